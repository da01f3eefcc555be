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
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .checks import check_sequence_inputs, common_unit, device_guard, feature_count, interpreted, vector_rows, wide_mask
from .launch import launch
from .segments import cut, cut_table
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
    ROLL_BY_GATHER: bool
    WIDE_LAST: bool
    DTYPE: tl.dtype
    PRECISION: str
    num_warps: int
    num_stages: int


def _config(D, dtype):
    """Tiles for one (D, dtype): fixed, never raced, so that two runs of a program give the same bits.

    The state of a program, all features of BLOCK_V values, stays in registers. 16 x 16 x 16 is the smallest product of the
    tensor cores: tiles this small keep Triton on the synchronous products that every GPU since Ampere has. Chunks of 16
    make the least work in the quadratic form; where 32 fit, two halves do not wait on one another. What other settings
    gave is in the README.
    """
    P = 16 if D <= 16 else 32
    if dtype == torch.bfloat16:
        # the interpreter multiplies the bits of bfloat16 as integers
        product = tl.float32 if interpreted() else tl.bfloat16
        if P == 16:
            return _Config(P, 32, 16, False, True, product, "tf32", 1, 4)
        return _Config(P, 16, 16, False, True, product, "tf32", 4, 3)
    # fp16 features overflow at |x| = 256: tf32 has the mantissa of fp16 and the range of fp32
    precision = "tf32" if dtype == torch.float16 else "tf32x3"
    return _Config(P, 16, 16, True, P == 32, tl.float32, precision, 1 if P == 16 else 4, 2 if P == 16 else 1)


# Warps that fit a processor beside one another: they hold 255 registers a lane.
_WARPS = 8
# Below this a segment reads and writes more of states than of tokens.
_SHORTEST_SEGMENT = 256


def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _segment_length(B, T, H, blocks_v, num_warps, packed, processors, most):
    """Tokens per segment. Cutting costs a second pass over keys and values, and launches. On a card half full that is as
    much as it gains (benchmarks/results), so sequences are cut only where they leave two thirds of the card empty; and
    into no more segments than the `most` whose states there is room for."""
    rows = H * blocks_v * (1 if packed else B)
    parts = _WARPS * processors // (rows * num_warps)
    if packed:
        # each document may end in a segment that is short: see `cut`
        most = most // 2
    if parts < 3 or most < 2:
        return -(-T // 64) * 64
    return max(-(-T // (min(parts, most) * 64)) * 64, _SHORTEST_SEGMENT)


# Tokens that the slope kernel takes at once, and how far it looks ahead: more of either does not fit beside the states.
_SLOPE_BLOCK_C, _SLOPE_STAGES = 16, 2


def _slope_tiles(V, config):
    """-> values of a program of the slope kernel and groups of features. Of the bf16 products of P = 16, half of the
    features leave room for twice the values, so that features are made half as often (measured, see README)."""
    if config.num_warps > 1 or config.ROLL_BY_GATHER or V <= 16:
        return config.BLOCK_V, 1
    return 32, 2


def _num_shares(V, config):
    block_v, groups = _slope_tiles(V, config)
    return -(-V // block_v) * groups


def _size_of_g(dtype):
    """Bytes of an entry of do / z: fp16 has no room for what a long sequence divides by."""
    return 2 if dtype == torch.bfloat16 else 4


def _memory_left(D, V, dtype, config):
    """Bytes of a token and head that are left of 1.5 times inputs and outputs, with the shares of one gradient there and
    the gradient of value not yet."""
    size = 4 if dtype == torch.float32 else 2
    count = _num_shares(V, config)
    taken = _size_of_g(dtype) * V + (4 * count * D if count > 1 else 0) + 8 - size * V
    return 3 * size * (4 * D + 3 * V) // 2 - taken


def _most_segments(T, D, V, dtype, config):
    """Of a row: as many as have room for their states, forward and backward."""
    return _memory_left(D, V, dtype, config) * T // (2 * (V + 1) * feature_count(D)[1] * 4)


class _Fixed(NamedTuple):
    """What depends on sizes of heads, dtype and device alone."""

    config: _Config
    padded: int
    processors: int
    table: torch.Tensor  # the matrices of `load_rolls`
    absent: torch.Tensor  # stands for an absent tensor: of the type that the kernel compiles for, and never touched


_fixed_by_kind = {}


def _fixed(D, dtype, device):
    """Kept, except where tensors are made in a CUDA graph's memory pool, which they would not outlive, or by a compiled
    graph, which is not to see what is kept."""
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling:
        fixed = _fixed_by_kind.get((D, dtype, device))
        if fixed is not None:
            return fixed
    config = _config(D, dtype)
    P = config.P
    table_dtype = torch.bfloat16 if tl.bfloat16 == config.DTYPE else torch.float32
    table = torch.empty((2, P // 2 + 1, P, P), dtype=table_dtype, device=device)
    absent = torch.empty(4, dtype=torch.float32, device=device)
    fixed = _Fixed(config, feature_count(D)[1], _processors(device), table, absent)
    with device_guard(table):
        roll_table_kernel[(P // 2 + 1,)](table, P=P, DTYPE=config.DTYPE, num_warps=1)
        if is_compiling or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return fixed
        if device.type == "cuda":
            # once, for the other streams that will read it
            torch.cuda.current_stream().synchronize()
    _fixed_by_kind[D, dtype, device] = fixed
    return fixed


class _Plan:
    """What the launches of one call have in common. `cut_at` is the table of an earlier plan for the same documents."""

    def __init__(self, query, value, scale, mask, cu_seqlens, cut_at=None):
        B, T, H, D = query.shape
        V = value.shape[3]
        self.device = query.device
        config, _, processors, table, absent = self.fixed = _fixed(D, query.dtype, self.device)
        self.size = D, V
        self.heads = H
        self.blocks_v = -(-V // config.BLOCK_V)
        self.packed = packed = cu_seqlens is not None
        most = _most_segments(T, D, V, query.dtype, config)
        length = _segment_length(B, T, H, self.blocks_v, config.num_warps, packed, processors, most)
        self.segments = segments = cut(B, T, cu_seqlens, length)
        self.grid = segments.programs * H * self.blocks_v
        if segments.has_table and cut_at is None:
            with device_guard(query):
                cut_at = cut_table(segments, cu_seqlens)
        self.cut_at = cut_at
        self.absent = absent
        self.mask = absent if mask is None else mask
        self.tables = (
            table,
            cu_seqlens if packed else absent,
            cut_at if segments.has_table else absent,
        )
        self.numbers = (scale, math.sqrt(scale), T, segments.docs, H, segments.length, segments.per_doc)
        self.has_mask = mask is not None
        # an absent tensor has another dtype than one that is there
        self.kind = (D, V, query.dtype, self.device, self.has_mask, packed, segments.has_table)

    def constants(self, **more):
        D, V = self.size
        return {
            "D": D,
            "V": V,
            "F_PAD": self.fixed.padded,
            "HAS_MASK": self.has_mask,
            "PACKED": self.packed,
            "TABLE": self.segments.has_table,
            **self.fixed.config._asdict(),
            **more,
        }

    def states(self, count):
        """An empty fp32 state for each of `count` documents or segments."""
        shape = (count, self.heads, self.size[1] + 1, self.fixed.padded)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def or_absent(self, x):
        return self.absent if x is None else x

    def partial(self, y, b, e, *, edge, gradient):
        """-> what each segment of a cut document adds to the state, or to its gradient."""
        slots = self.states(self.segments.slots)
        launch(
            taylor_attention_partial_kernel,
            (self.kind, edge, gradient),
            self.grid,
            (y, b, self.mask, self.or_absent(e), slots, *self.tables),
            (*self.numbers, *_strides(y), *_strides(b)),
            partial(self.constants, EDGE=edge, GRADIENT=gradient),
        )
        return slots

    def scan(self, slots, initial, final, *, reverse):
        """Turns partial sums into the state each segment starts from, in place; writes the total to `final`."""
        size, block = (self.size[1] + 1) * self.fixed.padded, 1024
        has_initial, has_final = initial is not None, final is not None
        launch(
            taylor_attention_scan_kernel,
            (self.kind, has_initial, has_final, reverse),
            self.segments.docs * self.heads * -(-size // block),
            (slots, self.or_absent(initial), self.or_absent(final), self.tables[2]),
            (self.segments.docs, self.segments.per_doc, self.heads),
            lambda: {
                "SIZE": size,
                "F": feature_count(self.size[0])[0],
                "F_PAD": self.fixed.padded,
                "BLOCK": block,
                "HAS_INIT": has_initial,
                "HAS_FINAL": has_final,
                "TABLE": self.segments.has_table,
                "REVERSE": reverse,
                "num_warps": 4,
            },
        )

    def sum(self, x, y, b, initial, slots, out, z, final, *, reverse):
        has_initial, has_final = initial is not None, final is not None
        launch(
            taylor_attention_sum_kernel,
            (self.kind, has_initial, has_final, reverse),
            self.grid,
            (
                x,
                y,
                b,
                self.mask,
                self.or_absent(initial),
                self.or_absent(slots),
                out,
                self.or_absent(z),
                self.or_absent(final),
                *self.tables,
            ),
            (*self.numbers, *_strides(x), *_strides(y), *_strides(b)),
            partial(self.constants, HAS_INIT=has_initial, HAS_FINAL=has_final, REVERSE=reverse),
        )

    def slope(self, query, key, g, value, e, initial, slots, d_final, d_slots, d_initial):
        """-> the gradients of query and key: blocks of V and groups of features give shares, summed in a fixed order."""
        has_initial, has_d_final, has_d_initial = initial is not None, d_final is not None, d_initial is not None
        D, V = self.size
        block_v, groups = _slope_tiles(V, self.fixed.config)
        count = _num_shares(V, self.fixed.config)
        gradients = [torch.empty(query.shape, dtype=query.dtype, device=self.device) for _ in range(2)]
        # Both at once fill a card that either leaves half empty. Segments fill it anyway, and one after the other the
        # shares take half the memory.
        left = _memory_left(D, V, query.dtype, self.fixed.config)
        entries, block = query.numel(), 1024
        at_once = 1 if count > 1 and (self.segments.slots > 0 or 4 * count * D > left) else 2
        for first in range(0, 2, at_once):
            shares = gradients
            if count > 1:
                # of what a launch leaves alone nothing is there
                shares = [self.absent] * 2
                for i in range(first, first + at_once):
                    shares[i] = torch.empty((count, *query.shape), dtype=torch.float32, device=self.device)
            launch(
                taylor_attention_slope_kernel,
                (self.kind, has_initial, has_d_final, has_d_initial),
                self.segments.programs * self.heads * at_once * count,
                (
                    query,
                    key,
                    g,
                    value,
                    e,
                    self.mask,
                    self.or_absent(initial),
                    self.or_absent(slots),
                    self.or_absent(d_final),
                    self.or_absent(d_slots),
                    *shares,
                    self.or_absent(d_initial),
                    *self.tables,
                ),
                (
                    *self.numbers,
                    *_strides(query),
                    *_strides(key),
                    *_strides(g),
                    *_strides(value),
                    e.numel(),
                    first * groups,
                    at_once * groups,
                ),
                partial(
                    self.constants,
                    BLOCK_C=_SLOPE_BLOCK_C,
                    num_stages=min(self.fixed.config.num_stages, _SLOPE_STAGES),
                    BLOCK_V=block_v,
                    GROUPS=groups,
                    HAS_INIT=has_initial,
                    HAS_DFINAL=has_d_final,
                    HAS_DINIT=has_d_initial,
                ),
            )
            if count > 1:
                launch(
                    sum_shares_kernel,
                    self.kind,
                    at_once * -(-entries // block),
                    (*shares, *gradients),
                    (entries, first),
                    lambda: {"SHARES": count, "BLOCK": block, "num_warps": 4},
                )
        return gradients

    def rows(self, output, d_output, z):
        """-> do / z and the gradient of z, of each row."""
        g_dtype = torch.bfloat16 if _size_of_g(output.dtype) == 2 else torch.float32
        g = torch.empty(output.shape, dtype=g_dtype, device=self.device)
        e = torch.empty(z.shape, dtype=torch.float32, device=self.device)
        V, block = self.size[1], 32
        batch, time, head, last = d_output.stride()
        unit = common_unit(batch, time, head) if last == 1 else 1
        launch(
            taylor_attention_rows_kernel,
            (self.kind, d_output.dtype, unit),
            -(-z.numel() // block),
            (output, d_output, z, self.mask, g, e),
            (z.numel(), z.shape[1], z.shape[2], batch // unit, time // unit, head // unit, last),
            lambda: {
                "V": V,
                "BLOCK_R": block,
                "BLOCK_V": triton.next_power_of_2(V),
                "UNIT": unit,
                "HAS_MASK": self.has_mask,
                "num_warps": 4,
            },
        )
        return g, e


def _strides(x):
    # units of 8 elements, see the kernels
    batch, time, head, _ = x.stride()
    return batch // 8, time // 8, head // 8


def _taylor_attention_fwd(query, key, value, scale, mask, cu_seqlens, initial_state, has_final):
    """-> output [B, T, H, V], z [B, T, H] fp32, the states of cut documents or None, the table of cuts or None, final
    state or None."""
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
    return output, z, slots, plan.cut_at, final


def _taylor_attention_bwd(
    query, key, value, scale, mask, cu_seqlens, initial_state, slots, cut_at, output, z, d_output, d_final, need_initial
):
    """-> gradients of query, key, value and initial_state (None unless needed)."""
    plan = _Plan(query, value, scale, mask, cu_seqlens, cut_at)
    d_initial = plan.states(plan.segments.docs) if need_initial else None
    with device_guard(query):
        g, e = plan.rows(output, d_output, z)
        d_slots = None
        if plan.segments.slots > 0:
            d_slots = plan.partial(query, g, e, edge=need_initial, gradient=True)
            plan.scan(d_slots, d_final, d_initial, reverse=True)
        d_query, d_key = plan.slope(query, key, g, value, e, initial_state, slots, d_final, d_slots, d_initial)
        d_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        plan.sum(key, query, g, d_final, d_slots, d_value, None, d_initial, reverse=True)
    return d_query, d_key, d_value, d_initial


class _TaylorAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale, mask, cu_seqlens, initial_state, output_final_state):
        query, key, value = vector_rows(query), vector_rows(key), vector_rows(value)
        output, z, slots, cut_at, final = _taylor_attention_fwd(
            query, key, value, scale, mask, cu_seqlens, initial_state, output_final_state
        )
        ctx.save_for_backward(query, key, value, mask, cu_seqlens, initial_state, slots, cut_at, output, z)
        ctx.scale = scale
        if output_final_state:
            return output, final
        return output

    @staticmethod
    def backward(ctx, d_output, d_final=None):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "taylor_attention: got create_graph=True, a first derivative fits; transformers_based.taylor_attention"
                " with TRANSFORMERS_BASED_BACKEND=torch has the second"
            )
        query, key, value, mask, cu_seqlens, initial_state, slots, cut_at, output, z = ctx.saved_tensors
        if d_final is not None:
            d_final = d_final.contiguous()
        need_initial = ctx.needs_input_grad[6]
        gradients = _taylor_attention_bwd(
            query,
            key,
            value,
            ctx.scale,
            mask,
            cu_seqlens,
            initial_state,
            slots,
            cut_at,
            output,
            z,
            d_output,
            d_final,
            need_initial,
        )
        return *gradients[:3], None, None, None, gradients[3], None


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
        initial_state: [B or N, H, V + 1, F_PAD] float32, as returned for an earlier part of the same sequences. The
            gradients take it for such a sum of tokens, whose normaliser is 0.5 or more for every query.
            F_PAD is (D + 1) (D + 2) / 2 rounded up to a multiple of 8; row V is the normaliser.
        output_final_state: also return the state after the last token.

    Returns:
        output [B, T, H, V] in value's dtype, and the final state (float32) or None.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.
        RuntimeError: a second derivative is asked for (create_graph=True).
    """
    scale = check_sequence_inputs(query, key, value, scale, mask, cu_seqlens, initial_state)
    if mask is not None:
        mask = wide_mask(mask if mask.dtype == torch.bool else mask != 0).contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    if initial_state is not None:
        initial_state = initial_state.contiguous()
    arguments = query, key, value, scale, mask, cu_seqlens, initial_state
    if output_final_state:
        return _TaylorAttention.apply(*arguments, True)
    return _TaylorAttention.apply(*arguments, False), None
