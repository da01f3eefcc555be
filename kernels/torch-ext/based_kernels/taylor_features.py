# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Packed second-order Taylor features on the GPU: which pair is feature f, how a state is read, written and grown.

Layout in memory (public):  state [V + 1, F_PAD] fp32 per head, pairs (a <= b) in torch.triu_indices(D + 1, D + 1) order,
                            row v < V for the values, row V for the normaliser.
Layout in a kernel:         x [BLOCK_C, BLOCK_D] the tokens' entries; y [BLOCK_C, BLOCK_Y] the same as [x, 1, 0 ..];
                            a token that does not exist is 0 everywhere, the 1 included.
                            The values in tiles [BLOCK_F, BLOCK_V]: products x_a x_(a + r mod D) for r = 0 .. D / 2, then
                            x_a 1, then 1 1; in a tile of whole rolls r the first factor is x repeated, the same for all.
                            The normaliser as the moment matrix sum y y^T [BLOCK_Y, BLOCK_Y].

Maths:  phi_f(x) = y_a y_b, unscaled inside the kernel: picking an entry is exact in any dtype
        w(q, k) = sum_f coef_f phi_f(q) phi_f(k)           coef = scale^2 (a < b), scale^2 / 2 (a == b), scale, 1
        public state_f = unit_f * state inside             unit = scale, sqrt(scale), 1
"""

# ruff: noqa: E501

import triton
import triton.language as tl


@triton.jit
def load_y(p_x, r_x, m_t, o_d, D: tl.constexpr, DTYPE: tl.constexpr):
    """y [BLOCK_C, BLOCK_Y] of a chunk."""
    b_x = tl.load(p_x + r_x, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0).to(DTYPE)
    b_one = m_t.to(tl.float32)[:, None] + tl.zeros_like(o_d).to(tl.float32)[None, :]
    return tl.where((o_d == D)[None, :], b_one.to(DTYPE), b_x)


@triton.jit
def feature_pair(i_f: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr):
    """The two entries (a, b) of y that make each feature of tile i_f; (-1, -1) marks the padding."""
    return _pair(i_f * BLOCK_F + tl.arange(0, BLOCK_F), D)


@triton.jit
def _pair(o_f, D: tl.constexpr):
    F2: tl.constexpr = D * (D + 1) // 2
    a = o_f % D
    b = (a + o_f // D) % D
    a = tl.where(o_f < F2, a, o_f - F2)
    b = tl.where(o_f < F2, b, D)
    a = tl.where(o_f <= F2 + D, a, -1)
    b = tl.where(o_f <= F2 + D, b, -1)
    return a, b


@triton.jit
def feature_column(a, b, D: tl.constexpr):
    """Column of the pair (a, b) in the public state."""
    low = tl.minimum(a, b)
    return low * (2 * D + 3 - low) // 2 + tl.maximum(a, b) - low


@triton.jit
def feature_coef(i_f: tl.constexpr, scale, D: tl.constexpr, BLOCK_F: tl.constexpr):
    """Coefficients of the query side of tile i_f, [BLOCK_F]; by position, so that they cost no registers."""
    F2: tl.constexpr = D * (D + 1) // 2
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    # the squares come first
    b_coef = tl.where(o_f < D, 0.5 * scale * scale, scale * scale)
    if has_ones(i_f, D, BLOCK_F):
        b_coef = tl.where(o_f < F2, b_coef, tl.where(o_f < F2 + D, scale, 1.0))
    return b_coef


@triton.constexpr_function
def is_rolls(i_f, D, BLOCK_F):
    """Whether tile i_f holds nothing but whole rolls."""
    return BLOCK_F % D == 0 and (i_f + 1) * BLOCK_F <= D * (D // 2)


@triton.constexpr_function
def has_ones(i_f, D, BLOCK_F):
    """Whether tile i_f needs the constant entry, so y in place of x."""
    return (i_f + 1) * BLOCK_F > D * (D + 1) // 2


@triton.jit
def load_one_hots(
    p_table,
    i_f: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TILES: tl.constexpr,
    ONES: tl.constexpr,
):
    """Selection matrices of tile i_f, [BLOCK_F, BLOCK_D] for x, or [BLOCK_F, BLOCK_Y] for y if ONES and the tile has them:
    a product with one picks the first or the second factor of each feature, exactly, on the tensor cores; a product with
    its transpose adds a gradient of the factors to the entries. Table: [2 TILES, BLOCK_F, BLOCK_Y].

    Read again for every chunk: a copy to shared memory that runs ahead, where a constant would be kept in registers and
    written to shared memory each time.
    """
    o_f = tl.arange(0, BLOCK_F)[:, None] * BLOCK_Y
    p_a = p_table
    if not is_rolls(i_f, D, BLOCK_F):
        # all tiles of whole rolls share the matrix of tile 0, hence the product with it
        p_a += i_f * BLOCK_F * BLOCK_Y
    p_b = p_table + (TILES * BLOCK_F * BLOCK_Y + i_f * BLOCK_F * BLOCK_Y)
    if ONES and has_ones(i_f, D, BLOCK_F):
        o_y = o_f + tl.arange(0, BLOCK_Y)[None, :]
        return tl.load(p_a + o_y, cache_modifier=".ca"), tl.load(p_b + o_y, cache_modifier=".ca")
    else:
        o_d = o_f + tl.arange(0, BLOCK_D)[None, :]
        return tl.load(p_a + o_d, cache_modifier=".ca"), tl.load(p_b + o_d, cache_modifier=".ca")


@triton.jit
def factors(b_x, b_y, b_ea, b_eb, i_f: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr):
    """The two factors [BLOCK_C, BLOCK_F] of the features of tile i_f."""
    b_t = b_x
    if has_ones(i_f, D, BLOCK_F):
        b_t = b_y
    b_a = tl.dot(b_t, tl.trans(b_ea), input_precision=PRECISION)
    b_b = tl.dot(b_t, tl.trans(b_eb), input_precision=PRECISION)
    return b_a, b_b


@triton.jit
def phi_columns(
    b_x, b_y, b_ea, b_eb, i_f: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr
):
    """The features of tile i_f, transposed: [BLOCK_F, BLOCK_C]."""
    b_t = b_x
    if has_ones(i_f, D, BLOCK_F):
        b_t = b_y
    b_a = tl.dot(b_ea, tl.trans(b_t), input_precision=PRECISION)
    b_b = tl.dot(b_eb, tl.trans(b_t), input_precision=PRECISION)
    return b_a * b_b


@triton.jit
def _one_hot_table_kernel(
    p_table, D: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_F: tl.constexpr, TILES: tl.constexpr, DTYPE: tl.constexpr
):
    """First factors of all tiles, then second factors."""
    o_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    o_y = tl.arange(0, BLOCK_Y)
    a, b = _pair(o_f, D)
    p_a = p_table + o_f[:, None] * BLOCK_Y + o_y[None, :]
    tl.store(p_a, (a[:, None] == o_y[None, :]).to(DTYPE))
    tl.store(p_a + TILES * BLOCK_F * BLOCK_Y, (b[:, None] == o_y[None, :]).to(DTYPE))


@triton.jit
def _unit(a, b, scale, sqrt_scale, D: tl.constexpr, GRADIENT: tl.constexpr):
    """Public state over the state inside; a gradient carries the inverse."""
    unit = tl.where(b < D, scale, tl.where(a < D, sqrt_scale, 1.0))
    if GRADIENT:
        unit = 1.0 / unit
    return unit


@triton.jit
def load_state(
    p_state,
    i_f: tl.constexpr,
    o_v,
    rows,
    scale,
    sqrt_scale,
    D: tl.constexpr,
    F_PAD: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Tile i_f of the values' state as [BLOCK_F, BLOCK_V]; 0 past row `rows`."""
    a, b = feature_pair(i_f, D, BLOCK_F)
    o_f = feature_column(a, b, D)
    unit = 1.0 / _unit(a, b, scale, sqrt_scale, D, GRADIENT)
    m_fv = (a >= 0)[:, None] & (o_v < rows)[None, :]
    return tl.load(p_state + o_v[None, :] * F_PAD + o_f[:, None], mask=m_fv, other=0.0) * unit[:, None]


@triton.jit
def store_state(
    p_state,
    b_state,
    i_f: tl.constexpr,
    o_v,
    rows,
    scale,
    sqrt_scale,
    D: tl.constexpr,
    F_PAD: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Inverse of load_state; the padding columns are written too, as 0."""
    a, b = feature_pair(i_f, D, BLOCK_F)
    o_f = tl.where(a < 0, i_f * BLOCK_F + tl.arange(0, BLOCK_F), feature_column(a, b, D))
    b_state = tl.where((a >= 0)[:, None], b_state * _unit(a, b, scale, sqrt_scale, D, GRADIENT)[:, None], 0.0)
    m_fv = (o_f < F_PAD)[:, None] & (o_v < rows)[None, :]
    tl.store(p_state + o_v[None, :] * F_PAD + o_f[:, None], b_state, mask=m_fv)


@triton.jit
def _moment_grid(BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    o_a = tl.arange(0, BLOCK_Y)[:, None] + tl.zeros([1, BLOCK_X], dtype=tl.int32)
    o_b = tl.arange(0, BLOCK_X)[None, :] + tl.zeros([BLOCK_Y, 1], dtype=tl.int32)
    return o_a, o_b


@triton.jit
def load_moment(
    p_row,
    exists,
    scale,
    sqrt_scale,
    D: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    CORNER: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """The normaliser row as a moment matrix, sum y y^T [BLOCK_Y, BLOCK_Y], or sum y x^T if not CORNER; 0 unless it exists.

    As GRADIENT the matrix is sum e y_q y_q^T: the row of a gradient knows the coefficient 1/2 of a square.
    """
    o_a, o_b = _moment_grid(BLOCK_Y, BLOCK_X)
    low = tl.minimum(o_a, o_b)
    high = tl.maximum(o_a, o_b)
    unit = 1.0 / _unit(low, high, scale, sqrt_scale, D, False)
    if GRADIENT:
        unit = tl.where((o_a == o_b) & (o_a < D), 2.0, 1.0) * unit
    end = tl.where(exists, D, -1)
    m_ab = high <= end
    if not CORNER:
        m_ab = m_ab & (o_b < D)
    return tl.load(p_row + feature_column(low, high, D), mask=m_ab, other=0.0) * unit


@triton.jit
def store_moment(
    p_row,
    b_moment,
    b_count,
    write,
    scale,
    sqrt_scale,
    D: tl.constexpr,
    F_PAD: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    CORNER: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Inverse of load_moment, if `write`; the padding columns are written as 0. b_count: the corner, if the matrix has none."""
    o_a, o_b = _moment_grid(BLOCK_Y, BLOCK_X)
    low = tl.minimum(o_a, o_b)
    high = tl.maximum(o_a, o_b)
    unit = _unit(low, high, scale, sqrt_scale, D, False)
    if GRADIENT:
        unit = tl.where((o_a == o_b) & (o_a < D), 0.5, 1.0) * unit
    end = tl.where(write, D, -1)
    # each pair once: (a, b) and (b, a) may differ in rounding
    m_once = o_a <= o_b
    if not CORNER:
        m_once = (m_once | (o_a == D)) & (o_b < D)
        tl.store(p_row + D * (D + 3) // 2, b_count, mask=write)
    tl.store(p_row + feature_column(low, high, D), b_moment * unit, mask=m_once & (high <= end))
    o_pad = (D + 1) * (D + 2) // 2 + tl.arange(0, 8)
    tl.store(p_row + o_pad, tl.zeros([8], dtype=tl.float32), mask=o_pad < tl.where(write, F_PAD, 0))


@triton.jit
def times_moment(b_y, b_moment, PRECISION: tl.constexpr):
    """b_y [BLOCK_C, BLOCK_Y] times a moment matrix; in bf16 in two parts, so that the normaliser stays as good as fp32."""
    b_high = b_moment.to(b_y.dtype)
    b_x = tl.dot(b_y, b_high, input_precision=PRECISION)
    if b_y.dtype != tl.float32:
        b_x = tl.dot(b_y, (b_moment - b_high.to(tl.float32)).to(b_y.dtype), b_x, input_precision=PRECISION)
    return b_x


@triton.jit
def moment_value(b_moment, scale, D: tl.constexpr, BLOCK_Y: tl.constexpr):
    """C with y_q^T C y_q = the normaliser: the coefficients, split evenly between (a, b) and (b, a)."""
    o_a, o_b = _moment_grid(BLOCK_Y, BLOCK_Y)
    quadratic = 0.5 * scale * scale
    return b_moment * tl.where(o_a < D, tl.where(o_b < D, quadratic, 0.5 * scale), tl.where(o_b < D, 0.5 * scale, 1.0))


@triton.jit
def moment_slope(b_moment, scale, D: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):
    """C with y_q^T C = the gradient of the normaliser in q."""
    o_a, _ = _moment_grid(BLOCK_Y, BLOCK_X)
    return b_moment * tl.where(o_a < D, scale * scale, scale)
