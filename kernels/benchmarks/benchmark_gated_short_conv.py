# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Verifies the gated short convolution of whole sequences, then times it, on a CUDA GPU.

    PYTHONPATH=kernels/torch-ext python kernels/benchmarks/benchmark_gated_short_conv.py [--output FOLDER]

Beside it: the plain PyTorch of the model, eager and compiled (sequence_ops.py). Bytes: u, g and the output forward;
u, g and three gradients backward.
"""

import torch
from benchmark_step_ops import drawing, wide
from sequence_ops import errors, run
from torch.nn import functional as F

from based_kernels import gated_short_conv


# Of the 1.3B model.
CHANNELS, TAPS = 3584, 3


def make(draw, B, T, channels=CHANNELS, taps=TAPS):
    return draw(B, T, 2 * channels).requires_grad_(), draw(channels, taps).requires_grad_()


def ours(projected, weight):
    return gated_short_conv(projected, weight)[0]


def plain(projected, weight):
    u, g = projected.chunk(2, -1)
    T, past = u.shape[1], weight.shape[1] - 1
    u = torch.cat([u.new_zeros(u.shape[0], past, u.shape[2]), u], 1).to(wide(u.dtype))
    weight = weight.to(u.dtype)
    output = u[:, past:] * weight[:, -1]
    for tap in range(past):
        output = torch.addcmul(output, u[:, tap : tap + T], weight[:, tap])
    return (F.silu(output) * g).to(g.dtype)


def prepare(draw, B, T, **sizes):
    """-> inputs, nothing more, and the gradient of the output."""
    inputs = make(draw, B, T, **sizes)
    return inputs, (), draw(B, T, inputs[1].shape[0])


def verify(function, device="cuda", B=2, T=301, **sizes):
    """[errors of `function`, errors of plain PyTorch] against the plain form in float64, for output and gradients."""
    return errors((function, plain), plain, *prepare(drawing(device), B, T, **sizes))


def bytes_moved(B, T, channels, size=2):
    """Forward, and forward with backward."""
    return 3 * B * T * channels * size, 8 * B * T * channels * size


if __name__ == "__main__":
    run(
        "gated_short_conv",
        __doc__,
        {"channels": CHANNELS, "taps": TAPS},
        ours,
        plain,
        verify,
        lambda B, T: prepare(drawing("cuda"), B, T),
        lambda B, T: bytes_moved(B, T, CHANNELS),
    )
