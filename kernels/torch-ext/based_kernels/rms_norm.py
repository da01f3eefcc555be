# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""RMSNorm, and the sum of the residual stream before it, in one kernel; backward in one more, and one for the weight.

Layout: hidden_states, residual, both outputs and their gradients [.., C]; weight, bias [C]. Of a product that was made
in parts, and that the kernel adds up, the parts [P, .., C] take the place of hidden_states.

Maths:  x = residual + hidden_states, rounded to the stream's dtype
        y = x (mean(x^2) + eps)^(-1/2),  o = weight y   in fp32
        dx = (mean(x^2) + eps)^(-1/2) (weight do - y mean(weight do y)) + d_sum,  dweight = sum over rows of do y

Forward, a program owns one row. Backward it owns a run of rows, and adds what they give to weight in registers; the
runs are added by a second kernel, always in the same order.
"""

import torch
import triton
import triton.language as tl

from .checks import (
    check_rms_norm_inputs,
    check_rms_norm_of_parts_inputs,
    common_unit,
    device_guard,
    refuse_second_order,
    rows_of,
)


# Runs of rows in the backward pass: four programs a processor on the GPUs at hand, if there are rows enough.
_RUNS, _SHORTEST_RUN = 512, 4


@triton.jit(do_not_specialize=["stride_x", "stride_r"])
def _rms_norm_fwd_kernel(
    p_x,
    p_r,
    p_w,
    p_bias,
    p_sum,
    p_o,
    eps,
    stride_x,
    stride_r,
    C: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    # torch.compile passes Python floats as float64
    eps = tl.cast(eps, tl.float32)
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    # [BLOCK_C] each
    b_w = tl.load(p_w + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + i_n * stride_x * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
    for i_p in tl.static_range(1, P):
        i_row = i_p * tl.num_programs(0) + i_n
        b_x += tl.load(p_x + i_row * stride_x * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_x += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_r = tl.load(p_r + i_n * stride_r * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_sum = (b_r + b_x).to(p_sum.dtype.element_ty)
        tl.store(p_sum + i_n * C + o_c, b_sum, mask=m_c)
        b_x = b_sum.to(tl.float32)
    b_o = b_w * (b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) / C + eps))
    tl.store(p_o + i_n * C + o_c, b_o.to(p_o.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["N", "rows", "stride_x", "stride_do", "stride_ds"])
def _rms_norm_bwd_kernel(
    p_x,
    p_w,
    p_do,
    p_ds,
    p_dx,
    p_dr,
    p_dw,
    eps,
    N,
    rows,
    stride_x,
    stride_do,
    stride_ds,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_DS: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DR: tl.constexpr,
    NEEDS_DW: tl.constexpr,
):
    eps = tl.cast(eps, tl.float32)
    i_p = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    # [BLOCK_C] each
    b_w = tl.load(p_w + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BLOCK_C], dtype=tl.float32)
    for i_n in range(i_p * rows, tl.minimum(i_p * rows + rows, N)):
        b_x = tl.load(p_x + i_n * stride_x * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_do = tl.load(p_do + i_n * stride_do * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / C + eps)
        b_y = b_x * b_scale
        if NEEDS_DW:
            b_dw += b_do * b_y
        if NEEDS_DX or NEEDS_DR:
            b_dy = b_w * b_do
            b_dx = b_scale * (b_dy - b_y * (tl.sum(b_dy * b_y, axis=0) / C))
            if HAS_DS:
                b_dx += tl.load(p_ds + i_n * stride_ds * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
            if NEEDS_DX:
                tl.store(p_dx + i_n * C + o_c, b_dx.to(p_dx.dtype.element_ty), mask=m_c)
            if NEEDS_DR:
                tl.store(p_dr + i_n * C + o_c, b_dx.to(p_dr.dtype.element_ty), mask=m_c)
    if NEEDS_DW:
        tl.store(p_dw + i_p * C + o_c, b_dw, mask=m_c)


@triton.jit(do_not_specialize=["P"])
def _rms_norm_sum_kernel(p_runs, p_dw, P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    # [BLOCK_P, BLOCK_C]
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    for i_p in range(0, P, BLOCK_P):
        o_p = i_p + tl.arange(0, BLOCK_P)
        b_sum += tl.load(p_runs + o_p[:, None] * C + o_c, mask=(o_p < P)[:, None] & m_c, other=0.0)
    tl.store(p_dw + o_c, tl.sum(b_sum, axis=0).to(p_dw.dtype.element_ty), mask=m_c)


def _tile(C):
    """BLOCK_C and warps: 8 values a lane, and more where 16 warps do not hold the row."""
    block = triton.next_power_of_2(C)
    return block, min(max(block // 256, 1), 16)


def _rms_norm_fwd(hidden_states, weight, eps, residual, in_place=False, bias=None, is_in_parts=False):
    shape, C = hidden_states.shape, weight.shape[0]
    x = rows_of(hidden_states)
    dtype, P = hidden_states.dtype, 1
    if is_in_parts:
        dtype, P, shape = weight.dtype, shape[0], shape[1:]
    normed = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    r, total, strides = x, hidden_states, (x.stride(0), x.stride(0))
    if residual is not None:
        r = rows_of(residual)
        dtype = torch.promote_types(residual.dtype, dtype)
        total = residual if in_place else torch.empty(shape, dtype=dtype, device=residual.device)
        strides = x.stride(0), r.stride(0)
    unit = common_unit(C, *strides)
    block, warps = _tile(C)
    with device_guard(x):
        _rms_norm_fwd_kernel[(x.shape[0] // P,)](
            x,
            r,
            weight,
            weight if bias is None else bias,
            total,
            normed,
            eps,
            *(stride // unit for stride in strides),
            C=C,
            P=P,
            UNIT=unit,
            BLOCK_C=block,
            HAS_RESIDUAL=residual is not None,
            HAS_BIAS=bias is not None,
            num_warps=warps,
        )
    return normed, total


def _rms_norm_bwd(x, weight, eps, d_normed, d_total, x_dtype, residual_dtype, needs_dx, needs_dw, needs_dr):
    """-> gradients of hidden_states, weight and residual, None where not needed; `x` is the sum."""
    shape, C = x.shape, weight.shape[0]
    x, do = rows_of(x), rows_of(d_normed)
    ds = do if d_total is None else rows_of(d_total)
    N = x.shape[0]
    rows = max(triton.cdiv(N, _RUNS), _SHORTEST_RUN)
    runs = triton.cdiv(N, rows)
    # of one dtype, both are one tensor
    shares = needs_dx and needs_dr and residual_dtype == x_dtype
    dx = torch.empty(shape, dtype=x_dtype, device=x.device) if needs_dx else None
    dr = torch.empty(shape, dtype=residual_dtype, device=x.device) if needs_dr and not shares else None
    dw = d_runs = None
    if needs_dw:
        d_runs = torch.empty((runs, C), dtype=torch.float32, device=x.device)
        dw = torch.empty((C,), dtype=weight.dtype, device=x.device)
    strides = x.stride(0), do.stride(0), ds.stride(0)
    unit = common_unit(C, *strides)
    block, warps = _tile(C)
    with device_guard(x):
        _rms_norm_bwd_kernel[(runs,)](
            x,
            weight,
            do,
            ds,
            x if dx is None else dx,
            x if dr is None else dr,
            x if d_runs is None else d_runs,
            eps,
            N,
            rows,
            *(stride // unit for stride in strides),
            C=C,
            UNIT=unit,
            BLOCK_C=block,
            HAS_DS=d_total is not None,
            NEEDS_DX=dx is not None,
            NEEDS_DR=dr is not None,
            NEEDS_DW=needs_dw,
            num_warps=warps,
        )
        if needs_dw:
            _rms_norm_sum_kernel[(triton.cdiv(C, 32),)](d_runs, dw, runs, C=C, BLOCK_P=128, BLOCK_C=32, num_warps=4)
    return dx, dw, dx if shares else dr


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, eps, residual):
        normed, total = _rms_norm_fwd(hidden_states, weight, eps, residual)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.dtype = eps, hidden_states.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        if residual is None:
            return normed
        return normed, total

    @staticmethod
    def backward(ctx, d_normed, d_total=None):
        refuse_second_order("rms_norm")
        total, weight = ctx.saved_tensors
        needs_dx, needs_dw, _, needs_dr = ctx.needs_input_grad
        dx, dw, dr = _rms_norm_bwd(
            total, weight, ctx.eps, d_normed, d_total, ctx.dtype, ctx.residual_dtype, needs_dx, needs_dw, needs_dr
        )
        return dx, dw, None, dr


def rms_norm(hidden_states, weight, eps, *, residual=None, in_place=False):
    """RMSNorm of `residual + hidden_states`, which is returned too: it is the residual stream from here on.

    The norm is computed in fp32 and rounded once, as `BasedRMSNorm` of transformers_based does (arXiv 1910.07467).
    Differentiable in hidden_states, weight and residual, once.

    Args:
        hidden_states: [.., C], float32, float16 or bfloat16, C up to 16384. Any strides.
        weight: [C], float32, float16 or bfloat16.
        eps: number >= 0, added to the mean of squares.
        residual: [.., C], float32, float16 or bfloat16.
        in_place: the sum is written over `residual`, which must be contiguous and of the sum's dtype; no gradients.

    Returns:
        normed [.., C] in weight's dtype, and the sum [.., C] in the dtype to which PyTorch promotes the two; without
        residual, hidden_states itself.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits. RuntimeError for gradients of gradients.
    """
    check_rms_norm_inputs(hidden_states, weight, eps, residual, in_place)
    weight = weight.contiguous()
    if not torch.is_grad_enabled():
        return _rms_norm_fwd(hidden_states, weight, eps, residual, in_place)
    if residual is None:
        return _RMSNorm.apply(hidden_states, weight, eps, None), hidden_states
    return _RMSNorm.apply(hidden_states, weight, eps, residual)


def rms_norm_of_parts(parts, weight, eps, *, residual, bias=None, in_place=False):
    """`rms_norm` of a product with weights that was made in P parts, one for each part of what it sums over.

    Parts, bias and residual are added in fp32, and the sum is rounded once, to the dtype of the residual stream; the
    order is that of the parts. Forward only: no gradients.

    Args:
        parts: [P, .., C], float32, P up to 16.
        weight, eps: as of `rms_norm`.
        residual: [.., C], float32, float16 or bfloat16.
        bias: [C], float32, float16 or bfloat16, or None.
        in_place: as of `rms_norm`.

    Returns:
        normed [.., C] in weight's dtype, and the sum [.., C] in the dtype that PyTorch promotes it and residual's to.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.
    """
    check_rms_norm_of_parts_inputs(parts, weight, eps, residual, bias, in_place)
    bias = None if bias is None else bias.contiguous()
    return _rms_norm_fwd(parts, weight.contiguous(), eps, residual, in_place, bias, is_in_parts=True)
