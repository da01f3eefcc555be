# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The gated short convolution of whole sequences, forward and backward, straight on what the projection gives.

Layout: projected [B, T, 2C] = [u ; g]; weight [C, K], tap K - 1 on the token itself; output [B, T, C]; state
        [B, K - 1, C], the last inputs, oldest first.

Maths:  c_n = sum_j weight[:, j] x_{n - (K - 1) + j},   o_n = c_n sigmoid(c_n) g_n,   x = state followed by u
        dc_n = do_n g_n sigma (1 + c_n (1 - sigma)),   dg_n = c_n sigma do_n,   sigma = sigmoid(c_n)
        dx_n = sum_j weight[:, j] dc_{n + (K - 1) - j},   dweight[:, j] = sum_n dc_n x_{n - (K - 1) + j}

The inputs x of a row are counted n = 0 .. T + K - 2. Where input n stands is its place: t >= 0, token t; 1 - K .. -1,
a row of the state, oldest first; -K - t, token t, which does not exist. Without a mask the place of n is n - (K - 1).
With one, `conv_places` sorts them: what does not exist, then the state, then the tokens, so that neighbours touch.

A program owns BLOCK_C channels of a segment of one row and goes through it BLOCK_T inputs at a time, the K - 1 before
them in registers: every input is read once. The gradient of the weight is summed per segment, then over segments.
"""

# ruff: noqa: RUF005, SIM102
# Triton compiles nested ifs on a constant and a GPU value, not an `and` of the two; and adds tuples, but unpacks none.

import torch
import triton
import triton.language as tl

from .checks import check_conv_inputs, common_unit, device_guard, refuse_second_order


# A place that is none.
_NOWHERE = tl.constexpr(-(2**31))
_WARPS = 2
_FORWARD_BLOCK_T, _BACKWARD_BLOCK_T = 8, 4
# Rows are cut into segments, of at most so many inputs, until there are so many programs: what a segment reads twice,
# and the sums it leaves behind, is then a few percent.
_PROGRAMS, _LONGEST_SEGMENT = 4096, 256
# Of the sum over segments.
_BLOCK_R, _SUM_BLOCK_C, _SUM_WARPS = 64, 32, 4

# What changes with batch, length or memory layout must not cause a new compilation.
_DYNAMIC = ["T", "SEGMENT", "SEGMENTS", "ROWS", "stride_xb", "stride_xt", "stride_ob", "stride_ot"]


@triton.jit
def _place(p_places, n, end, K: tl.constexpr, HAS_PLACES: tl.constexpr):
    """The place of input n of the row, 0 <= n < end."""
    inside = (n >= 0) & (n < end)
    if HAS_PLACES:
        return tl.load(p_places + n, mask=inside, other=_NOWHERE)
    return tl.where(inside, n - (K - 1), _NOWHERE)


@triton.jit
def _load_documents(p_ids, places, COUNT: tl.constexpr, HAS_IDS: tl.constexpr):
    """The document of what stands at each of the places; the state belongs to none."""
    documents = ()
    if HAS_IDS:
        for t in tl.static_range(COUNT):
            documents = documents + (tl.load(p_ids + places[t], mask=places[t] >= 0, other=-1),)
    return documents


@triton.jit
def _load_input(p_x, p_s, place, stride_xt, o_c, C: tl.constexpr, K: tl.constexpr, HAS_STATE: tl.constexpr):
    """[BLOCK_C] fp32: the input at a place, 0 where there is none."""
    place = place.to(tl.int64)
    p_row = p_x + place * stride_xt
    first = 0
    if HAS_STATE:
        p_row = tl.where(place >= 0, p_row, p_s + (place + (K - 1)) * C)
        first = 1 - K
    return tl.load(p_row + o_c, mask=o_c < tl.where(place >= first, C, 0), other=0.0).to(tl.float32)


@triton.jit
def _load_weight(p_w, o_c, C: tl.constexpr, K: tl.constexpr):
    """K times [BLOCK_C] fp32."""
    weights = ()
    for j in tl.static_range(K):
        weights = weights + (tl.load(p_w + o_c * K + j, mask=o_c < C, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def _convolve(weights, inputs, documents, t: tl.constexpr, K: tl.constexpr, HAS_IDS: tl.constexpr):
    """[BLOCK_C] fp32: the sum over the taps that end on inputs[t + K - 1]."""
    b_c = weights[K - 1] * inputs[t + K - 1]
    for j in tl.static_range(K - 1):
        b_x = inputs[t + j]
        if HAS_IDS:
            b_x = tl.where(documents[t + j] == documents[t + K - 1], b_x, 0.0)
        b_c += weights[j] * b_x
    return b_c


@triton.jit
def _program(SEGMENTS, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """-> row of the batch, segment, [BLOCK_C] channels."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_n = tl.program_id(0) // blocks
    o_c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return (i_n // SEGMENTS).to(tl.int64), i_n % SEGMENTS, o_c


@triton.jit(do_not_specialize=_DYNAMIC)
def _gated_short_conv_fwd_kernel(
    p_x,
    p_w,
    p_s,
    p_places,
    p_ids,
    p_o,
    p_f,
    T,
    SEGMENT,
    SEGMENTS,
    stride_xb,
    stride_xt,
    C: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):
    i_b, i_s, o_c = _program(SEGMENTS, C, BLOCK_C)
    stride_xt = tl.cast(stride_xt, tl.int64) * UNIT
    p_x += i_b * stride_xb * UNIT
    p_s += i_b * (K - 1) * C
    p_places += i_b * (T + K - 1)
    p_ids += i_b * T
    p_o += i_b * T * C
    start = i_s * SEGMENT
    count = T + K - 1
    end = tl.minimum(start + SEGMENT, count)
    weights = _load_weight(p_w, o_c, C, K)
    earlier = ()
    window = ()
    for j in tl.static_range(K - 1):
        earlier = earlier + (_place(p_places, start - (K - 1) + j, count, K, HAS_PLACES),)
        window = window + (_load_input(p_x, p_s, earlier[j], stride_xt, o_c, C, K, HAS_STATE),)
    for n in range(start, end, BLOCK_T):
        places = earlier
        for t in tl.static_range(BLOCK_T):
            places = places + (_place(p_places, n + t, count, K, HAS_PLACES),)
        documents = _load_documents(p_ids, places, K - 1 + BLOCK_T, HAS_IDS)
        inputs = window
        gates = ()
        for t in tl.static_range(BLOCK_T):
            place = places[K - 1 + t]
            inputs = inputs + (_load_input(p_x, p_s, place, stride_xt, o_c, C, K, HAS_STATE),)
            p_g = p_x + place.to(tl.int64) * stride_xt + C
            gates = gates + (tl.load(p_g + o_c, mask=o_c < tl.where(place >= 0, C, 0), other=0.0),)
        for t in tl.static_range(BLOCK_T):
            # [BLOCK_C]; 0 where there is no token, since there is no gate
            b_c = _convolve(weights, inputs, documents, t, K, HAS_IDS)
            b_o = b_c / (1.0 + tl.exp(-b_c)) * gates[t].to(tl.float32)
            place = places[K - 1 + t]
            i_t = tl.where(place >= 0, place, -K - place)
            m_t = o_c < tl.where((i_t >= 0) & (i_t < T), C, 0)
            tl.store(p_o + i_t.to(tl.int64) * C + o_c, b_o.to(p_o.dtype.element_ty), mask=m_t)
        earlier = ()
        window = ()
        for j in tl.static_range(K - 1):
            earlier = earlier + (places[BLOCK_T + j],)
            window = window + (inputs[BLOCK_T + j],)
    if HAS_FINAL:
        if end == count:
            p_f += i_b * (K - 1) * C
            for j in tl.static_range(K - 1):
                place = _place(p_places, T + j, count, K, HAS_PLACES)
                b_x = _load_input(p_x, p_s, place, stride_xt, o_c, C, K, HAS_STATE)
                tl.store(p_f + j * C + o_c, b_x.to(p_f.dtype.element_ty), mask=o_c < C)


@triton.jit(do_not_specialize=_DYNAMIC)
def _gated_short_conv_bwd_kernel(
    p_x,
    p_w,
    p_s,
    p_places,
    p_ids,
    p_do,
    p_df,
    p_dx,
    p_ds,
    p_shares,
    T,
    SEGMENT,
    SEGMENTS,
    stride_xb,
    stride_xt,
    stride_ob,
    stride_ot,
    C: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_S: tl.constexpr,
    NEED_W: tl.constexpr,
):
    i_b, i_s, o_c = _program(SEGMENTS, C, BLOCK_C)
    stride_xt = tl.cast(stride_xt, tl.int64) * UNIT
    stride_ot = tl.cast(stride_ot, tl.int64) * UNIT
    p_x += i_b * stride_xb * UNIT
    p_s += i_b * (K - 1) * C
    p_places += i_b * (T + K - 1)
    p_ids += i_b * T
    p_do += i_b * stride_ob * UNIT
    p_df += i_b * (K - 1) * C
    p_dx += i_b * T * 2 * C
    p_ds += i_b * (K - 1) * C
    p_shares += (i_b * SEGMENTS + i_s) * K * C
    start = i_s * SEGMENT
    count = T + K - 1
    end = tl.minimum(start + SEGMENT, count)
    stop = end
    if NEED_X or NEED_S:
        # the gradient of an input needs the K - 1 tokens behind it
        stop = end + K - 1
    last = tl.minimum(stop, count)
    weights = _load_weight(p_w, o_c, C, K)
    earlier = ()
    window = ()
    slopes_window = ()
    sums = (tl.zeros([BLOCK_C], dtype=tl.float32),)
    for j in tl.static_range(K - 1):
        earlier = earlier + (_place(p_places, start - (K - 1) + j, count, K, HAS_PLACES),)
        window = window + (_load_input(p_x, p_s, earlier[j], stride_xt, o_c, C, K, HAS_STATE),)
        slopes_window = slopes_window + (tl.zeros([BLOCK_C], dtype=tl.float32),)
        sums = sums + (tl.zeros([BLOCK_C], dtype=tl.float32),)
    for n in range(start, stop, BLOCK_T):
        places = earlier
        for t in tl.static_range(BLOCK_T):
            places = places + (_place(p_places, n + t, last, K, HAS_PLACES),)
        documents = _load_documents(p_ids, places, K - 1 + BLOCK_T, HAS_IDS)
        inputs = window
        gates = ()
        gradients = ()
        for t in tl.static_range(BLOCK_T):
            place = places[K - 1 + t]
            inputs = inputs + (_load_input(p_x, p_s, place, stride_xt, o_c, C, K, HAS_STATE),)
            m_t = o_c < tl.where(place >= 0, C, 0)
            i_t = place.to(tl.int64)
            gates = gates + (tl.load(p_x + i_t * stride_xt + C + o_c, mask=m_t, other=0.0),)
            gradients = gradients + (tl.load(p_do + i_t * stride_ot + o_c, mask=m_t, other=0.0),)
        slopes = slopes_window
        for t in tl.static_range(BLOCK_T):
            # [BLOCK_C] each; 0 where there is no token, since there is no gate and no gradient
            b_c = _convolve(weights, inputs, documents, t, K, HAS_IDS)
            b_do = gradients[t].to(tl.float32)
            b_sigma = 1.0 / (1.0 + tl.exp(-b_c))
            b_dc = b_do * gates[t].to(tl.float32) * b_sigma * (1.0 + b_c * (1.0 - b_sigma))
            b_dg = b_do * b_c * b_sigma
            slopes = slopes + (b_dc,)
            if NEED_X:
                place = places[K - 1 + t]
                i_t = tl.where(place >= 0, place, -K - place)
                m_t = o_c < tl.where((i_t >= 0) & (i_t < T) & (n + t < end), C, 0)
                tl.store(p_dx + i_t.to(tl.int64) * (2 * C) + C + o_c, b_dg.to(p_dx.dtype.element_ty), mask=m_t)
            if NEED_W:
                b_own = tl.where(n + t < end, b_dc, 0.0)
                added = ()
                for j in tl.static_range(K):
                    b_x = inputs[t + j]
                    if HAS_IDS:
                        b_x = tl.where(documents[t + j] == documents[t + K - 1], b_x, 0.0)
                    added = added + (sums[j] + b_own * b_x,)
                sums = added
        if NEED_X or NEED_S:
            for t in tl.static_range(BLOCK_T):
                # [BLOCK_C]: the gradient of the input whose last tap this token has
                b_dx = weights[K - 1] * slopes[t]
                for j in tl.static_range(K - 1):
                    b_dc = slopes[t + K - 1 - j]
                    if HAS_IDS:
                        b_dc = tl.where(documents[t + K - 1 - j] == documents[t], b_dc, 0.0)
                    b_dx += weights[j] * b_dc
                i_x = n + t - (K - 1)
                is_own = (i_x >= start) & (i_x < end)
                if HAS_FINAL:
                    p_last = p_df + (i_x - T).to(tl.int64) * C
                    m_last = o_c < tl.where(is_own & (i_x >= T), C, 0)
                    b_dx += tl.load(p_last + o_c, mask=m_last, other=0.0).to(tl.float32)
                place = places[t]
                if NEED_X:
                    i_t = tl.where(place >= 0, place, -K - place)
                    m_t = o_c < tl.where(is_own & (i_t >= 0) & (i_t < T), C, 0)
                    tl.store(p_dx + i_t.to(tl.int64) * (2 * C) + o_c, b_dx.to(p_dx.dtype.element_ty), mask=m_t)
                if NEED_S:
                    m_s = o_c < tl.where(is_own & (place < 0) & (place > -K), C, 0)
                    tl.store(p_ds + (place + K - 1).to(tl.int64) * C + o_c, b_dx.to(p_ds.dtype.element_ty), mask=m_s)
        earlier = ()
        window = ()
        slopes_window = ()
        for j in tl.static_range(K - 1):
            earlier = earlier + (places[BLOCK_T + j],)
            window = window + (inputs[BLOCK_T + j],)
            slopes_window = slopes_window + (slopes[BLOCK_T + j],)
    if NEED_W:
        for j in tl.static_range(K):
            tl.store(p_shares + j * C + o_c, sums[j], mask=o_c < C)


@triton.jit(do_not_specialize=["ROWS"])
def _gated_short_conv_weight_kernel(
    p_shares, p_dw, ROWS, C: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    i_j = tl.program_id(0) % K
    o_c = tl.program_id(0) // K * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_sum = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for r in range(0, ROWS, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        # [BLOCK_R, BLOCK_C]
        p_share = p_shares + (o_r[:, None].to(tl.int64) * K + i_j) * C + o_c[None, :]
        b_sum += tl.load(p_share, mask=(o_r[:, None] < ROWS) & m_c[None, :], other=0.0)
    tl.store(p_dw + o_c * K + i_j, tl.sum(b_sum, 0).to(p_dw.dtype.element_ty), mask=m_c)


def _segment_length(blocks, block_t):
    """Inputs of a segment, a multiple of block_t, where all tokens together have so many blocks of channels."""
    return max(block_t, min(_LONGEST_SEGMENT, blocks // _PROGRAMS // block_t * block_t))


class _Launch:
    """What forward and backward have in common."""

    def __init__(self, projected, weight, block_t, lane):
        B, T, C = projected.shape[0], projected.shape[1], projected.shape[2] // 2
        K = weight.shape[1]
        # values a lane: so many that they and the taps stay in registers
        block_c = 32 * _WARPS * (lane if K <= 4 else lane // 2)
        self.segment = _segment_length(B * T * C // block_c, block_t)
        self.segments = -(-(T + K - 1) // self.segment)
        self.rows = B * self.segments
        self.grid = (self.rows * -(-C // block_c),)
        self.constants = {"C": C, "K": K, "BLOCK_C": block_c, "BLOCK_T": block_t, "num_warps": _WARPS}


def _gated_short_conv_fwd(projected, weight, state, places, document_ids, has_final):
    """-> output [B, T, C], final state or None."""
    B, T, C = projected.shape[0], projected.shape[1], projected.shape[2] // 2
    output = torch.empty((B, T, C), dtype=projected.dtype, device=projected.device)
    final = None
    if has_final:
        final = torch.empty((B, weight.shape[1] - 1, C), dtype=projected.dtype, device=projected.device)
    launch = _Launch(projected, weight, _FORWARD_BLOCK_T, 16 // projected.element_size())
    strides = projected.stride(0), projected.stride(1)
    unit = common_unit(C, *strides)
    with device_guard(projected):
        _gated_short_conv_fwd_kernel[launch.grid](
            projected,
            weight,
            projected if state is None else state,
            projected if places is None else places,
            projected if document_ids is None else document_ids,
            output,
            output if final is None else final,
            T,
            launch.segment,
            launch.segments,
            *(stride // unit for stride in strides),
            UNIT=unit,
            HAS_STATE=state is not None,
            HAS_PLACES=places is not None,
            HAS_IDS=document_ids is not None,
            HAS_FINAL=has_final,
            **launch.constants,
        )
    return output, final


def _gated_short_conv_bwd(projected, weight, state, places, document_ids, d_output, d_final, needs):
    """-> gradients of projected, weight and state, each None unless `needs` says so."""
    need_x, need_w, need_s = needs
    device = projected.device
    T, C = projected.shape[1], projected.shape[2] // 2
    launch = _Launch(projected, weight, _BACKWARD_BLOCK_T, 4)
    d_projected = torch.empty(projected.shape, dtype=projected.dtype, device=device) if need_x else None
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device) if need_w else None
    d_state = torch.empty(state.shape, dtype=state.dtype, device=device) if need_s else None
    shares = None
    if need_w:
        shares = torch.empty((launch.rows, weight.shape[1], C), dtype=torch.float32, device=device)
    strides = projected.stride(0), projected.stride(1), d_output.stride(0), d_output.stride(1)
    unit = common_unit(C, *strides)
    with device_guard(projected):
        _gated_short_conv_bwd_kernel[launch.grid](
            projected,
            weight,
            projected if state is None else state,
            projected if places is None else places,
            projected if document_ids is None else document_ids,
            d_output,
            projected if d_final is None else d_final,
            projected if d_projected is None else d_projected,
            projected if d_state is None else d_state,
            projected if shares is None else shares,
            T,
            launch.segment,
            launch.segments,
            *(stride // unit for stride in strides),
            UNIT=unit,
            HAS_STATE=state is not None,
            HAS_PLACES=places is not None,
            HAS_IDS=document_ids is not None,
            HAS_FINAL=d_final is not None,
            NEED_X=need_x,
            NEED_S=need_s,
            NEED_W=need_w,
            **launch.constants,
        )
        if need_w:
            _gated_short_conv_weight_kernel[(-(-C // _SUM_BLOCK_C) * weight.shape[1],)](
                shares,
                d_weight,
                launch.rows,
                C=C,
                K=weight.shape[1],
                BLOCK_R=_BLOCK_R,
                BLOCK_C=_SUM_BLOCK_C,
                num_warps=_SUM_WARPS,
            )
    return d_projected, d_weight, d_state


class _GatedShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, weight, state, places, document_ids, has_final):
        projected = projected if projected.stride(2) == 1 else projected.contiguous()
        weight = weight.contiguous()
        state = None if state is None else state.contiguous()
        output, final = _gated_short_conv_fwd(projected, weight, state, places, document_ids, has_final)
        ctx.save_for_backward(projected, weight, state, places, document_ids)
        if has_final:
            return output, final
        return output

    @staticmethod
    def backward(ctx, d_output, d_final=None):
        refuse_second_order("gated_short_conv")
        d_output = d_output if d_output.stride(2) == 1 else d_output.contiguous()
        d_final = None if d_final is None else d_final.contiguous()
        gradients = _gated_short_conv_bwd(*ctx.saved_tensors, d_output, d_final, ctx.needs_input_grad[:3])
        return *gradients, None, None, None


def conv_places(mask, K):
    """The places of the inputs of each row for `gated_short_conv`, from the mask `[B, T]`: int32 `[B, K - 1 + T]`.

    Depends on the mask and the number of taps alone: the layers of a model share it. Waits for no GPU.
    """
    B, T = mask.shape
    token = torch.arange(T, dtype=torch.int32, device=mask.device)
    token = torch.where(mask != 0, token, -K - token)
    state = torch.arange(1 - K, 0, dtype=torch.int32, device=mask.device).expand(B, -1)
    return torch.cat([state, token], dim=1).sort(dim=1).values


def gated_short_conv(
    projected,
    weight,
    *,
    state=None,
    mask=None,
    places=None,
    document_ids=None,
    output_final_state=False,
):
    """The gated short convolution of Based, `silu(conv(u)) * g`, a causal depthwise convolution over time.

    Arithmetic in fp32, rounded once. The plain original is `BasedGatedConv1d` in transformers_based (`BaseConv` of the
    paper's code, arXiv 2402.18668). Differentiable in projected, weight and state.

    Args:
        projected: [B, T, 2 C], float32, float16 or bfloat16: u, the input of the convolution, beside g, its gate.
        weight: [C, K], float32, float16 or bfloat16, K from 2 to 8, the last tap on the token itself.
        state: [B, K - 1, C], dtype of projected, the last inputs before these, oldest first; zeros at the start.
        mask: [B, T], bool or 0/1. 0: the token does not exist and its neighbours touch; its output row is 0 whatever it
            holds.
        places: [B, K - 1 + T] int32, `conv_places(mask, K)` if it is at hand; then the mask is not looked at.
        document_ids: [B, T], integers >= 0; a tap reaches no token of another number, and no state.
        output_final_state: also return the last K - 1 inputs, those of the state among them if there are fewer tokens.

    Returns:
        output [B, T, C] and the final state [B, K - 1, C] or None, in projected's dtype.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.
        RuntimeError: a second derivative is asked for (create_graph=True).
    """
    check_conv_inputs(projected, weight, state, mask, places, document_ids)
    if places is not None:
        places = places.contiguous()
    elif mask is not None:
        places = conv_places(mask, weight.shape[1])
    if document_ids is not None:
        document_ids = document_ids.contiguous()
    arguments = projected, weight, state, places, document_ids
    if output_final_state:
        return _GatedShortConv.apply(*arguments, True)
    return _GatedShortConv.apply(*arguments, False), None
