# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What the model does beside the Taylor attention, each op in plain PyTorch and, where it is faster, fused.

    project                  [x W_1, x W_2, ...]
    project_out              x W + bias, which `rms_norm` may have to add up
    rms_norm                 x = hidden_states + residual;  weight * x / sqrt(mean(x^2) + eps)
    swiglu                   silu(gate) * up
    gated_short_conv         silu(conv(u)) * g                                                   of [B, T, C]
    gated_short_conv_step    state := [state, u][1:];  silu(sum_k weight_k state_k) * g          of [B, 1, C]
    sliding_attention        softmax attention of [B, T, H, D] to the last W tokens, with rotary
    sliding_attention_step   the same of one token, to the ring of its window

The fused steps have no backward: they run where no gradient is asked for.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.models.llama.modeling_llama import rotate_half

from .backend import backend_wanted, based_kernels, can_fuse, choose_backend


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _is_fused(op: str, x: torch.Tensor) -> bool:
    return can_fuse(x) and _choose_backend(op, x.device.type, str(x.dtype)) == "triton"


def _is_step_fused(op: str, x: torch.Tensor) -> bool:
    return not torch.is_grad_enabled() and _is_fused(op, x)


def _are_plain(*tensors: torch.Tensor) -> bool:
    """Not sharded over devices, nor of another type of somebody's making."""
    return all(type(x) in (torch.Tensor, nn.Parameter) for x in tensors)


def is_transformed() -> bool:
    """Whether `torch.func` is at work, which follows no `autograd.Function` and not every change in place."""
    return torch._C._are_functorch_transforms_active()


def _compiles_training() -> bool:
    # `is_exporting` would say yes to every compilation by Dynamo of torch 2.11.
    return torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()


def _always_anew(*arguments, **options) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


# Older compilers (2.11 does) overlook what runs inside of an `autograd.Function`, unless each op is asked for. That
# makes them warn of changes in place, of which there are none but of what a kernel has just made.
_OF_KERNELS_TOO = (
    {}
    if torch.__version__ >= (2, 13)
    else {"context_fn": functools.partial(create_selective_checkpoint_contexts, _always_anew)}
)


def _made_anew(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """
    `function(*inputs)`, cheap to make, for a product with weights. Where training is compiled, the backward of that
    product makes it anew from `inputs`, which others keep in any case. Without a compiler the product keeps what it is
    given.
    """
    if _compiles_training():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **_OF_KERNELS_TOO)
    return function(*inputs)


@torch.compiler.assume_constant_result
def _choose_backend(op: str, device: str, dtype: str, obstacle: str | None = None) -> str:
    return choose_backend(op, device, dtype, obstacle)


def project(x: torch.Tensor, *projections: nn.Module) -> tuple[torch.Tensor, ...]:
    """
    What each of several `nn.Linear` makes of `x`; in one product if `lay_side_by_side` has put their weights so. On a
    GPU the gradient of `x` is summed up inside of the products that make it.
    """
    weights = None if torch.compiler.is_compiling() else _plain_weights(projections)
    if weights is not None and _are_plain(x) and not torch.is_grad_enabled():
        return _products(x, weights)
    if weights is not None and _are_plain(x) and _sums_gradients(x):
        return _Projections.apply(x, *weights)
    return tuple(projection(x) for projection in projections)


def _sums_gradients(x: torch.Tensor) -> bool:
    return can_fuse(x) and backend_wanted() != "torch" and not torch.is_autocast_enabled(x.device.type)


def _plain_weights(projections: tuple[nn.Module, ...]) -> tuple[nn.Parameter, ...] | None:
    """The weights, if all that the projections do is to multiply by them."""
    if any(not _is_plain_linear(projection) or projection.bias is not None for projection in projections):
        return None
    return tuple(projection.weight for projection in projections)


def _is_plain_linear(projection: nn.Module) -> bool:
    # Adapters, quantized and sharded weights have other types, and hooks must be called.
    return type(projection) is nn.Linear and not is_watched(projection) and _are_plain(*projection.parameters())


def is_watched(module: nn.Module) -> bool:
    """Whether somebody sees what goes into the module or comes out of it, or has replaced what it does."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _side_by_side(tensors: tuple[torch.Tensor, ...], dim: int) -> torch.Tensor | None:
    """Matrices that lie side by side in memory along `dim`, as one; None if they do not."""
    first, size = tensors[0], 0
    address, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for x in tensors:
        if x.stride() != first.stride() or x.data_ptr() != address + size * first.stride(dim) * first.element_size():
            return None
        if x.untyped_storage().data_ptr() != storage:
            return None
        size += x.shape[dim]
    shape = (size, first.shape[1]) if dim == 0 else (first.shape[0], size)
    return first.as_strided(shape, first.stride())


def _products(x: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    weight = _side_by_side(weights, dim=0)
    if weight is None:
        return tuple(nn.functional.linear(x, weight) for weight in weights)
    return nn.functional.linear(x, weight).split([weight.shape[0] for weight in weights], dim=-1)


class _Projections(torch.autograd.Function):
    """`_products`. What autograd would make of it: a product for the gradient of x for each weight, and their sums."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        return _products(x, weights)

    @staticmethod
    def backward(ctx, *d_outputs):
        x, *weights = ctx.saved_tensors
        needs_dx, *need_dw = ctx.needs_input_grad
        rows, parts = x.reshape(-1, x.shape[-1]), [d.reshape(-1, d.shape[-1]) for d in d_outputs]
        # For gradients of gradients only what autograd can follow.
        is_last, dx = not torch.is_grad_enabled(), None
        weight, d_output = (_side_by_side(weights, 0), _side_by_side(parts, 1)) if is_last else (None, None)
        is_one = weight is not None and d_output is not None
        if needs_dx and is_one:
            dx = d_output @ weight
        elif needs_dx:
            dx = parts[0] @ weights[0]
            for d, weight in zip(parts[1:], weights[1:]):
                dx = dx.addmm_(d, weight) if is_last else dx.addmm(d, weight)
        if is_one and all(need_dw):
            dw = (d_output.t() @ rows).split([weight.shape[0] for weight in weights])
        else:
            dw = [d.t() @ rows if needed else None for d, needed in zip(parts, need_dw)]
        return dx if dx is None else dx.view(x.shape), *dw


def lay_side_by_side(model: nn.Module) -> None:
    """
    Puts the weights of projections that share an input (`shares_input` of a module names them) behind one another in
    memory. The parameters stay what and where they are; only the addresses of their values change. Weights that are
    parts of something larger stay: an optimizer or a sharding library may have put them there, to change them there.
    """
    # What is made in `torch.inference_mode` cannot be changed outside of it, and this outlives it.
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            projections = tuple(getattr(module, name) for name in getattr(module, "shares_input", ()))
            weights = _plain_weights(projections) if projections else None
            if weights is None or _side_by_side(weights, dim=0) is not None:
                continue
            if all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights):
                merged = torch.cat([weight.data for weight in weights])
                for weight, part in zip(weights, merged.split([weight.shape[0] for weight in weights])):
                    weight.data = part


class Parts(NamedTuple):
    """A product with weights that was made in parts, one for each part of what it sums over."""

    sums: torch.Tensor  # [P, B, T, C], fp32
    bias: torch.Tensor | None  # [C]

    def added_up(self, dtype: torch.dtype) -> torch.Tensor:
        total = self.sums.sum(0)
        return (total if self.bias is None else total + self.bias).to(dtype)


def num_parts(x: torch.Tensor) -> int:
    """
    In how many parts a product of `x` `[B, T, K]` with weights is to be made for `rms_norm` to add up; 1 for in one.
    Too few processors read a matrix that makes a few thousand numbers of a few thousand, unless each reads a part of
    every row. With more tokens the parts take longer to write and to add up than that spares (kernels/README.md).
    """
    tokens = x.shape[:-1].numel()
    parts = 4 if tokens <= 64 else 2
    is_half = x.dtype in (torch.float16, torch.bfloat16)
    return parts if is_half and tokens <= 256 and x.shape[-1] % (8 * parts) == 0 and _is_step_fused("RMSNorm", x) else 1


def project_out(x: torch.Tensor, projection: nn.Module, may_be_parts: bool = False) -> torch.Tensor | Parts:
    """What a `nn.Linear` makes of `x` `[B, T, K]`; of few tokens on a GPU it `may_be_parts`."""
    parts = num_parts(x) if may_be_parts and _are_plain(x) and _is_plain_linear(projection) else 1
    fits = parts > 1 and projection.weight.dtype == x.dtype and projection.out_features <= _MAX_NORM_DIM
    if not fits or torch.is_autocast_enabled(x.device.type):
        return projection(x)
    # [P, B T, K / P] and [P, K / P, C]
    rows = x.reshape(-1, parts, x.shape[-1] // parts).transpose(0, 1)
    weights = projection.weight.unflatten(1, (parts, -1)).permute(1, 2, 0)
    return Parts(_product_in_fp32(rows, weights).unflatten(1, x.shape[:-1]), projection.bias)


def _product_in_fp32(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # A CPU knows no such product; it comes here in the interpreter only.
    return torch.bmm(x, y, out_dtype=torch.float32) if x.is_cuda else torch.bmm(x.float(), y.float())


# A row stays in registers.
_MAX_NORM_DIM = 16384


def rms_norm(
    hidden_states: torch.Tensor | Parts,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    RMSNorm of `[B, T, C]`, in fp32 or better, after adding `residual` if there is one, which `Parts` always need. The
    sum may be written over it if `in_place`, which is for calls without gradients.

    Returns:
        The normalised sum in the dtype of `weight`, and the sum in the wider dtype of the two.
    """
    is_in_parts = isinstance(hidden_states, Parts)
    in_place = in_place and _can_hold_sum(residual, weight.dtype if is_in_parts else hidden_states.dtype)
    if is_in_parts and _are_plain(weight) and _is_step_fused("RMSNorm", hidden_states.sums):
        sums, bias = hidden_states
        return based_kernels.rms_norm_of_parts(sums, weight, eps, residual=residual, bias=bias, in_place=in_place)
    if is_in_parts:
        hidden_states = hidden_states.added_up(weight.dtype)
    fits = weight.shape[0] <= _MAX_NORM_DIM and _are_plain(hidden_states, weight)
    # A compiler that sees the arithmetic does it beside what comes before and after.
    if fits and not _compiles_training() and _is_fused("RMSNorm", hidden_states):
        return based_kernels.rms_norm(hidden_states, weight, eps, residual=residual, in_place=in_place)
    if residual is not None:
        hidden_states = residual.add_(hidden_states) if in_place else residual + hidden_states
    x = hidden_states.to(at_least_fp32(hidden_states.dtype))
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return _made_anew(_scaled, hidden_states, scale, weight), hidden_states


def _scaled(hidden_states: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight * (hidden_states.to(scale.dtype) * scale)).to(weight.dtype)


def _can_hold_sum(residual: torch.Tensor, added: torch.dtype) -> bool:
    return residual.is_contiguous() and torch.promote_types(residual.dtype, added) == residual.dtype


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of `[B, T, C]`."""
    if gate.dtype == up.dtype and _are_plain(gate, up) and not _compiles_training() and _is_fused("SwiGLU", gate):
        return based_kernels.swiglu(gate, up)
    return _made_anew(_gated, gate, up)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate) * up


_CONV = "the gated short convolution"


def _has_conv_kernel(kernel_size: int) -> bool:
    return 2 <= kernel_size <= 8


def can_step_fused(x: torch.Tensor, kernel_size: int, *weights: torch.Tensor) -> bool:
    """Whether `gated_short_conv_step` is to be used for `x` `[B, 1, C]`, in place of the convolution for any length."""
    fits = x.shape[1] == 1 and _has_conv_kernel(kernel_size) and _are_plain(x, *weights)
    return fits and _is_step_fused(_CONV, x)


def can_convolve_fused(x: torch.Tensor, kernel_size: int, *weights: torch.Tensor) -> bool:
    """Whether `gated_short_conv` is to be used for `x` `[B, T, C]`, in place of plain PyTorch."""
    return _has_conv_kernel(kernel_size) and _are_plain(x, *weights) and _is_fused(_CONV, x)


def conv_places(mask: torch.Tensor | None, like: torch.Tensor, kernel_size: int) -> torch.Tensor | None:
    """
    What `gated_short_conv` needs to know of a mask `[B, T]`, made once for all layers of a model; `None` where it does
    not run. `like` has the dtype and the device of the model.
    """
    if mask is None or not can_convolve_fused(like, kernel_size):
        return None
    return based_kernels.conv_places(mask, kernel_size)


def gated_short_conv(
    projected: torch.Tensor,
    weight: torch.Tensor,
    *,
    state: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The gated short convolution, fused; its plain form is `BasedGatedConv1d` of modeling_based.py.

    Args:
        projected: `[B, T, 2C]`, the input u and the gate g side by side.
        weight: `[C, K]`.
        state: `[B, K - 1, C]`, the last inputs before these, oldest first.
        mask: `[B, T]`; a token with 0 does not exist: its neighbours touch, and its output is 0.
        places: what `conv_places` makes of the mask.
        document_ids: `[B, T]`; a tap never reaches into another document.

    Returns:
        `[B, T, C]` and the next state `[B, K - 1, C]` or `None`, in the dtype of `projected`.
    """

    def convolve(projected: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return based_kernels.gated_short_conv(
            projected,
            weight,
            state=None if state is None else state.to(projected.dtype),
            mask=mask,
            places=places,
            document_ids=document_ids,
            output_final_state=output_final_state,
        )

    if output_final_state:
        return convolve(projected, weight)
    return _made_anew(lambda *inputs: convolve(*inputs)[0], projected, weight), None


def gated_short_conv_step(
    projected: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    One token of the gated short convolution, fused; its plain form is `BasedGatedConv1d` of modeling_based.py.

    Args:
        projected: `[B, 1, 2C]`, the input u and the gate g side by side.
        weight: `[C, K]`.
        state: `[B, K - 1, C]`, the last inputs, oldest first; changed in place.
        mask: `[B, 1]`; a row with 0 leaves its state as it is, and its output is 0.

    Returns:
        `[B, 1, C]` in the dtype of `projected`.
    """
    return based_kernels.gated_short_conv_step(projected, weight, state, mask=mask)


# Of a head: its tiles stay in registers.
_MAX_HEAD_DIM = 128
# Of a head and of the window, in a step.
_MAX_STEP_HEAD_DIM, _MAX_STEP_WINDOW = 256, 4096


def can_attend_fused(x: torch.Tensor, head_dim: int) -> bool:
    """Whether `sliding_attention` is to be used for tokens like `x`, in place of attention with a mask."""
    fits = head_dim % 8 == 0 and head_dim <= _MAX_HEAD_DIM
    return fits and _are_plain(x) and _is_fused("sliding-window attention", x)


def sliding_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    window: int,
    scale: float,
    mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    past_keys: torch.Tensor | None = None,
    past_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Softmax attention to the last `window` tokens, itself included, with rotary, fused, forward and backward; its plain
    form is in `BasedAttention` of modeling_based.py. Linear in T; no mask of T x T is made.

    Args:
        query, key, value: `[B, T, H, D]`, key and value with H / G heads for groups of G; not rotated.
        cos, sin: `[B or 1, T, D]`, fp32, of the tokens' positions.
        mask: `[B, P + T]`; a token with 0 is seen by nobody, and its output is 0.
        document_ids: `[B, T]`; a token sees only its own document.
        past_keys, past_values: `[B, H / G, P, D]`, the tokens before these, keys rotated.

    Returns:
        `[B, T, H, D]` in the dtype of `value`.

    Source: arXiv 2402.18668, section 4.2; `based/models/mixers/slide_attention.py` of the original code.
    """
    return based_kernels.sliding_attention(
        query,
        key,
        value,
        cos,
        sin,
        window=window,
        scale=scale,
        mask=mask,
        document_ids=document_ids,
        past_keys=past_keys,
        past_values=past_values,
    )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary of `[B, T, H, D]`, in the wider of the dtypes, that of the angles being fp32 or better."""
    return x * cos[:, :, None] + rotate_half(x) * sin[:, :, None]


def sliding_attention_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    One token of sliding-window attention with rotary: writes its key and value into the ring, **in place**, and attends
    to the last W tokens of the row, itself included.

    Args:
        query, key, value: `[B, 1, H, D]`, key and value with H / G heads for groups of G; not rotated.
        cos, sin: `[B or 1, 1, D]`, fp32, of the token's position.
        keys, values, seen: see `WindowCacheLayer`.
        mask: `[B, 1]`; a row with 0 leaves its ring as it is, and its output is 0.

    Returns:
        `[B, 1, H, D]` in the dtype of `value`.

    Source: arXiv 2402.18668, section 4.2; `based/models/mixers/slide_attention.py` of the original code.
    """
    head_dim, window = value.shape[3], keys.shape[2]
    fits = head_dim % 8 == 0 and head_dim <= _MAX_STEP_HEAD_DIM and window <= _MAX_STEP_WINDOW
    if fits and _are_plain(query, key, value) and _is_step_fused("sliding-window attention", value):
        return based_kernels.sliding_attention_step(
            query, key, value, cos, sin, keys, values, seen, scale=scale, mask=mask
        )
    query, key = (rotate(x, cos, sin).to(value.dtype) for x in (query, key))
    exists = torch.ones_like(seen[:, :1], dtype=torch.bool) if mask is None else mask.bool()
    # [B, H, 1, D]: in a row that does not exist the slot gets what it holds
    slot = (seen % window)[..., None, None].expand(-1, -1, 1, keys.shape[3])
    for ring, new in ((keys, key), (values, value)):
        ring.scatter_(2, slot, torch.where(exists[..., None, None], new.transpose(1, 2), ring.gather(2, slot)))
    seen.add_(exists)
    visible = torch.arange(window, device=seen.device) < seen[..., None]  # [B, H, W]
    dtype = at_least_fp32(value.dtype)
    query = query.transpose(1, 2).unflatten(1, (keys.shape[1], -1)).squeeze(3).to(dtype)  # [B, H, G, D]
    scores = (query @ keys.transpose(2, 3).to(dtype) * scale).masked_fill(~visible[:, :, None], float("-inf"))
    output = scores.softmax(dim=-1).masked_fill(~exists[..., None, None], 0) @ values.to(dtype)
    return output.flatten(1, 2)[:, None].to(value.dtype)
