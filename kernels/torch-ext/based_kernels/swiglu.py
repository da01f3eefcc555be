# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The gate of the MLP in one kernel.

Layout: gate, up, output [.., C].

Maths:  o = gate sigmoid(gate) up   in fp32

A program owns BLOCK_C values of one row.
"""

import torch
import triton
import triton.language as tl

from .checks import check_swiglu_inputs, common_unit, device_guard, rows_of


# 8 values of a half type a lane: one 16-byte access a tensor.
_BLOCK_C, _WARPS = 512, 2


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
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    # [BLOCK_C] each
    b_g = tl.load(p_g + i_n * stride_g * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + i_n * stride_u * UNIT + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_o = b_g / (1.0 + tl.exp(-b_g)) * b_u
    tl.store(p_o + i_n * C + o_c, b_o.to(p_o.dtype.element_ty), mask=m_c)


def _swiglu(gate, up):
    output = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = rows_of(gate), rows_of(up)
    N, C = gate.shape
    unit = common_unit(C, gate.stride(0), up.stride(0))
    with device_guard(gate):
        _swiglu_fwd_kernel[(N, triton.cdiv(C, _BLOCK_C))](
            gate,
            up,
            output,
            gate.stride(0) // unit,
            up.stride(0) // unit,
            C=C,
            UNIT=unit,
            BLOCK_C=_BLOCK_C,
            num_warps=_WARPS,
        )
    return output


def swiglu(gate, up):
    """`silu(gate) * up` in fp32, rounded once: PyTorch's two ops round the silu as well (arXiv 2002.05202).

    Forward only: no gradients.

    Args:
        gate, up: [.., C], same shape, float32, float16 or bfloat16; two halves of one tensor are read where they are.

    Returns:
        [.., C] in gate's dtype.

    Raises:
        TypeError or ValueError naming the argument, what it got and what fits.
    """
    check_swiglu_inputs(gate, up)
    return _swiglu(gate, up)
