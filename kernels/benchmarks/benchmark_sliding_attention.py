# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Verifies the sliding-window attention of whole sequences, then times it, on a CUDA GPU.

    PYTHONPATH=kernels/torch-ext:src python kernels/benchmarks/benchmark_sliding_attention.py [--output FOLDER]

Beside it: the plain PyTorch of the model, eager and compiled (sequence_ops.py): rotary, and SDPA on blocks of the
window with their mask, which is made beforehand. Bytes: query, key, value and output forward; all of these, the
gradient of the output and three gradients backward.
"""

import torch
from benchmark_step_ops import MODEL, drawing, rotate, wide
from sequence_ops import errors, run
from torch.nn import functional as F

from based_kernels import sliding_attention
from transformers_based import BasedConfig
from transformers_based.modeling_based import _MIN_BLOCK, _block_mask, _cut_in_blocks


SIZE = {name: getattr(MODEL, name) for name in ("heads", "kv_heads", "head_dim")}


def make(draw, B, T, heads=MODEL.heads, kv_heads=MODEL.kv_heads, head_dim=MODEL.head_dim):
    """query, key and value as parts of one projection."""
    merged = draw(B, T, (heads + 2 * kv_heads) * head_dim)
    parts = merged.split([n * head_dim for n in (heads, kv_heads, kv_heads)], dim=-1)
    return [x.view(B, T, -1, head_dim).detach().requires_grad_() for x in parts]


def angles(inputs):
    """cos and sin `[1, T, D]`, fp32 or better, of the tokens' positions."""
    query = inputs[0]
    T, D, device, dtype = query.shape[1], query.shape[3], query.device, wide(query.dtype)
    x = torch.arange(T, device=device, dtype=dtype)[:, None] * 10000.0 ** (
        -torch.arange(0, D, 2, device=device, dtype=dtype) / D
    )
    x = torch.cat([x, x], dim=-1)[None]
    return x.cos(), x.sin()


def mask_of(inputs, window=MODEL.window):
    config = BasedConfig(sliding_window=window, attn_implementation="sdpa")
    return _block_mask(config, inputs[0], None, 0, 0, None, max(window, _MIN_BLOCK))


def ours(query, key, value, cos, sin, mask, window=MODEL.window):
    return sliding_attention(query, key, value, cos, sin, window=window)


def plain(query, key, value, cos, sin, mask, window=MODEL.window):
    B, T = query.shape[:2]
    groups = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (rotate(query, cos, sin), rotate(key, cos, sin), value))
    query, key, value, mask = _cut_in_blocks(query, key, value, mask, window)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=groups)
    return output.transpose(1, 2).reshape(B, -1, *output.shape[1::2])[:, :T]


def prepare(draw, B, T, **sizes):
    """-> inputs, angles and mask, and the gradient of the output."""
    inputs = make(draw, B, T, **sizes)
    return inputs, (*angles(inputs), mask_of(inputs)), draw(*inputs[0].shape)


def verify(function, device="cuda", B=2, T=301, **sizes):
    """[errors of `function`, errors of plain PyTorch] against the plain form in float64, for output and gradients."""
    return errors((function, plain), plain, *prepare(drawing(device), B, T, **sizes))


def bytes_moved(B, T, heads, kv_heads, head_dim, size=2):
    """Forward, and forward with backward."""
    queries, keys = (B * T * n * head_dim * size for n in (heads, kv_heads))
    # query, output; then query, output, its gradient and that of query. Two of keys; then two read and two written
    return 2 * queries + 2 * keys, 6 * queries + 6 * keys


if __name__ == "__main__":
    run(
        "sliding_attention",
        __doc__,
        {**SIZE, "window": MODEL.window},
        ours,
        plain,
        verify,
        lambda B, T: prepare(drawing("cuda"), B, T),
        lambda B, T: bytes_moved(B, T, **SIZE),
    )
