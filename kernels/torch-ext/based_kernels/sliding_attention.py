# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Softmax attention in a sliding window with rotary, for whole sequences: forward and backward, linear in T.

Layout: query, output [B, T, H, D]; key, value [B, T, HKV, D]; keys and values before them [B, HKV, P, D], keys rotated;
log-sum-exp and row sums of the backward [B, H, T] fp32. Token t of a row stands at t, what was before it at -P .. -1.

Maths:  q, k <- R x = (low cos - high sin, high cos + low sin), rounded;   s_ij = scale q_i . k_j,  i - W < j <= i
        o_i = sum_j p_ij v_j,  p_ij = e^{s_ij - lse_i};   dv_j = sum_i p_ij do_i
        ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij),  dp_ij = do_i . v_j
        dq_i = scale R^T sum_j ds_ij k_j,   dk_j = scale R^T sum_i ds_ij q_i

Two kernels give the gradients, one by blocks of queries and one by blocks of keys (sliding_attention_kernels.py); here
is what is launched when, and the op.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import check_sliding_inputs, device_guard, interpreted, refuse_second_order, vector_rows, wide_mask
from .launch import launch
from .sliding_attention_kernels import (
    sliding_attention_bwd_key_kernel,
    sliding_attention_bwd_query_kernel,
    sliding_attention_fwd_kernel,
)


class _Config(NamedTuple):
    BLOCK_Q: int
    BLOCK_K: int
    num_warps: int
    num_stages: int = 1


# Products of 16 rows a warp, and too few rows for Hopper's asynchronous products, which are kept out (README). The keys
# of a block of queries are read by the next ones too, from the L2 cache. Fixed, never raced.
_FORWARD = _Config(BLOCK_Q=32, BLOCK_K=32, num_warps=2)
_BACKWARD_QUERY = _Config(BLOCK_Q=32, BLOCK_K=16, num_warps=2)
_BACKWARD_KEY = _Config(BLOCK_Q=16, BLOCK_K=32, num_warps=2)


class _Call:
    """What the launches of one call have in common."""

    def __init__(self, query, key, value, past_keys, past_values, cos, sin, mask, document_ids, window, scale):
        self.has_past, self.has_mask, self.packed = past_keys is not None, mask is not None, document_ids is not None
        if not self.has_past:
            # stand for absent tensors: never touched, and their strides do not matter
            past_keys, past_values = key, value
        mask = mask if self.has_mask else cos
        document_ids = document_ids if self.packed else cos
        self.tensors = query, key, value, past_keys, past_values, cos, sin, mask, document_ids
        self.B, self.T, self.H, self.D = query.shape
        self.group, self.dtype = self.H // key.shape[2], value.dtype
        self.past = past_keys.shape[2] if self.has_past else 0
        self.scale = scale
        self.numbers = (
            self.T,
            self.past,
            window,
            # units of 8 elements: 16-byte loads without a compilation per layout
            *_strides(query),
            *_strides(key),
            *_strides(value),
            *_strides(past_keys),
            *_strides(past_values),
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            sin.stride(0) if sin.shape[0] > 1 else 0,
            sin.stride(1),
            mask.stride(0),
            document_ids.stride(0),
        )
        dtypes = query.dtype, key.dtype, value.dtype, mask.dtype, document_ids.dtype
        self.kind = (self.H, self.group, self.D, self.has_past, self.has_mask, self.packed, dtypes, query.device)

    def launch(self, kernel, config, blocks, tensors, numbers):
        """`blocks` programs for each row and each of its heads, of which there are as many as the kernel writes to."""
        launch(
            kernel,
            (config, self.kind),
            blocks * self.B,
            (*self.tensors, *tensors),
            (self.scale, *self.numbers, *numbers),
            lambda: self.constants(config),
        )

    def constants(self, config):
        return {
            "H": self.H,
            "GROUP": self.group,
            "D": self.D,
            # 16: the least that a product takes
            "HALF": max(triton.next_power_of_2(self.D // 2), 16),
            "BLOCK_D": max(triton.next_power_of_2(self.D), 16),
            "HAS_MASK": self.has_mask,
            "PACKED": self.packed,
            "HAS_PAST": self.has_past,
            "DTYPE": _product_type(self.dtype),
            "PRECISION": "tf32x3" if self.dtype == torch.float32 else "tf32",
            **config._asdict(),
        }


def _product_type(dtype):
    # the interpreter multiplies the bits of bfloat16 as integers
    if dtype == torch.float32 or interpreted():
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def _strides(x):
    return x.stride(0) // 8, x.stride(1) // 8, x.stride(2) // 8


def _empty_like(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _sliding_attention_fwd(inputs):
    """-> output [B, T, H, D], log-sum-exp [B, H, T] in base 2."""
    query, value = inputs[0], inputs[2]
    B, T, H, _ = query.shape
    output = torch.empty(query.shape, dtype=value.dtype, device=query.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=query.device)
    call, config = _Call(*inputs), _FORWARD
    with device_guard(query):
        call.launch(sliding_attention_fwd_kernel, config, -(-T // config.BLOCK_Q) * H, (output, lse), ())
    return output, lse


def _sliding_attention_bwd(inputs, lse, d_output, need_keys, need_past):
    """-> gradients of query, key, value, past_keys and past_values: the former two pairs None unless needed."""
    query, key, value, past_keys, past_values = inputs[:5]
    T, H = query.shape[1:3]
    call = _Call(*inputs)
    delta, d_query = torch.empty_like(lse), _empty_like(query)
    d_key = d_value = d_past_keys = d_past_values = None
    with device_guard(query):
        config = _BACKWARD_QUERY
        call.launch(
            sliding_attention_bwd_query_kernel,
            config,
            -(-T // config.BLOCK_Q) * H,
            (lse, d_output, delta, d_query),
            _strides(d_output),
        )
        if need_keys or need_past:
            config, past_blocks = _BACKWARD_KEY, 0
            d_key, d_value = _empty_like(key), _empty_like(value)
            d_past = d_key, d_value
            if need_past:
                past_blocks = -(-call.past // config.BLOCK_K)
                d_past = d_past_keys, d_past_values = _empty_like(past_keys), _empty_like(past_values)
            call.launch(
                sliding_attention_bwd_key_kernel,
                config,
                (-(-T // config.BLOCK_K) + past_blocks) * key.shape[2],
                (lse, d_output, delta, d_key, d_value, *d_past),
                (*_strides(d_output), past_blocks),
            )
    return d_query, d_key, d_value, d_past_keys, d_past_values


class _SlidingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, past_keys, past_values, cos, sin, mask, document_ids, window, scale):
        query, key, value = vector_rows(query), vector_rows(key), vector_rows(value)
        if past_keys is not None:
            past_keys, past_values = vector_rows(past_keys), vector_rows(past_values)
        tensors = query, key, value, past_keys, past_values, cos, sin, mask, document_ids
        output, lse = _sliding_attention_fwd((*tensors, window, scale))
        ctx.save_for_backward(*tensors, lse)
        ctx.window, ctx.scale = window, scale
        return output

    @staticmethod
    def backward(ctx, d_output):
        refuse_second_order("sliding_attention")
        *tensors, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients = _sliding_attention_bwd(
            (*tensors, ctx.window, ctx.scale),
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
    Softmax and sums in fp32. The plain original is `BasedAttention` in transformers_based. Differentiable once, in
    query, key, value, past_keys and past_values. Two runs give the same bits.

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
        RuntimeError: a second derivative is asked for (create_graph=True).

    Source: arXiv 2402.18668, section 4.2; blocks of softmax and its backward as in FlashAttention-2, arXiv 2307.08691.
    """
    scale = check_sliding_inputs(query, key, value, cos, sin, window, scale, mask, document_ids, past_keys, past_values)
    cos, sin = (x if x.stride(2) == 1 else x.contiguous() for x in (cos, sin))
    mask, document_ids = (
        x if x is None or x.stride(1) == 1 else x.contiguous() for x in (wide_mask(mask), document_ids)
    )
    return _SlidingAttention.apply(
        query, key, value, past_keys, past_values, cos, sin, mask, document_ids, window, scale
    )
