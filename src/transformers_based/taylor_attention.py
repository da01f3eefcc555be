# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Second-order Taylor linear attention: the maths in plain PyTorch, and the front that takes fused or plain.

Layout
    query, key [B, T, H, D]   value [B, T, H, V]   mask [B, T] (0: the token does not exist)
    state [B, H, V + 1, F]    fp32; row v < V is the sum of v_j phi(k_j), row V (the normaliser) is the sum of phi(k_j)

Maths (arXiv 2402.18668, section 4.1; `TaylorExp` and `LinearAttention` in the original code), for j <= i
    weight_ij = 1 + s + s^2 / 2,   s = scale * q_i . k_j        never below 1/2
    output_i  = sum_j weight_ij v_j / sum_j weight_ij           0 where no token is visible
    weight_ij = psi(q_i) . phi(k_j) = (1 + s)^2 / 2 + 1/2,      with x~ = [x sqrt(scale), 1] and one feature
    x~_a x~_b for each pair a <= b: (D + 1)(D + 2) / 2 of them (153 for D = 16), padded with zeros to a multiple of 8.
"""

from itertools import pairwise

import torch
from torch.utils.checkpoint import checkpoint

from .backend import based_kernels, can_fuse, choose_backend


# Tokens handled at once by the chunked form: weights pair by pair within a chunk, through the state between chunks. 128
# balances the two for the released models (examples/benchmark_cpu.py).
CHUNK_SIZE = 128
# How many tokens the lazy step may keep beside the state.
PENDING_SIZES = (16, 32, 64)


def num_features(feature_dim: int) -> int:
    """Features held for each key of `feature_dim` entries: the pairs a <= b of `feature_dim + 1`, padded to 8."""
    pairs = (feature_dim + 1) * (feature_dim + 2) // 2
    return -(-pairs // 8) * 8


def state_shape(batch: int, heads: int, feature_dim: int, head_dim: int) -> tuple[int, int, int, int]:
    """Shape of the recurrent state, normaliser included."""
    return batch, heads, head_dim + 1, num_features(feature_dim)


def _features(x: torch.Tensor, scale: float, is_query: bool) -> torch.Tensor:
    """[B, H, C, D] -> [B, H, F, C]. Tokens stay last so that picking a factor copies whole rows."""
    feature_dim = x.shape[-1]
    x = x.transpose(-1, -2) * scale**0.5
    # Entry D is the constant; entry D + 1 is 0 and fills the padding.
    extended = torch.cat([x, torch.ones_like(x[:, :, :1]), torch.zeros_like(x[:, :, :1])], dim=2)
    first, second = torch.triu_indices(feature_dim + 1, feature_dim + 1, device=x.device)
    padding = first.new_full((num_features(feature_dim) - first.numel(),), feature_dim + 1)
    first, second = torch.cat([first, padding]), torch.cat([second, padding])
    left = extended.index_select(2, first)
    if is_query:
        # A pair a < b stands for its twin too; the constant pair also carries the 1/2 that completes the square.
        coefficient = torch.where((first == second) & (first < feature_dim), 0.5, 1.0).to(x.dtype)
        left = left * coefficient[:, None]
    return left * extended.index_select(2, second)


def _normalise(extended: torch.Tensor) -> torch.Tensor:
    """[..., V + 1] -> [..., V]. Every visible key weighs at least 1/2, so the bound only acts on rows that see none."""
    return extended[..., :-1] / extended[..., -1:].clamp_min(0.5)


def _advance(state: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The state after the keys [B, H, C, D] with their extended values [B, H, C, V + 1]."""
    update = value.transpose(-1, -2) @ _features(key, scale, is_query=False).transpose(-1, -2)
    return update if state is None else state + update


def _chunk(query, key, value, state, scale: float, needs_state: bool):
    """One chunk, [B, H, C, *] with extended values: exact weights inside it, everything before it through the state."""
    scores = (query @ key.transpose(-1, -2)) * scale
    weights = (1 + scores * (1 + 0.5 * scores)).tril()
    extended = weights @ value
    if state is not None:
        extended = extended + _features(query, scale, is_query=True).transpose(-1, -2) @ state.transpose(-1, -2)
    return _normalise(extended), _advance(state, key, value, scale) if needs_state else None


def _extend(value: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Appends the column of ones that sums into the normaliser; a token that does not exist has 0 in both."""
    if mask is None:
        ones = torch.ones_like(value[..., :1], dtype=dtype)
    else:
        ones = mask[:, :, None, None].to(dtype).expand(-1, -1, value.shape[2], 1)
    return torch.cat([value.to(dtype), ones], dim=-1)


def _hide(mask: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zeros where the mask is 0, whatever stood there (NaN included)."""
    if mask is None:
        return tensors
    hidden = ~mask[:, :, None, None].bool()
    return tuple(tensor.masked_fill(hidden, 0) for tensor in tensors)


def torch_taylor_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`taylor_attention` in plain PyTorch, chunk by chunk: memory O(T * CHUNK_SIZE), backward by recomputation."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None:
        return _packed(query, key, value, scale, mask, cu_seqlens, initial_state, output_final_state)

    query, key, value = _hide(mask, query, key, value)
    dtype = torch.promote_types(query.dtype, torch.float32)
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (query, key, value, initial_state)
    )
    state = None if initial_state is None else initial_state.to(dtype)
    length, outputs = query.shape[1], []
    with torch.autocast(device_type=query.device.type, enabled=False):
        for start in range(0, length, CHUNK_SIZE):
            end = min(start + CHUNK_SIZE, length)
            chunk_mask = None if mask is None else mask[:, start:end]
            arguments = (
                query[:, start:end].to(dtype).transpose(1, 2),
                key[:, start:end].to(dtype).transpose(1, 2),
                _extend(value[:, start:end], chunk_mask, dtype).transpose(1, 2),
                state,
                scale,
                output_final_state or end < length,
            )
            if needs_grad and length > CHUNK_SIZE:
                output, state = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                output, state = _chunk(*arguments)
            outputs.append(output.transpose(1, 2).to(value.dtype))
    (output,) = _hide(mask, torch.cat(outputs, dim=1))
    return output, state if output_final_state else None


# Every batch has documents of other lengths, each of which would be compiled anew.
@torch.compiler.disable
def _packed(query, key, value, scale, mask, cu_seqlens, initial_state, output_final_state):
    """Documents one after the other: equal, to the bit, to separate calls."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != query.shape[1] or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(
            f"`cu_seqlens` must rise from 0 to the number of tokens ({query.shape[1]}), each document with at least "
            f"one token; got {bounds}."
        )
    outputs, states = [], []
    for i, (start, end) in enumerate(pairwise(bounds)):
        output, state = torch_taylor_attention(
            query[:, start:end],
            key[:, start:end],
            value[:, start:end],
            scale=scale,
            mask=None if mask is None else mask[:, start:end],
            initial_state=None if initial_state is None else initial_state[i : i + 1],
            output_final_state=output_final_state,
        )
        outputs.append(output)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states) if output_final_state else None


def torch_taylor_attention_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`taylor_attention_step` in plain PyTorch: a rank-one update of the state and one read of it."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = _hide(mask, query, key, value)
    with torch.autocast(device_type=query.device.type, enabled=False):
        key_features = _features(key.to(state.dtype).transpose(1, 2), scale, is_query=False)  # [B, H, F, 1]
        extended_value = _extend(value, mask, state.dtype).permute(0, 2, 3, 1)  # [B, H, V + 1, 1]
        state.addcmul_(extended_value, key_features.transpose(-1, -2))
        query_features = _features(query.to(state.dtype).transpose(1, 2), scale, is_query=True)
        output = _normalise((state @ query_features).transpose(-1, -2))  # [B, H, 1, V]
    (output,) = _hide(mask, output.transpose(1, 2).to(value.dtype))
    return output


@torch.no_grad()
def torch_taylor_attention_lazy_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    pending_keys: torch.Tensor,
    pending_values: torch.Tensor,
    num_pending: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`taylor_attention_lazy_step` in plain PyTorch: exact weights for the pending tokens, the state for the others."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    size, dtype = pending_keys.shape[2], state.dtype
    query, key, value = (x.transpose(1, 2) for x in _hide(mask, query, key, value))  # [B, H, 1, *]
    slots = torch.arange(size, device=query.device)
    count = num_pending[..., None]  # [B, H, 1]
    is_new = slots == count
    if mask is not None:
        is_new = is_new & mask[:, :, None].bool()
    pending_keys.copy_(torch.where(is_new[..., None], key, pending_keys))
    pending_values.copy_(torch.where(is_new[..., None], value, pending_values))
    visible = ((slots < count) | is_new)[..., None]  # [B, H, N, 1]
    with torch.autocast(device_type=query.device.type, enabled=False):
        query = query.to(dtype)
        keys = pending_keys.masked_fill(~visible, 0).to(dtype)
        values = torch.cat([pending_values.masked_fill(~visible, 0).to(dtype), visible.to(dtype)], dim=-1)
        scores = (query @ keys.transpose(-1, -2)) * scale
        extended = (1 + scores * (1 + 0.5 * scores)) @ values  # [B, H, 1, V + 1]
        extended = extended + (state @ _features(query, scale, is_query=True)).transpose(-1, -2)
    num_pending.add_(is_new.any(-1))
    is_full = num_pending == size
    # A look at the numbers saves nearly all of the work; on a GPU it would wait, and no graph can be captured with it.
    if state.device.type != "cpu" or torch.compiler.is_compiling() or is_full.any():
        _fold(state, pending_keys, pending_values, is_full[..., None].expand(-1, -1, size), scale)
        num_pending.masked_fill_(is_full, 0)
    (output,) = _hide(mask, _normalise(extended).transpose(1, 2).to(value.dtype))
    return output


@torch.no_grad()
def fold_pending(
    state: torch.Tensor,
    pending_keys: torch.Tensor,
    pending_values: torch.Tensor,
    num_pending: torch.Tensor,
    *,
    scale: float | None = None,
) -> None:
    """
    Adds the pending tokens of `taylor_attention_lazy_step` to `state` and sets `num_pending` to 0, in place: `state` is
    then that of every token, as `taylor_attention` takes it. Never waits for a GPU.

    Args: as in `taylor_attention_lazy_step`, `scale` the one that was given to it.
    """
    scale = pending_keys.shape[-1] ** -0.5 if scale is None else scale
    slots = torch.arange(pending_keys.shape[2], device=state.device)
    _fold(state, pending_keys, pending_values, slots < num_pending[..., None], scale)
    num_pending.zero_()


def _fold(state, keys, values, exists, scale: float):
    """Adds the tokens `keys` [B, H, N, D], `values` [B, H, N, V] that exist [B, H, N] to the state, in place."""
    exists = exists[..., None]
    keys, values = (x.masked_fill(~exists, 0).to(state.dtype) for x in (keys, values))
    with torch.autocast(device_type=state.device.type, enabled=False):
        state.add_(_advance(None, keys, torch.cat([values, exists.to(state.dtype)], dim=-1), scale))


def taylor_state(
    state: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The state after `key` [B, T, H, D] and `value` [B, T, H, V], without any output: the state is a sum."""
    key, value = _hide(mask, key, value)
    dtype = torch.promote_types(key.dtype, torch.float32) if state is None else state.dtype
    for start in range(0, key.shape[1], CHUNK_SIZE):
        part = slice(start, start + CHUNK_SIZE)
        extended = _extend(value[:, part], None if mask is None else mask[:, part], dtype)
        state = _advance(state, key[:, part].to(dtype).transpose(1, 2), extended.transpose(1, 2), scale)
    return state


def taylor_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Causal linear attention with the weight `1 + s + s^2 / 2`, `s = scale * q . k`, for prefill and training.

    Args:
        query, key: `[B, T, H, D]`, fp32, fp16 or bf16 (fp64 in plain PyTorch); accumulation is fp32 (fp64 for fp64).
        value: `[B, T, H, V]`, same dtype.
        scale: positive; `D ** -0.5` by default.
        mask: `[B, T]`, bool or 0/1. A token with 0 does not exist: nobody sees it, and its output is 0.
        cu_seqlens: int32 `[N + 1]`, rising from 0 to T: the bounds of N packed documents that do not see each other.
            Then `B = 1`, and the states have N in place of B.
        initial_state: `[B, H, V + 1, F]` (see `state_shape`), the state left by the tokens before these.
        output_final_state: also return the state after the last token.

    Returns:
        The output `[B, T, H, V]` in value's dtype, and the final state in fp32 (fp64 for fp64 input) or `None`.

    Raises:
        ValueError: a shape, dtype or range does not fit; the message names the argument.
        RuntimeError: the backend asked for in `TRANSFORMERS_BASED_BACKEND` cannot run these tensors.

    Source: arXiv 2402.18668, section 4.1; `based/models/mixers/linear_attention.py` of the original code.
    """
    _check(query, key, value, scale, mask)
    if cu_seqlens is not None and (query.shape[0] != 1 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2):
        raise ValueError(
            f"`cu_seqlens` must be [documents + 1] with the documents in one row (B = 1); got shape "
            f"{tuple(cu_seqlens.shape)} with B = {query.shape[0]}."
        )
    if initial_state is not None:
        _check_state("initial_state", initial_state, query, value, cu_seqlens)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    op = torch_taylor_attention if _backend(query, value) == "torch" else based_kernels.taylor_attention
    return op(
        query,
        key,
        value,
        scale=scale,
        mask=mask,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        output_final_state=output_final_state,
    )


def taylor_attention_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    One token of `taylor_attention` (T = 1): updates `state` **in place** and returns the output `[B, 1, H, V]`.

    Args:
        query, key: `[B, 1, H, D]`. value: `[B, 1, H, V]`. scale: as in `taylor_attention`.
        state: fp32 `[B, H, V + 1, F]`, the state left by the tokens before this one; zeros at the start.
        mask: `[B, 1]`; a row with 0 neither changes its state nor reads it, and its output is 0.

    Raises:
        ValueError: a shape, dtype or range does not fit; the message names the argument.
    """
    _check(query, key, value, scale, mask)
    if query.shape[1] != 1:
        raise ValueError(f"`taylor_attention_step` takes one token; `query` has {query.shape[1]}.")
    _check_state("state", state, query, value, None)
    _check_not_expanded("state", state)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    op = torch_taylor_attention_step if _backend(query, value) == "torch" else based_kernels.taylor_attention_step
    return op(query, key, value, state, scale=scale, mask=mask)


def taylor_attention_lazy_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    pending_keys: torch.Tensor,
    pending_values: torch.Tensor,
    num_pending: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `taylor_attention_step` for which the last tokens wait beside the state: the same function of the same tokens, the
    state read once a step and written once in N steps. Returns the output `[B, 1, H, V]`; no gradients.

    The token is stored in slot `num_pending`, the output sees it and all before it, and `num_pending` grows by 1. At N,
    the N tokens are added to `state` and it returns to 0. All of this **in place**, row by row and head by head.

    Args:
        query, key: `[B, 1, H, D]`. value: `[B, 1, H, V]`. As in `taylor_attention`.
        state: fp32 `[B, H, V + 1, F]`, all tokens before this one but the pending ones; zeros at the start.
        pending_keys: `[B, H, N, D]` in key's dtype, N 16, 32 or 64. Whatever is in the slots from `num_pending` on is
            ignored.
        pending_values: `[B, H, N, V]`, likewise.
        num_pending: int32 `[B, H]`, from 0 to N - 1; zeros at the start.
        scale: as in `taylor_attention`, the same one as long as tokens are pending.
        mask: `[B, 1]`; of a row with 0 nothing changes, and its output is 0.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument. The counts are not looked at.
    """
    _check(query, key, value, scale, mask)
    if query.shape[1] != 1:
        raise ValueError(f"`taylor_attention_lazy_step` takes one token; `query` has {query.shape[1]}.")
    _check_state("state", state, query, value, None)
    _check_pending(state, pending_keys, pending_values, num_pending, query, value)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    is_plain = _backend(query, value) == "torch"
    op = torch_taylor_attention_lazy_step if is_plain else based_kernels.taylor_attention_lazy_step
    return op(query, key, value, state, pending_keys, pending_values, num_pending, scale=scale, mask=mask)


def _check_pending(state, pending_keys, pending_values, num_pending, query, value):
    batch, _, heads, feature_dim = query.shape
    size = pending_keys.shape[2] if pending_keys.ndim == 4 else None
    if size not in PENDING_SIZES:
        raise ValueError(f"`pending_keys` must be [B, H, N, D], N 16, 32 or 64; got {tuple(pending_keys.shape)}.")
    for name, tensor, last, dtype in (
        ("pending_keys", pending_keys, (size, feature_dim), query.dtype),
        ("pending_values", pending_values, (size, value.shape[3]), query.dtype),
        ("num_pending", num_pending, (), torch.int32),
    ):
        if tuple(tensor.shape) != (batch, heads, *last):
            raise ValueError(f"`{name}` must be {(batch, heads, *last)}; got {tuple(tensor.shape)}.")
        if tensor.dtype != dtype:
            raise ValueError(f"`{name}` must be {dtype}; got {tensor.dtype}.")
    for name, tensor in (("state", state), ("pending_keys", pending_keys), ("pending_values", pending_values)):
        _check_not_expanded(name, tensor)


def _check_not_expanded(name, tensor):
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride())):
        raise ValueError(f"`{name}` is changed in place and must not be expanded; got strides {tensor.stride()}.")


def is_lazy_step_faster(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether these `[B, 1, H, D]` are to go through `taylor_attention_lazy_step`, not `taylor_attention_step`."""
    return not torch.compiler.is_compiling() and can_fuse(query) and _backend(query, value) == "triton"


def _check(query, key, value, scale, mask):
    if query.ndim != 4 or query.shape[1] == 0:
        raise ValueError(f"`query` must be [B, T, H, D] with T >= 1; got {tuple(query.shape)}.")
    if key.shape != query.shape:
        raise ValueError(f"`key` must have the shape of `query`, {tuple(query.shape)}; got {tuple(key.shape)}.")
    if value.ndim != 4 or value.shape[:3] != query.shape[:3]:
        raise ValueError(f"`value` must be [B, T, H, V] with [B, T, H] of `query`; got {tuple(value.shape)}.")
    if not query.dtype == key.dtype == value.dtype or not query.dtype.is_floating_point:
        raise ValueError(
            f"`query`, `key` and `value` must share a floating dtype; got {query.dtype}, {key.dtype}, {value.dtype}."
        )
    if scale is not None and not scale > 0:
        raise ValueError(f"`scale` must be positive; got {scale}.")
    if mask is not None and mask.shape != query.shape[:2]:
        raise ValueError(f"`mask` must be [B, T] = {tuple(query.shape[:2])}; got {tuple(mask.shape)}.")


def _check_state(name, state, query, value, cu_seqlens):
    batch = query.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    expected = state_shape(batch, query.shape[2], query.shape[3], value.shape[3])
    if tuple(state.shape) != expected:
        raise ValueError(f"`{name}` must be [B, H, V + 1, F] = {expected}; got {tuple(state.shape)}.")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"`{name}` must be fp32, since it sums over every token seen; got {state.dtype}.")


def _backend(query: torch.Tensor, value: torch.Tensor) -> str:
    return _choose_backend(query.device.type, str(query.dtype), query.shape[-1], value.shape[-1])


@torch.compiler.assume_constant_result
def _choose_backend(device: str, dtype: str, feature_dim: int, head_dim: int) -> str:
    obstacle = None
    if feature_dim > 32 or feature_dim % 8 or head_dim > 256 or head_dim % 8:
        obstacle = (
            f"the kernels take a feature_dim of 8 to 32 and a head_dim of 8 to 256 in steps of 8, not {feature_dim} "
            f"and {head_dim}"
        )
    return choose_backend("Taylor attention", device, dtype, obstacle)
