# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The gate of the MLP in one kernel, its backward in another.

Layout: gate, up, output [.., C]; their gradients side by side in one tensor [.., 2 C].

Maths:  s = sigmoid(gate),  o = gate s up   in fp32
        dgate = do up s (1 + gate (1 - s)),  dup = do gate s

A program owns BLOCK_C values of one row.
"""

import torch
import triton
import triton.language as tl

from .checks import check_swiglu_inputs, common_unit, device_guard, refuse_second_order, rows_of


@triton.jit(do_not_specialize=["stride_g", "stride_u"])
def _swiglu_fwd_kernel(
    p_g,
    p_u,
    p_o,
    stride_g,
    stride_u,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    # [BLOCK_C] each
    b_g = tl.load(p_g + i_n * stride_g * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + i_n * stride_u * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_o = b_g / (1.0 + tl.exp(-b_g)) * b_u
    tl.store(p_o + i_n * C + o_c, b_o.to(p_o.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["stride_g", "stride_u", "stride_do"])
def _swiglu_bwd_kernel(
    p_g,
    p_u,
    p_do,
    p_d,
    stride_g,
    stride_u,
    stride_do,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_n = (tl.program_id(0) // BLOCKS).to(tl.int64)
    o_c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    # [BLOCK_C] each
    b_g = tl.load(p_g + i_n * stride_g * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + i_n * stride_u * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_do = tl.load(p_do + i_n * stride_do * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_s = 1.0 / (1.0 + tl.exp(-b_g))
    b_dg = b_do * b_u * b_s * (1.0 + b_g * (1.0 - b_s))
    b_du = b_do * b_g * b_s
    p_d += i_n * (2 * C)
    tl.store(p_d + o_c, b_dg.to(p_d.dtype.element_ty), mask=m_c)
    tl.store(p_d + C + o_c, b_du.to(p_d.dtype.element_ty), mask=m_c)


def _tile(N):
    """BLOCK_C and warps: 8 values a lane, 16 bytes of a half type. Few rows are cut into more parts."""
    return (1024, 4) if N >= 1024 else (512, 2)


def _swiglu_fwd(gate, up):
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = rows_of(gate), rows_of(up)
    N, C = gate.shape
    unit = common_unit(C, gate.stride(0), up.stride(0))
    block, warps = _tile(N)
    with device_guard(gate):
        _swiglu_fwd_kernel[(N * triton.cdiv(C, block),)](
            gate,
            up,
            output,
            gate.stride(0) // unit,
            up.stride(0) // unit,
            C=C,
            UNIT=unit,
            BLOCK_C=block,
            num_warps=warps,
        )
    return output


def _swiglu_bwd(gate, up, d_output):
    """-> gradients of gate and up, the two halves of one tensor."""
    shape = gate.shape
    gate, up, do = rows_of(gate), rows_of(up), rows_of(d_output)
    N, C = gate.shape
    both = torch.empty((*shape[:-1], 2 * C), dtype=gate.dtype, device=gate.device)
    unit = common_unit(C, gate.stride(0), up.stride(0), do.stride(0))
    block, warps = _tile(N)
    with device_guard(gate):
        _swiglu_bwd_kernel[(N * triton.cdiv(C, block),)](
            gate,
            up,
            do,
            both,
            gate.stride(0) // unit,
            up.stride(0) // unit,
            do.stride(0) // unit,
            C=C,
            UNIT=unit,
            BLOCK_C=block,
            num_warps=warps,
        )
    return both[..., :C], both[..., C:]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _swiglu_fwd(gate, up)

    @staticmethod
    def backward(ctx, d_output):
        refuse_second_order("swiglu")
        gate, up = ctx.saved_tensors
        return _swiglu_bwd(gate, up, d_output)


def swiglu(gate, up):
    """`silu(gate) * up` in fp32, rounded once: PyTorch's two ops round the silu as well (arXiv 2002.05202).

    Differentiable in gate and up, once; their gradients are the halves of one tensor.

    Args:
        gate, up: [.., C], same shape, float32, float16 or bfloat16; two halves of one tensor are read where they are.

    Returns:
        [.., C] in gate's dtype.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits. RuntimeError for gradients of gradients.
    """
    check_swiglu_inputs(gate, up)
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else _swiglu_fwd(gate, up)
