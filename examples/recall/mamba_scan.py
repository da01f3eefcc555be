# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The selective scan of transformers' Mamba in one Triton kernel each way, to train it in minutes on a GPU.

    u, delta [B, D, T], A [D, N] < 0, B, C [B, N, T] -> y [B, D, T], all computed in fp32
    h_t = exp(delta_t A) h_(t-1) + delta_t u_t B_t   [D, N]
    y_t = h_t C_t

mamba_ssm's kernels want a compiler of CUDA; what transformers has in PyTorch writes tensors of [B, D, T, N] some forty
times a step. This writes the states once and reads them once. T stays small: a program walks a sequence alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from transformers.models.mamba import modeling_mamba


BLOCK_D = 32


@triton.jit
def _scan_fwd_kernel(
    p_u, p_delta, p_a, p_b, p_c, p_y, p_states, T, D, N: tl.constexpr, BLOCK_D: tl.constexpr, KEEP: tl.constexpr
):
    """u, delta, y [B, T, D], A [D, N], B, C [B, T, N]; with KEEP the states [B, T, D, N]."""
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, N)
    m_d = o_d < D
    # [BLOCK_D, N]
    b_a = tl.load(p_a + o_d[:, None] * N + o_n[None, :], mask=m_d[:, None], other=0.0)
    b_h = tl.zeros([BLOCK_D, N], dtype=tl.float32)
    for t in range(T):
        row = i_b * T + t
        # [BLOCK_D] and [N]
        b_u = tl.load(p_u + row * D + o_d, mask=m_d, other=0.0)
        b_delta = tl.load(p_delta + row * D + o_d, mask=m_d, other=0.0)
        b_b = tl.load(p_b + row * N + o_n)
        b_c = tl.load(p_c + row * N + o_n)
        b_h = tl.exp(b_delta[:, None] * b_a) * b_h + (b_delta * b_u)[:, None] * b_b[None, :]
        tl.store(p_y + row * D + o_d, tl.sum(b_h * b_c[None, :], axis=1), mask=m_d)
        if KEEP:
            tl.store(p_states + (row * D + o_d[:, None]) * N + o_n[None, :], b_h, mask=m_d[:, None])


@triton.jit
def _scan_bwd_kernel(
    p_u,
    p_delta,
    p_a,
    p_b,
    p_c,
    p_states,
    p_dy,
    p_du,
    p_ddelta,
    p_da,
    p_db,
    p_dc,
    B,
    T,
    D,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of u and delta [B, T, D]; shares of that of A [B, D, N], of those of B and C [blocks of D, B, T, N]."""
    i_d, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, N)
    m_d = o_d < D
    r_state = o_d[:, None] * N + o_n[None, :]
    b_a = tl.load(p_a + r_state, mask=m_d[:, None], other=0.0)
    b_da = tl.zeros([BLOCK_D, N], dtype=tl.float32)
    # of the state, from all later tokens
    b_dh = tl.zeros([BLOCK_D, N], dtype=tl.float32)
    b_h = tl.load(p_states + (i_b * T + T - 1) * D * N + r_state, mask=m_d[:, None], other=0.0)
    for i in range(T):
        row = i_b * T + T - 1 - i
        # the first token has none before it
        m_before = o_d < tl.where(row > i_b * T, D, 0)
        b_u = tl.load(p_u + row * D + o_d, mask=m_d, other=0.0)
        b_delta = tl.load(p_delta + row * D + o_d, mask=m_d, other=0.0)
        b_dy = tl.load(p_dy + row * D + o_d, mask=m_d, other=0.0)
        b_b = tl.load(p_b + row * N + o_n)
        b_c = tl.load(p_c + row * N + o_n)
        b_before = tl.load(p_states + (row - 1) * D * N + r_state, mask=m_before[:, None], other=0.0)
        # [N]
        share = i_d * B * T + row
        tl.store(p_dc + share * N + o_n, tl.sum(b_dy[:, None] * b_h, axis=0))
        b_dh += b_dy[:, None] * b_c[None, :]
        tl.store(p_db + share * N + o_n, tl.sum(b_dh * (b_delta * b_u)[:, None], axis=0))
        # [BLOCK_D], of delta_t u_t
        b_dx = tl.sum(b_dh * b_b[None, :], axis=1)
        tl.store(p_du + row * D + o_d, b_dx * b_delta, mask=m_d)
        b_dh *= tl.exp(b_delta[:, None] * b_a)
        # [BLOCK_D, N], of delta_t A
        b_dlog = b_dh * b_before
        tl.store(p_ddelta + row * D + o_d, b_dx * b_u + tl.sum(b_dlog * b_a, axis=1), mask=m_d)
        b_da += b_dlog * b_delta[:, None]
        b_h = b_before
    tl.store(p_da + i_b * D * N + r_state, b_da, mask=m_d[:, None])


class _Scan(torch.autograd.Function):
    """On u, delta [B, T, D], A [D, N], B, C [B, T, N], contiguous and fp32."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C):
        batch, T, D = u.shape
        N = A.shape[1]
        keep = any(ctx.needs_input_grad)
        y = torch.empty_like(u)
        states = torch.empty((batch, T, D, N), device=u.device) if keep else y
        grid = (triton.cdiv(D, BLOCK_D), batch)
        _scan_fwd_kernel[grid](u, delta, A, B, C, y, states, T, D, N, BLOCK_D, keep, num_warps=1)
        ctx.save_for_backward(u, delta, A, B, C, states)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        u, delta, A, B, C, states = ctx.saved_tensors
        batch, T, D = u.shape
        N = A.shape[1]
        grid = (triton.cdiv(D, BLOCK_D), batch)
        du, ddelta = torch.empty_like(u), torch.empty_like(delta)
        da = torch.empty((batch, D, N), device=u.device)
        db, dc = (torch.empty((grid[0], *x.shape), device=u.device) for x in (B, C))
        _scan_bwd_kernel[grid](
            u, delta, A, B, C, states, dy.contiguous(), du, ddelta, da, db, dc, batch, T, D, N, BLOCK_D, num_warps=1
        )
        return du, ddelta, da.sum(0), db.sum(0), dc.sum(0)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    **ways: bool,
) -> torch.Tensor:
    """
    y [B, D, T] in the dtype of u, as `mamba_selective_scan` of transformers' modeling_mamba.py, whose `use_mambapy` and
    `use_associative_scan` are `ways` that this has no need of. N is a power of two.

    Raises `ValueError` where the last state is asked for: this is for training.
    """
    if ways.get("return_last_state"):
        raise ValueError("This scan keeps no last state: call it without a cache.")
    of_dtype = u.dtype
    u, delta, B, C = (x.float().transpose(1, 2).contiguous() for x in (u, delta, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    y = _Scan.apply(u, delta.contiguous(), A.float().contiguous(), B, C)
    if D is not None:
        y = y + u * D
    y = y.transpose(1, 2)
    if z is not None:
        y = y * F.silu(z)
    return y.to(of_dtype)


@contextmanager
def in_transformers() -> Iterator[None]:
    """transformers' Mamba takes this scan."""
    before = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = selective_scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = before
