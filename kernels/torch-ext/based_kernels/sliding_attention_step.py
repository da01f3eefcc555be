# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""One decoding step of sliding-window attention: rotary, store into the window's ring and attention, in one kernel.

Layout: query, output [B, 1, H, DH]; key, value [B, 1, HKV, DH]; ring of keys and of values [B, HKV, W, DH], the token
with ordinal r at slot r mod W, keys rotated; count [B, HKV] int64, the tokens seen.

Maths:  q, k <- x cos + rotate_half(x) sin, rounded;  s_j = scale q . k_j, j the token and min(count, W - 1) before it
        o = sum_j e^{s_j} v_j / sum_j e^{s_j},   rescaled block by block to the largest s so far

A program owns one (row of the batch, key head) with its group of query heads: its ring and its count are nobody else's.
The token itself is taken from registers, so no store is waited for; the slot it overwrites is outside the window.
"""

# ruff: noqa: SIM102
# Triton compiles nested ifs on a constant and a GPU value, not an `and` of the two.

import torch
import triton
import triton.language as tl

from .checks import check_sliding_step_inputs, device_guard, vector_rows


# Elements in a tile of keys or values, by bytes of an element: both stay in registers. One warp a program waits for no
# other, and the tiles to come are loaded meanwhile. (16-bit tiles of 2,048 are 4 to 7 percent slower on an H200.)
_TILE = {2: 1024, 4: 2048}
_NUM_WARPS = {2: 1, 4: 2}


@triton.jit
def _rotated(p_x, b_cos, b_sin, o_d, o_pair, m_d):
    """[BLOCK_D] in the dtype of x; the sign of rotate_half is in b_sin."""
    b_x = tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_pair = tl.load(p_x + o_pair, mask=m_d, other=0.0).to(tl.float32)
    return (b_x * b_cos + b_pair * b_sin).to(p_x.dtype.element_ty)


@triton.jit(
    do_not_specialize=[
        "HKV",
        "stride_qb",
        "stride_qh",
        "stride_kb",
        "stride_kh",
        "stride_vb",
        "stride_vh",
        "stride_cos",
        "stride_sin",
        "stride_ring_kb",
        "stride_ring_kh",
        "stride_ring_vb",
        "stride_ring_vh",
        "stride_nb",
        "stride_nh",
        "stride_mb",
    ]
)
def _sliding_attention_step_kernel(
    p_q,
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_ring_k,
    p_ring_v,
    p_count,
    p_mask,
    p_o,
    scale,
    HKV,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_cos,
    stride_sin,
    stride_ring_kb,
    stride_ring_kh,
    stride_ring_vb,
    stride_ring_vh,
    stride_nb,
    stride_nh,
    stride_mb,
    GROUP: tl.constexpr,
    DH: tl.constexpr,
    W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    # torch.compile passes Python floats as float64
    scale = tl.cast(scale, tl.float32)
    i_b = (tl.program_id(0) // HKV).to(tl.int64)
    i_h = (tl.program_id(0) % HKV).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < DH
    p_o += (i_b * HKV + i_h) * (GROUP * DH) + o_d
    p_count += i_b * stride_nb + i_h * stride_nh
    count = tl.load(p_count)
    # [BLOCK_D] each; asked for before it is known whether the row is finished
    is_low = o_d < DH // 2
    o_pair = tl.where(is_low, o_d + DH // 2, o_d - DH // 2)
    b_cos = tl.load(p_cos + i_b * stride_cos + o_d, mask=m_d, other=0.0)
    b_sin = tl.load(p_sin + i_b * stride_sin + o_d, mask=m_d, other=0.0)
    b_sin = tl.where(is_low, -b_sin, b_sin)
    b_k = _rotated(p_k + (i_b * stride_kb + i_h * stride_kh) * 8, b_cos, b_sin, o_d, o_pair, m_d)
    b_v = tl.load(p_v + (i_b * stride_vb + i_h * stride_vh) * 8 + o_d, mask=m_d, other=0.0)
    if HAS_MASK:
        if tl.load(p_mask + i_b * stride_mb) == 0:
            # a finished row: nothing is written to its ring
            for i_g in range(GROUP):
                tl.store(p_o + i_g * DH, tl.zeros([BLOCK_D], dtype=p_o.dtype.element_ty), mask=m_d)
            return
    i_slot = (count % W).to(tl.int32)
    earlier = tl.minimum(count, W - 1).to(tl.int32)
    p_ring_k += (i_b * stride_ring_kb + i_h * stride_ring_kh) * 8
    p_ring_v += (i_b * stride_ring_vb + i_h * stride_ring_vh) * 8
    tl.store(p_ring_k + i_slot * DH + o_d, b_k, mask=m_d)
    tl.store(p_ring_v + i_slot * DH + o_d, b_v, mask=m_d)

    for i_g in range(GROUP):
        p_head = p_q + (i_b * stride_qb + (i_h * GROUP + i_g) * stride_qh) * 8
        b_q = _rotated(p_head, b_cos, b_sin, o_d, o_pair, m_d).to(tl.float32)
        # the token itself is the first of the sum
        b_max = tl.sum(b_q * b_k.to(tl.float32), axis=0) * scale
        b_z = 1.0
        b_o = b_v.to(tl.float32)
        for i_w in tl.range(tl.cdiv(earlier, BLOCK_W), num_stages=2):
            # how many tokens before the last one
            o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)
            m_w = o_w < earlier
            o_slot = i_slot - 1 - o_w
            o_slot = tl.where(o_slot < 0, o_slot + W, o_slot)
            # [BLOCK_W, BLOCK_D] twice, and [BLOCK_W]
            o_tile = o_slot[:, None] * DH + o_d[None, :]
            m_tile = m_w[:, None] & m_d[None, :]
            b_keys = tl.load(p_ring_k + o_tile, mask=m_tile, other=0.0)
            b_values = tl.load(p_ring_v + o_tile, mask=m_tile, other=0.0)
            b_s = tl.sum(b_keys.to(tl.float32) * b_q[None, :], axis=1) * scale
            b_s = tl.where(m_w, b_s, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_s, axis=0))
            b_shrink = tl.exp(b_max - b_new_max)
            b_p = tl.exp(b_s - b_new_max)
            b_z = b_z * b_shrink + tl.sum(b_p, axis=0)
            b_o = b_o * b_shrink + tl.sum(b_p[:, None] * b_values.to(tl.float32), axis=0)
            b_max = b_new_max
        tl.store(p_o + i_g * DH, (b_o / b_z).to(p_o.dtype.element_ty), mask=m_d)
    # every warp, if there is more than one, has read the count before one of them changes it
    tl.debug_barrier()
    tl.store(p_count, count + 1)


def _sliding_attention_step(query, key, value, cos, sin, keys, values, count, scale, mask):
    B, _, H, DH = query.shape
    _, HKV, W, _ = keys.shape
    block_d = triton.next_power_of_2(DH)
    output = torch.empty((B, 1, H, DH), dtype=query.dtype, device=query.device)
    with device_guard(query):
        _sliding_attention_step_kernel[(B * HKV,)](
            query,
            key,
            value,
            cos,
            sin,
            keys,
            values,
            count,
            query if mask is None else mask,
            output,
            scale,
            HKV,
            # units of 8 elements: 16-byte loads without a compilation per layout
            query.stride(0) // 8,
            query.stride(2) // 8,
            key.stride(0) // 8,
            key.stride(2) // 8,
            value.stride(0) // 8,
            value.stride(2) // 8,
            cos.stride(0) if cos.shape[0] > 1 else 0,
            sin.stride(0) if sin.shape[0] > 1 else 0,
            keys.stride(0) // 8,
            keys.stride(1) // 8,
            values.stride(0) // 8,
            values.stride(1) // 8,
            count.stride(0),
            count.stride(1),
            0 if mask is None else mask.stride(0),
            GROUP=H // HKV,
            DH=DH,
            W=W,
            BLOCK_D=block_d,
            BLOCK_W=max(min(_TILE[query.itemsize] // block_d, triton.next_power_of_2(W - 1)), 1),
            HAS_MASK=mask is not None,
            num_warps=_NUM_WARPS[query.itemsize],
        )
    return output


def sliding_attention_step(query, key, value, cos, sin, keys, values, count, *, scale=None, mask=None):
    """One token of softmax attention in a window of W tokens, which a ring holds that is updated in place.

    Query and key come as projected and are rotated here, in fp32, then rounded to their dtype, as the ring holds keys.
    Softmax and sums in fp32. The plain original is `BasedAttention` in transformers_based (eager attention of Llama).
    Forward only: no gradients. The order of the sum is that of the tokens, most recent first, wherever the ring stands.

    Args:
        query: [B, 1, H, DH], float32, float16 or bfloat16, DH a multiple of 8 up to 256.
        key, value: [B, 1, HKV, DH], same dtype; HKV divides H, and query head h reads key head h // (H // HKV).
        cos, sin: [B or 1, 1, DH] float32, the second half of DH like the first (the layout of transformers).
        keys, values: [B, HKV, W, DH], same dtype, W up to 4096: the token with ordinal r (from 0) at slot r % W, keys
            rotated; anything in slots not yet written. The last two dimensions contiguous.
        count: [B, HKV] int64, tokens seen before this one, the same for all heads of a row; grows by 1.
        scale: number > 0; default DH ** -0.5.
        mask: [B, 1], bool or 0/1. 0: the row does not write to ring and count and its output row is 0.

    Returns:
        output [B, 1, H, DH] in query's dtype.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.
    """
    scale = check_sliding_step_inputs(query, key, value, cos, sin, keys, values, count, scale, mask)
    query, key, value = vector_rows(query), vector_rows(key), vector_rows(value)
    cos, sin = (x if x.stride(2) == 1 else x.contiguous() for x in (cos, sin))
    return _sliding_attention_step(query, key, value, cos, sin, keys, values, count, scale, mask)
