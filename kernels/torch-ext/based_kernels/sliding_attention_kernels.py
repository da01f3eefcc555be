# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The kernels of sliding_attention.py, which says what they compute.

Rotary works on the halves of a head, so a tile of query or key is a pair of tiles, rotated as it is loaded. A program
owns a block of queries (output; dq) or of keys with all queries of its group (dk, dv), and nobody adds to what it
writes. Tiles begin at multiples of their length, so a tile of keys lies before token 0 or behind it, not both. A token
that does not exist sees itself alone, as zeros: no row is empty, and nothing there is ever NaN.
"""

# ruff: noqa: SIM102
# Triton compiles nested ifs on a constant and a GPU value, not an `and` of the two.

import triton
import triton.language as tl


# log2(e): powers of 2 are what the GPU has.
_LOG2_E = tl.constexpr(1.4426950408889634)

# Of every kernel: numbers that change from call to call or from layout to layout.
_NUMBERS = [
    "scale",
    "T",
    "P",
    "W",
    "stride_qb",
    "stride_qt",
    "stride_qh",
    "stride_kb",
    "stride_kt",
    "stride_kh",
    "stride_vb",
    "stride_vt",
    "stride_vh",
    "stride_pkb",
    "stride_pkh",
    "stride_pkt",
    "stride_pvb",
    "stride_pvh",
    "stride_pvt",
    "stride_cos_b",
    "stride_cos_t",
    "stride_sin_b",
    "stride_sin_t",
    "stride_mask",
    "stride_ids",
]


@triton.jit
def _load_pair(p_x, stride_t, o_t, m_t, o_h, D: tl.constexpr):
    """[BLOCK, HALF] twice, fp32: the halves of rows o_t, 0 where m_t is not."""
    m_x = m_t[:, None] & (o_h < D // 2)[None, :]
    p_low = p_x + o_t[:, None] * (stride_t * 8) + o_h[None, :]
    b_low = tl.load(p_low, mask=m_x, other=0.0).to(tl.float32)
    b_high = tl.load(p_low + D // 2, mask=m_x, other=0.0).to(tl.float32)
    return b_low, b_high


@triton.jit
def _load_angles(p_cos, p_sin, stride_cos, stride_sin, o_t, m_t, o_h, D: tl.constexpr):
    """[BLOCK, HALF] twice: no rotation where m_t is not."""
    m_x = m_t[:, None] & (o_h < D // 2)[None, :]
    b_cos = tl.load(p_cos + o_t[:, None] * stride_cos + o_h[None, :], mask=m_x, other=1.0)
    b_sin = tl.load(p_sin + o_t[:, None] * stride_sin + o_h[None, :], mask=m_x, other=0.0)
    return b_cos, b_sin


@triton.jit
def _load_rows(p_x, stride_t, o_t, m_t, o_d, D: tl.constexpr):
    """[BLOCK, BLOCK_D]: rows o_t, 0 where m_t is not."""
    m_x = m_t[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_t[:, None] * (stride_t * 8) + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def _store_pair(p_x, stride_t, b_low, b_high, b_cos, b_sin, o_t, m_t, o_h, D: tl.constexpr):
    """Rotates a gradient back and stores it."""
    m_x = m_t[:, None] & (o_h < D // 2)[None, :]
    p_low = p_x + o_t[:, None] * stride_t + o_h[None, :]
    tl.store(p_low, (b_low * b_cos + b_high * b_sin).to(p_x.dtype.element_ty), mask=m_x)
    tl.store(p_low + D // 2, (b_high * b_cos - b_low * b_sin).to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def _exist(p_mask, o_t, T, P, HAS_MASK: tl.constexpr):
    """[BLOCK] bool: the token is one of the row's, and not masked."""
    m_t = (o_t < T) & (o_t >= -P)
    if HAS_MASK:
        m_t = m_t & (tl.load(p_mask + P + o_t, mask=m_t, other=0) != 0)
    return m_t


@triton.jit
def _sees(o_q, m_q, o_k, m_k, p_ids, T, W, PACKED: tl.constexpr):
    """Whether queries o_q see keys o_k, two ranges that broadcast."""
    distance = o_q - o_k
    m_s = (distance >= 0) & (distance < W) & m_q & m_k
    if PACKED:
        ids_q = tl.load(p_ids + o_q, mask=o_q < T, other=0)
        ids_k = tl.load(p_ids + o_k, mask=o_k < T, other=0)
        m_s = m_s & (ids_q == ids_k)
    return m_s | (distance == 0)


@triton.jit
def _key_tile(
    p_k,
    p_v,
    p_past_k,
    p_past_v,
    p_cos,
    p_sin,
    p_mask,
    n,
    T,
    P,
    stride_kt,
    stride_vt,
    stride_pkt,
    stride_pvt,
    stride_cos_t,
    stride_sin_t,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PAST: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Keys n .. n + BLOCK_K - 1: where, which exist, the halves rotated in DTYPE, values in DTYPE, angles."""
    o_n = tl.arange(0, BLOCK_K)
    o_h = tl.arange(0, HALF)
    o_d = tl.arange(0, BLOCK_D)
    n_64 = tl.cast(n, tl.int64)
    m_k = _exist(p_mask, n + o_n, T, P, HAS_MASK)
    p_tile_k = p_k + n_64 * stride_kt * 8
    p_tile_v = p_v + n_64 * stride_vt * 8
    step_k = stride_kt
    step_v = stride_vt
    if HAS_PAST:
        if n < 0:
            p_tile_k = p_past_k + (n_64 + P) * stride_pkt * 8
            p_tile_v = p_past_v + (n_64 + P) * stride_pvt * 8
            step_k = stride_pkt
            step_v = stride_pvt
    b_low, b_high = _load_pair(p_tile_k, step_k, o_n, m_k, o_h, D)
    # what was before has been rotated
    m_new = m_k & (n + o_n >= 0)
    b_cos, b_sin = _load_angles(
        p_cos + n_64 * stride_cos_t, p_sin + n_64 * stride_sin_t, stride_cos_t, stride_sin_t, o_n, m_new, o_h, D
    )
    b_v = _load_rows(p_tile_v, step_v, o_n, m_k, o_d, D).to(DTYPE)
    b_k_low = (b_low * b_cos - b_high * b_sin).to(p_v.dtype.element_ty).to(DTYPE)
    b_k_high = (b_high * b_cos + b_low * b_sin).to(p_v.dtype.element_ty).to(DTYPE)
    return n + o_n, m_k, b_k_low, b_k_high, b_v, b_cos, b_sin


@triton.jit
def _query_tile(
    p_q,
    p_cos,
    p_sin,
    p_mask,
    m,
    T,
    P,
    stride_qt,
    stride_cos_t,
    stride_sin_t,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ROUND: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Queries m .. m + BLOCK_Q - 1: where, which exist, the halves rotated in DTYPE, angles."""
    o_m = tl.arange(0, BLOCK_Q)
    o_h = tl.arange(0, HALF)
    m_64 = tl.cast(m, tl.int64)
    m_q = _exist(p_mask, m + o_m, T, 0, False)
    if HAS_MASK:
        m_q = m_q & (tl.load(p_mask + P + m + o_m, mask=m_q, other=0) != 0)
    b_low, b_high = _load_pair(p_q + m_64 * stride_qt * 8, stride_qt, o_m, m_q, o_h, D)
    b_cos, b_sin = _load_angles(
        p_cos + m_64 * stride_cos_t, p_sin + m_64 * stride_sin_t, stride_cos_t, stride_sin_t, o_m, m_q, o_h, D
    )
    b_q_low = (b_low * b_cos - b_high * b_sin).to(ROUND).to(DTYPE)
    b_q_high = (b_high * b_cos + b_low * b_sin).to(ROUND).to(DTYPE)
    return m + o_m, m_q, b_q_low, b_q_high, b_cos, b_sin


@triton.jit
def _first_key(m, P, W, BLOCK_K: tl.constexpr):
    """Where the first tile of keys begins that query m reaches; tiles begin at multiples of BLOCK_K, also below 0."""
    before = tl.cdiv(P, BLOCK_K) * BLOCK_K
    return (tl.maximum(m - W + 1, -P) + before) // BLOCK_K * BLOCK_K - before


@triton.jit(do_not_specialize=_NUMBERS)
def sliding_attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_past_k,
    p_past_v,
    p_cos,
    p_sin,
    p_mask,
    p_ids,
    p_o,
    p_lse,
    scale,
    T,
    P,
    W,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_pkb,
    stride_pkh,
    stride_pkt,
    stride_pvb,
    stride_pvh,
    stride_pvt,
    stride_cos_b,
    stride_cos_t,
    stride_sin_b,
    stride_sin_t,
    stride_mask,
    stride_ids,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_PAST: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # torch.compile passes Python floats as float64
    scale = tl.cast(scale, tl.float32) * _LOG2_E
    blocks = tl.cdiv(T, BLOCK_Q)
    i_h = tl.program_id(0) % H
    m = (tl.program_id(0) // H) % blocks * BLOCK_Q
    i_b = (tl.program_id(0) // H // blocks).to(tl.int64)
    i_kv = i_h // GROUP
    p_q += (i_b * stride_qb + i_h * stride_qh) * 8
    p_k += (i_b * stride_kb + i_kv * stride_kh) * 8
    p_v += (i_b * stride_vb + i_kv * stride_vh) * 8
    p_past_k += (i_b * stride_pkb + i_kv * stride_pkh) * 8
    p_past_v += (i_b * stride_pvb + i_kv * stride_pvh) * 8
    p_cos += i_b * stride_cos_b
    p_sin += i_b * stride_sin_b
    p_mask += i_b * stride_mask
    p_ids += i_b * stride_ids

    o_q, m_q, b_q_low, b_q_high, _b_cos_q, _b_sin_q = _query_tile(
        p_q,
        p_cos,
        p_sin,
        p_mask,
        m,
        T,
        P,
        stride_qt,
        stride_cos_t,
        stride_sin_t,
        D,
        HALF,
        BLOCK_Q,
        HAS_MASK,
        p_v.dtype.element_ty,
        DTYPE,
    )
    # below every score, and not -inf: a block may hold no key for a row
    b_max = tl.full([BLOCK_Q], -1e30, tl.float32)
    b_z = tl.zeros([BLOCK_Q], dtype=tl.float32)
    b_o = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    for n in range(_first_key(m, P, W, BLOCK_K), tl.minimum(m + BLOCK_Q, tl.cdiv(T, BLOCK_K) * BLOCK_K), BLOCK_K):
        o_k, m_k, b_k_low, b_k_high, b_v, _b_cos_k, _b_sin_k = _key_tile(
            p_k,
            p_v,
            p_past_k,
            p_past_v,
            p_cos,
            p_sin,
            p_mask,
            n,
            T,
            P,
            stride_kt,
            stride_vt,
            stride_pkt,
            stride_pvt,
            stride_cos_t,
            stride_sin_t,
            D,
            HALF,
            BLOCK_D,
            BLOCK_K,
            HAS_MASK,
            HAS_PAST,
            DTYPE,
        )
        # [BLOCK_Q, BLOCK_K]
        b_s = tl.dot(b_q_low, tl.trans(b_k_low), input_precision=PRECISION)
        b_s = tl.dot(b_q_high, tl.trans(b_k_high), b_s, input_precision=PRECISION) * scale
        m_s = _sees(o_q[:, None], m_q[:, None], o_k[None, :], m_k[None, :], p_ids, T, W, PACKED)
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_p = tl.exp2(b_s - b_new_max[:, None])
        b_shrink = tl.exp2(b_max - b_new_max)
        b_z = b_z * b_shrink + tl.sum(b_p, axis=1)
        b_p = b_p.to(p_v.dtype.element_ty).to(DTYPE)
        b_o = tl.dot(b_p, b_v, b_o * b_shrink[:, None], input_precision=PRECISION)
        b_max = b_new_max

    o_d = tl.arange(0, BLOCK_D)
    m_t = o_q < T
    p_o += ((i_b * T + m) * H + i_h) * D
    p_o += tl.arange(0, BLOCK_Q)[:, None] * (H * D) + o_d[None, :]
    tl.store(p_o, (b_o / b_z[:, None]).to(p_o.dtype.element_ty), mask=m_t[:, None] & (o_d < D)[None, :])
    tl.store(p_lse + (i_b * H + i_h) * T + o_q, b_max + tl.log2(b_z), mask=m_t)


@triton.jit(do_not_specialize=[*_NUMBERS, "stride_gb", "stride_gt", "stride_gh"])
def sliding_attention_bwd_query_kernel(
    p_q,
    p_k,
    p_v,
    p_past_k,
    p_past_v,
    p_cos,
    p_sin,
    p_mask,
    p_ids,
    p_lse,
    p_do,
    p_delta,
    p_dq,
    scale,
    T,
    P,
    W,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_pkb,
    stride_pkh,
    stride_pkt,
    stride_pvb,
    stride_pvh,
    stride_pvt,
    stride_cos_b,
    stride_cos_t,
    stride_sin_b,
    stride_sin_t,
    stride_mask,
    stride_ids,
    stride_gb,
    stride_gt,
    stride_gh,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_PAST: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of query, and the row sums of p do . v, which the gradient of key needs too."""
    scale = tl.cast(scale, tl.float32)
    blocks = tl.cdiv(T, BLOCK_Q)
    i_h = tl.program_id(0) % H
    m = (tl.program_id(0) // H) % blocks * BLOCK_Q
    i_b = (tl.program_id(0) // H // blocks).to(tl.int64)
    i_kv = i_h // GROUP
    p_q += (i_b * stride_qb + i_h * stride_qh) * 8
    p_k += (i_b * stride_kb + i_kv * stride_kh) * 8
    p_v += (i_b * stride_vb + i_kv * stride_vh) * 8
    p_past_k += (i_b * stride_pkb + i_kv * stride_pkh) * 8
    p_past_v += (i_b * stride_pvb + i_kv * stride_pvh) * 8
    p_cos += i_b * stride_cos_b
    p_sin += i_b * stride_sin_b
    p_mask += i_b * stride_mask
    p_ids += i_b * stride_ids

    o_q, m_q, b_q_low, b_q_high, b_cos_q, b_sin_q = _query_tile(
        p_q,
        p_cos,
        p_sin,
        p_mask,
        m,
        T,
        P,
        stride_qt,
        stride_cos_t,
        stride_sin_t,
        D,
        HALF,
        BLOCK_Q,
        HAS_MASK,
        p_v.dtype.element_ty,
        DTYPE,
    )
    o_m = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    p_do += (i_b * stride_gb + i_h * stride_gh + tl.cast(m, tl.int64) * stride_gt) * 8
    # [BLOCK_Q, BLOCK_D], and [BLOCK_Q] twice
    b_do = _load_rows(p_do, stride_gt, o_m, m_q, o_d, D).to(DTYPE)
    o_row = (i_b * H + i_h) * T + o_q
    b_lse = tl.load(p_lse + o_row, mask=o_q < T, other=0.0)

    # Not do . o: o has been rounded, and the difference is what the gradients of scores are made of.
    b_delta = tl.zeros([BLOCK_Q], dtype=tl.float32)
    for n in range(_first_key(m, P, W, BLOCK_K), tl.minimum(m + BLOCK_Q, tl.cdiv(T, BLOCK_K) * BLOCK_K), BLOCK_K):
        o_k, m_k, b_k_low, b_k_high, b_v, _b_cos_k, _b_sin_k = _key_tile(
            p_k,
            p_v,
            p_past_k,
            p_past_v,
            p_cos,
            p_sin,
            p_mask,
            n,
            T,
            P,
            stride_kt,
            stride_vt,
            stride_pkt,
            stride_pvt,
            stride_cos_t,
            stride_sin_t,
            D,
            HALF,
            BLOCK_D,
            BLOCK_K,
            HAS_MASK,
            HAS_PAST,
            DTYPE,
        )
        # [BLOCK_Q, BLOCK_K]
        b_s = tl.dot(b_q_low, tl.trans(b_k_low), input_precision=PRECISION)
        b_s = tl.dot(b_q_high, tl.trans(b_k_high), b_s, input_precision=PRECISION) * (scale * _LOG2_E)
        m_s = _sees(o_q[:, None], m_q[:, None], o_k[None, :], m_k[None, :], p_ids, T, W, PACKED)
        b_p = tl.exp2(tl.where(m_s, b_s, float("-inf")) - b_lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_delta += tl.sum(b_p * b_dp, axis=1)
    tl.store(p_delta + o_row, b_delta, mask=o_q < T)

    b_dq_low = tl.zeros([BLOCK_Q, HALF], dtype=tl.float32)
    b_dq_high = tl.zeros([BLOCK_Q, HALF], dtype=tl.float32)
    for n in range(_first_key(m, P, W, BLOCK_K), tl.minimum(m + BLOCK_Q, tl.cdiv(T, BLOCK_K) * BLOCK_K), BLOCK_K):
        o_k, m_k, b_k_low, b_k_high, b_v, _b_cos_k, _b_sin_k = _key_tile(
            p_k,
            p_v,
            p_past_k,
            p_past_v,
            p_cos,
            p_sin,
            p_mask,
            n,
            T,
            P,
            stride_kt,
            stride_vt,
            stride_pkt,
            stride_pvt,
            stride_cos_t,
            stride_sin_t,
            D,
            HALF,
            BLOCK_D,
            BLOCK_K,
            HAS_MASK,
            HAS_PAST,
            DTYPE,
        )
        # [BLOCK_Q, BLOCK_K]
        b_s = tl.dot(b_q_low, tl.trans(b_k_low), input_precision=PRECISION)
        b_s = tl.dot(b_q_high, tl.trans(b_k_high), b_s, input_precision=PRECISION) * (scale * _LOG2_E)
        m_s = _sees(o_q[:, None], m_q[:, None], o_k[None, :], m_k[None, :], p_ids, T, W, PACKED)
        b_p = tl.exp2(tl.where(m_s, b_s, float("-inf")) - b_lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(p_v.dtype.element_ty).to(DTYPE)
        b_dq_low = tl.dot(b_ds, b_k_low, b_dq_low, input_precision=PRECISION)
        b_dq_high = tl.dot(b_ds, b_k_high, b_dq_high, input_precision=PRECISION)

    p_dq += ((i_b * T + m) * H + i_h) * D
    o_h = tl.arange(0, HALF)
    _store_pair(p_dq, H * D, b_dq_low * scale, b_dq_high * scale, b_cos_q, b_sin_q, o_m, o_q < T, o_h, D)


@triton.jit(do_not_specialize=[*_NUMBERS, "stride_gb", "stride_gt", "stride_gh", "past_blocks"])
def sliding_attention_bwd_key_kernel(
    p_q,
    p_k,
    p_v,
    p_past_k,
    p_past_v,
    p_cos,
    p_sin,
    p_mask,
    p_ids,
    p_lse,
    p_do,
    p_delta,
    p_dk,
    p_dv,
    p_d_past_k,
    p_d_past_v,
    scale,
    T,
    P,
    W,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_pkb,
    stride_pkh,
    stride_pkt,
    stride_pvb,
    stride_pvh,
    stride_pvt,
    stride_cos_b,
    stride_cos_t,
    stride_sin_b,
    stride_sin_t,
    stride_mask,
    stride_ids,
    stride_gb,
    stride_gt,
    stride_gh,
    past_blocks,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_PAST: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of key and value; the first `past_blocks` programs of a head give those of what was before."""
    scale = tl.cast(scale, tl.float32)
    HKV: tl.constexpr = H // GROUP
    blocks = tl.cdiv(T, BLOCK_K) + past_blocks
    i_kv = tl.program_id(0) % HKV
    n = ((tl.program_id(0) // HKV) % blocks - past_blocks) * BLOCK_K
    i_b = (tl.program_id(0) // HKV // blocks).to(tl.int64)
    p_cos += i_b * stride_cos_b
    p_sin += i_b * stride_sin_b
    p_mask += i_b * stride_mask
    p_ids += i_b * stride_ids
    o_k, m_k, b_k_low, b_k_high, b_v, b_cos_k, b_sin_k = _key_tile(
        p_k + (i_b * stride_kb + i_kv * stride_kh) * 8,
        p_v + (i_b * stride_vb + i_kv * stride_vh) * 8,
        p_past_k + (i_b * stride_pkb + i_kv * stride_pkh) * 8,
        p_past_v + (i_b * stride_pvb + i_kv * stride_pvh) * 8,
        p_cos,
        p_sin,
        p_mask,
        n,
        T,
        P,
        stride_kt,
        stride_vt,
        stride_pkt,
        stride_pvt,
        stride_cos_t,
        stride_sin_t,
        D,
        HALF,
        BLOCK_D,
        BLOCK_K,
        HAS_MASK,
        HAS_PAST,
        DTYPE,
    )
    o_m = tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    b_dk_low = tl.zeros([BLOCK_K, HALF], dtype=tl.float32)
    b_dk_high = tl.zeros([BLOCK_K, HALF], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for i_g in range(GROUP):
        i_h = i_kv * GROUP + i_g
        p_head = p_q + (i_b * stride_qb + i_h * stride_qh) * 8
        p_do_head = p_do + (i_b * stride_gb + i_h * stride_gh) * 8
        o_row = (i_b * H + i_h) * T
        for m in range(tl.maximum(n, 0) // BLOCK_Q * BLOCK_Q, tl.minimum(T, n + BLOCK_K + W - 1), BLOCK_Q):
            o_q, m_q, b_q_low, b_q_high, _b_cos_q, _b_sin_q = _query_tile(
                p_head,
                p_cos,
                p_sin,
                p_mask,
                m,
                T,
                P,
                stride_qt,
                stride_cos_t,
                stride_sin_t,
                D,
                HALF,
                BLOCK_Q,
                HAS_MASK,
                p_v.dtype.element_ty,
                DTYPE,
            )
            # [BLOCK_Q, BLOCK_D], and [BLOCK_Q] twice
            b_do = _load_rows(p_do_head + tl.cast(m, tl.int64) * stride_gt * 8, stride_gt, o_m, m_q, o_d, D)
            b_do = b_do.to(DTYPE)
            b_lse = tl.load(p_lse + o_row + o_q, mask=o_q < T, other=0.0)
            b_delta = tl.load(p_delta + o_row + o_q, mask=o_q < T, other=0.0)
            # [BLOCK_K, BLOCK_Q]
            b_s = tl.dot(b_k_low, tl.trans(b_q_low), input_precision=PRECISION)
            b_s = tl.dot(b_k_high, tl.trans(b_q_high), b_s, input_precision=PRECISION) * (scale * _LOG2_E)
            m_s = _sees(o_q[None, :], m_q[None, :], o_k[:, None], m_k[:, None], p_ids, T, W, PACKED)
            b_p = tl.exp2(tl.where(m_s, b_s, float("-inf")) - b_lse[None, :])
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_ds = (b_p * (b_dp - b_delta[None, :])).to(p_v.dtype.element_ty).to(DTYPE)
            b_p = b_p.to(p_v.dtype.element_ty).to(DTYPE)
            b_dv = tl.dot(b_p, b_do, b_dv, input_precision=PRECISION)
            b_dk_low = tl.dot(b_ds, b_q_low, b_dk_low, input_precision=PRECISION)
            b_dk_high = tl.dot(b_ds, b_q_high, b_dk_high, input_precision=PRECISION)

    step = HKV * D
    p_tile_dk = p_dk + ((i_b * T + n) * HKV + i_kv) * D
    p_tile_dv = p_dv + ((i_b * T + n) * HKV + i_kv) * D
    if HAS_PAST:
        if n < 0:
            step = D
            p_tile_dk = p_d_past_k + ((i_b * HKV + i_kv) * P + n + P) * D
            p_tile_dv = p_d_past_v + ((i_b * HKV + i_kv) * P + n + P) * D
    o_n = tl.arange(0, BLOCK_K)
    o_h = tl.arange(0, HALF)
    m_n = (o_k < T) & (o_k >= -P)
    _store_pair(p_tile_dk, step, b_dk_low * scale, b_dk_high * scale, b_cos_k, b_sin_k, o_n, m_n, o_h, D)
    p_rows = p_tile_dv + o_n[:, None] * step + o_d[None, :]
    tl.store(p_rows, b_dv.to(p_dv.dtype.element_ty), mask=m_n[:, None] & (o_d < D)[None, :])
