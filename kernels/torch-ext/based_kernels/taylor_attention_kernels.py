# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The kernels behind taylor_attention_chunk.py, which has the maths.

Two kernels do everything, each forward or backward in time, since w is symmetric in query and key:
        sum    out_i = sum_j w(x_i, y_j) b_j               the output (x, y, b = q, k, v) and dv (k, q, do / z)
        slope  dx_i = sum_j (a_i . b_j + e) dw(x_i, y_j)    dq (q, k; a, b = do / z, v) and dk (k, q; v, do / z)

A program owns one (segment, head, block of V). One warp does it where it can: products then take what other products
left in registers, without a barrier. Features are never stored, and no sum depends on the order in which programs run, so
results repeat bit by bit.

Several warps share a product as Triton 3.6 shares out the last one of the loop. WIDE_LAST makes that one of
[BLOCK_C or BLOCK_V, P], a part of P for each warp; after a square one each warp would do all of most products.
"""

# ruff: noqa: RUF005, SIM102, E501
# Triton compiles `a + (b,)` and nested ifs on constants, not `(*a, b)` nor an `and` of a constant and a GPU value.

import triton
import triton.language as tl

from .segments import exists, locate
from .taylor_features import (
    coef_columns,
    columns,
    grow_moment,
    half_roll,
    load_moment,
    load_rolls,
    load_state,
    load_x,
    load_xt,
    normaliser,
    normaliser_slope,
    num_tiles,
    reader_features,
    rolled,
    source_features,
    store_moment,
    store_state,
)


# What changes with batch, length or memory layout must not cause a new compilation.
_DYNAMIC = ["T", "SEGMENT", "PER_DOC", "N", "H", "ROWS", "COUNT", "FIRST_PART", "PARTS", "FIRST_OUT", "stride_dov"] + [
    f"stride_{x}{d}" for x in ("x", "y", "b", "q", "k", "v", "g", "do") for d in "bth"
]


@triton.jit
def _start(p_init, p_slots, i_n, slot, i_h, H, SIZE: tl.constexpr, HAS_INIT: tl.constexpr):
    """Where the state stands that a segment starts from, and whether there is one: its slot's or its document's."""
    p_state = p_init + (i_n.to(tl.int64) * H + i_h) * SIZE
    m_state = slot >= 0
    if HAS_INIT:
        m_state = slot >= -1
    if slot >= 0:
        p_state = p_slots + (slot.to(tl.int64) * H + i_h) * SIZE
    return p_state, m_state


@triton.jit
def _visible(o_c, REVERSE: tl.constexpr):
    """[BLOCK_C, BLOCK_C] bool: row i sees column j."""
    if REVERSE:
        return o_c[:, None] <= o_c[None, :]
    else:
        return o_c[:, None] >= o_c[None, :]


@triton.jit
def _one_plus_s(b_x, b_yt, scale, D: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """1 + s of a chunk, [BLOCK_C, BLOCK_C]. If D < P, x . y counts the constant too."""
    b_s = tl.dot(b_x, b_yt, input_precision=PRECISION) * scale
    if D < P:
        b_s -= scale
    return b_s + 1.0


@triton.jit
def _grow_rest(
    b_next,
    b_s,
    b_bt,
    b_yt,
    b_y32,
    b_rollt,
    o_d,
    D: tl.constexpr,
    P: tl.constexpr,
    ROLL_BY_GATHER: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tiles from P / 2 on of a state [BLOCK_V, P] that takes in a chunk, after those in b_next."""
    for r in tl.static_range(P // 2, num_tiles(D, P)):
        b_f = source_features(r, b_yt, b_y32, b_rollt, o_d, D, P, True, True, ROLL_BY_GATHER, DTYPE, PRECISION)
        b_next = b_next + (tl.dot(b_bt, b_f, b_s[r], input_precision=PRECISION),)
    return b_next


@triton.jit(do_not_specialize=_DYNAMIC)
def taylor_attention_sum_kernel(
    p_x,
    p_y,
    p_b,
    p_mask,
    p_init,
    p_slots,
    p_o,
    p_z,
    p_final,
    p_table,
    p_cu,
    p_cut,
    scale,
    sqrt_scale,
    T,
    N,
    H,
    SEGMENT,
    PER_DOC,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_yb,
    stride_yt,
    stride_yh,
    stride_bb,
    stride_bt,
    stride_bh,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROLL_BY_GATHER: tl.constexpr,
    WIDE_LAST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_INIT: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    TABLE: tl.constexpr,
    REVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_i = sum_j w(x_i, y_j) b_j, over j <= i and divided by the normaliser; with REVERSE over j >= i and not divided."""
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    # torch.compile passes Python floats as float64
    scale = tl.cast(scale, tl.float32)
    sqrt_scale = tl.cast(sqrt_scale, tl.float32)
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_s = tl.program_id(0) // NV // H
    if TABLE:
        if tl.load(p_cut + 3 * N + i_s) >= N:
            return
    i_n, i_b, start, end, slot, _, _ = locate(i_s, p_cu, p_cut, T, N, SEGMENT, PER_DOC, PACKED, TABLE)

    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, P)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    # strides come in units of 8 elements: 16-byte loads without a compilation per layout
    p_x += (i_b.to(tl.int64) * stride_xb + i_h.to(tl.int64) * stride_xh) * 8
    p_y += (i_b.to(tl.int64) * stride_yb + i_h.to(tl.int64) * stride_yh) * 8
    p_b += (i_b.to(tl.int64) * stride_bb + i_h.to(tl.int64) * stride_bh) * 8
    r_rowx = o_c * stride_xt * 8
    r_rowy = o_c * stride_yt * 8
    r_x = r_rowx[:, None] + o_d[None, :]
    r_y = r_rowy[:, None] + o_d[None, :]
    r_yt = r_rowy[None, :] + o_d[:, None]
    r_b = o_c[:, None] * stride_bt * 8 + o_v[None, :]
    r_bt = o_c[None, :] * stride_bt * 8 + o_v[:, None]
    r_o = o_c[:, None] * (H * V) + o_v[None, :]
    p_mask += i_b.to(tl.int64) * T
    p_o += (i_b.to(tl.int64) * T * H + i_h) * V
    p_z += i_b.to(tl.int64) * T * H + i_h

    p_state, m_state = _start(p_init, p_slots, i_n, slot, i_h, H, (V + 1) * F_PAD, HAS_INIT)
    v_state = tl.where(m_state, V, 0)
    b_s = ()
    for r in tl.static_range(num_tiles(D, P)):
        # [BLOCK_V, P]
        b_s = b_s + (load_state(p_state, r, o_v, v_state, scale, sqrt_scale, D, P, F_PAD, REVERSE, False, True),)
    if not REVERSE:
        # [P, P], [BLOCK_C, P] and a number
        b_m, b_n, count = load_moment(p_state + V * F_PAD, m_state, scale, sqrt_scale, D, P, BLOCK_C, False)
    b_roll = load_rolls(p_table, P, False)
    b_rollt = load_rolls(p_table, P, True)

    chunks = tl.cdiv(end - start, BLOCK_C)
    for i in range(chunks):
        i_c = i
        if REVERSE:
            i_c = chunks - 1 - i
        i_t = (start + i_c * BLOCK_C).to(tl.int64)
        left = (end - i_t).to(tl.int32)
        m_t = exists(o_c, left, p_mask + i_t, HAS_MASK)
        # [BLOCK_C, P], [P, BLOCK_C], [BLOCK_C, BLOCK_V], [BLOCK_V, BLOCK_C]. A tensor is read once for each of its uses:
        # each then has a copy of its own under way to shared memory, in the layout of that use.
        p_xc = p_x + i_t * stride_xt * 8
        p_yc = p_y + i_t * stride_yt * 8
        b_x = load_x(p_xc, r_x, m_t, o_d, D, P, DTYPE)
        b_y = load_x(p_yc, r_y, m_t, o_d, D, P, DTYPE)
        b_yt = load_xt(p_yc, r_yt, m_t, o_d, D, P, DTYPE)
        b_y32 = columns(b_yt, b_rollt, ROLL_BY_GATHER, PRECISION)
        b_b = tl.load(p_b + i_t * stride_bt * 8 + r_b, mask=m_t[:, None] & m_v[None, :], other=0.0).to(DTYPE)
        b_bt = tl.load(p_b + i_t * stride_bt * 8 + r_bt, mask=m_t[None, :] & m_v[:, None], other=0.0).to(DTYPE)

        # tokens before this chunk, through the state, which then takes in the chunk: two chains of products side by side.
        # The rolls share a coefficient, and the linear tile, read last but one, has its square root.
        b_o = tl.zeros([BLOCK_C, BLOCK_V], dtype=tl.float32)
        b_next = ()
        for r in tl.static_range(P // 2):
            # [BLOCK_C, P]
            b_f = reader_features(r, b_x, b_roll, P, ROLL_BY_GATHER, PRECISION)
            b_sf = b_s[r]
            if D < P:
                b_sf = b_sf * coef_columns(r, scale, D, P, True)[None, :]
            b_o = tl.dot(b_f, tl.trans(b_sf).to(DTYPE), b_o, input_precision=PRECISION)
            b_f = source_features(r, b_yt, b_y32, b_rollt, o_d, D, P, True, True, ROLL_BY_GATHER, DTYPE, PRECISION)
            b_next = b_next + (tl.dot(b_bt, b_f, b_s[r], input_precision=PRECISION),)
        if D == P:
            b_o *= scale
            b_o = tl.dot(b_x, tl.trans(b_s[P // 2 + 1]).to(DTYPE), b_o, input_precision=PRECISION)
            b_o *= scale
        b_f = reader_features(P // 2, b_x, b_roll, P, ROLL_BY_GATHER, PRECISION)
        b_f = half_roll(b_f, o_d, D, P, DTYPE, False)
        b_sf = b_s[P // 2] * coef_columns(P // 2, scale, D, P, True)[None, :]
        b_o = tl.dot(b_f, tl.trans(b_sf).to(DTYPE), b_o, input_precision=PRECISION)
        if not WIDE_LAST:
            b_s = _grow_rest(b_next, b_s, b_bt, b_yt, b_y32, b_rollt, o_d, D, P, ROLL_BY_GATHER, DTYPE, PRECISION)

        # tokens of this chunk
        # [BLOCK_C, BLOCK_C]
        b_w = _one_plus_s(b_x, b_yt, scale, D, P, PRECISION)
        b_w = tl.where(_visible(o_c, REVERSE), 0.5 * (b_w * b_w) + 0.5, 0.0)
        if HAS_MASK:
            b_w = tl.where(m_t[None, :], b_w, 0.0)
        b_o = tl.dot(b_w.to(DTYPE), b_b, b_o, input_precision=PRECISION)
        m_row = o_c < left
        if not REVERSE:
            b_z = normaliser(b_x, b_m, b_n, count, scale, D, P, PRECISION)
            b_z = tl.maximum(b_z + tl.sum(b_w, axis=1), 0.5)
            b_o *= (1.0 / b_z)[:, None]
            if i_v == 0:
                tl.store(p_z + i_t * H + o_c * H, tl.where(m_t, b_z, 1.0), mask=m_row)
        if HAS_MASK:
            b_o = tl.where(m_t[:, None], b_o, 0.0)
        tl.store(p_o + i_t * (H * V) + r_o, b_o.to(p_o.dtype.element_ty), mask=m_row[:, None] & m_v[None, :])

        if not REVERSE:
            b_m, b_n = grow_moment(b_m, b_n, b_y32.to(DTYPE), b_y, D, P, PRECISION)
            if HAS_MASK:
                count += tl.sum(m_t.to(tl.float32), axis=0)
            else:
                count += tl.minimum(left, BLOCK_C).to(tl.float32)
        if WIDE_LAST:
            b_s = _grow_rest(b_next, b_s, b_bt, b_yt, b_y32, b_rollt, o_d, D, P, ROLL_BY_GATHER, DTYPE, PRECISION)

    if HAS_FINAL:
        if slot < 0:
            p_state = p_final + (i_n.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
            store_state(p_state, b_s, o_v, V, scale, sqrt_scale, D, P, F_PAD, REVERSE)
            if not REVERSE:
                p_row = p_state + V * F_PAD
                store_moment(p_row, b_m, b_n, count, i_v == 0, scale, sqrt_scale, D, P, F_PAD, BLOCK_C, False)


@triton.constexpr_function
def first_tile(group, groups, tiles):
    """Of the features that a group of programs has, of as many groups."""
    return (group * tiles + groups - 1) // groups


@triton.jit
def _grow_slope(
    b_s,
    b_b,
    b_yt,
    b_y32,
    b_rollt,
    o_d,
    FIRST_TILE: tl.constexpr,
    END_TILE: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    ROLL_BY_GATHER: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The tiles FIRST_TILE to END_TILE of a state [P, BLOCK_V] take in a chunk."""
    b_next = ()
    for r in tl.static_range(FIRST_TILE, END_TILE):
        # [P, BLOCK_C]
        b_f = source_features(r, b_yt, b_y32, b_rollt, o_d, D, P, False, False, ROLL_BY_GATHER, DTYPE, PRECISION)
        b_next = b_next + (tl.dot(b_f, b_b, b_s[r - FIRST_TILE], input_precision=PRECISION),)
    return b_next


@triton.jit
def _grow_slope_moment(
    b_m,
    b_n,
    count,
    b_y,
    b_y32,
    b_e,
    D: tl.constexpr,
    P: tl.constexpr,
    REVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if REVERSE:
        b_y = (b_y.to(tl.float32) * b_e[:, None]).to(DTYPE)
        count += tl.sum(b_e, axis=0)
    b_m, b_n = grow_moment(b_m, b_n, b_y32.to(DTYPE), b_y, D, P, PRECISION)
    return b_m, b_n, count


@triton.jit
def _slope_of_tiles(
    p_x,
    p_y,
    p_a,
    p_b,
    p_e,
    p_mask,
    p_state,
    m_state,
    p_dx,
    p_last,
    m_last,
    p_table,
    scale,
    sqrt_scale,
    H,
    start,
    end,
    i_v,
    stride_xt,
    stride_yt,
    stride_at,
    stride_bt,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROLL_BY_GATHER: tl.constexpr,
    WIDE_LAST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    REVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A segment for one block of V and one group of tiles; the last group has the tokens of a chunk and the normaliser.
    Pointers are those of the row and head."""
    FIRST_TILE: tl.constexpr = first_tile(GROUP, GROUPS, num_tiles(D, P))
    END_TILE: tl.constexpr = first_tile(GROUP + 1, GROUPS, num_tiles(D, P))
    IS_LAST: tl.constexpr = GROUP == GROUPS - 1
    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, P)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    r_rowx = o_c * stride_xt * 8
    r_rowy = o_c * stride_yt * 8
    r_x = r_rowx[:, None] + o_d[None, :]
    r_y = r_rowy[:, None] + o_d[None, :]
    r_yt = r_rowy[None, :] + o_d[:, None]
    r_a = o_c[:, None] * stride_at * 8 + o_v[None, :]
    r_b = o_c[:, None] * stride_bt * 8 + o_v[None, :]
    r_bt = o_c[None, :] * stride_bt * 8 + o_v[:, None]
    r_dx = o_c[:, None] * (H * D) + o_d[None, :]
    e_end = tl.where(i_v == 0, BLOCK_C, 0)

    v_state = tl.where(m_state, V, 0)
    b_s = ()
    for r in tl.static_range(FIRST_TILE, END_TILE):
        # [P, BLOCK_V]
        b_s = b_s + (load_state(p_state, r, o_v, v_state, scale, sqrt_scale, D, P, F_PAD, REVERSE, True, False),)
    if IS_LAST:
        # [P, P], [BLOCK_C, P] and a number
        p_row = p_state + V * F_PAD
        b_m, b_n, count = load_moment(p_row, m_state & (i_v == 0), scale, sqrt_scale, D, P, BLOCK_C, REVERSE)
    b_roll = load_rolls(p_table, P, False)
    b_rollt = load_rolls(p_table, P, True)

    chunks = tl.cdiv(end - start, BLOCK_C)
    for i in range(chunks):
        i_c = i
        if REVERSE:
            i_c = chunks - 1 - i
        i_t = (start + i_c * BLOCK_C).to(tl.int64)
        left = (end - i_t).to(tl.int32)
        m_t = exists(o_c, left, p_mask + i_t, HAS_MASK)
        # [BLOCK_C, P] x 2, [P, BLOCK_C], [BLOCK_C, BLOCK_V] x 2, [BLOCK_V, BLOCK_C], [BLOCK_C]
        p_xc = p_x + i_t * stride_xt * 8
        p_yc = p_y + i_t * stride_yt * 8
        b_x = load_x(p_xc, r_x, m_t, o_d, D, P, DTYPE)
        b_yt = load_xt(p_yc, r_yt, m_t, o_d, D, P, DTYPE)
        b_y32 = columns(b_yt, b_rollt, ROLL_BY_GATHER, PRECISION)
        b_a = tl.load(p_a + i_t * stride_at * 8 + r_a, mask=m_t[:, None] & m_v[None, :], other=0.0).to(DTYPE)
        b_b = tl.load(p_b + i_t * stride_bt * 8 + r_b, mask=m_t[:, None] & m_v[None, :], other=0.0).to(DTYPE)
        if IS_LAST:
            b_y = load_x(p_yc, r_y, m_t, o_d, D, P, DTYPE)
            b_bt = tl.load(p_b + i_t * stride_bt * 8 + r_bt, mask=m_t[None, :] & m_v[:, None], other=0.0).to(DTYPE)
            b_e = tl.load(p_e + i_t * H + o_c * H, mask=m_t & (o_c < e_end), other=0.0)
        b_x32 = b_x.to(tl.float32)

        # tokens before this chunk, through the state: dx_a += dphi_r x_(a + r), dx_(a + r) += dphi_r x_a
        b_dx = tl.zeros([BLOCK_C, P], dtype=tl.float32)
        b_back = tl.zeros([BLOCK_C, P], dtype=tl.float32)
        for r in tl.static_range(FIRST_TILE, END_TILE):
            if r <= P // 2:
                # [BLOCK_C, P]
                b_dphi = tl.dot(b_a, tl.trans(b_s[r - FIRST_TILE]).to(DTYPE), input_precision=PRECISION)
                if D < P:
                    b_dphi *= coef_columns(r, scale, D, P, False)[None, :]
                if r == P // 2:
                    b_dphi = tl.where((o_d < P // 2)[None, :], b_dphi, 0.0)
                if r == 0:
                    b_dx += 2.0 * (b_dphi * b_x32)
                else:
                    if ROLL_BY_GATHER:
                        b_dx += b_dphi * rolled(b_x, r, P, 1)
                        b_back += rolled(b_dphi * b_x32, P - r, P, 1)
                    else:
                        b_dx += b_dphi * tl.dot(b_x, b_roll[r], input_precision=PRECISION)
                        b_back = tl.dot((b_dphi * b_x32).to(DTYPE), b_rollt[r], b_back, input_precision=PRECISION)
        b_dx += b_back
        if D == P:
            b_dx *= scale
            if IS_LAST:
                b_dx = tl.dot(b_a, tl.trans(b_s[P // 2 + 1 - FIRST_TILE]).to(DTYPE), b_dx, input_precision=PRECISION)
            b_dx *= scale
        if IS_LAST:
            b_slope = normaliser_slope(b_x, b_m, b_n, scale, D, P, PRECISION)
            if REVERSE:
                b_dx += b_slope
            else:
                b_dx += b_e[:, None] * b_slope

        if WIDE_LAST:
            b_s = _grow_slope(
                b_s, b_b, b_yt, b_y32, b_rollt, o_d, FIRST_TILE, END_TILE, D, P, ROLL_BY_GATHER, DTYPE, PRECISION
            )
            if IS_LAST:
                b_m, b_n, count = _grow_slope_moment(b_m, b_n, count, b_y, b_y32, b_e, D, P, REVERSE, DTYPE, PRECISION)

        if IS_LAST:
            # tokens of this chunk
            # [BLOCK_C, BLOCK_C]
            b_dw = tl.dot(b_a, b_bt, input_precision=PRECISION)
            if REVERSE:
                b_dw += b_e[None, :]
            else:
                b_dw += b_e[:, None]
            b_dw *= _one_plus_s(b_x, b_yt, scale, D, P, PRECISION) * scale
            b_dw = tl.where(_visible(o_c, REVERSE), b_dw, 0.0)
            b_dx = tl.dot(b_dw.to(DTYPE), b_y, b_dx, input_precision=PRECISION)
        if HAS_MASK:
            b_dx = tl.where(m_t[:, None], b_dx, 0.0)
        m_dx = (o_c < left)[:, None] & (o_d < D)[None, :]
        tl.store(p_dx + i_t * (H * D) + r_dx, b_dx.to(p_dx.dtype.element_ty), mask=m_dx)

        if not WIDE_LAST:
            b_s = _grow_slope(
                b_s, b_b, b_yt, b_y32, b_rollt, o_d, FIRST_TILE, END_TILE, D, P, ROLL_BY_GATHER, DTYPE, PRECISION
            )
            if IS_LAST:
                b_m, b_n, count = _grow_slope_moment(b_m, b_n, count, b_y, b_y32, b_e, D, P, REVERSE, DTYPE, PRECISION)

    if HAS_FINAL:
        if IS_LAST:
            p_row = p_last + V * F_PAD
            store_moment(p_row, b_m, b_n, count, m_last & (i_v == 0), scale, sqrt_scale, D, P, F_PAD, BLOCK_C, True)


@triton.jit(do_not_specialize=_DYNAMIC)
def taylor_attention_slope_kernel(
    p_q,
    p_k,
    p_g,
    p_v,
    p_e,
    p_mask,
    p_init,
    p_slots,
    p_dfinal,
    p_dslots,
    p_dq,
    p_dk,
    p_dinit,
    p_table,
    p_cu,
    p_cut,
    scale,
    sqrt_scale,
    T,
    N,
    H,
    SEGMENT,
    PER_DOC,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_vb,
    stride_vt,
    stride_vh,
    ROWS,
    FIRST_PART,
    PARTS,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUPS: tl.constexpr,
    ROLL_BY_GATHER: tl.constexpr,
    WIDE_LAST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_INIT: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    HAS_DINIT: tl.constexpr,
    PACKED: tl.constexpr,
    TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq_i = sum_j (g_i . v_j + e_i) dw(q_i, k_j) / dq_i over j <= i; dk_i = sum_j (v_i . g_j + e_j) dw(k_i, q_j) / dk_i
    over j >= i.

    Each block of V and each group of features gives a share [NV * GROUPS, B, T, H, D] of either: what the features of a
    group cost is paid once for all of a wide block. e is in one share. A launch does PARTS of the 2 * GROUPS parts, those
    of dq or of dk or all, from FIRST_PART on.
    """
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    # torch.compile passes Python floats as float64
    scale = tl.cast(scale, tl.float32)
    sqrt_scale = tl.cast(sqrt_scale, tl.float32)
    i_part = FIRST_PART + tl.program_id(0) % PARTS
    i_v = tl.program_id(0) // PARTS % NV
    i_h = (tl.program_id(0) // (PARTS * NV)) % H
    i_s = tl.program_id(0) // (PARTS * NV) // H
    if TABLE:
        if tl.load(p_cut + 3 * N + i_s) >= N:
            return
    i_n, i_b, start, end, slot, _, _ = locate(i_s, p_cu, p_cut, T, N, SEGMENT, PER_DOC, PACKED, TABLE)

    p_q += (i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh) * 8
    p_k += (i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh) * 8
    p_g += (i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh) * 8
    p_v += (i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh) * 8
    p_mask += i_b.to(tl.int64) * T
    p_e += i_b.to(tl.int64) * T * H + i_h
    o_share = ((i_v * GROUPS + i_part % GROUPS).to(tl.int64) * ROWS + i_b.to(tl.int64) * T * H + i_h) * D
    p_last = p_dinit + (i_n.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
    # of a cut document, the scan writes it
    m_last = slot < 0
    for part in tl.static_range(2 * GROUPS):
        if i_part == part:
            if part < GROUPS:
                p_x = p_q
                p_y = p_k
                p_a = p_g
                p_b = p_v
                p_dx = p_dq + o_share
                stride_xt = stride_qt
                stride_yt = stride_kt
                stride_at = stride_gt
                stride_bt = stride_vt
                p_state, m_state = _start(p_init, p_slots, i_n, slot, i_h, H, (V + 1) * F_PAD, HAS_INIT)
            else:
                p_x = p_k
                p_y = p_q
                p_a = p_v
                p_b = p_g
                p_dx = p_dk + o_share
                stride_xt = stride_kt
                stride_yt = stride_qt
                stride_at = stride_vt
                stride_bt = stride_gt
                p_state, m_state = _start(p_dfinal, p_dslots, i_n, slot, i_h, H, (V + 1) * F_PAD, HAS_DFINAL)
            _slope_of_tiles(
                p_x,
                p_y,
                p_a,
                p_b,
                p_e,
                p_mask,
                p_state,
                m_state,
                p_dx,
                p_last,
                m_last,
                p_table,
                scale,
                sqrt_scale,
                H,
                start,
                end,
                i_v,
                stride_xt,
                stride_yt,
                stride_at,
                stride_bt,
                part % GROUPS,
                GROUPS,
                D,
                V,
                F_PAD,
                P,
                BLOCK_C,
                BLOCK_V,
                ROLL_BY_GATHER,
                WIDE_LAST,
                HAS_MASK,
                HAS_DINIT and part >= GROUPS,
                part >= GROUPS,
                DTYPE,
                PRECISION,
            )


@triton.jit(do_not_specialize=_DYNAMIC)
def taylor_attention_partial_kernel(
    p_y,
    p_b,
    p_mask,
    p_e,
    p_slots,
    p_table,
    p_cu,
    p_cut,
    scale,
    sqrt_scale,
    T,
    N,
    H,
    SEGMENT,
    PER_DOC,
    stride_yb,
    stride_yt,
    stride_yh,
    stride_bb,
    stride_bt,
    stride_bh,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROLL_BY_GATHER: tl.constexpr,
    WIDE_LAST: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    TABLE: tl.constexpr,
    EDGE: tl.constexpr,
    GRADIENT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one segment adds to its document's state (y, b = key, value), or, as GRADIENT, to the state's gradient
    (y, b = query, do / z, and e for the normaliser). EDGE: also the segment nobody of the document reads."""
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    # torch.compile passes Python floats as float64
    scale = tl.cast(scale, tl.float32)
    sqrt_scale = tl.cast(sqrt_scale, tl.float32)
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_s = tl.program_id(0) // NV // H
    if TABLE:
        if tl.load(p_cut + 3 * N + i_s) >= N:
            return
    _, i_b, start, end, slot, is_first, is_last = locate(i_s, p_cu, p_cut, T, N, SEGMENT, PER_DOC, PACKED, TABLE)
    if slot < 0:
        return
    if not EDGE:
        if GRADIENT:
            if is_first:
                return
        else:
            if is_last:
                return

    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, P)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    p_y += (i_b.to(tl.int64) * stride_yb + i_h.to(tl.int64) * stride_yh) * 8
    p_b += (i_b.to(tl.int64) * stride_bb + i_h.to(tl.int64) * stride_bh) * 8
    r_rowy = o_c * stride_yt * 8
    r_y = r_rowy[:, None] + o_d[None, :]
    r_yt = r_rowy[None, :] + o_d[:, None]
    r_bt = o_c[None, :] * stride_bt * 8 + o_v[:, None]
    p_mask += i_b.to(tl.int64) * T
    p_e += i_b.to(tl.int64) * T * H + i_h

    b_s = ()
    for _ in tl.static_range(num_tiles(D, P)):
        b_s = b_s + (tl.zeros([BLOCK_V, P], dtype=tl.float32),)
    b_m = tl.zeros([P, P], dtype=tl.float32)
    b_n = tl.zeros([BLOCK_C, P], dtype=tl.float32)
    count = 0.0
    b_rollt = load_rolls(p_table, P, True)
    for i_c in range(tl.cdiv(end - start, BLOCK_C)):
        i_t = (start + i_c * BLOCK_C).to(tl.int64)
        left = (end - i_t).to(tl.int32)
        m_t = exists(o_c, left, p_mask + i_t, HAS_MASK)
        # [BLOCK_C, P] x 2, [P, BLOCK_C], [BLOCK_V, BLOCK_C]
        p_yc = p_y + i_t * stride_yt * 8
        b_y = load_x(p_yc, r_y, m_t, o_d, D, P, DTYPE)
        b_yt = load_xt(p_yc, r_yt, m_t, o_d, D, P, DTYPE)
        b_y32 = columns(b_yt, b_rollt, ROLL_BY_GATHER, PRECISION)
        b_bt = tl.load(p_b + i_t * stride_bt * 8 + r_bt, mask=m_t[None, :] & m_v[:, None], other=0.0).to(DTYPE)
        b_next = ()
        for r in tl.static_range(P // 2):
            b_f = source_features(r, b_yt, b_y32, b_rollt, o_d, D, P, True, True, ROLL_BY_GATHER, DTYPE, PRECISION)
            b_next = b_next + (tl.dot(b_bt, b_f, b_s[r], input_precision=PRECISION),)
        if not WIDE_LAST:
            b_s = _grow_rest(b_next, b_s, b_bt, b_yt, b_y32, b_rollt, o_d, D, P, ROLL_BY_GATHER, DTYPE, PRECISION)
        # [BLOCK_C]: what a token counts for in the normaliser
        b_e = m_t.to(tl.float32)
        if GRADIENT:
            b_e = tl.load(p_e + i_t * H + o_c * H, mask=m_t, other=0.0)
            b_y = (b_y.to(tl.float32) * b_e[:, None]).to(DTYPE)
        b_m, b_n = grow_moment(b_m, b_n, b_y32.to(DTYPE), b_y, D, P, PRECISION)
        count += tl.sum(b_e, axis=0)
        if WIDE_LAST:
            b_s = _grow_rest(b_next, b_s, b_bt, b_yt, b_y32, b_rollt, o_d, D, P, ROLL_BY_GATHER, DTYPE, PRECISION)

    p_state = p_slots + (slot.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
    store_state(p_state, b_s, o_v, V, scale, sqrt_scale, D, P, F_PAD, GRADIENT)
    p_row = p_state + V * F_PAD
    store_moment(p_row, b_m, b_n, count, i_v == 0, scale, sqrt_scale, D, P, F_PAD, BLOCK_C, GRADIENT)


@triton.jit(do_not_specialize=_DYNAMIC)
def taylor_attention_scan_kernel(
    p_slots,
    p_init,
    p_final,
    p_cut,
    N,
    PER_DOC,
    H,
    SIZE: tl.constexpr,
    F: tl.constexpr,
    F_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_INIT: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    TABLE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Partial sums of a document's segments -> the state each segment starts from, in place; the total -> p_final."""
    NB: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_x = tl.program_id(0) % NB
    i_h = (tl.program_id(0) // NB) % H
    i_n = tl.program_id(0) // NB // H
    if TABLE:
        slot = tl.load(p_cut + N + i_n)
        count = tl.load(p_cut + 2 * N + i_n)
        if slot < 0:
            return
    else:
        slot = i_n * PER_DOC
        count = PER_DOC
    o_x = i_x * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < SIZE
    o_doc = (i_n.to(tl.int64) * H + i_h) * SIZE
    b_carry = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_INIT:
        b_carry += tl.load(p_init + o_doc + o_x, mask=m_x & (o_x % F_PAD < F), other=0.0)
    for i in tl.range(count, num_stages=4):
        i_slot = slot + i
        # the last partial sum feeds only the total: it is not computed when nobody wants that
        m_read = i < count - 1
        if HAS_FINAL:
            m_read = i < count
        if REVERSE:
            i_slot = slot + count - 1 - i
        p_x = p_slots + (i_slot.to(tl.int64) * H + i_h) * SIZE + o_x
        b_x = tl.load(p_x, mask=o_x < tl.where(m_read, SIZE, 0), other=0.0)
        tl.store(p_x, b_carry, mask=m_x)
        b_carry += b_x
    if HAS_FINAL:
        tl.store(p_final + o_doc + o_x, b_carry, mask=m_x)


@triton.jit(do_not_specialize=_DYNAMIC)
def taylor_attention_rows_kernel(
    p_o,
    p_do,
    p_z,
    p_mask,
    p_g,
    p_e,
    ROWS,
    T,
    H,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dov,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """g_i = do_i / z_i and e_i = dL / dz_i = -(g_i . o_i); 0 for a token that does not exist.

    UNIT: 8 if do is contiguous in its last dimension and its other strides come in units of 8 elements, else 1.
    """
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_v = tl.arange(0, BLOCK_V)
    m_r = o_r < ROWS
    i_h = o_r % H
    i_b = o_r // H // T
    i_t = o_r // H % T
    m_t = m_r
    if HAS_MASK:
        m_t = m_r & (tl.load(p_mask + o_r // H, mask=m_r, other=0) != 0)
    m_v = (o_v < V)[None, :]
    p_do += ((i_b * stride_dob + i_t * stride_dot + i_h * stride_doh) * UNIT)[:, None]
    if UNIT == 1:
        p_do += o_v[None, :] * stride_dov
    else:
        p_do += o_v[None, :]
    # [BLOCK_R, BLOCK_V]
    b_o = tl.load(p_o + o_r[:, None] * V + o_v[None, :], mask=m_t[:, None] & m_v, other=0.0).to(tl.float32)
    b_g = tl.load(p_do, mask=m_t[:, None] & m_v, other=0.0).to(tl.float32)
    b_g /= tl.load(p_z + o_r, mask=m_r, other=1.0)[:, None]
    tl.store(p_g + o_r[:, None] * V + o_v[None, :], b_g.to(p_g.dtype.element_ty), mask=m_r[:, None] & m_v)
    tl.store(p_e + o_r, -tl.sum(b_o * b_g, axis=1), mask=m_r)


@triton.jit(do_not_specialize=_DYNAMIC)
def sum_shares_kernel(p_share_q, p_share_k, p_dq, p_dk, COUNT, FIRST_OUT, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    """[SHARES, COUNT] fp32 -> [COUNT], in a fixed order: of dq (0) and dk (1), from FIRST_OUT on."""
    count = tl.cast(COUNT, tl.int64)
    blocks = (count + BLOCK - 1) // BLOCK
    o_x = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < count
    is_dq = FIRST_OUT + tl.program_id(0) // blocks == 0
    p_share = tl.where(is_dq, p_share_q, p_share_k)
    p_out = tl.where(is_dq, p_dq, p_dk)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(SHARES):
        b_sum += tl.load(p_share + i * count + o_x, mask=m_x, other=0.0)
    tl.store(p_out + o_x, b_sum.to(p_out.dtype.element_ty), mask=m_x)
