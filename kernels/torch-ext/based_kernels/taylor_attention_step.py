# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""One decoding step of Taylor attention: the state is read once, updated in place and read out, in one kernel.

Layout: query, key [B, 1, H, D]; value, output [B, 1, H, V]; state [B, H, V + 1, F_PAD] fp32, row V is the normaliser.

Maths:  S_v += v_v phi(k) for every row v,  N += phi(k)
        z = max(N . phi'(q), 0.5)   with phi' = coefficient * phi
        o_v = S_v . phi'(q) / z

A program owns one (row of the batch, head), so nobody else reads the normaliser while it is rewritten.
"""

# ruff: noqa: SIM102, E501
# Triton compiles nested ifs on a constant and a GPU value, not an `and` of the two.

import math

import torch
import triton
import triton.language as tl

from .checks import check_step_inputs, device_guard, feature_count, vector_rows


@triton.jit
def _public_pair(o_f, D: tl.constexpr):
    """Factors (a, b) of the features in the order of the public state; b == D is the constant, padding reads (D, D + 1)."""
    N: tl.constexpr = D + 1
    a = tl.zeros_like(o_f)
    for i in tl.static_range(1, N):
        a += (o_f >= i * (2 * N - i + 1) // 2).to(tl.int32)
    b = o_f - a * (2 * N - a + 1) // 2 + a
    return a, b


@triton.jit
def _features(p_x, a, b, sqrt_scale, D: tl.constexpr):
    b_a = tl.load(p_x + a, mask=a < D, other=0.0).to(tl.float32) * sqrt_scale
    b_b = tl.load(p_x + b, mask=b < D, other=0.0).to(tl.float32) * sqrt_scale
    b_phi = tl.where(a < D, b_a, 1.0) * tl.where(b < D, b_b, 1.0)
    return tl.where(b <= D, b_phi, 0.0)


@triton.jit(
    do_not_specialize=[
        "H",
        "stride_qb",
        "stride_qh",
        "stride_kb",
        "stride_kh",
        "stride_vb",
        "stride_vh",
        "stride_sb",
        "stride_sh",
    ]
)
def _taylor_attention_step_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_s,
    p_o,
    sqrt_scale,
    H,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_sb,
    stride_sh,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    # torch.compile passes Python floats as float64
    sqrt_scale = tl.cast(sqrt_scale, tl.float32)
    i_b = (tl.program_id(0) // H).to(tl.int64)
    i_h = (tl.program_id(0) % H).to(tl.int64)
    p_o += (i_b * H + i_h) * V
    if HAS_MASK:
        if tl.load(p_mask + i_b) == 0:
            # a finished row: nothing is written to the state
            o_zero = tl.arange(0, 256)
            tl.store(p_o + o_zero, tl.zeros([256], dtype=p_o.dtype.element_ty), mask=o_zero < V)
            return
    o_f = tl.arange(0, BLOCK_F)
    m_f = o_f < F_PAD
    a, b = _public_pair(o_f, D)
    # [BLOCK_F]
    b_k = _features(p_k + (i_b * stride_kb + i_h * stride_kh) * 8, a, b, sqrt_scale, D)
    b_q = _features(p_q + (i_b * stride_qb + i_h * stride_qh) * 8, a, b, sqrt_scale, D)
    b_q *= tl.where((a == b) & (a < D), 0.5, 1.0)
    p_s += (i_b * stride_sb + i_h * stride_sh) * 8
    p_v += (i_b * stride_vb + i_h * stride_vh) * 8

    b_n = tl.load(p_s + V * F_PAD + o_f, mask=m_f, other=0.0) + b_k
    tl.store(p_s + V * F_PAD + o_f, b_n, mask=m_f)
    b_z = tl.maximum(tl.sum(b_n * b_q, axis=0), 0.5)
    for i_v in range(tl.cdiv(V, BLOCK_V)):
        o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
        m_v = o_v < V
        m_vf = m_v[:, None] & m_f[None, :]
        # [BLOCK_V, BLOCK_F], [BLOCK_V]
        p_tile = p_s + o_v[:, None] * F_PAD + o_f[None, :]
        b_v = tl.load(p_v + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_s = tl.load(p_tile, mask=m_vf, other=0.0) + b_v[:, None] * b_k[None, :]
        tl.store(p_tile, b_s, mask=m_vf)
        b_o = tl.sum(b_s * b_q[None, :], axis=1) / b_z
        tl.store(p_o + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)


def _taylor_attention_step(query, key, value, state, scale, mask):
    B, _, H, D = query.shape
    V = value.shape[3]
    _, padded = feature_count(D)
    block_f = triton.next_power_of_2(padded)
    output = torch.empty((B, 1, H, V), dtype=value.dtype, device=value.device)
    with device_guard(query):
        _taylor_attention_step_kernel[(B * H,)](
            query,
            key,
            value,
            query if mask is None else mask,
            state,
            output,
            math.sqrt(scale),
            H,
            # units of 8 elements: 16-byte loads without a compilation per layout
            query.stride(0) // 8,
            query.stride(2) // 8,
            key.stride(0) // 8,
            key.stride(2) // 8,
            value.stride(0) // 8,
            value.stride(2) // 8,
            state.stride(0) // 8,
            state.stride(1) // 8,
            D=D,
            V=V,
            F_PAD=padded,
            BLOCK_F=block_f,
            BLOCK_V=max(1, 4096 // block_f),
            HAS_MASK=mask is not None,
            num_warps=4,
        )
    return output


@torch.no_grad()
def taylor_attention_step(query, key, value, state, *, scale=None, mask=None):
    """One token of `taylor_attention` on a running state, which is updated in place (arXiv 2402.18668).

    Args:
        query, key: [B, 1, H, D], float32, float16 or bfloat16, D a multiple of 8 up to 32.
        value: [B, 1, H, V], same dtype, V a multiple of 8 up to 256.
        state: [B, H, V + 1, F_PAD] float32 as returned by `taylor_attention`, or zeros; its last two dimensions contiguous.
        scale: number > 0; default D ** -0.5.
        mask: [B, 1], bool or 0/1. 0: the row does not write to its state and its output row is 0.

    Returns:
        output [B, 1, H, V] in value's dtype. No gradients.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.
    """
    scale = check_step_inputs(query, key, value, state, scale, mask)
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).contiguous()
    return _taylor_attention_step(vector_rows(query), vector_rows(key), vector_rows(value), state, scale, mask)
