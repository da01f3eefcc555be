# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Causal linear attention with the second-order Taylor feature map (Based): forward and backward for whole sequences.

Layout: query, key [B, T, H, D]; value, output [B, T, H, V]; state fp32 [N, H, V + 1, F_PAD], row V is the normaliser.

Maths:  w_ij = 1 + s + s^2 / 2,  s = scale q_i . k_j,  j <= i;   o_i = sum_j w_ij v_j / z_i,  z_i = max(sum_j w_ij, 0.5)
        inside a chunk of BLOCK_C tokens by the quadratic form, over earlier chunks through w_ij = phi(q_i) . phi(k_j) and
        the running state  sum_j phi(k_j) v_j^T  and the moments of k, in registers in fp32.

One kernel gives the output and the gradient of value, another those of query and key (taylor_attention_kernels.py); here
is what is launched when, and the op.
"""

# ruff: noqa: E501

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import check_sequence_inputs, device_guard, feature_count, interpreted, vector_rows
from .segments import cut
from .taylor_attention_kernels import (
    sum_shares_kernel,
    taylor_attention_partial_kernel,
    taylor_attention_rows_kernel,
    taylor_attention_scan_kernel,
    taylor_attention_slope_kernel,
    taylor_attention_sum_kernel,
)
from .taylor_features import roll_table_kernel


class _Config(NamedTuple):
    P: int
    BLOCK_C: int
    BLOCK_V: int
    ROLL_BY_LOAD: bool
    DTYPE: tl.dtype
    PRECISION: str
    num_warps: int
    num_stages: int


def _config(D, dtype):
    """Tiles for one (D, dtype): fixed, never raced, so that two runs of a program give the same bits.

    The state of a program, all features of BLOCK_V values, stays in registers. 16 x 16 x 16 is the smallest product of the
    tensor cores: chunks of 16 make the least work in the quadratic form, and tiles this small keep Triton on the
    synchronous products that every GPU since Ampere has. What other settings gave is in the README.
    """
    P = 16 if D <= 16 else 32
    if dtype == torch.bfloat16:
        # the interpreter multiplies the bits of bfloat16 as integers
        product = tl.float32 if interpreted() else tl.bfloat16
        return _Config(P, 16, 16, False, product, "tf32", 1 if P == 16 else 4, 3)
    # fp16 features overflow at |x| = 256: tf32 has the mantissa of fp16 and the range of fp32
    precision = "tf32" if dtype == torch.float16 else "tf32x3"
    return _Config(P, 16, 16, True, tl.float32, precision, 2 if P == 16 else 4, 2 if P == 16 else 1)


# Warps that fit a processor beside one another: they hold 255 registers a lane.
_WARPS = 8
# Below this a segment reads and writes more of states than of tokens.
_SHORTEST_SEGMENT = 256


def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _segment_length(B, T, H, blocks_v, num_warps, packed, processors):
    """Tokens per segment. Cutting costs a second pass over keys and values and two launches. On a card half full that is as
    much as it gains (benchmarks/results), so sequences are cut only where they leave two thirds of the card empty."""
    rows = H * blocks_v * (1 if packed else B)
    parts = _WARPS * processors // (rows * num_warps)
    if parts < 3:
        return -(-T // 64) * 64
    return max(-(-T // (parts * 64)) * 64, _SHORTEST_SEGMENT)


_roll_tables = {}


def _roll_table(config, device):
    """The matrices of `load_rolls`. Kept, except where they are made in a CUDA graph's memory pool, which they would not
    outlive, or by a compiled graph, which is not to see what is kept."""
    dtype = torch.bfloat16 if tl.bfloat16 == config.DTYPE else torch.float32
    P = config.P
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and (P, dtype, device) in _roll_tables:
        return _roll_tables[P, dtype, device]
    table = torch.empty((2, P // 2 + 1, P, P), dtype=dtype, device=device)
    with device_guard(table):
        roll_table_kernel[(P // 2 + 1,)](table, P=P, DTYPE=config.DTYPE, num_warps=1)
        if is_compiling or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return table
        if device.type == "cuda":
            # once, for the other streams that will read it
            torch.cuda.current_stream().synchronize()
    _roll_tables[P, dtype, device] = table
    return table


class _Plan:
    """What the launches of one call have in common."""

    def __init__(self, query, value, scale, mask, cu_seqlens):
        B, T, H, D = query.shape
        V = value.shape[3]
        config = _config(D, query.dtype)
        _, padded = feature_count(D)
        self.device = query.device
        self.blocks_v = -(-V // config.BLOCK_V)
        self.state_rows = (H, V + 1, padded)
        packed = cu_seqlens is not None
        length = _segment_length(B, T, H, self.blocks_v, config.num_warps, packed, _processors(query.device))
        self.segments = cut(B, T, cu_seqlens, length)
        self.grid = (self.segments.programs * H * self.blocks_v,)
        self.has_table = self.segments.doc is not None
        table = _roll_table(config, query.device)
        # stands for an absent tensor: of the type that the kernel compiles for, and never touched
        self.absent = torch.empty(4, dtype=torch.float32, device=query.device)
        bounds = cu_seqlens if packed else self.absent
        where = (self.segments.doc, self.segments.first, self.segments.slot) if self.has_table else (bounds,) * 3
        numbers = (
            float(scale),
            math.sqrt(scale),
            T,
            self.segments.docs,
            H,
            self.segments.length,
            self.segments.per_doc,
        )
        self.arguments = (table, bounds, *where, *numbers)
        self.mask = self.absent if mask is None else mask
        self.constants = {
            "D": D,
            "V": V,
            "F_PAD": padded,
            "HAS_MASK": mask is not None,
            "PACKED": packed,
            "TABLE": self.has_table,
            **config._asdict(),
        }

    def states(self, count):
        """An empty fp32 state for each of `count` documents or segments."""
        return torch.empty((count, *self.state_rows), dtype=torch.float32, device=self.device)

    def or_absent(self, x):
        return self.absent if x is None else x

    def partial(self, y, b, e, *, edge, gradient):
        """-> what each segment of a cut document adds to the state, or to its gradient."""
        slots = self.states(self.segments.slots)
        taylor_attention_partial_kernel[self.grid](
            y,
            b,
            self.mask,
            self.or_absent(e),
            slots,
            *self.arguments,
            *_strides(y),
            *_strides(b),
            EDGE=edge,
            GRADIENT=gradient,
            **self.constants,
        )
        return slots

    def scan(self, slots, initial, final, *, reverse):
        """Turns partial sums into the state each segment starts from, in place; writes the total to `final`."""
        H, rows, padded = self.state_rows
        size, block = rows * padded, 1024
        taylor_attention_scan_kernel[(self.segments.docs * H * -(-size // block),)](
            slots,
            self.or_absent(initial),
            self.or_absent(final),
            self.segments.slot if self.has_table else slots,
            self.segments.count if self.has_table else slots,
            self.segments.per_doc,
            H,
            SIZE=size,
            F=feature_count(self.constants["D"])[0],
            F_PAD=padded,
            BLOCK=block,
            HAS_INIT=initial is not None,
            HAS_FINAL=final is not None,
            TABLE=self.has_table,
            REVERSE=reverse,
            num_warps=4,
        )

    def sum(self, x, y, b, initial, slots, out, z, final, *, reverse):
        taylor_attention_sum_kernel[self.grid](
            x,
            y,
            b,
            self.mask,
            self.or_absent(initial),
            self.or_absent(slots),
            out,
            self.or_absent(z),
            self.or_absent(final),
            *self.arguments,
            *_strides(x),
            *_strides(y),
            *_strides(b),
            HAS_INIT=initial is not None,
            HAS_FINAL=final is not None,
            REVERSE=reverse,
            **self.constants,
        )

    def slope(self, x, y, a, b, e, initial, slots, final, *, reverse):
        """-> the gradient of x: blocks of V give shares, which are summed in a fixed order."""
        share = x.dtype if self.blocks_v == 1 else torch.float32
        dx = torch.empty((self.blocks_v, *x.shape), dtype=share, device=x.device)
        taylor_attention_slope_kernel[self.grid](
            x,
            y,
            a,
            b,
            e,
            self.mask,
            self.or_absent(initial),
            self.or_absent(slots),
            dx,
            self.or_absent(final),
            *self.arguments,
            *_strides(x),
            *_strides(y),
            *_strides(a),
            *_strides(b),
            e.numel(),
            HAS_INIT=initial is not None,
            HAS_FINAL=final is not None,
            REVERSE=reverse,
            **self.constants,
        )
        return dx[0] if self.blocks_v == 1 else _sum_shares(dx, x.dtype)


def _sum_shares(shares, dtype):
    out = torch.empty(shares.shape[1:], dtype=dtype, device=shares.device)
    block = 1024
    grid = (-(-out.numel() // block),)
    sum_shares_kernel[grid](shares, out, out.numel(), NV=shares.shape[0], BLOCK=block, num_warps=4)
    return out


def _strides(x):
    # units of 8 elements, see the kernels
    return x.stride(0) // 8, x.stride(1) // 8, x.stride(2) // 8


def _taylor_attention_fwd(query, key, value, scale, mask, cu_seqlens, initial_state, has_final):
    """-> output [B, T, H, V], z [B, T, H] fp32, the states of cut documents or None, final state or None."""
    plan = _Plan(query, value, scale, mask, cu_seqlens)
    output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    z = torch.empty(value.shape[:3], dtype=torch.float32, device=value.device)
    final = plan.states(plan.segments.docs) if has_final else None
    slots = None
    with device_guard(query):
        if plan.segments.slots > 0:
            slots = plan.partial(key, value, None, edge=has_final, gradient=False)
            plan.scan(slots, initial_state, final, reverse=False)
        plan.sum(query, key, value, initial_state, slots, output, z, final, reverse=False)
    return output, z, slots, final


def _taylor_attention_bwd(
    query, key, value, scale, mask, cu_seqlens, initial_state, slots, output, z, d_output, d_final, need_initial
):
    """-> gradients of query, key, value and initial_state (None unless needed)."""
    plan = _Plan(query, value, scale, mask, cu_seqlens)
    # fp16 has no room for what a long sequence divides by
    g = torch.empty_like(output, dtype=torch.bfloat16 if output.dtype == torch.bfloat16 else torch.float32)
    e = torch.empty_like(z)
    d_initial = plan.states(plan.segments.docs) if need_initial else None
    block_r = 32
    with device_guard(query):
        taylor_attention_rows_kernel[(-(-z.numel() // block_r),)](
            output,
            d_output,
            z,
            g,
            e,
            plan.mask,
            z.numel(),
            z.shape[1],
            z.shape[2],
            *d_output.stride(),
            V=value.shape[3],
            BLOCK_R=block_r,
            BLOCK_V=triton.next_power_of_2(value.shape[3]),
            HAS_MASK=mask is not None,
            num_warps=4,
        )
        d_query = plan.slope(query, key, g, value, e, initial_state, slots, None, reverse=False)
        d_slots = None
        if plan.segments.slots > 0:
            d_slots = plan.partial(query, g, e, edge=need_initial, gradient=True)
            plan.scan(d_slots, d_final, d_initial, reverse=True)
        d_key = plan.slope(key, query, value, g, e, d_final, d_slots, d_initial, reverse=True)
        d_value = torch.empty_like(output)
        plan.sum(key, query, g, d_final, d_slots, d_value, None, d_initial, reverse=True)
    return d_query, d_key, d_value, d_initial


class _TaylorAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, mask, cu_seqlens, initial_state, output_final_state):
        query, key, value = vector_rows(query), vector_rows(key), vector_rows(value)
        output, z, slots, final = _taylor_attention_fwd(
            query, key, value, scale, mask, cu_seqlens, initial_state, output_final_state
        )
        ctx.save_for_backward(query, key, value, mask, cu_seqlens, initial_state, slots, output, z)
        ctx.scale = scale
        if output_final_state:
            return output, final
        return output

    @staticmethod
    def backward(ctx, d_output, d_final=None):
        query, key, value, mask, cu_seqlens, initial_state, slots, output, z = ctx.saved_tensors
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
            ctx.needs_input_grad[6],
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
    arguments = query, key, value, scale, mask, cu_seqlens, initial_state
    if output_final_state:
        return _TaylorAttention.apply(*arguments, True)
    return _TaylorAttention.apply(*arguments, False), None
