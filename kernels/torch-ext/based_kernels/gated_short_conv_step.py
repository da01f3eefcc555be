# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""One decoding step of the gated short convolution: state shifted, convolved, gated, in one kernel.

Layout: projected [B, 1, 2C] = [u ; g]; weight [C, K], tap K - 1 on the token itself; state [B, K - 1, C], oldest first.

Maths:  c = sum_j weight[:, j] u_{t - (K - 1) + j},   o = c sigmoid(c) g
        state <- [state[1:], u_t]

A program owns BLOCK_C channels of one row of the batch: nobody else reads or writes their state.
"""

# ruff: noqa: RUF005
# Triton adds tuples, but unpacks none.

import torch
import triton
import triton.language as tl

from .checks import check_conv_step_inputs, common_unit, device_guard


# 8 values of a half type a lane: one 16-byte access a tap.
_BLOCK_C, _WARPS = 512, 2


@triton.jit(do_not_specialize=["stride_xb", "stride_sb", "stride_sk", "stride_mb"])
def _gated_short_conv_step_kernel(
    p_x,
    p_w,
    p_s,
    p_mask,
    p_o,
    stride_xb,
    stride_sb,
    stride_sk,
    stride_mb,
    C: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_o += i_b * C + o_c
    m_s = m_c
    if HAS_MASK:
        # a finished row: nothing is written to the state. The loads do not wait until that is known.
        exists = tl.load(p_mask + i_b * stride_mb) != 0
        m_s = o_c < tl.where(exists, C, 0)
    p_x += i_b * stride_xb * UNIT + o_c
    p_s += i_b * stride_sb * UNIT + o_c
    p_w += o_c * K
    stride_sk = tl.cast(stride_sk, tl.int64) * UNIT
    # [BLOCK_C] each
    b_u = tl.load(p_x, mask=m_c, other=0.0)
    b_g = tl.load(p_x + C, mask=m_c, other=0.0)
    inputs = ()
    for i in tl.static_range(K - 1):
        inputs = inputs + (tl.load(p_s + i * stride_sk, mask=m_c, other=0.0),)
    inputs = inputs + (b_u,)
    b_c = tl.load(p_w + K - 1, mask=m_c, other=0.0).to(tl.float32) * b_u.to(tl.float32)
    for i in tl.static_range(K - 1):
        b_c += tl.load(p_w + i, mask=m_c, other=0.0).to(tl.float32) * inputs[i].to(tl.float32)
    b_o = b_c / (1.0 + tl.exp(-b_c)) * b_g.to(tl.float32)
    if HAS_MASK:
        b_o = tl.where(exists, b_o, 0.0)
    tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_c)
    # the lane that stores an input need not be the one that loaded what stood there
    tl.debug_barrier()
    for i in tl.static_range(K - 1):
        tl.store(p_s + i * stride_sk, inputs[i + 1], mask=m_s)


def _gated_short_conv_step(projected, weight, state, mask):
    B, _, C = state.shape
    output = torch.empty((B, 1, C), dtype=projected.dtype, device=projected.device)
    strides = projected.stride(0), state.stride(0), state.stride(1)
    unit = common_unit(C, *strides)
    with device_guard(projected):
        _gated_short_conv_step_kernel[(B, triton.cdiv(C, _BLOCK_C))](
            projected,
            weight,
            state,
            projected if mask is None else mask,
            output,
            *(stride // unit for stride in strides),
            0 if mask is None else mask.stride(0),
            C=C,
            K=weight.shape[1],
            UNIT=unit,
            BLOCK_C=_BLOCK_C,
            HAS_MASK=mask is not None,
            num_warps=_WARPS,
        )
    return output


def gated_short_conv_step(projected, weight, state, *, mask=None):
    """One token of the gated short convolution, `silu(conv(u)) * g`, on a running state, updated in place.

    Arithmetic in fp32, rounded once. The plain original is `BasedShortConv` in transformers_based, between its two
    projections (`BaseConv` of the paper's code, arXiv 2402.18668). Forward only: no gradients.

    Args:
        projected: [B, 1, 2 C], float32, float16 or bfloat16: u, the input of the convolution, beside g, its gate.
        weight: [C, K], float32, float16 or bfloat16, K from 2 to 8, the last tap on the token itself.
        state: [B, K - 1, C], dtype of projected, the last K - 1 inputs, oldest first; its last dimension contiguous.
        mask: [B, 1], bool or 0/1. 0: the row does not write to its state and its output row is 0.

    Returns:
        output [B, 1, C] in projected's dtype.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.
    """
    check_conv_step_inputs(projected, weight, state, mask)
    projected = projected if projected.stride(2) == 1 else projected.contiguous()
    return _gated_short_conv_step(projected, weight.contiguous(), state, mask)
