# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Causal linear attention with the second-order Taylor feature map (Based): forward and backward for whole sequences.

Layout: query, key [B, T, H, D]; value, output [B, T, H, V]; state fp32 [N, H, V + 1, F_PAD], row V is the normaliser.

Maths:  w_ij = 1 + s + s^2 / 2,  s = scale q_i . k_j,  j <= i;   o_i = sum_j w_ij v_j / z_i,  z_i = max(sum_j w_ij, 0.5)
        inside a chunk of BLOCK_C tokens by the quadratic form, over earlier chunks through w_ij = phi(q_i) . phi(k_j) and
        the running state  S = sum_j phi(k_j) v_j^T [F, V],  N = sum_j phi(k_j) [F], kept in registers in fp32.

A program owns one (segment, head, block of V). Factors of phi are picked with one-hot products on the tensor cores.
Backward: dq walks forward with S again; dk, dv walk backward with dS = sum_i phi(q_i) do_i^T / z_i. Nothing of size T x F
is stored, and no sum depends on the order in which programs run, so results repeat bit by bit.
"""

# ruff: noqa: RUF005, RUF059, SIM102, SIM300, B007, E501
# Triton compiles `a + (b,)` and nested ifs on constants, not `(*a, b)` nor an `and` of a constant and a GPU value.

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import check_sequence_inputs, device_guard, feature_count, interpreted, vector_rows
from .segments import cut
from .taylor_features import (
    _one_hot_table_kernel,
    factors,
    feature_coef,
    load_moment,
    load_one_hots,
    load_state,
    load_y,
    moment_slope,
    moment_value,
    phi_columns,
    store_moment,
    store_state,
    times_moment,
)


# What changes with batch, length or memory layout must not cause a new compilation.
_DYNAMIC = ["T", "SEGMENT", "PER_DOC", "N", "H", "ROWS"] + [
    f"stride_{x}{d}" for x in ("q", "k", "v", "do") for d in "bth"
]


@triton.jit
def _locate(i_s, p_cu, p_doc, p_first, p_slot, T, SEGMENT, PER_DOC, PACKED: tl.constexpr, TABLE: tl.constexpr):
    """Segment i_s -> document, batch row, first and last+1 token, state slot (-1: the document is a single segment)."""
    if TABLE:
        i_n = tl.load(p_doc + i_s)
        i_part = i_s - tl.load(p_first + i_n)
        slot = tl.load(p_slot + i_n)
        slot = tl.where(slot < 0, -1, slot + i_part)
    else:
        i_n = i_s // PER_DOC
        i_part = i_s % PER_DOC
        slot = tl.where(PER_DOC > 1, i_s, -1)
    if PACKED:
        i_b = i_n * 0
        bos = tl.load(p_cu + i_n)
        eos = tl.load(p_cu + i_n + 1)
    else:
        i_b = i_n
        bos = i_n * 0
        eos = T
    start = bos + i_part * SEGMENT
    end = tl.minimum(start + SEGMENT, eos)
    return i_n, i_b, start, end, slot, i_part == 0, end == eos


@triton.jit
def _causal(o_c, i_c, TRANSPOSED: tl.constexpr):
    """[BLOCK_C, BLOCK_C] bool, query row >= key column. Through i_c, so that it is not kept in registers over chunks."""
    o_i = o_c + i_c
    if TRANSPOSED:
        return o_i[:, None] <= o_i[None, :]
    else:
        return o_i[:, None] >= o_i[None, :]


@triton.jit
def _exists(o_c, left, p_mask, HAS_MASK: tl.constexpr):
    """[BLOCK_C] bool: the token lies in the segment, of which `left` are left, and is not masked."""
    m_t = o_c < left
    if HAS_MASK:
        m_t = m_t & (tl.load(p_mask + o_c, mask=m_t, other=0) != 0)
    return m_t


@triton.jit(do_not_specialize=_DYNAMIC)
def _taylor_attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_init,
    p_slots,
    p_o,
    p_z,
    p_final,
    p_table,
    p_cu,
    p_doc,
    p_first,
    p_slot,
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
    stride_vb,
    stride_vt,
    stride_vh,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_INIT: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    # torch.compile passes Python floats as float64
    scale = tl.cast(scale, tl.float32)
    sqrt_scale = tl.cast(sqrt_scale, tl.float32)
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_s = tl.program_id(0) // NV // H
    if TABLE:
        if tl.load(p_doc + i_s) >= N:
            return
    i_n, i_b, start, end, slot, _, _ = _locate(i_s, p_cu, p_doc, p_first, p_slot, T, SEGMENT, PER_DOC, PACKED, TABLE)

    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    o_y = tl.arange(0, BLOCK_Y)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_d = o_d < D
    m_v = o_v < V
    # strides come in units of 8 elements: 16-byte loads without a compilation per layout
    row = o_c[:, None]
    p_q += (i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh) * 8
    p_k += (i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh) * 8
    p_v += (i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh) * 8
    r_q = row * stride_qt * 8 + o_d[None, :]
    r_qy = row * stride_qt * 8 + o_y[None, :]
    r_k = row * stride_kt * 8 + o_d[None, :]
    r_ky = row * stride_kt * 8 + o_y[None, :]
    r_v = row * stride_vt * 8 + o_v[None, :]
    r_o = row * (H * V) + o_v[None, :]
    p_mask += i_b.to(tl.int64) * T
    p_o += (i_b.to(tl.int64) * T * H + i_h) * V
    p_z += i_b.to(tl.int64) * T * H + i_h

    # the state this segment starts from
    p_state = p_init + (i_n.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
    m_state = slot >= 0
    if HAS_INIT:
        m_state = slot >= -1
    if slot >= 0:
        p_state = p_slots + (slot.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
    v_state = tl.where(m_state, V, 0)
    b_s = ()
    for i_f in tl.static_range(TILES):
        # [BLOCK_F, BLOCK_V]
        b_s = b_s + (load_state(p_state, i_f, o_v, v_state, scale, sqrt_scale, D, F_PAD, BLOCK_F, False),)
    # [BLOCK_Y, BLOCK_Y]
    b_n = load_moment(p_state + V * F_PAD, m_state, scale, sqrt_scale, D, BLOCK_Y, BLOCK_Y, True, False)

    for i_c in range(tl.cdiv(end - start, BLOCK_C)):
        i_t = (start + i_c * BLOCK_C).to(tl.int64)
        left = (end - i_t).to(tl.int32)
        m_t = _exists(o_c, left, p_mask + i_t, HAS_MASK)
        m_td = m_t[:, None] & m_d[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        # [BLOCK_C, BLOCK_D], [BLOCK_C, BLOCK_Y] x 2, [BLOCK_C, BLOCK_V]
        b_q = tl.load(p_q + i_t * stride_qt * 8 + r_q, mask=m_td, other=0.0).to(DTYPE)
        b_qy = load_y(p_q + i_t * stride_qt * 8, r_qy, m_t, o_y, D, DTYPE)
        b_k = tl.load(p_k + i_t * stride_kt * 8 + r_k, mask=m_td, other=0.0).to(DTYPE)
        b_ky = load_y(p_k + i_t * stride_kt * 8, r_ky, m_t, o_y, D, DTYPE)
        b_v = tl.load(p_v + i_t * stride_vt * 8 + r_v, mask=m_tv, other=0.0).to(DTYPE)
        b_kt = tl.trans(b_k)
        b_ea = ()
        b_eb = ()
        for i_f in tl.static_range(TILES):
            # [BLOCK_F, BLOCK_D] or [BLOCK_F, BLOCK_Y]
            b_a, b_b = load_one_hots(p_table, i_f, D, BLOCK_D, BLOCK_Y, BLOCK_F, TILES, True)
            b_ea = b_ea + (b_a,)
            b_eb = b_eb + (b_b,)

        # keys before this chunk, through the state
        b_o = tl.zeros([BLOCK_C, BLOCK_V], dtype=tl.float32)
        for i_f in tl.static_range(TILES):
            # [BLOCK_C, BLOCK_F]
            b_a, b_b = factors(b_q, b_qy, b_ea[i_f], b_eb[i_f], i_f, D, BLOCK_F, PRECISION)
            b_phi = (b_a * feature_coef(i_f, scale, D, BLOCK_F)[None, :] * b_b).to(DTYPE)
            b_o = tl.dot(b_phi, b_s[i_f].to(DTYPE), b_o, input_precision=PRECISION)
        b_z = times_moment(b_qy, moment_value(b_n, scale, D, BLOCK_Y), PRECISION)
        b_z = tl.sum(b_z * b_qy.to(tl.float32), axis=1)

        # keys of this chunk
        # [BLOCK_C, BLOCK_C]
        b_w = tl.dot(b_q, b_kt, input_precision=PRECISION) * scale
        b_w = tl.where(_causal(o_c, i_c, False), 1.0 + b_w * (1.0 + 0.5 * b_w), 0.0)
        if HAS_MASK:
            b_w = tl.where(m_t[None, :], b_w, 0.0)
        b_o = tl.dot(b_w.to(DTYPE), b_v, b_o, input_precision=PRECISION)
        b_z = tl.maximum(b_z + tl.sum(b_w, axis=1), 0.5)
        b_o *= (1.0 / b_z)[:, None]
        if HAS_MASK:
            b_o = tl.where(m_t[:, None], b_o, 0.0)
        m_row = o_c < left
        tl.store(p_o + i_t * (H * V) + r_o, b_o.to(p_o.dtype.element_ty), mask=m_row[:, None] & m_v[None, :])
        if i_v == 0:
            tl.store(p_z + i_t * H + o_c * H, tl.where(m_t, b_z, 1.0), mask=m_row)

        b_s_next = ()
        for i_f in tl.static_range(TILES):
            # [BLOCK_F, BLOCK_C]
            b_phi = phi_columns(b_k, b_ky, b_ea[i_f], b_eb[i_f], i_f, D, BLOCK_F, PRECISION).to(DTYPE)
            b_s_next = b_s_next + (tl.dot(b_phi, b_v, b_s[i_f], input_precision=PRECISION),)
        b_s = b_s_next
        b_n = tl.dot(tl.trans(b_ky), b_ky, b_n, input_precision=PRECISION)

    if HAS_FINAL:
        if slot < 0:
            p_state = p_final + (i_n.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
            for i_f in tl.static_range(TILES):
                store_state(p_state, b_s[i_f], i_f, o_v, V, scale, sqrt_scale, D, F_PAD, BLOCK_F, False)
            p_row = p_state + V * F_PAD
            store_moment(p_row, b_n, 0.0, i_v == 0, scale, sqrt_scale, D, F_PAD, BLOCK_Y, BLOCK_Y, True, False)


@triton.jit(do_not_specialize=_DYNAMIC)
def _taylor_attention_partial_kernel(
    p_x,
    p_y,
    p_mask,
    p_z,
    p_e,
    p_slots,
    p_table,
    p_cu,
    p_doc,
    p_first,
    p_slot,
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
    stride_vb,
    stride_vt,
    stride_vh,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    TABLE: tl.constexpr,
    EDGE: tl.constexpr,
    GRADIENT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one segment adds to its document's state (x = key, y = value), or, as GRADIENT, to the state's gradient
    (x = query, y = output gradient, row e for the normaliser). EDGE: also the segment nobody of the document reads."""
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    # torch.compile passes Python floats as float64
    scale = tl.cast(scale, tl.float32)
    sqrt_scale = tl.cast(sqrt_scale, tl.float32)
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_s = tl.program_id(0) // NV // H
    if TABLE:
        if tl.load(p_doc + i_s) >= N:
            return
    i_n, i_b, start, end, slot, is_first, is_last = _locate(
        i_s, p_cu, p_doc, p_first, p_slot, T, SEGMENT, PER_DOC, PACKED, TABLE
    )
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
    o_d = tl.arange(0, BLOCK_D)
    o_y = tl.arange(0, BLOCK_Y)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_d = o_d < D
    m_v = o_v < V
    row = o_c[:, None]
    p_x += (i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh) * 8
    p_y += (i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh) * 8
    r_x = row * stride_qt * 8 + o_d[None, :]
    r_xy = row * stride_qt * 8 + o_y[None, :]
    r_y = row * stride_vt * 8 + o_v[None, :]
    p_mask += i_b.to(tl.int64) * T
    p_z += i_b.to(tl.int64) * T * H + i_h
    p_e += i_b.to(tl.int64) * T * H + i_h

    b_s = ()
    for i_f in tl.static_range(TILES):
        b_s = b_s + (tl.zeros([BLOCK_F, BLOCK_V], dtype=tl.float32),)
    b_n = tl.zeros([BLOCK_Y, BLOCK_Y], dtype=tl.float32)
    for i_c in range(tl.cdiv(end - start, BLOCK_C)):
        i_t = (start + i_c * BLOCK_C).to(tl.int64)
        left = (end - i_t).to(tl.int32)
        m_t = _exists(o_c, left, p_mask + i_t, HAS_MASK)
        m_td = m_t[:, None] & m_d[None, :]
        # [BLOCK_C, BLOCK_D], [BLOCK_C, BLOCK_Y], [BLOCK_C, BLOCK_V]
        b_x = tl.load(p_x + i_t * stride_qt * 8 + r_x, mask=m_td, other=0.0).to(DTYPE)
        b_xy = load_y(p_x + i_t * stride_qt * 8, r_xy, m_t, o_y, D, DTYPE)
        b_y = tl.load(p_y + i_t * stride_vt * 8 + r_y, mask=m_t[:, None] & m_v[None, :], other=0.0).to(DTYPE)
        # [BLOCK_C]: what a token counts for in the normaliser
        b_e = m_t.to(tl.float32)
        if GRADIENT:
            b_rz = 1.0 / tl.load(p_z + i_t * H + o_c * H, mask=m_t, other=1.0)
            b_e = tl.load(p_e + i_t * H + o_c * H, mask=m_t, other=0.0)
        b_ea = ()
        b_eb = ()
        for i_f in tl.static_range(TILES):
            # [BLOCK_F, BLOCK_D] or [BLOCK_F, BLOCK_Y]
            b_a, b_b = load_one_hots(p_table, i_f, D, BLOCK_D, BLOCK_Y, BLOCK_F, TILES, True)
            b_ea = b_ea + (b_a,)
            b_eb = b_eb + (b_b,)
        b_s_next = ()
        for i_f in tl.static_range(TILES):
            # [BLOCK_F, BLOCK_C]
            b_phi = phi_columns(b_x, b_xy, b_ea[i_f], b_eb[i_f], i_f, D, BLOCK_F, PRECISION)
            if GRADIENT:
                b_phi *= feature_coef(i_f, scale, D, BLOCK_F)[:, None] * b_rz[None, :]
            b_s_next = b_s_next + (tl.dot(b_phi.to(DTYPE), b_y, b_s[i_f], input_precision=PRECISION),)
        b_s = b_s_next
        b_n = tl.dot(tl.trans((b_xy.to(tl.float32) * b_e[:, None]).to(DTYPE)), b_xy, b_n, input_precision=PRECISION)

    p_state = p_slots + (slot.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
    for i_f in tl.static_range(TILES):
        store_state(p_state, b_s[i_f], i_f, o_v, V, scale, sqrt_scale, D, F_PAD, BLOCK_F, GRADIENT)
    p_row = p_state + V * F_PAD
    store_moment(p_row, b_n, 0.0, i_v == 0, scale, sqrt_scale, D, F_PAD, BLOCK_Y, BLOCK_Y, True, GRADIENT)


@triton.jit(do_not_specialize=["PER_DOC", "H"])
def _taylor_attention_scan_kernel(
    p_slots,
    p_init,
    p_final,
    p_slot,
    p_count,
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
        slot = tl.load(p_slot + i_n)
        count = tl.load(p_count + i_n)
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
    for i in range(count):
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


@triton.jit(do_not_specialize=["ROWS", "T", "H", "stride_dob", "stride_dot", "stride_doh"])
def _taylor_attention_bwd_row_kernel(
    p_o,
    p_do,
    p_z,
    p_e,
    p_mask,
    ROWS,
    T,
    H,
    stride_dob,
    stride_dot,
    stride_doh,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """e_i = dL / dz_i = -(do_i . o_i) / z_i, 0 for a token that does not exist."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_v = tl.arange(0, BLOCK_V)
    m_r = o_r < ROWS
    i_h = o_r % H
    i_b = o_r // H // T
    i_t = o_r // H % T
    m_t = m_r
    if HAS_MASK:
        m_t = m_r & (tl.load(p_mask + o_r // H, mask=m_r, other=0) != 0)
    m_tv = m_t[:, None] & (o_v < V)[None, :]
    o_do = (i_b * stride_dob + i_t * stride_dot + i_h * stride_doh) * 8
    # [BLOCK_R, BLOCK_V]
    b_o = tl.load(p_o + o_r[:, None] * V + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)
    b_do = tl.load(p_do + o_do[:, None] + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)
    b_z = tl.load(p_z + o_r, mask=m_r, other=1.0)
    tl.store(p_e + o_r, -tl.sum(b_o * b_do, axis=1) / b_z, mask=m_r)


@triton.jit(do_not_specialize=_DYNAMIC)
def _taylor_attention_bwd_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_mask,
    p_z,
    p_e,
    p_init,
    p_slots,
    p_dq,
    p_table,
    p_cu,
    p_doc,
    p_first,
    p_slot,
    scale,
    sqrt_scale,
    T,
    N,
    H,
    SEGMENT,
    PER_DOC,
    ROWS,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_INIT: tl.constexpr,
    PACKED: tl.constexpr,
    TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq; the share of block i_v of V goes to p_dq + i_v * ROWS * D."""
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    # torch.compile passes Python floats as float64
    scale = tl.cast(scale, tl.float32)
    sqrt_scale = tl.cast(sqrt_scale, tl.float32)
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_s = tl.program_id(0) // NV // H
    if TABLE:
        if tl.load(p_doc + i_s) >= N:
            return
    i_n, i_b, start, end, slot, _, _ = _locate(i_s, p_cu, p_doc, p_first, p_slot, T, SEGMENT, PER_DOC, PACKED, TABLE)

    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    o_y = tl.arange(0, BLOCK_Y)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_d = o_d < D
    m_v = o_v < V
    row = o_c[:, None]
    p_q += (i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh) * 8
    p_k += (i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh) * 8
    p_v += (i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh) * 8
    p_do += (i_b.to(tl.int64) * stride_dob + i_h.to(tl.int64) * stride_doh) * 8
    r_q = row * stride_qt * 8 + o_d[None, :]
    r_qy = row * stride_qt * 8 + o_y[None, :]
    r_k = row * stride_kt * 8 + o_d[None, :]
    r_ky = row * stride_kt * 8 + o_y[None, :]
    r_v = row * stride_vt * 8 + o_v[None, :]
    r_do = row * stride_dot * 8 + o_v[None, :]
    p_mask += i_b.to(tl.int64) * T
    p_z += i_b.to(tl.int64) * T * H + i_h
    p_e += i_b.to(tl.int64) * T * H + i_h
    p_dq += (i_v.to(tl.int64) * ROWS + i_b.to(tl.int64) * T * H + i_h) * D
    r_dq = row * (H * D) + o_d[None, :]

    p_state = p_init + (i_n.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
    m_state = slot >= 0
    if HAS_INIT:
        m_state = slot >= -1
    if slot >= 0:
        p_state = p_slots + (slot.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
    v_state = tl.where(m_state, V, 0)
    b_s = ()
    for i_f in tl.static_range(TILES):
        # [BLOCK_F, BLOCK_V]
        b_s = b_s + (load_state(p_state, i_f, o_v, v_state, scale, sqrt_scale, D, F_PAD, BLOCK_F, False),)
    # [BLOCK_Y, BLOCK_D]
    b_n = load_moment(p_state + V * F_PAD, m_state, scale, sqrt_scale, D, BLOCK_Y, BLOCK_D, False, False)

    for i_c in range(tl.cdiv(end - start, BLOCK_C)):
        i_t = (start + i_c * BLOCK_C).to(tl.int64)
        left = (end - i_t).to(tl.int32)
        m_t = _exists(o_c, left, p_mask + i_t, HAS_MASK)
        m_td = m_t[:, None] & m_d[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        # [BLOCK_C, BLOCK_D], [BLOCK_C, BLOCK_Y] x 2, [BLOCK_C, BLOCK_V] x 2, [BLOCK_C] x 2
        b_q = tl.load(p_q + i_t * stride_qt * 8 + r_q, mask=m_td, other=0.0).to(DTYPE)
        b_qy = load_y(p_q + i_t * stride_qt * 8, r_qy, m_t, o_y, D, DTYPE)
        b_k = tl.load(p_k + i_t * stride_kt * 8 + r_k, mask=m_td, other=0.0).to(DTYPE)
        b_ky = load_y(p_k + i_t * stride_kt * 8, r_ky, m_t, o_y, D, DTYPE)
        b_v = tl.load(p_v + i_t * stride_vt * 8 + r_v, mask=m_tv, other=0.0).to(DTYPE)
        b_do = tl.load(p_do + i_t * stride_dot * 8 + r_do, mask=m_tv, other=0.0).to(DTYPE)
        b_rz = 1.0 / tl.load(p_z + i_t * H + o_c * H, mask=m_t, other=1.0)
        b_e = tl.load(p_e + i_t * H + o_c * H, mask=m_t, other=0.0)
        b_e = tl.where(i_v == 0, b_e, 0.0)
        b_kt = tl.trans(b_k)
        b_ea = ()
        b_eb = ()
        for i_f in tl.static_range(TILES):
            # [BLOCK_F, BLOCK_D] or [BLOCK_F, BLOCK_Y]
            b_a, b_b = load_one_hots(p_table, i_f, D, BLOCK_D, BLOCK_Y, BLOCK_F, TILES, True)
            b_ea = b_ea + (b_a,)
            b_eb = b_eb + (b_b,)

        # keys of this chunk
        # [BLOCK_C, BLOCK_C]
        b_ds = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) * b_rz[:, None] + b_e[:, None]
        b_ds *= 1.0 + tl.dot(b_q, b_kt, input_precision=PRECISION) * scale
        b_ds = tl.where(_causal(o_c, i_c, False), b_ds * scale, 0.0)
        if HAS_MASK:
            b_ds = tl.where(m_t[None, :], b_ds, 0.0)
        # [BLOCK_C, BLOCK_D]
        b_dq = tl.dot(b_ds.to(DTYPE), b_k, input_precision=PRECISION)

        # keys before this chunk
        for i_f in tl.static_range(TILES):
            # [BLOCK_C, BLOCK_F]
            b_dphi = tl.dot(b_do, tl.trans(b_s[i_f].to(DTYPE)), input_precision=PRECISION)
            b_dphi *= b_rz[:, None] * feature_coef(i_f, scale, D, BLOCK_F)[None, :]
            b_a, b_b = factors(b_q, b_qy, b_ea[i_f], b_eb[i_f], i_f, D, BLOCK_F, PRECISION)
            b_ga, b_gb = load_one_hots(p_table, i_f, D, BLOCK_D, BLOCK_Y, BLOCK_F, TILES, False)
            b_dq = tl.dot((b_dphi * b_b).to(DTYPE), b_ga, b_dq, input_precision=PRECISION)
            b_dq = tl.dot((b_dphi * b_a).to(DTYPE), b_gb, b_dq, input_precision=PRECISION)
        b_dq += times_moment(b_qy, moment_slope(b_n, scale, D, BLOCK_Y, BLOCK_D), PRECISION) * b_e[:, None]
        if HAS_MASK:
            b_dq = tl.where(m_t[:, None], b_dq, 0.0)
        m_row = (o_c < left)[:, None] & m_d[None, :]
        tl.store(p_dq + i_t * (H * D) + r_dq, b_dq.to(p_dq.dtype.element_ty), mask=m_row)

        b_s_next = ()
        for i_f in tl.static_range(TILES):
            # [BLOCK_F, BLOCK_C]
            b_phi = phi_columns(b_k, b_ky, b_ea[i_f], b_eb[i_f], i_f, D, BLOCK_F, PRECISION).to(DTYPE)
            b_s_next = b_s_next + (tl.dot(b_phi, b_v, b_s[i_f], input_precision=PRECISION),)
        b_s = b_s_next
        b_n = tl.dot(tl.trans(b_ky), b_k, b_n, input_precision=PRECISION)


@triton.jit(do_not_specialize=_DYNAMIC)
def _taylor_attention_bwd_dkv_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_mask,
    p_z,
    p_e,
    p_dfinal,
    p_slots,
    p_dk,
    p_dv,
    p_dinit,
    p_table,
    p_cu,
    p_doc,
    p_first,
    p_slot,
    scale,
    sqrt_scale,
    T,
    N,
    H,
    SEGMENT,
    PER_DOC,
    ROWS,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    D: tl.constexpr,
    V: tl.constexpr,
    F_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    HAS_DINIT: tl.constexpr,
    PACKED: tl.constexpr,
    TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk (the share of block i_v of V at p_dk + i_v * ROWS * D), dv and the gradient of the initial state."""
    NV: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    # torch.compile passes Python floats as float64
    scale = tl.cast(scale, tl.float32)
    sqrt_scale = tl.cast(sqrt_scale, tl.float32)
    i_v = tl.program_id(0) % NV
    i_h = (tl.program_id(0) // NV) % H
    i_s = tl.program_id(0) // NV // H
    if TABLE:
        if tl.load(p_doc + i_s) >= N:
            return
    i_n, i_b, start, end, slot, _, _ = _locate(i_s, p_cu, p_doc, p_first, p_slot, T, SEGMENT, PER_DOC, PACKED, TABLE)

    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    o_y = tl.arange(0, BLOCK_Y)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_d = o_d < D
    m_v = o_v < V
    row = o_c[:, None]
    p_q += (i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh) * 8
    p_k += (i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh) * 8
    p_v += (i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh) * 8
    p_do += (i_b.to(tl.int64) * stride_dob + i_h.to(tl.int64) * stride_doh) * 8
    r_q = row * stride_qt * 8 + o_d[None, :]
    r_qy = row * stride_qt * 8 + o_y[None, :]
    r_k = row * stride_kt * 8 + o_d[None, :]
    r_ky = row * stride_kt * 8 + o_y[None, :]
    r_v = row * stride_vt * 8 + o_v[None, :]
    r_do = row * stride_dot * 8 + o_v[None, :]
    p_mask += i_b.to(tl.int64) * T
    p_z += i_b.to(tl.int64) * T * H + i_h
    p_e += i_b.to(tl.int64) * T * H + i_h
    p_dk += (i_v.to(tl.int64) * ROWS + i_b.to(tl.int64) * T * H + i_h) * D
    p_dv += (i_b.to(tl.int64) * T * H + i_h) * V
    r_dk = row * (H * D) + o_d[None, :]
    r_dv = row * (H * V) + o_v[None, :]

    # the gradient of the state this segment ends in; its normaliser row is the business of the first block of V
    p_state = p_dfinal + (i_n.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
    m_state = slot >= 0
    if HAS_DFINAL:
        m_state = slot >= -1
    if slot >= 0:
        p_state = p_slots + (slot.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
    v_state = tl.where(m_state, V, 0)
    b_s = ()
    for i_f in tl.static_range(TILES):
        # [BLOCK_F, BLOCK_V]
        b_s = b_s + (load_state(p_state, i_f, o_v, v_state, scale, sqrt_scale, D, F_PAD, BLOCK_F, True),)
    # [BLOCK_Y, BLOCK_D]
    p_row = p_state + V * F_PAD
    b_n = load_moment(p_row, m_state & (i_v == 0), scale, sqrt_scale, D, BLOCK_Y, BLOCK_D, False, True)

    # the gradient of the number of keys, where the matrix has no column for it
    b_count = tl.load(p_row + D * (D + 3) // 2, mask=m_state & (i_v == 0), other=0.0)
    chunks = tl.cdiv(end - start, BLOCK_C)
    for i_r in range(chunks):
        i_t = (start + (chunks - 1 - i_r) * BLOCK_C).to(tl.int64)
        left = (end - i_t).to(tl.int32)
        m_t = _exists(o_c, left, p_mask + i_t, HAS_MASK)
        m_td = m_t[:, None] & m_d[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        # [BLOCK_C, BLOCK_D], [BLOCK_C, BLOCK_Y] x 2, [BLOCK_C, BLOCK_V] x 2, [BLOCK_C] x 2
        b_q = tl.load(p_q + i_t * stride_qt * 8 + r_q, mask=m_td, other=0.0).to(DTYPE)
        b_qy = load_y(p_q + i_t * stride_qt * 8, r_qy, m_t, o_y, D, DTYPE)
        b_k = tl.load(p_k + i_t * stride_kt * 8 + r_k, mask=m_td, other=0.0).to(DTYPE)
        b_ky = load_y(p_k + i_t * stride_kt * 8, r_ky, m_t, o_y, D, DTYPE)
        b_v = tl.load(p_v + i_t * stride_vt * 8 + r_v, mask=m_tv, other=0.0).to(DTYPE)
        b_do = tl.load(p_do + i_t * stride_dot * 8 + r_do, mask=m_tv, other=0.0).to(DTYPE)
        b_rz = 1.0 / tl.load(p_z + i_t * H + o_c * H, mask=m_t, other=1.0)
        b_e = tl.load(p_e + i_t * H + o_c * H, mask=m_t, other=0.0)
        b_e = tl.where(i_v == 0, b_e, 0.0)
        b_qt = tl.trans(b_q)
        b_ea = ()
        b_eb = ()
        for i_f in tl.static_range(TILES):
            # [BLOCK_F, BLOCK_D] or [BLOCK_F, BLOCK_Y]
            b_a, b_b = load_one_hots(p_table, i_f, D, BLOCK_D, BLOCK_Y, BLOCK_F, TILES, True)
            b_ea = b_ea + (b_a,)
            b_eb = b_eb + (b_b,)

        # queries of this chunk; rows are keys j, columns are queries i
        m_ji = _causal(o_c, i_r, True)
        if HAS_MASK:
            m_ji = m_ji & m_t[:, None]
        # [BLOCK_C, BLOCK_C]
        b_w = tl.dot(b_k, b_qt, input_precision=PRECISION) * scale
        b_ds = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) * b_rz[None, :] + b_e[None, :]
        b_ds = tl.where(m_ji, b_ds * (1.0 + b_w) * scale, 0.0)
        b_w = tl.where(m_ji, (1.0 + b_w * (1.0 + 0.5 * b_w)) * b_rz[None, :], 0.0)
        # [BLOCK_C, BLOCK_D], [BLOCK_C, BLOCK_V]
        b_dk = tl.dot(b_ds.to(DTYPE), b_q, input_precision=PRECISION)
        b_dv = tl.dot(b_w.to(DTYPE), b_do, input_precision=PRECISION)

        # queries after this chunk
        for i_f in tl.static_range(TILES):
            b_h = b_s[i_f].to(DTYPE)
            # [BLOCK_C, BLOCK_F]
            b_a, b_b = factors(b_k, b_ky, b_ea[i_f], b_eb[i_f], i_f, D, BLOCK_F, PRECISION)
            b_dv = tl.dot((b_a * b_b).to(DTYPE), b_h, b_dv, input_precision=PRECISION)
            b_dphi = tl.dot(b_v, tl.trans(b_h), input_precision=PRECISION)
            b_ga, b_gb = load_one_hots(p_table, i_f, D, BLOCK_D, BLOCK_Y, BLOCK_F, TILES, False)
            b_dk = tl.dot((b_dphi * b_b).to(DTYPE), b_ga, b_dk, input_precision=PRECISION)
            b_dk = tl.dot((b_dphi * b_a).to(DTYPE), b_gb, b_dk, input_precision=PRECISION)
        b_dk += times_moment(b_ky, moment_slope(b_n, scale, D, BLOCK_Y, BLOCK_D), PRECISION)
        if HAS_MASK:
            b_dk = tl.where(m_t[:, None], b_dk, 0.0)
            b_dv = tl.where(m_t[:, None], b_dv, 0.0)
        m_row = (o_c < left)[:, None]
        tl.store(p_dk + i_t * (H * D) + r_dk, b_dk.to(p_dk.dtype.element_ty), mask=m_row & m_d[None, :])
        tl.store(p_dv + i_t * (H * V) + r_dv, b_dv.to(p_dv.dtype.element_ty), mask=m_row & m_v[None, :])

        b_s_next = ()
        for i_f in tl.static_range(TILES):
            # [BLOCK_F, BLOCK_C]
            b_phi = phi_columns(b_q, b_qy, b_ea[i_f], b_eb[i_f], i_f, D, BLOCK_F, PRECISION)
            b_phi *= feature_coef(i_f, scale, D, BLOCK_F)[:, None] * b_rz[None, :]
            b_s_next = b_s_next + (tl.dot(b_phi.to(DTYPE), b_do, b_s[i_f], input_precision=PRECISION),)
        b_s = b_s_next
        b_n = tl.dot(tl.trans((b_qy.to(tl.float32) * b_e[:, None]).to(DTYPE)), b_q, b_n, input_precision=PRECISION)
        if HAS_DINIT:
            b_count += tl.sum(b_e, axis=0)

    if HAS_DINIT:
        if slot < 0:
            p_state = p_dinit + (i_n.to(tl.int64) * H + i_h) * ((V + 1) * F_PAD)
            for i_f in tl.static_range(TILES):
                store_state(p_state, b_s[i_f], i_f, o_v, V, scale, sqrt_scale, D, F_PAD, BLOCK_F, True)
            p_row = p_state + V * F_PAD
            store_moment(p_row, b_n, b_count, i_v == 0, scale, sqrt_scale, D, F_PAD, BLOCK_Y, BLOCK_D, False, True)


class _Config(NamedTuple):
    BLOCK_C: int
    BLOCK_D: int
    BLOCK_Y: int
    BLOCK_F: int
    BLOCK_V: int
    TILES: int
    DTYPE: tl.dtype
    PRECISION: str
    num_warps: int
    num_stages: int


def _config(D, V, dtype):
    """Tiles for one (D, V, dtype): fixed, never raced, so that two runs of a program give the same bits.

    bf16 with D <= 16 runs on Hopper's warpgroup products: chunks of 64, 4 warps and 2 stages are the combination that is
    verified there. With 1 stage or 8 warps Triton 3.6 gives wrong gradients or faults (see the README), so change none of
    the three without the gpu tests. Tiles of 32 keep everything else off that path.
    """
    features, _ = feature_count(D)
    block_d = max(16, triton.next_power_of_2(D))
    block_y = max(16, triton.next_power_of_2(D + 1))
    # the state stays in registers
    block_v = 64 if D <= 16 else 32 if D <= 24 else 16
    block_v = min(block_v, max(16, triton.next_power_of_2(V)))
    if dtype == torch.bfloat16:
        # the interpreter multiplies the bits of bfloat16 as integers
        product = tl.float32 if interpreted() else tl.bfloat16
        chunk, block_f = (64, 64) if D <= 16 else (32, 32)
        return _Config(chunk, block_d, block_y, block_f, block_v, -(-features // block_f), product, "tf32", 4, 2)
    # fp16 features overflow at |x| = 256: tf32 has the mantissa of fp16 and the range of fp32
    precision = "tf32" if dtype == torch.float16 else "tf32x3"
    stages = 2 if D <= 24 else 1
    return _Config(32, block_d, block_y, 64, min(block_v, 32), -(-features // 64), tl.float32, precision, 4, stages)


def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _segment_length(B, T, H, blocks_v, chunk, packed, processors):
    """Tokens per segment. Cutting costs a second pass over keys and values and two launches: only as much as fills the card,
    and not where the card is nearly full and the sequence short."""
    rows = H * blocks_v * (1 if packed else B)
    full = rows > processors or (4 * rows >= 3 * processors and T <= 64 * chunk)
    parts = 1 if full else -(-2 * processors // rows)
    length = -(-T // (parts * chunk)) * chunk
    return max(length, 8 * chunk)


def _segments(query, V, cu_seqlens, config):
    B, T, H, _ = query.shape
    blocks_v = -(-V // config.BLOCK_V)
    packed = cu_seqlens is not None
    length = _segment_length(B, T, H, blocks_v, config.BLOCK_C, packed, _processors(query.device))
    return cut(B, T, cu_seqlens, length)


def _strides(x):
    # units of 8 elements, see the kernels
    return x.stride(0) // 8, x.stride(1) // 8, x.stride(2) // 8


def _sizes(query, V, config):
    D = query.shape[3]
    _, padded = feature_count(D)
    return {
        "D": D,
        "V": V,
        "F_PAD": padded,
        "BLOCK_C": config.BLOCK_C,
        "BLOCK_D": config.BLOCK_D,
        "BLOCK_Y": config.BLOCK_Y,
        "BLOCK_F": config.BLOCK_F,
        "BLOCK_V": config.BLOCK_V,
        "TILES": config.TILES,
        "DTYPE": config.DTYPE,
        "PRECISION": config.PRECISION,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _one_hot_table(config, D, device):
    """The selection matrices, made on the GPU each time: a cached tensor would not outlive a CUDA graph's memory pool."""
    dtype = torch.bfloat16 if tl.bfloat16 == config.DTYPE else torch.float32
    table = torch.empty((2 * config.TILES, config.BLOCK_F, config.BLOCK_Y), dtype=dtype, device=device)
    _one_hot_table_kernel[(config.TILES,)](
        table,
        D=D,
        BLOCK_Y=config.BLOCK_Y,
        BLOCK_F=config.BLOCK_F,
        TILES=config.TILES,
        DTYPE=config.DTYPE,
        num_warps=4,
    )
    return table


def _scan(segments, slots, initial, final, H, D, reverse):
    features, padded = feature_count(D)
    size = slots.shape[2] * padded
    table = segments.doc is not None
    block = 1024
    _taylor_attention_scan_kernel[(segments.docs * H * -(-size // block),)](
        slots,
        slots if initial is None else initial,
        slots if final is None else final,
        segments.slot if table else slots,
        segments.count if table else slots,
        segments.per_doc,
        H,
        SIZE=size,
        F=features,
        F_PAD=padded,
        BLOCK=block,
        HAS_INIT=initial is not None,
        HAS_FINAL=final is not None,
        TABLE=table,
        REVERSE=reverse,
        num_warps=4,
    )


def _taylor_attention_fwd(query, key, value, scale, mask, cu_seqlens, initial_state, final):
    """-> output [B, T, H, V], z [B, T, H] fp32, slots or None; writes `final` if it is given."""
    B, T, H, D = query.shape
    V = value.shape[3]
    config = _config(D, V, query.dtype)
    sizes = _sizes(query, V, config)
    segments = _segments(query, V, cu_seqlens, config)
    blocks_v = -(-V // config.BLOCK_V)
    table = segments.doc is not None
    output = torch.empty((B, T, H, V), dtype=value.dtype, device=value.device)
    z = torch.empty((B, T, H), dtype=torch.float32, device=value.device)
    common = {"HAS_MASK": mask is not None, "PACKED": cu_seqlens is not None, "TABLE": table, **sizes}
    # an absent tensor is replaced by one of the right type, which the kernel does not touch
    p_mask = z if mask is None else mask
    p_cu = z if cu_seqlens is None else cu_seqlens
    p_table = _one_hot_table(config, D, query.device)
    tables = (segments.doc, segments.first, segments.slot) if table else (p_cu, p_cu, p_cu)
    numbers = (float(scale), math.sqrt(scale), T, segments.docs, H, segments.length, segments.per_doc)
    grid = (segments.programs * H * blocks_v,)
    slots = None
    with device_guard(query):
        if segments.slots > 0:
            slots = torch.empty((segments.slots, H, V + 1, sizes["F_PAD"]), dtype=torch.float32, device=value.device)
            _taylor_attention_partial_kernel[grid](
                key,
                value,
                p_mask,
                z,
                z,
                slots,
                p_table,
                p_cu,
                *tables,
                *numbers,
                *_strides(key),
                *_strides(value),
                EDGE=final is not None,
                GRADIENT=False,
                **common,
            )
            _scan(segments, slots, initial_state, final, H, D, False)
        _taylor_attention_fwd_kernel[grid](
            query,
            key,
            value,
            p_mask,
            z if initial_state is None else initial_state,
            z if slots is None else slots,
            output,
            z,
            z if final is None else final,
            p_table,
            p_cu,
            *tables,
            *numbers,
            *_strides(query),
            *_strides(key),
            *_strides(value),
            HAS_INIT=initial_state is not None,
            HAS_FINAL=final is not None,
            **common,
        )
    return output, z, slots


def _taylor_attention_bwd(
    query, key, value, scale, mask, cu_seqlens, initial_state, slots, output, z, d_output, d_final, need_initial
):
    """-> gradients of query, key, value and initial_state (None unless needed)."""
    B, T, H, D = query.shape
    V = value.shape[3]
    config = _config(D, V, query.dtype)
    sizes = _sizes(query, V, config)
    segments = _segments(query, V, cu_seqlens, config)
    blocks_v = -(-V // config.BLOCK_V)
    table = segments.doc is not None
    rows = B * T * H
    e = torch.empty_like(z)
    # each block of V adds a share of dq and dk; shares are summed in a fixed order
    share = query.dtype if blocks_v == 1 else torch.float32
    d_query = torch.empty((blocks_v, B, T, H, D), dtype=share, device=query.device)
    d_key = torch.empty((blocks_v, B, T, H, D), dtype=share, device=query.device)
    d_value = torch.empty((B, T, H, V), dtype=value.dtype, device=value.device)
    d_initial = None
    if need_initial:
        d_initial = torch.empty((segments.docs, H, V + 1, sizes["F_PAD"]), dtype=torch.float32, device=value.device)
    common = {"HAS_MASK": mask is not None, "PACKED": cu_seqlens is not None, "TABLE": table, **sizes}
    p_mask = z if mask is None else mask
    p_cu = z if cu_seqlens is None else cu_seqlens
    p_table = _one_hot_table(config, D, query.device)
    tables = (segments.doc, segments.first, segments.slot) if table else (p_cu, p_cu, p_cu)
    numbers = (float(scale), math.sqrt(scale), T, segments.docs, H, segments.length, segments.per_doc)
    strides = (*_strides(query), *_strides(key), *_strides(value), *_strides(d_output))
    grid = (segments.programs * H * blocks_v,)
    with device_guard(query):
        block_r = 32
        _taylor_attention_bwd_row_kernel[(-(-rows // block_r),)](
            output,
            d_output,
            z,
            e,
            p_mask,
            rows,
            T,
            H,
            *_strides(d_output),
            V=V,
            BLOCK_R=block_r,
            BLOCK_V=triton.next_power_of_2(V),
            HAS_MASK=mask is not None,
            num_warps=4,
        )
        _taylor_attention_bwd_dq_kernel[grid](
            query,
            key,
            value,
            d_output,
            p_mask,
            z,
            e,
            z if initial_state is None else initial_state,
            z if slots is None else slots,
            d_query,
            p_table,
            p_cu,
            *tables,
            *numbers,
            rows,
            *strides,
            HAS_INIT=initial_state is not None,
            **common,
        )
        d_slots = None
        if segments.slots > 0:
            d_slots = torch.empty((segments.slots, H, V + 1, sizes["F_PAD"]), dtype=torch.float32, device=value.device)
            _taylor_attention_partial_kernel[grid](
                query,
                d_output,
                p_mask,
                z,
                e,
                d_slots,
                p_table,
                p_cu,
                *tables,
                *numbers,
                *_strides(query),
                *_strides(d_output),
                EDGE=need_initial,
                GRADIENT=True,
                **common,
            )
            _scan(segments, d_slots, d_final, d_initial, H, D, True)
        _taylor_attention_bwd_dkv_kernel[grid](
            query,
            key,
            value,
            d_output,
            p_mask,
            z,
            e,
            z if d_final is None else d_final,
            z if d_slots is None else d_slots,
            d_key,
            d_value,
            z if d_initial is None else d_initial,
            p_table,
            p_cu,
            *tables,
            *numbers,
            rows,
            *strides,
            HAS_DFINAL=d_final is not None,
            HAS_DINIT=need_initial,
            **common,
        )
    if blocks_v == 1:
        return d_query[0], d_key[0], d_value, d_initial
    return d_query.sum(0).to(query.dtype), d_key.sum(0).to(key.dtype), d_value, d_initial


class _TaylorAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, mask, cu_seqlens, initial_state, output_final_state):
        query, key, value = vector_rows(query), vector_rows(key), vector_rows(value)
        final = None
        if output_final_state:
            docs = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            _, padded = feature_count(query.shape[3])
            final = torch.empty(
                (docs, query.shape[2], value.shape[3] + 1, padded), dtype=torch.float32, device=value.device
            )
        output, z, slots = _taylor_attention_fwd(query, key, value, scale, mask, cu_seqlens, initial_state, final)
        ctx.save_for_backward(query, key, value, mask, cu_seqlens, initial_state, slots, output, z)
        ctx.scale = scale
        if output_final_state:
            return output, final
        return output

    @staticmethod
    def backward(ctx, d_output, d_final=None):
        query, key, value, mask, cu_seqlens, initial_state, slots, output, z = ctx.saved_tensors
        need_initial = ctx.needs_input_grad[6]
        d_output = vector_rows(d_output)
        if d_final is not None:
            d_final = d_final.contiguous()
        d_query, d_key, d_value, d_initial = _taylor_attention_bwd(
            query,
            key,
            value,
            ctx.scale,
            mask,
            cu_seqlens,
            initial_state,
            slots,
            output,
            z,
            d_output,
            d_final,
            need_initial,
        )
        return d_query, d_key, d_value, None, None, None, d_initial, None


def taylor_attention(
    query,
    key,
    value,
    *,
    scale=None,
    mask=None,
    cu_seqlens=None,
    initial_state=None,
    output_final_state=False,
):
    """Causal linear attention with the second-order Taylor feature map of Based (arXiv 2402.18668), normaliser included.

    The weight of key j for query i >= j is `1 + s + s^2 / 2` with `s = scale * q_i . k_j`; the output is the weighted
    mean of the values. Differentiable in query, key, value and initial_state.

    Args:
        query, key: [B, T, H, D], float32, float16 or bfloat16, D a multiple of 8 up to 32. Any strides.
        value: [B, T, H, V], same dtype, V a multiple of 8 up to 256.
        scale: number > 0; default D ** -0.5.
        mask: [B, T], bool or 0/1. 0: the token does not exist; its output row is 0 whatever its query, key and value hold.
        cu_seqlens: [N + 1] int32 on the same device, from 0 to T, rising; then B = 1 and the N documents are independent.
        initial_state: [B or N, H, V + 1, F_PAD] float32, as returned for an earlier part of the same sequences.
            F_PAD is (D + 1) (D + 2) / 2 rounded up to a multiple of 8; row V is the normaliser.
        output_final_state: also return the state after the last token.

    Returns:
        output [B, T, H, V] in value's dtype, and the final state (float32) or None.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.
    """
    scale = check_sequence_inputs(query, key, value, scale, mask, cu_seqlens, initial_state)
    if mask is not None:
        mask = (mask != 0).to(torch.int8).contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    arguments = query, key, value, scale, mask, cu_seqlens, initial_state, output_final_state
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        tensors = (query, key, value) if initial_state is None else (query, key, value, initial_state)
        if any(x.requires_grad for x in tensors):
            return _outside_the_graph(*arguments)
    return _apply(*arguments)


def _apply(query, key, value, scale, mask, cu_seqlens, initial_state, output_final_state):
    if output_final_state:
        return _TaylorAttention.apply(query, key, value, scale, mask, cu_seqlens, initial_state, True)
    return _TaylorAttention.apply(query, key, value, scale, mask, cu_seqlens, initial_state, False), None


# The gradients came out NaN when Inductor of torch 2.11 compiled the backward kernels itself (see the README): with
# gradients the op is a graph break, and with fullgraph=True an error, until that is understood.
_outside_the_graph = torch.compiler.disable(_apply)
