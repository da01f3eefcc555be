# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Packed second-order Taylor features on the GPU: which pair is a feature, how a state is read, written and grown.

Layout in memory (public):  state [V + 1, F_PAD] fp32 per head, pairs (a <= b) in torch.triu_indices(D + 1, D + 1) order,
                            row v < V for the values, row V for the normaliser.
Layout in a kernel:         x [BLOCK_C, P] the tokens' entries, P = 16 or 32. If D < P, entry D is the constant 1; if D = P,
                            the constant has no place in x. Features come in tiles of P columns, one a distance r
                            between their entries, column c of x_a x_(a + r mod P) with a = c + first_roll(r) mod P:
                            tile r < P / 2   all of them
                            tile P / 2       those with c < P / 2, and, if D = P, the constant 1 in column P / 2
                            the last tile    x_c, if D = P
                            The state of the values is a tuple of tiles [BLOCK_V, P] or [P, BLOCK_V]; the normaliser the
                            moment sum y y^T [P, P] and, if D = P, the sum of y (in every row of a [BLOCK_C, P]) and a count.

Maths:  w(q, k) = 1 + s + s^2 / 2 = sum_f coef_f half_f phi_f(q) phi_f(k),  half = 1/2 for the squares (r = 0), else 1
        coef = scale^2 for two entries, scale for one, 1 for none.  A state inside is sum half_f phi_f(k) v.
        public state = sum unit_f phi_f(k) v,  unit = scale, sqrt(scale), 1; its gradient carries the inverse unit.

In bf16 a roll is a product with a permutation matrix: exact, and on the tensor cores. In fp32 it is a gather within a warp.
With SHARE_ROLLS the factors of all tiles are few rolls of x, whose differences are all distances: 4 in place of 8 if P is
16, 6 in place of 16 if P is 32. Without it a tile has a roll of its own, which is less where a program has few tiles.
"""

# ruff: noqa: E501, RUF005
# Triton compiles `a + (b,)`, not `(*a, b)`.

import triton
import triton.language as tl


@triton.constexpr_function
def first_roll(r, P, SHARE_ROLLS):
    """By how much the first factor of tile r = 0 .. P / 2 is rolled; the second is rolled by r more."""
    # All that torch.compile copies of a constant function is its own text. Rolls by 1, 2, 5, 8 and 1, 2, 3, 8, 12, 16.
    rolls = (0, 0, 0, 2, 1, 0, 2, 1, 0) if P == 16 else (0, 0, 0, 0, 8, 3, 2, 1, 0, 3, 2, 1, 0, 3, 2, 1, 0)
    return rolls[r] if SHARE_ROLLS else 0


@triton.jit
def load_x(p_x, r_x, m_t, o_d, D: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """x [BLOCK_C, P] of a chunk; a token that does not exist is 0 everywhere."""
    if D == P:
        return tl.load(p_x + r_x, mask=m_t[:, None], other=0.0).to(DTYPE)
    else:
        b_x = tl.load(p_x + r_x, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0).to(DTYPE)
        return tl.where((o_d == D)[None, :] & m_t[:, None], 1.0, b_x).to(DTYPE)


@triton.jit
def load_xt(p_x, r_xt, m_t, o_d, D: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """The same, transposed: [P, BLOCK_C]."""
    if D == P:
        return tl.load(p_x + r_xt, mask=m_t[None, :], other=0.0).to(DTYPE)
    else:
        b_x = tl.load(p_x + r_xt, mask=m_t[None, :] & (o_d < D)[:, None], other=0.0).to(DTYPE)
        return tl.where((o_d == D)[:, None] & m_t[None, :], 1.0, b_x).to(DTYPE)


@triton.jit
def rolled(b_x, r: tl.constexpr, P: tl.constexpr, AXIS: tl.constexpr):
    """x [BLOCK_C, P] (AXIS 1) or x^T [P, BLOCK_C] (AXIS 0), its entries rolled by r within their warp: for dtypes in which
    a product is not exact or costs more."""
    o_d = tl.expand_dims((tl.arange(0, P) + r) % P, 1 - AXIS)
    return tl.gather(b_x, tl.broadcast_to(o_d, b_x.shape), AXIS)


@triton.jit
def load_rolls(p_table, P: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Tuple of matrices [P, P] for r = 0 .. P / 2: `x @ m` rolls the entries of x by r; with TRANSPOSED `m @ x^T` does,
    and `x @ m` rolls them back. Read once, before the loop over chunks: they stay in shared memory.
    """
    o_d = tl.arange(0, P)
    p_m = p_table + o_d[:, None] * P + o_d[None, :]
    if TRANSPOSED:
        p_m += (P // 2 + 1) * P * P
    b_m = ()
    for r in tl.static_range(P // 2 + 1):
        b_m = b_m + (tl.load(p_m + r * P * P),)
    return b_m


@triton.jit
def roll_table_kernel(p_table, P: tl.constexpr, DTYPE: tl.constexpr):
    """Writes the matrices of `load_rolls`: [2, P / 2 + 1, P, P]."""
    r = tl.program_id(0)
    o_d = tl.arange(0, P)
    b_m = ((o_d[None, :] + r) % P == o_d[:, None]).to(DTYPE)
    p_m = p_table + r * P * P
    tl.store(p_m + o_d[:, None] * P + o_d[None, :], b_m)
    tl.store(p_m + (P // 2 + 1) * P * P + o_d[None, :] * P + o_d[:, None], b_m)


@triton.jit
def half_roll(b_f, o_d, D: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Tile P / 2 from its products: each pair once, and the constant. It is 1 for tokens that do not exist too: their
    values are 0."""
    b_rest = tl.where(o_d == P // 2, 1.0, 0.0).to(DTYPE)
    if D < P:
        b_rest = tl.zeros_like(b_rest)
    if TRANSPOSED:
        return tl.where((o_d < P // 2)[:, None], b_f, b_rest[:, None])
    else:
        return tl.where((o_d < P // 2)[None, :], b_f, b_rest[None, :])


@triton.constexpr_function
def num_tiles(D, P):
    return P // 2 + 1 + (D == P)


@triton.jit
def coef_columns(r: tl.constexpr, scale, D: tl.constexpr, P: tl.constexpr, SHARE_ROLLS: tl.constexpr):
    """Coefficients [P] of tile r."""
    o_d = tl.arange(0, P)
    if D == P:
        if r == P // 2:
            return tl.where(o_d < P // 2, scale * scale, 1.0)
        elif r < P // 2:
            return tl.where(o_d < P, scale * scale, 1.0)
        else:
            return tl.where(o_d < P, scale, 1.0)
    else:
        a = (o_d + first_roll(r, P, SHARE_ROLLS)) % P
        b_coef = tl.where(a < D, scale, 1.0) * tl.where((a + r) % P < D, scale, 1.0)
        if r == 0:
            # the constant times itself is halved as the squares are
            b_coef = tl.where(o_d == D, 2.0, b_coef)
        return b_coef


@triton.jit
def _pair(r: tl.constexpr, D: tl.constexpr, P: tl.constexpr, SHARE_ROLLS: tl.constexpr):
    """The entries (a, b) of each column of tile r, D for the constant; a = -1 where there is no feature."""
    a = tl.arange(0, P)
    if r < P // 2:
        a = (a + first_roll(r, P, SHARE_ROLLS)) % P
    b = (a + r) % P
    if D == P:
        if r == P // 2:
            b = tl.where(a < P // 2, b, D)
            a = tl.where(a < P // 2, a, tl.where(a == P // 2, D, -1))
        elif r > P // 2:
            b = tl.zeros_like(a) + D
    else:
        a = tl.where((a <= D) & (b <= D), a, -1)
        if r == P // 2:
            a = tl.where(tl.arange(0, P) < P // 2, a, -1)
    return a, b


@triton.jit
def feature_column(a, b, D: tl.constexpr):
    """Column of the pair (a, b) in the public state."""
    low = tl.minimum(a, b)
    return low * (2 * D + 3 - low) // 2 + tl.maximum(a, b) - low


@triton.jit
def _unit(a, b, scale, sqrt_scale, D: tl.constexpr):
    return tl.where(a < D, tl.where(b < D, scale, sqrt_scale), tl.where(b < D, sqrt_scale, 1.0))


@triton.jit
def _public_factor(r: tl.constexpr, a, b, scale, sqrt_scale, D: tl.constexpr, P: tl.constexpr, GRADIENT: tl.constexpr):
    """Public state over the state inside: unit / half; of a gradient, coef / unit."""
    unit = _unit(a, b, scale, sqrt_scale, D)
    if r == 0:
        if not GRADIENT:
            unit *= 2.0
        elif D < P:
            unit = tl.where(a == D, 2.0, unit)
    return unit


@triton.jit
def load_state(
    p_state,
    r: tl.constexpr,
    o_v,
    rows,
    scale,
    sqrt_scale,
    D: tl.constexpr,
    P: tl.constexpr,
    F_PAD: tl.constexpr,
    GRADIENT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SHARE_ROLLS: tl.constexpr,
):
    """Tile r of the values' state: [BLOCK_V, P], or [P, BLOCK_V] with TRANSPOSED; 0 from row `rows` on."""
    a, b = _pair(r, D, P, SHARE_ROLLS)
    o_f = feature_column(a, b, D)
    factor = 1.0 / _public_factor(r, a, b, scale, sqrt_scale, D, P, GRADIENT)
    if TRANSPOSED:
        m_vf = (a >= 0)[:, None] & (o_v < rows)[None, :]
        return tl.load(p_state + o_v[None, :] * F_PAD + o_f[:, None], mask=m_vf, other=0.0) * factor[:, None]
    else:
        m_vf = (o_v < rows)[:, None] & (a >= 0)[None, :]
        return tl.load(p_state + o_v[:, None] * F_PAD + o_f[None, :], mask=m_vf, other=0.0) * factor[None, :]


@triton.jit
def store_state(
    p_state,
    b_s,
    o_v,
    rows,
    scale,
    sqrt_scale,
    D: tl.constexpr,
    P: tl.constexpr,
    F_PAD: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """All tiles [BLOCK_V, P] of the values' state, with SHARE_ROLLS; the padding columns are written too, as 0."""
    for r in tl.static_range(num_tiles(D, P)):
        a, b = _pair(r, D, P, True)
        factor = _public_factor(r, a, b, scale, sqrt_scale, D, P, GRADIENT)
        m_vf = (o_v < rows)[:, None] & (a >= 0)[None, :]
        tl.store(p_state + o_v[:, None] * F_PAD + feature_column(a, b, D)[None, :], b_s[r] * factor[None, :], mask=m_vf)
    o_pad = (D + 1) * (D + 2) // 2 + tl.arange(0, 8)
    m_pad = (o_v < rows)[:, None] & (o_pad < F_PAD)[None, :]
    tl.store(p_state + o_v[:, None] * F_PAD + o_pad[None, :], tl.zeros_like(m_pad.to(tl.float32)), mask=m_pad)


@triton.jit
def _moment_grid(P: tl.constexpr):
    o_a = tl.arange(0, P)[:, None] + tl.zeros([1, P], dtype=tl.int32)
    o_b = tl.arange(0, P)[None, :] + tl.zeros([P, 1], dtype=tl.int32)
    return o_a, o_b


@triton.jit
def _moment_factor(o_a, o_b, scale, sqrt_scale, D: tl.constexpr, GRADIENT: tl.constexpr):
    """Public normaliser row over the moment. The row of a gradient knows that a square counts once, not twice."""
    unit = _unit(o_a, o_b, scale, sqrt_scale, D)
    if GRADIENT:
        unit *= tl.where((o_a == o_b) & (o_a < D), 0.5, 1.0)
    return unit


@triton.jit
def load_moment(
    p_row,
    exists,
    scale,
    sqrt_scale,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """The normaliser row as moment [P, P], sum [BLOCK_C, P] and count (the two last only if D = P); 0 unless it exists."""
    o_a, o_b = _moment_grid(P)
    end = tl.where(exists, D + 1, 0)
    m_ab = (o_a < end) & (o_b < end)
    factor = 1.0 / _moment_factor(o_a, o_b, scale, sqrt_scale, D, GRADIENT)
    b_m = tl.load(p_row + feature_column(o_a, o_b, D), mask=m_ab, other=0.0) * factor
    o_n = tl.zeros([BLOCK_C, 1], dtype=tl.int32) + tl.arange(0, P)[None, :]
    b_n = tl.zeros([BLOCK_C, P], dtype=tl.float32)
    count = 0.0
    if D == P:
        b_n = tl.load(p_row + feature_column(o_n, D + o_n * 0, D), mask=o_n < end, other=0.0) / sqrt_scale
        count = tl.load(p_row + D * (D + 3) // 2, mask=exists, other=0.0)
    return b_m, b_n, count


@triton.jit
def store_moment(
    p_row,
    b_m,
    b_n,
    count,
    write,
    scale,
    sqrt_scale,
    D: tl.constexpr,
    P: tl.constexpr,
    F_PAD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """Inverse of load_moment, if `write`; the padding columns are written as 0."""
    o_a, o_b = _moment_grid(P)
    end = tl.where(write, D + 1, 0)
    # each pair once: (a, b) and (b, a) may differ in rounding
    m_once = (o_a <= o_b) & (o_b < end)
    tl.store(
        p_row + feature_column(o_a, o_b, D),
        b_m * _moment_factor(o_a, o_b, scale, sqrt_scale, D, GRADIENT),
        mask=m_once,
    )
    if D == P:
        o_c = tl.arange(0, BLOCK_C)[:, None] + tl.zeros([1, P], dtype=tl.int32)
        o_n = tl.zeros([BLOCK_C, 1], dtype=tl.int32) + tl.arange(0, P)[None, :]
        tl.store(p_row + feature_column(o_n, D + o_n * 0, D), b_n * sqrt_scale, mask=(o_c == 0) & (o_n < end))
        tl.store(p_row + D * (D + 3) // 2, count, mask=write)
    o_pad = (D + 1) * (D + 2) // 2 + tl.arange(0, 8)
    tl.store(p_row + o_pad, tl.zeros([8], dtype=tl.float32), mask=o_pad < tl.where(write, F_PAD, 0))


@triton.jit
def grow_moment(b_m, b_n, b_yt, b_y, D: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """Adds sum y y^T and, if D = P, sum y (in every row). b_y may carry a weight of each token."""
    b_m = tl.dot(b_yt, b_y, b_m, input_precision=PRECISION)
    if D == P:
        BLOCK_C: tl.constexpr = b_y.shape[0]
        b_n = tl.dot(tl.full([BLOCK_C, BLOCK_C], 1.0, dtype=b_y.dtype), b_y, b_n, input_precision=PRECISION)
    return b_m, b_n


@triton.jit
def columns(b_yt, b_rollt, ROLL_BY_GATHER: tl.constexpr, PRECISION: tl.constexpr):
    """y^T [P, BLOCK_C] in fp32 as a product leaves it: the identity times y^T costs less than another layout of y^T."""
    if ROLL_BY_GATHER:
        return b_yt
    else:
        return tl.dot(b_rollt[0], b_yt, input_precision=PRECISION)


@triton.jit
def _roll_columns(
    b_yt, b_y32, b_rollt, r: tl.constexpr, P: tl.constexpr, ROLL_BY_GATHER: tl.constexpr, PRECISION: tl.constexpr
):
    """y^T rolled by r, as `columns` gives y^T."""
    if r == 0:
        return b_y32
    elif ROLL_BY_GATHER:
        return rolled(b_yt, r, P, 0)
    else:
        return tl.dot(b_rollt[r], b_yt, input_precision=PRECISION)


@triton.jit
def _factor(b_x, SWAP: tl.constexpr, DTYPE: tl.constexpr):
    # A swap of 16-bit entries would go through shared memory.
    if SWAP:
        b_x = tl.trans(b_x)
    return b_x.to(DTYPE)


@triton.jit
def _product(b_x, b_y, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        # x * y + -0. LLVM would pair the factors up anew, and take apart the pairs that they are in.
        return tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r",
            [b_x, b_y],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return b_x * b_y


@triton.jit
def source_features(
    r: tl.constexpr,
    b_yt,
    b_y32,
    b_rollt,
    o_d,
    D: tl.constexpr,
    P: tl.constexpr,
    SHARE_ROLLS: tl.constexpr,
    SWAP: tl.constexpr,
    ROLL_BY_GATHER: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tile r of half phi(y): [BLOCK_C, P] with SWAP, else [P, BLOCK_C]. b_yt is y^T, b_y32 its `columns`, b_rollt from
    load_rolls(TRANSPOSED)."""
    if r > P // 2:
        return _factor(b_y32, SWAP, DTYPE)
    else:
        FIRST: tl.constexpr = first_roll(r, P, SHARE_ROLLS)
        b_f = _roll_columns(b_yt, b_y32, b_rollt, FIRST, P, ROLL_BY_GATHER, PRECISION)
        if r == 0:
            b_g = b_y32 * 0.5
        else:
            b_g = _roll_columns(b_yt, b_y32, b_rollt, FIRST + r, P, ROLL_BY_GATHER, PRECISION)
        b_f = _product(_factor(b_f, SWAP, DTYPE), _factor(b_g, SWAP, DTYPE), DTYPE)
        if r == P // 2:
            b_f = half_roll(b_f, o_d, D, P, DTYPE, not SWAP)
        return b_f


@triton.jit
def _roll_rows(b_x, b_roll, r: tl.constexpr, P: tl.constexpr, ROLL_BY_GATHER: tl.constexpr, PRECISION: tl.constexpr):
    """x rolled by r."""
    if r == 0:
        return b_x
    elif ROLL_BY_GATHER:
        return rolled(b_x, r, P, 1)
    else:
        return tl.dot(b_x, b_roll[r], input_precision=PRECISION).to(b_x.dtype)


@triton.jit
def reader_features(
    r: tl.constexpr, b_x, b_roll, P: tl.constexpr, ROLL_BY_GATHER: tl.constexpr, PRECISION: tl.constexpr
):
    """The products [BLOCK_C, P] of tile r <= P / 2 of phi(x), with SHARE_ROLLS; b_roll from load_rolls."""
    FIRST: tl.constexpr = first_roll(r, P, True)
    b_f = _roll_rows(b_x, b_roll, FIRST, P, ROLL_BY_GATHER, PRECISION)
    return _roll_rows(b_x, b_roll, FIRST + r, P, ROLL_BY_GATHER, PRECISION) * b_f


@triton.jit
def normaliser(b_x, b_m, b_n, count, scale, D: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """What the tokens before a chunk add to the normaliser, [BLOCK_C]."""
    if D == P:
        b_c = tl.trans(b_m * (0.5 * scale)).to(b_x.dtype)
        b_u = tl.dot(b_x, b_c, b_n, input_precision=PRECISION)
        return tl.sum(b_u * b_x.to(tl.float32), axis=1) * scale + count
    else:
        o_a, o_b = _moment_grid(P)
        quadratic = 0.5 * scale * scale
        b_c = tl.where(o_a < D, tl.where(o_b < D, quadratic, 0.5 * scale), tl.where(o_b < D, 0.5 * scale, 1.0))
        b_u = tl.dot(b_x, tl.trans(b_m * b_c).to(b_x.dtype), input_precision=PRECISION)
        return tl.sum(b_u * b_x.to(tl.float32), axis=1)


@triton.jit
def normaliser_slope(b_x, b_m, b_n, scale, D: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of `normaliser` in x, [BLOCK_C, P]."""
    if D == P:
        return tl.dot(b_x, tl.trans(b_m * scale).to(b_x.dtype), b_n, input_precision=PRECISION) * scale
    else:
        b_c = tl.where(tl.arange(0, P) < D, scale * scale, scale)[None, :]
        return tl.dot(b_x, tl.trans(b_m * b_c).to(b_x.dtype), input_precision=PRECISION)
