# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""RMSNorm, and the sum of the residual stream before it, in one kernel.

Layout: hidden_states, residual, both outputs [.., C]; weight [C].

Maths:  x = residual + hidden_states, rounded to the stream's dtype
        o = weight * x * (mean(x^2) + eps)^(-1/2)   in fp32

A program owns one row.
"""

import torch
import triton
import triton.language as tl

from .checks import check_rms_norm_inputs, common_unit, device_guard, rows_of


@triton.jit(do_not_specialize=["stride_x", "stride_r"])
def _rms_norm_fwd_kernel(
    p_x,
    p_r,
    p_w,
    p_sum,
    p_o,
    eps,
    stride_x,
    stride_r,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    # torch.compile passes Python floats as float64
    eps = tl.cast(eps, tl.float32)
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    # [BLOCK_C] each
    b_w = tl.load(p_w + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + i_n * stride_x * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_r = tl.load(p_r + i_n * stride_r * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_sum = (b_r + b_x).to(p_sum.dtype.element_ty)
        tl.store(p_sum + i_n * C + o_c, b_sum, mask=m_c)
        b_x = b_sum.to(tl.float32)
    b_o = b_w * (b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=0) / C + eps))
    tl.store(p_o + i_n * C + o_c, b_o.to(p_o.dtype.element_ty), mask=m_c)


def _rms_norm(hidden_states, weight, eps, residual):
    shape, C = hidden_states.shape, weight.shape[0]
    x = rows_of(hidden_states)
    normed = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    r, total, strides = x, hidden_states, (x.stride(0), x.stride(0))
    if residual is not None:
        r = rows_of(residual)
        total = torch.empty(shape, dtype=residual.dtype, device=residual.device)
        strides = x.stride(0), r.stride(0)
    unit = common_unit(C, *strides)
    block = triton.next_power_of_2(C)
    with device_guard(x):
        _rms_norm_fwd_kernel[(x.shape[0],)](
            x,
            r,
            weight,
            total,
            normed,
            eps,
            *(stride // unit for stride in strides),
            C=C,
            UNIT=unit,
            BLOCK_C=block,
            HAS_RESIDUAL=residual is not None,
            # 8 values a lane, and more where 16 warps do not hold the row
            num_warps=min(max(block // 256, 1), 16),
        )
    return normed, total


def rms_norm(hidden_states, weight, eps, *, residual=None):
    """RMSNorm of `residual + hidden_states`, which is returned too: it is the residual stream from here on.

    The norm is computed in fp32 and rounded once, as `BasedRMSNorm` of transformers_based does (arXiv 1910.07467).
    Forward only: no gradients.

    Args:
        hidden_states: [.., C], float32, float16 or bfloat16, C up to 16384.
        weight: [C], float32, float16 or bfloat16.
        eps: number >= 0, added to the mean of squares.
        residual: [.., C], float32 or the dtype of hidden_states.

    Returns:
        normed [.., C] in weight's dtype, and the sum [.., C] in the dtype of residual; without residual,
        hidden_states itself.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.
    """
    check_rms_norm_inputs(hidden_states, weight, eps, residual)
    return _rms_norm(hidden_states, weight.contiguous(), eps, residual)
