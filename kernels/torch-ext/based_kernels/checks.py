# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What fits and what does not, said by name; and the facts about sizes that the ops share. No check reads the GPU."""

import contextlib
import itertools
import os

import torch


MAX_FEATURE_DIM = 32
MAX_HEAD_DIM = 256
MAX_WINDOW = 4096
MAX_SLIDING_HEAD_DIM = 128
MAX_NORM_DIM = 16384
MAX_PARTS = 16
CONV_KERNELS = range(2, 9)
PENDING_SIZES = (16, 32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def feature_count(D):
    """-> number of packed features, and the same rounded up to a multiple of 8."""
    features = (D + 1) * (D + 2) // 2
    return features, -(-features // 8) * 8


def interpreted():
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_NOTHING = contextlib.nullcontext()


def device_guard(x):
    """Triton launches on the current device; under torch.compile the graph takes care of that."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)


def vector_rows(x):
    """x, or a copy of it whose rows the kernels can read 16 bytes at a time."""
    strides = x.stride()
    fits = strides[-1] == 1
    if not torch.compiler.is_compiling():
        # a speed matter only: Triton looks at the address itself; torch.compile cannot trace the question
        fits = fits and (x.storage_offset() * x.element_size()) % 16 == 0
    for size, stride in zip(x.shape[:-1], strides):
        # a row step of 2^24 elements would overflow the 32-bit offsets inside a chunk
        fits = fits and (size == 1 or (stride % 8 == 0 and (stride < 2**24 or stride != strides[1])))
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def wide_mask(mask):
    """A mask that no kernel loads as bytes. Triton lays out the operands of a product for the narrowest type that is
    loaded on the way to them, and bytes among 16-bit operands cost up to twice the instructions."""
    return mask.to(torch.int16) if mask is not None and mask.element_size() == 1 else mask


def rows_of(x):
    """x as [N, C] with a contiguous last dimension: a view where there is one, a copy elsewhere."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def common_unit(*numbers):
    """8 if it divides all these sizes and strides, else 1: strides counted in eights allow 16-byte accesses without a
    compilation per layout."""
    return 8 if all(number % 8 == 0 for number in numbers) else 1


def refuse_second_order(op):
    """Backward passes are kernels, which autograd does not see: it would leave them out of a gradient of gradients."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op}: got create_graph=True, but it is differentiable once; plain PyTorch fits")


def check_sequence_inputs(query, key, value, scale, mask, cu_seqlens, initial_state):
    """Raises on what `taylor_attention` cannot take; -> scale."""
    B, T, H, D, V = _check_qkv(query, key, value)
    if T < 1:
        raise ValueError("query: got a sequence of length 0, at least 1 token fits")
    if mask is not None:
        _check_mask(mask, query, (B, T))
    documents = B
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype != torch.int32:
            got = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
            raise TypeError(f"cu_seqlens: got {got}, an int32 tensor [N + 1] fits")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, [N + 1] with N >= 1 fits")
        if B != 1:
            raise ValueError(f"cu_seqlens: got a batch of {B} with it, packed documents need a batch of 1")
        _check_device("cu_seqlens", cu_seqlens, query)
        if cu_seqlens.device.type == "cpu":
            # on a GPU this would wait for it; the caller's promise is taken there
            ends = cu_seqlens.tolist()
            if ends[0] != 0 or ends[-1] != T or any(a > b for a, b in itertools.pairwise(ends)):
                raise ValueError(f"cu_seqlens: got {ends}, numbers that rise from 0 to T = {T} fit")
        documents = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        _check_state("initial_state", initial_state, query, (documents, H, V + 1, feature_count(D)[1]))
    return _check_scale(scale, D)


def check_step_inputs(query, key, value, state, scale, mask):
    """Raises on what `taylor_attention_step` cannot take; -> scale."""
    B, T, H, D, V = _check_qkv(query, key, value)
    if T != 1:
        raise ValueError(f"query: got {T} tokens, a step takes exactly 1")
    if mask is not None:
        _check_mask(mask, query, (B, 1))
    _, padded = feature_count(D)
    _check_state("state", state, query, (B, H, V + 1, padded))
    _check_rows_in_place("state", state)
    return _check_scale(scale, D)


def check_conv_step_inputs(projected, weight, state, mask):
    """Raises on what `gated_short_conv_step` cannot take."""
    _refuse_gradients(projected=projected, weight=weight, state=state)
    B, T, C = _check_conv_weight(projected, weight, 1)
    if T != 1:
        raise ValueError(f"projected: got {T} tokens, a step takes exactly 1")
    _check_in_place("state", state, projected, "projected", (B, weight.shape[1] - 1, C))
    if state.stride(2) != 1:
        raise ValueError(
            f"state: got strides {state.stride()}, a contiguous last dimension fits: it is updated in place"
        )
    if mask is not None:
        _check_mask(mask, projected, (B, 1), "projected")


def check_conv_inputs(projected, weight, state, mask, places, document_ids):
    """Raises on what `gated_short_conv` cannot take."""
    B, T, C = _check_conv_weight(projected, weight, "time")
    past = weight.shape[1] - 1
    if state is not None:
        _check_floats("state", state, (projected.dtype,))
        if tuple(state.shape) != (B, past, C):
            raise ValueError(f"state: got shape {tuple(state.shape)}, {[B, past, C]} fits")
        _check_device("state", state, projected, "projected")
    if mask is not None:
        _check_mask(mask, projected, (B, T), "projected")
    for name, x, dtypes, shape in (
        ("places", places, (torch.int32,), (B, past + T)),
        ("document_ids", document_ids, (torch.int32, torch.int64), (B, T)),
    ):
        if x is not None:
            _check_floats(name, x, dtypes)
            if tuple(x.shape) != shape:
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, {list(shape)} fits")
            _check_device(name, x, projected, "projected")


def _check_conv_weight(projected, weight, length):
    """-> B, T, C."""
    _check_floats("projected", projected)
    _check_runs_here("projected", projected)
    if projected.dim() != 3 or projected.shape[2] % 2 or 0 in projected.shape:
        raise ValueError(f"projected: got shape {tuple(projected.shape)}, [batch, {length}, 2 * channels] fits")
    B, T, C = projected.shape[0], projected.shape[1], projected.shape[2] // 2
    _check_floats("weight", weight)
    if weight.dim() != 2 or weight.shape[0] != C or not CONV_KERNELS[0] <= weight.shape[1] <= CONV_KERNELS[-1]:
        sizes = f"K from {CONV_KERNELS[0]} to {CONV_KERNELS[-1]}"
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, [{C}, K] with {sizes} fits")
    _check_device("weight", weight, projected, "projected")
    return B, T, C


def check_sliding_step_inputs(query, key, value, cos, sin, keys, values, count, scale, mask):
    """Raises on what `sliding_attention_step` cannot take; -> scale."""
    _refuse_gradients(query=query, key=key, value=value, keys=keys, values=values)
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_floats(name, x)
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, [batch, 1, heads, head_dim] fits")
    _check_runs_here("query", query)
    B, T, H, DH = query.shape
    if T != 1:
        raise ValueError(f"query: got {T} tokens, a step takes exactly 1")
    if DH % 8 or DH > MAX_HEAD_DIM:
        raise ValueError(f"query: got head_dim {DH}, a multiple of 8 up to {MAX_HEAD_DIM} fits")
    HKV = key.shape[2]
    if key.shape != (B, 1, HKV, DH) or H % HKV:
        raise ValueError(f"key: got shape {tuple(key.shape)}, [{B}, 1, a divisor of {H}, {DH}] fits")
    if value.shape != key.shape:
        raise ValueError(f"value: got shape {tuple(value.shape)}, the shape of key fits: {tuple(key.shape)}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: got {x.dtype}, the dtype of query fits: {query.dtype}")
        _check_device(name, x, query)
    for name, x in (("cos", cos), ("sin", sin)):
        _check_floats(name, x, (torch.float32,))
        if x.dim() != 3 or x.shape[0] not in (1, B) or x.shape[1:] != (1, DH):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, [{B} or 1, 1, {DH}] fits")
        _check_device(name, x, query)
    if not isinstance(keys, torch.Tensor) or keys.dim() != 4 or not 0 < keys.shape[2] <= MAX_WINDOW:
        got = getattr(keys, "shape", type(keys).__name__)
        raise ValueError(f"keys: got {got}, a ring [{B}, {HKV}, W, {DH}] with W from 1 to {MAX_WINDOW} fits")
    for name, x in (("keys", keys), ("values", values)):
        _check_in_place(name, x, key, "key", (B, HKV, keys.shape[2], DH))
        if x.stride(3) != 1 or x.stride(2) != DH or x.stride(0) % 8 or x.stride(1) % 8:
            raise ValueError(
                f"{name}: got strides {x.stride()}, a contiguous last two dimensions and multiples of 8 before them"
                " fit: it changes in place"
            )
    if not isinstance(count, torch.Tensor) or count.dtype != torch.int64:
        got = getattr(count, "dtype", type(count).__name__)
        raise TypeError(f"count: got {got}, an int64 tensor [{B}, {HKV}] fits")
    _check_in_place("count", count, query, "query", (B, HKV), torch.int64)
    if mask is not None:
        _check_mask(mask, query, (B, 1))
    return _check_scale(scale, DH)


def check_sliding_inputs(query, key, value, cos, sin, window, scale, mask, document_ids, past_keys, past_values):
    """Raises on what `sliding_attention` cannot take; -> scale."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_floats(name, x)
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, [batch, time, heads, head_dim] fits")
        _check_device(name, x, query)
    _check_runs_here("query", query)
    B, T, H, D = query.shape
    if D % 8 or D > MAX_SLIDING_HEAD_DIM:
        raise ValueError(f"query: got head_dim {D}, a multiple of 8 up to {MAX_SLIDING_HEAD_DIM} fits")
    HKV = key.shape[2]
    if key.shape != (B, T, HKV, D) or H % HKV:
        raise ValueError(f"key: got shape {tuple(key.shape)}, [{B}, {T}, a divisor of {H}, {D}] fits")
    if value.shape != key.shape:
        raise ValueError(f"value: got shape {tuple(value.shape)}, the shape of key fits: {tuple(key.shape)}")
    for name, x in (("cos", cos), ("sin", sin)):
        _check_floats(name, x, (torch.float32,))
        if x.dim() != 3 or x.shape[0] not in (1, B) or x.shape[1:] != (T, D):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, [{B} or 1, {T}, {D}] fits")
        _check_device(name, x, query)
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window: got {type(window).__name__}, a Python int fits")
    if window < 1:
        raise ValueError(f"window: got {window}, 1 or more fits: the token itself counts")
    if (past_keys is None) != (past_values is None):
        raise ValueError("past_keys: got one of past_keys and past_values, both or neither fit")
    P = 0
    if past_keys is not None:
        for name, x in (("past_keys", past_keys), ("past_values", past_values)):
            _check_floats(name, x, (value.dtype,))
            if x.dim() != 4 or 0 in x.shape or (*x.shape[:2], x.shape[3]) != (B, HKV, D):
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, [{B}, {HKV}, P, {D}] fits")
            _check_device(name, x, query)
        P = past_keys.shape[2]
        if past_values.shape != past_keys.shape:
            got, fits = tuple(past_values.shape), tuple(past_keys.shape)
            raise ValueError(f"past_values: got shape {got}, the shape of past_keys fits: {fits}")
    if mask is not None:
        _check_mask(mask, query, (B, P + T))
    if document_ids is not None:
        if not isinstance(document_ids, torch.Tensor) or document_ids.dtype not in (torch.int32, torch.int64):
            got = getattr(document_ids, "dtype", type(document_ids).__name__)
            raise TypeError(f"document_ids: got {got}, an int32 or int64 tensor [{B}, {T}] fits")
        if tuple(document_ids.shape) != (B, T):
            raise ValueError(f"document_ids: got shape {tuple(document_ids.shape)}, [{B}, {T}] fits")
        _check_device("document_ids", document_ids, query)
        if past_keys is not None:
            raise ValueError("document_ids: got them with past_keys, which have none: one document a row fits there")
    return _check_scale(scale, D)


def check_rms_norm_inputs(hidden_states, weight, eps, residual, in_place=False):
    """Raises on what `rms_norm` cannot take."""
    _check_floats("hidden_states", hidden_states)
    _check_runs_here("hidden_states", hidden_states)
    if hidden_states.dim() < 1 or 0 in hidden_states.shape or hidden_states.shape[-1] > MAX_NORM_DIM:
        got = tuple(hidden_states.shape)
        raise ValueError(f"hidden_states: got shape {got}, [.., C] with C up to {MAX_NORM_DIM} fits")
    _check_floats("weight", weight)
    if weight.shape != hidden_states.shape[-1:]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, [{hidden_states.shape[-1]}] fits")
    _check_device("weight", weight, hidden_states, "hidden_states")
    if isinstance(eps, torch.Tensor) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {type(eps).__name__}, a Python number fits")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps}, a number >= 0 fits")
    if residual is not None:
        _check_floats("residual", residual)
        if residual.shape != hidden_states.shape:
            got = tuple(residual.shape)
            raise ValueError(
                f"residual: got shape {got}, the shape of hidden_states fits: {tuple(hidden_states.shape)}"
            )
        _check_device("residual", residual, hidden_states, "hidden_states")
    if in_place:
        _check_holds_sum(residual, hidden_states.dtype)


def check_rms_norm_of_parts_inputs(parts, weight, eps, residual, bias, in_place):
    """Raises on what `rms_norm_of_parts` cannot take."""
    _check_floats("parts", parts)
    if parts.dtype != torch.float32 or parts.dim() < 2 or not 1 <= parts.shape[0] <= MAX_PARTS:
        got = f"{parts.dtype} of shape {tuple(parts.shape)}"
        raise ValueError(f"parts: got {got}, torch.float32 of shape [P, .., C] with P up to {MAX_PARTS} fits")
    if residual is None:
        raise TypeError("residual: got None, a tensor fits: without one, add the parts up and use rms_norm")
    check_rms_norm_inputs(parts[0], weight, eps, residual)
    _refuse_gradients(parts=parts, weight=weight, residual=residual, bias=bias)
    if bias is not None:
        _check_floats("bias", bias)
        if bias.shape != weight.shape:
            raise ValueError(f"bias: got shape {tuple(bias.shape)}, the shape of weight fits: {tuple(weight.shape)}")
        _check_device("bias", bias, weight, "weight")
    if in_place:
        _check_holds_sum(residual, weight.dtype)


def _check_holds_sum(residual, added_dtype):
    if torch.is_grad_enabled():
        raise ValueError("in_place: got True where gradients are enabled, use it under torch.no_grad()")
    if residual is None:
        raise ValueError("in_place: got True without residual, there is no sum to write")
    dtype = torch.promote_types(residual.dtype, added_dtype)
    if residual.dtype != dtype or not residual.is_contiguous():
        got = f"{residual.dtype}, {'' if residual.is_contiguous() else 'not '}contiguous"
        raise ValueError(f"residual: got {got}, {dtype} and contiguous fits, so that it holds the sum in_place")


def check_swiglu_inputs(gate, up):
    """Raises on what `swiglu` cannot take."""
    _check_floats("gate", gate)
    _check_runs_here("gate", gate)
    if gate.dim() < 1 or 0 in gate.shape:
        raise ValueError(f"gate: got shape {tuple(gate.shape)}, [.., C] with at least one row and one value fits")
    _check_floats("up", up, (gate.dtype,))
    if up.shape != gate.shape:
        raise ValueError(f"up: got shape {tuple(up.shape)}, the shape of gate fits: {tuple(gate.shape)}")
    _check_device("up", up, gate, "gate")


def _refuse_gradients(**tensors):
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if isinstance(x, torch.Tensor) and x.requires_grad:
                raise ValueError(f"{name}: got a tensor that requires gradients, torch.no_grad() fits: forward only")


def _check_floats(name, x, dtypes=DTYPES):
    names = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, a tensor fits: {names}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: got {x.dtype}, {names} fits")


def _check_runs_here(name, x):
    if x.device.type == "cpu" and not interpreted():
        raise ValueError(f"{name}: got a tensor on the CPU, a CUDA tensor fits (or set TRITON_INTERPRET=1 for tests)")


def _check_in_place(name, x, like, like_name, shape, dtype=None):
    """x is written: it cannot be copied into another layout, and no two rows may share memory."""
    _check_floats(name, x, (dtype or like.dtype,))
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, {list(shape)} fits")
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride())):
        raise ValueError(
            f"{name}: got strides {x.stride()}, a row of its own for each sequence fits: it is updated in place"
        )
    _check_device(name, x, like, like_name)


def check_lazy_step_inputs(query, key, value, state, pending_keys, pending_values, num_pending, scale, mask):
    """Raises on what `taylor_attention_lazy_step` cannot take; -> scale."""
    scale = check_step_inputs(query, key, value, state, scale, mask)
    B, _, H, D = query.shape
    if not isinstance(pending_keys, torch.Tensor):
        raise TypeError(f"pending_keys: got {type(pending_keys).__name__}, a tensor fits")
    N = pending_keys.shape[2] if pending_keys.dim() == 4 else None
    if N not in PENDING_SIZES:
        raise ValueError(
            f"pending_keys: got shape {tuple(pending_keys.shape)}, [{B}, {H}, N, {D}] with N 16, 32 or 64 fits"
        )
    for name, x, dim, dtype in (
        ("pending_keys", pending_keys, (N, D), key.dtype),
        ("pending_values", pending_values, (N, value.shape[3]), key.dtype),
        ("num_pending", num_pending, (), torch.int32),
    ):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, a tensor fits")
        if x.dtype != dtype:
            raise TypeError(f"{name}: got {x.dtype}, {dtype} fits")
        if tuple(x.shape) != (B, H, *dim):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, {[B, H, *dim]} fits")
        _check_device(name, x, query)
    for name, x in (("pending_keys", pending_keys), ("pending_values", pending_values)):
        _check_rows_in_place(name, x)
    if not num_pending.is_contiguous():
        raise ValueError(
            f"num_pending: got strides {num_pending.stride()}, a contiguous tensor fits: it is updated in place"
        )
    return scale


def _check_qkv(query, key, value):
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, a tensor fits")
        if x.dim() != 4:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, [batch, time, heads, dim] fits")
    if query.dtype not in DTYPES:
        raise TypeError(f"query: got {query.dtype}, float32, float16 or bfloat16 fits")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: got {x.dtype}, the dtype of query fits: {query.dtype}")
        _check_device(name, x, query)
    _check_runs_here("query", query)
    B, T, H, D = query.shape
    if key.shape != query.shape:
        raise ValueError(f"key: got shape {tuple(key.shape)}, the shape of query fits: {tuple(query.shape)}")
    if value.shape[:3] != query.shape[:3]:
        raise ValueError(f"value: got shape {tuple(value.shape)}, [{B}, {T}, {H}, head_dim] fits")
    V = value.shape[3]
    if D < 8 or D % 8 or D > MAX_FEATURE_DIM:
        raise ValueError(f"query: got feature_dim {D}, a multiple of 8 from 8 to {MAX_FEATURE_DIM} fits")
    if V < 8 or V % 8 or V > MAX_HEAD_DIM:
        raise ValueError(f"value: got head_dim {V}, a multiple of 8 from 8 to {MAX_HEAD_DIM} fits")
    if B < 1 or H < 1:
        raise ValueError(f"query: got shape {tuple(query.shape)}, at least one row and one head fit")
    return B, T, H, D, V


def _check_device(name, x, like, like_name="query"):
    if x.device != like.device:
        raise ValueError(f"{name}: got device {x.device}, the device of {like_name} fits: {like.device}")


def _check_mask(mask, like, shape, like_name="query"):
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: got {type(mask).__name__}, a tensor of bool or 0/1 fits")
    if tuple(mask.shape) != shape:
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, {list(shape)} fits")
    _check_device("mask", mask, like, like_name)


def _check_state(name, state, query, shape):
    if not isinstance(state, torch.Tensor):
        raise TypeError(f"{name}: got {type(state).__name__}, a float32 tensor fits")
    if state.dtype != torch.float32:
        raise TypeError(f"{name}: got {state.dtype}, float32 fits: a sum that never decays stops growing in less")
    if tuple(state.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(state.shape)}, {list(shape)} fits")
    _check_device(name, state, query)


def _check_rows_in_place(name, x):
    outer = zip(x.shape[:2], x.stride()[:2])
    if x.stride()[2:] != (x.shape[3], 1) or any(size > 1 and (step == 0 or step % 8) for size, step in outer):
        raise ValueError(
            f"{name}: got strides {x.stride()}, contiguous last two dimensions and multiples of 8 before them fit: "
            "it is updated in place"
        )


def _check_scale(scale, D):
    if scale is None:
        return D**-0.5
    if isinstance(scale, torch.Tensor) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {type(scale).__name__}, a Python number fits")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: got {scale}, a number > 0 fits")
    return float(scale)
