# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Softmax attention in a sliding window with rotary, for whole sequences: forward and backward, linear in T.

Layout: query, output [B, T, H, D]; key, value [B, T, HKV, D]; keys and values before them [B, HKV, P, D], keys rotated;
log-sum-exp and row sums of the backward [B, H, T] fp32. Token t of a row stands at t, what was before it at -P .. -1.

Maths:  q, k <- R x = (low cos - high sin, high cos + low sin), rounded;   s_ij = scale q_i . k_j,  i - W < j <= i
        o_i = sum_j p_ij v_j,  p_ij = e^{s_ij - lse_i};   dv_j = sum_i p_ij do_i,   ds_ij = p_ij do_i . (v_j - o_i)
        dq_i = scale R^T sum_j ds_ij k_j,   dk_j = scale R^T sum_i ds_ij q_i

Two kernels give the gradients, one by blocks of queries and one by blocks of keys (sliding_attention_kernels.py); here
is what is launched when, and the op.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import check_sliding_inputs, device_guard, interpreted, vector_rows
from .sliding_attention_kernels import (
    sliding_attention_bwd_key_kernel,
    sliding_attention_bwd_query_kernel,
    sliding_attention_fwd_kernel,
)


class _Config(NamedTuple):
    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int


# Products of 16 rows a warp, and too few rows for Hopper's asynchronous products, which are kept out (README). The keys
# of a block of queries are read by the next ones too, from the L2 cache. Fixed, never raced.
_FORWARD = _Config(BLOCK_Q=32, BLOCK_K=32, num_warps=2)
_BACKWARD_QUERY = _Config(BLOCK_Q=32, BLOCK_K=16, num_warps=2)
_BACKWARD_KEY = _Config(BLOCK_Q=16, BLOCK_K=32, num_warps=2)


def _common(query, key, value, past_keys, past_values, cos, sin, mask, document_ids, window, scale):
    """-> what the three kernels share: (nine tensors, scale, numbers), and constants."""
    has_past = past_keys is not None
    if not has_past:
        # stand for absent tensors: never touched, and their strides do not matter
        past_keys, past_values = key, value
    arguments = (
        query,
        key,
        value,
        past_keys,
        past_values,
        cos,
        sin,
        cos if mask is None else mask,
        cos if document_ids is None else document_ids,
        scale,
        query.shape[1],
        past_keys.shape[2] if has_past else 0,
        window,
        # units of 8 elements: 16-byte loads without a compilation per layout
        *(x.stride(i) // 8 for x in (query, key, value, past_keys, past_values) for i in range(3)),
        *(number for x in (cos, sin) for number in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))),
        0 if mask is None else mask.stride(0),
        0 if document_ids is None else document_ids.stride(0),
    )
    D, dtype = query.shape[3], value.dtype
    product = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    constants = {
        "H": query.shape[2],
        "GROUP": query.shape[2] // key.shape[2],
        "D": D,
        # 16: the least that a product takes
        "HALF": max(triton.next_power_of_2(D // 2), 16),
        "BLOCK_D": max(triton.next_power_of_2(D), 16),
        "HAS_MASK": mask is not None,
        "PACKED": document_ids is not None,
        "HAS_PAST": has_past,
        # the interpreter multiplies the bits of bfloat16 as integers
        "DTYPE": tl.float32 if interpreted() else product,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }
    return arguments, constants


def _sliding_attention_fwd(*inputs):
    """-> output [B, T, H, D], log-sum-exp [B, H, T] in base 2."""
    query, _, value = inputs[:3]
    B, T, H, D = query.shape
    arguments, constants = _common(*inputs)
    output = torch.empty((B, T, H, D), dtype=value.dtype, device=value.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=value.device)
    with device_guard(query):
        sliding_attention_fwd_kernel[(-(-T // _FORWARD.BLOCK_Q) * B * H,)](
            *arguments[:9], output, lse, *arguments[9:], **constants, **_FORWARD._asdict(), num_stages=1
        )
    return output, lse


def _sliding_attention_bwd(inputs, output, lse, d_output, need_keys, need_past):
    """-> gradients of query, key, value, past_keys and past_values: the former two pairs None unless needed."""
    query, key, value, past_keys, past_values = inputs[:5]
    B, T, H, D = query.shape
    arguments, constants = _common(*inputs)
    tensors, (scale, *numbers) = arguments[:9], arguments[9:]
    numbers += [d_output.stride(i) // 8 for i in range(3)]
    delta = torch.empty_like(lse)
    d_query = torch.empty((B, T, H, D), dtype=query.dtype, device=query.device)
    d_key = d_value = d_past_keys = d_past_values = None
    with device_guard(query):
        config = _BACKWARD_QUERY
        sliding_attention_bwd_query_kernel[(-(-T // config.BLOCK_Q) * B * H,)](
            *tensors,
            output,
            lse,
            d_output,
            delta,
            d_query,
            scale,
            *numbers,
            **constants,
            **config._asdict(),
            num_stages=1,
        )
        if need_keys or need_past:
            config, past_blocks = _BACKWARD_KEY, 0
            d_key, d_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
            if need_past:
                past_blocks = -(-past_keys.shape[2] // config.BLOCK_K)
                d_past_keys, d_past_values = (
                    torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (past_keys, past_values)
                )
            sliding_attention_bwd_key_kernel[((-(-T // config.BLOCK_K) + past_blocks) * B * key.shape[2],)](
                *tensors,
                lse,
                d_output,
                delta,
                d_key,
                d_value,
                d_past_keys if need_past else d_key,
                d_past_values if need_past else d_value,
                scale,
                past_blocks,
                *numbers,
                **constants,
                **config._asdict(),
                num_stages=1,
            )
    return d_query, d_key, d_value, d_past_keys, d_past_values


class _SlidingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, past_keys, past_values, cos, sin, mask, document_ids, window, scale):
        query, key, value = vector_rows(query), vector_rows(key), vector_rows(value)
        if past_keys is not None:
            past_keys, past_values = vector_rows(past_keys), vector_rows(past_values)
        tensors = query, key, value, past_keys, past_values, cos, sin, mask, document_ids
        output, lse = _sliding_attention_fwd(*tensors, window, scale)
        ctx.save_for_backward(*tensors, output, lse)
        ctx.window, ctx.scale = window, scale
        return output

    @staticmethod
    def backward(ctx, d_output):
        *tensors, output, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients = _sliding_attention_bwd(
            (*tensors, ctx.window, ctx.scale),
            output,
            lse,
            vector_rows(d_output),
            needs[1] or needs[2],
            needs[3] or needs[4],
        )
        return *gradients, None, None, None, None, None, None


def sliding_attention(
    query,
    key,
    value,
    cos,
    sin,
    *,
    window,
    scale=None,
    mask=None,
    document_ids=None,
    past_keys=None,
    past_values=None,
):
    """Causal softmax attention to the last `window` tokens, itself included, with rotary; linear in T.

    Query and key come as projected and are rotated here, in fp32, then rounded to value's dtype, as plain PyTorch does.
    Softmax and sums in fp32. The plain original is `BasedAttention` in transformers_based. Differentiable in query,
    key, value, past_keys and past_values; the gradients of query and key are rotated back. Two runs give the same bits.

    Args:
        query: [B, T, H, D], float32, float16 or bfloat16, D a multiple of 8 up to 128. Any strides.
        key: [B, T, HKV, D], any of these dtypes; HKV divides H, and query head h reads key head h // (H // HKV).
        value: [B, T, HKV, D], any of these dtypes, which is that of products and output.
        cos, sin: [B or 1, T, D] float32, the second half of D like the first (the layout of transformers).
        window: how many tokens a query sees at most, 1 or more.
        scale: number > 0; default D ** -0.5.
        mask: [B, P + T], bool or 0/1, P = 0 without past_keys. 0: the token does not exist; nobody sees it, its output
            row and its gradients are 0, whatever its query, key and value hold.
        document_ids: [B, T], integers: tokens see only tokens of the same number. Not with past_keys.
        past_keys, past_values: [B, HKV, P, D] in value's dtype: the tokens before these, oldest first, keys rotated;
            they may be more than the window reaches.

    Returns:
        output [B, T, H, D] in value's dtype.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.

    Source: arXiv 2402.18668, section 4.2; blocks of softmax and its backward as in FlashAttention-2, arXiv 2307.08691.
    """
    scale = check_sliding_inputs(query, key, value, cos, sin, window, scale, mask, document_ids, past_keys, past_values)
    cos, sin = (x if x.stride(2) == 1 else x.contiguous() for x in (cos, sin))
    mask, document_ids = (x if x is None or x.stride(1) == 1 else x.contiguous() for x in (mask, document_ids))
    return _SlidingAttention.apply(
        query, key, value, past_keys, past_values, cos, sin, mask, document_ids, window, scale
    )
