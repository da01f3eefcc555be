# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""One decoding step of Taylor attention that leaves the state alone: the last tokens wait beside it, up to N of them.

Layout: query, key [B, 1, H, D]; value, output [B, 1, H, V]; state [B, H, V + 1, F_PAD] fp32, row V is the normaliser;
        pending_keys [B, H, N, D]; pending_values [B, H, N, V]; num_pending [B, H] int32.

Maths:  o = (S phi'(q) + sum_j w_j v_j) / max(N . phi'(q) + sum_j w_j, 0.5)   over the pending j and the new token
        w_j = 1 + s + s^2 / 2,  s = scale * q . k_j
        when the N-th token comes:  S += sum_j v_j phi(k_j),  the normaliser likewise with v = 1,  and none is pending

So the state is read once a step and written once in N. A program owns one (row of the batch, head) and with it the count,
so whether it folds is decided in the kernel: a captured CUDA graph stays valid, and rows may fill at different times.
"""

# ruff: noqa: SIM102, E501
# Triton compiles nested ifs on a constant and a GPU value, not an `and` of the two.

import math

import torch
import triton
import triton.language as tl

from .checks import check_lazy_step_inputs, device_guard, feature_count, vector_rows
from .taylor_attention_step import _features, _public_pair


@triton.jit
def _weight(b_s):
    return 1.0 + b_s * (1.0 + 0.5 * b_s)


@triton.jit
def _fold(
    p_s,
    p_pk,
    p_pv,
    sqrt_scale,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """
    Adds all N pending tokens to the state. Half inputs take two products in tf32, as exact as float32: a value fits one
    tf32, a feature two. Inputs in float32 take three. The sum is made apart and added once, so that a state far larger
    than what is added is rounded once in N tokens.
    """
    # tiles of few rows: from 64 on, Hopper's asynchronous products would be taken
    BLOCK_R: tl.constexpr = 32
    o_n = tl.arange(0, N)
    for i_f in range(tl.cdiv(F_PAD, BLOCK_F)):
        o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
        a, b = _public_pair(o_f, D)
        # [N, BLOCK_F], then its upper eleven bits and the rest
        b_phi = _features(p_pk + o_n[:, None] * D, a[None, :], b[None, :], sqrt_scale, D)
        b_high = (b_phi.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        b_low = b_phi - b_high
        for i_r in range(tl.cdiv(V + 1, BLOCK_R)):
            o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
            # [BLOCK_R, N]; row V of the state sums ones
            b_v = tl.load(p_pv + o_n[None, :] * V + o_r[:, None], mask=o_r[:, None] < V, other=1.0).to(tl.float32)
            if p_pv.dtype.element_ty == tl.float32:
                b_update = tl.dot(b_v, b_phi, input_precision="tf32x3")
            else:
                b_update = tl.dot(b_v, b_low, input_precision="tf32")
                b_update = tl.dot(b_v, b_high, b_update, input_precision="tf32")
            # [BLOCK_R, BLOCK_F]
            p_tile = p_s + o_r[:, None] * F_PAD + o_f[None, :]
            m_tile = (o_r[:, None] <= V) & (o_f[None, :] < F_PAD)
            tl.store(p_tile, tl.load(p_tile, mask=m_tile, other=0.0) + b_update, mask=m_tile)


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
        "stride_pkb",
        "stride_pkh",
        "stride_pvb",
        "stride_pvh",
    ]
)
def _taylor_attention_lazy_step_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_s,
    p_pk,
    p_pv,
    p_n,
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
    stride_pkb,
    stride_pkh,
    stride_pvb,
    stride_pvh,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    # torch.compile passes Python floats as float64
    sqrt_scale = tl.cast(sqrt_scale, tl.float32)
    i_b = (tl.program_id(0) // H).to(tl.int64)
    i_h = (tl.program_id(0) % H).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, N)
    o_v = tl.arange(0, BLOCK_V)
    m_d = o_d < D
    m_v = o_v < V
    p_o += (i_b * H + i_h) * V
    if HAS_MASK:
        if tl.load(p_mask + i_b) == 0:
            # a finished row: nothing changes
            tl.store(p_o + o_v, tl.zeros([BLOCK_V], dtype=p_o.dtype.element_ty), mask=m_v)
            return
    p_q += (i_b * stride_qb + i_h * stride_qh) * 8
    p_k += (i_b * stride_kb + i_h * stride_kh) * 8
    p_v += (i_b * stride_vb + i_h * stride_vh) * 8
    p_s += (i_b * stride_sb + i_h * stride_sh) * 8
    p_pk += (i_b * stride_pkb + i_h * stride_pkh) * 8
    p_pv += (i_b * stride_pvb + i_h * stride_pvh) * 8
    p_n += i_b * H + i_h

    n = tl.load(p_n)
    m_n = o_n < n
    # [N, BLOCK_D], [BLOCK_D], [BLOCK_V]
    b_pk = tl.load(p_pk + o_n[:, None] * D + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
    b_q = tl.load(p_q + o_d, mask=m_d, other=0.0).to(tl.float32) * (sqrt_scale * sqrt_scale)
    b_k = tl.load(p_k + o_d, mask=m_d, other=0.0)
    b_v = tl.load(p_v + o_v, mask=m_v, other=0.0)
    # every feature of the query is made by one thread; the loop hands them out
    a, b = _public_pair(tl.arange(0, BLOCK_Q), D)
    # [BLOCK_Q]
    b_phi = _features(p_q, a, b, sqrt_scale, D) * tl.where((a == b) & (a < D), 0.5, 1.0)

    b_read = tl.zeros([BLOCK_V, BLOCK_F], dtype=tl.float32)
    b_norm = tl.zeros([BLOCK_F], dtype=tl.float32)
    for i_f in tl.static_range((F_PAD + BLOCK_F - 1) // BLOCK_F):
        o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
        m_f = o_f < F_PAD
        # [BLOCK_V, BLOCK_F], [BLOCK_F], [BLOCK_F]
        b_s = tl.load(p_s + o_v[:, None] * F_PAD + o_f[None, :], mask=m_v[:, None] & m_f[None, :], other=0.0)
        b_sn = tl.load(p_s + V * F_PAD + o_f, mask=m_f, other=0.0)
        b_psi = tl.gather(b_phi, o_f, axis=0)
        b_read += b_s * b_psi[None, :]
        b_norm += b_sn * b_psi

    # [N], the new token's, [N, BLOCK_V]
    b_w = tl.where(m_n, _weight(tl.sum(b_pk.to(tl.float32) * b_q[None, :], axis=1)), 0.0)
    w = _weight(tl.sum(b_k.to(tl.float32) * b_q, axis=0))
    b_pv = tl.load(p_pv + o_n[:, None] * V + o_v[None, :], mask=m_n[:, None] & m_v[None, :], other=0.0)
    z = tl.maximum(tl.sum(b_norm, axis=0) + tl.sum(b_w, axis=0) + w, 0.5)
    b_o = tl.sum(b_read, axis=1) + tl.sum(b_pv.to(tl.float32) * b_w[:, None], axis=0) + b_v.to(tl.float32) * w
    tl.store(p_o + o_v, (b_o / z).to(p_o.dtype.element_ty), mask=m_v)

    # every warp has read the count and the state before any writes them
    tl.debug_barrier()
    tl.store(p_pk + n * D + o_d, b_k, mask=m_d)
    tl.store(p_pv + n * V + o_v, b_v, mask=m_v)
    is_full = n + 1 == N
    tl.store(p_n, tl.where(is_full, 0, n + 1))
    if is_full:
        # and every warp sees the new token
        tl.debug_barrier()
        _fold(p_s, p_pk, p_pv, sqrt_scale, D, V, F_PAD, N, BLOCK_F)


def _taylor_attention_lazy_step(query, key, value, state, pending_keys, pending_values, num_pending, scale, mask):
    B, _, H, D = query.shape
    V = value.shape[3]
    _, padded = feature_count(D)
    output = torch.empty((B, 1, H, V), dtype=value.dtype, device=value.device)
    with device_guard(query):
        _taylor_attention_lazy_step_kernel[(B * H,)](
            query,
            key,
            value,
            query if mask is None else mask,
            state,
            pending_keys,
            pending_values,
            num_pending,
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
            pending_keys.stride(0) // 8,
            pending_keys.stride(1) // 8,
            pending_values.stride(0) // 8,
            pending_values.stride(1) // 8,
            D=D,
            V=V,
            F_PAD=padded,
            N=pending_keys.shape[2],
            BLOCK_D=triton.next_power_of_2(D),
            BLOCK_Q=triton.next_power_of_2(padded),
            BLOCK_V=triton.next_power_of_2(V),
            # a cache line of 128 bytes a row: no column of D = 16 is a masked one, and a sum crosses eight lanes only
            BLOCK_F=32,
            HAS_MASK=mask is not None,
            num_warps=2 if V <= 128 else 8,
        )
    return output


@torch.no_grad()
def taylor_attention_lazy_step(
    query, key, value, state, pending_keys, pending_values, num_pending, *, scale=None, mask=None
):
    """`taylor_attention_step` that keeps the last tokens beside the state and writes it once in N steps; same function.

    The token is stored at slot `num_pending`, the output sees it, the slots before it and the state, and `num_pending`
    grows by 1; when it reaches N, all N tokens are added to the state and it returns to 0. All of that in place.

    Args:
        query, key: [B, 1, H, D], float32, float16 or bfloat16, D a multiple of 8 up to 32.
        value: [B, 1, H, V], same dtype, V a multiple of 8 up to 256.
        state: [B, H, V + 1, F_PAD] float32: all tokens but the pending ones, as returned by `taylor_attention`, or zeros.
        pending_keys: [B, H, N, D] in the dtype of key, N 16, 32 or 64; anything in the slots from `num_pending` on.
        pending_values: [B, H, N, V], likewise. Of these three the last two dimensions are contiguous.
        num_pending: [B, H] int32, contiguous, 0 <= num_pending < N (not checked: that would wait for the GPU).
        scale: number > 0, the same one as long as tokens are pending; default D ** -0.5.
        mask: [B, 1], bool or 0/1. 0: nothing of the row changes and its output row is 0.

    Returns:
        output [B, 1, H, V] in value's dtype. No gradients.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.

    Source: the weight is that of arXiv 2402.18668, section 4.1; both forms of it give the same sum.
    """
    scale = check_lazy_step_inputs(query, key, value, state, pending_keys, pending_values, num_pending, scale, mask)
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).contiguous()
    return _taylor_attention_lazy_step(
        vector_rows(query),
        vector_rows(key),
        vector_rows(value),
        state,
        pending_keys,
        pending_values,
        num_pending,
        scale,
        mask,
    )
