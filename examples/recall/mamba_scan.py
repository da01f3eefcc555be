# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The selective scan of transformers' Mamba in one Triton kernel each way, to train it in minutes on a GPU.

    u, delta, z [B, D, T], A [D, N] < 0, B, C [B, N, T], skip and bias [D] -> output [B, D, T], all computed in fp32
    delta' = softplus(delta + bias),   h_t = exp(delta'_t A) h_(t-1) + delta'_t u_t B_t   [D, N]
    output_t = (h_t C_t + skip u_t) silu(z_t)

mamba_ssm's kernels want a compiler of CUDA; what transformers has in PyTorch writes tensors of [B, D, T, N] again and
again. This writes the states once and reads them once. T stays small: a program walks a sequence alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from transformers.models.mamba import modeling_mamba


BLOCK_D = 32


@triton.jit
def _softplus(x):
    # as PyTorch has it
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _scan_fwd_kernel(
    p_u,
    p_delta,
    p_z,
    p_a,
    p_b,
    p_c,
    p_skip,
    p_bias,
    p_output,
    p_states,
    T,
    D,
    stride_ub,
    stride_ud,
    stride_ut,
    stride_db,
    stride_dd,
    stride_dt,
    stride_zb,
    stride_zd,
    stride_zt,
    stride_bb,
    stride_bn,
    stride_bt,
    stride_cb,
    stride_cn,
    stride_ct,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,
):
    """output [B, T, D]; with KEEP the states [B, T, D, N]."""
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, N)
    m_d = o_d < D
    r_state = o_d[:, None] * N + o_n[None, :]
    # [BLOCK_D, N] and [BLOCK_D]
    b_a = tl.load(p_a + r_state, mask=m_d[:, None], other=0.0)
    b_skip = tl.load(p_skip + o_d, mask=m_d, other=0.0)
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    p_u += i_b * stride_ub + o_d * stride_ud
    p_delta += i_b * stride_db + o_d * stride_dd
    p_z += i_b * stride_zb + o_d * stride_zd
    p_b += i_b * stride_bb + o_n * stride_bn
    p_c += i_b * stride_cb + o_n * stride_cn
    b_h = tl.zeros([BLOCK_D, N], dtype=tl.float32)
    for t in range(T):
        row = (i_b * T + t) * D
        # [BLOCK_D]
        b_u = tl.load(p_u + t * stride_ut, mask=m_d, other=0.0).to(tl.float32)
        b_z = tl.load(p_z + t * stride_zt, mask=m_d, other=0.0).to(tl.float32)
        b_delta = tl.load(p_delta + t * stride_dt, mask=m_d, other=0.0).to(tl.float32)
        b_delta = _softplus(b_delta + b_bias)
        # [N]
        b_b = tl.load(p_b + t * stride_bt).to(tl.float32)
        b_c = tl.load(p_c + t * stride_ct).to(tl.float32)
        b_h = tl.exp(b_delta[:, None] * b_a) * b_h + (b_delta * b_u)[:, None] * b_b[None, :]
        b_output = (tl.sum(b_h * b_c[None, :], axis=1) + b_skip * b_u) * b_z * tl.sigmoid(b_z)
        tl.store(p_output + row + o_d, b_output.to(p_output.dtype.element_ty), mask=m_d)
        if KEEP:
            tl.store(p_states + row * N + r_state, b_h, mask=m_d[:, None])


@triton.jit
def _scan_bwd_kernel(
    p_u,
    p_delta,
    p_z,
    p_a,
    p_b,
    p_c,
    p_skip,
    p_bias,
    p_states,
    p_doutput,
    p_du,
    p_ddelta,
    p_dz,
    p_da,
    p_db,
    p_dc,
    p_dskip,
    p_dbias,
    B,
    T,
    D,
    stride_ub,
    stride_ud,
    stride_ut,
    stride_db,
    stride_dd,
    stride_dt,
    stride_zb,
    stride_zd,
    stride_zt,
    stride_bb,
    stride_bn,
    stride_bt,
    stride_cb,
    stride_cn,
    stride_ct,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """
    Gradients of u, delta and z [B, T, D]; shares of those of A [B, D, N], of skip and bias [B, D], of B and C
    [blocks of D, B, T, N].
    """
    i_d, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, N)
    m_d = o_d < D
    r_state = o_d[:, None] * N + o_n[None, :]
    # [BLOCK_D, N] and [BLOCK_D]
    b_a = tl.load(p_a + r_state, mask=m_d[:, None], other=0.0)
    b_skip = tl.load(p_skip + o_d, mask=m_d, other=0.0)
    b_bias = tl.load(p_bias + o_d, mask=m_d, other=0.0)
    p_u += i_b * stride_ub + o_d * stride_ud
    p_delta += i_b * stride_db + o_d * stride_dd
    p_z += i_b * stride_zb + o_d * stride_zd
    p_b += i_b * stride_bb + o_n * stride_bn
    p_c += i_b * stride_cb + o_n * stride_cn
    b_da = tl.zeros([BLOCK_D, N], dtype=tl.float32)
    b_dskip = tl.zeros([BLOCK_D], dtype=tl.float32)
    b_dbias = tl.zeros([BLOCK_D], dtype=tl.float32)
    # of the state, from all later tokens
    b_dh = tl.zeros([BLOCK_D, N], dtype=tl.float32)
    b_h = tl.load(p_states + (i_b * T + T - 1) * D * N + r_state, mask=m_d[:, None], other=0.0)
    for i in range(T):
        t = T - 1 - i
        row = i_b * T + t
        # [BLOCK_D]
        b_u = tl.load(p_u + t * stride_ut, mask=m_d, other=0.0).to(tl.float32)
        b_z = tl.load(p_z + t * stride_zt, mask=m_d, other=0.0).to(tl.float32)
        b_raw = tl.load(p_delta + t * stride_dt, mask=m_d, other=0.0).to(tl.float32) + b_bias
        b_doutput = tl.load(p_doutput + row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        # [N]
        b_b = tl.load(p_b + t * stride_bt).to(tl.float32)
        b_c = tl.load(p_c + t * stride_ct).to(tl.float32)
        # [BLOCK_D, N]; the first token has none before it
        m_before = o_d < tl.where(row > i_b * T, D, 0)
        b_before = tl.load(p_states + (row - 1) * D * N + r_state, mask=m_before[:, None], other=0.0)

        b_delta = _softplus(b_raw)
        b_open = tl.sigmoid(b_z)
        b_y = tl.sum(b_h * b_c[None, :], axis=1) + b_skip * b_u
        b_dz = b_doutput * b_y * b_open * (1.0 + b_z * (1.0 - b_open))
        tl.store(p_dz + row * D + o_d, b_dz.to(p_dz.dtype.element_ty), mask=m_d)
        b_dy = b_doutput * b_z * b_open
        b_dskip += b_dy * b_u

        share = (i_d * B * T + row) * N + o_n
        tl.store(p_dc + share, tl.sum(b_dy[:, None] * b_h, axis=0))
        b_dh += b_dy[:, None] * b_c[None, :]
        tl.store(p_db + share, tl.sum(b_dh * (b_delta * b_u)[:, None], axis=0))
        # [BLOCK_D], of delta_t u_t
        b_dx = tl.sum(b_dh * b_b[None, :], axis=1)
        b_du = b_dx * b_delta + b_dy * b_skip
        tl.store(p_du + row * D + o_d, b_du.to(p_du.dtype.element_ty), mask=m_d)
        b_dh *= tl.exp(b_delta[:, None] * b_a)
        # [BLOCK_D, N], of delta_t A
        b_dlog = b_dh * b_before
        b_da += b_dlog * b_delta[:, None]
        b_ddelta = (b_dx * b_u + tl.sum(b_dlog * b_a, axis=1)) * tl.sigmoid(b_raw)
        tl.store(p_ddelta + row * D + o_d, b_ddelta.to(p_ddelta.dtype.element_ty), mask=m_d)
        b_dbias += b_ddelta
        b_h = b_before
    tl.store(p_da + i_b * D * N + r_state, b_da, mask=m_d[:, None])
    tl.store(p_dskip + i_b * D + o_d, b_dskip, mask=m_d)
    tl.store(p_dbias + i_b * D + o_d, b_dbias, mask=m_d)


class _Scan(torch.autograd.Function):
    """u, delta, z [B, D, T], B, C [B, N, T] of any strides; A [D, N], skip and bias [D], contiguous and fp32."""

    @staticmethod
    def forward(ctx, u, delta, z, A, B, C, skip, bias):
        batch, D, T = u.shape
        N = A.shape[1]
        keep = any(ctx.needs_input_grad)
        output = torch.empty((batch, T, D), dtype=u.dtype, device=u.device)
        states = torch.empty((batch, T, D, N) if keep else 0, dtype=torch.float32, device=u.device)
        strides = [step for x in (u, delta, z, B, C) for step in x.stride()]
        grid = (triton.cdiv(D, BLOCK_D), batch)
        tensors = (u, delta, z, A, B, C, skip, bias)
        _scan_fwd_kernel[grid](*tensors, output, states, T, D, *strides, N, BLOCK_D, keep, num_warps=1)
        ctx.save_for_backward(*tensors, states)
        return output.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output):
        *tensors, states = ctx.saved_tensors
        u, delta, z, A, B, C, *_ = tensors
        batch, D, T = u.shape
        N = A.shape[1]
        strides = [step for x in (u, delta, z, B, C) for step in x.stride()]
        grid = (triton.cdiv(D, BLOCK_D), batch)
        of_tokens = [torch.empty((batch, T, D), dtype=x.dtype, device=x.device) for x in (u, delta, z)]

        def shares(*shape):
            return torch.empty(shape, dtype=torch.float32, device=u.device)

        d_a, d_b, d_c = shares(batch, D, N), shares(grid[0], batch, T, N), shares(grid[0], batch, T, N)
        d_skip, d_bias = shares(batch, D), shares(batch, D)
        _scan_bwd_kernel[grid](
            *(*tensors, states, d_output.transpose(1, 2).contiguous(), *of_tokens, d_a, d_b, d_c, d_skip, d_bias),
            *(batch, T, D, *strides, N, BLOCK_D),
            num_warps=1,
        )
        d_b, d_c = (x.sum(0).transpose(1, 2).to(like.dtype) for x, like in ((d_b, B), (d_c, C)))
        return *(x.transpose(1, 2) for x in of_tokens), d_a.sum(0), d_b, d_c, d_skip.sum(0), d_bias.sum(0)


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    delta_softplus: bool,
    return_last_state: bool = False,
    **ways: bool,
) -> torch.Tensor:
    """
    The output `[B, D, T]` in the dtype of u, as `mamba_selective_scan` of transformers' modeling_mamba.py, with whose
    `use_mambapy` and `use_associative_scan` (`ways`) it has nothing to do. N is a power of two.

    Raises `ValueError` where the last state is asked for, or delta as it is: this is for training.
    """
    if return_last_state or not delta_softplus:
        raise ValueError("This scan is for training: it keeps no last state and takes delta through softplus.")
    return _Scan.apply(u, delta, z, *(A.float().contiguous(), B, C, D.float(), delta_bias.float()))


@contextmanager
def in_transformers() -> Iterator[None]:
    """transformers' Mamba takes this scan."""
    before = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = selective_scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = before
