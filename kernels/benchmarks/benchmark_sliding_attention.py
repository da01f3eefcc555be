# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Verifies the sliding-window attention of whole sequences, then times it, on a CUDA GPU.

    PYTHONPATH=kernels/torch-ext:src python kernels/benchmarks/benchmark_sliding_attention.py [--output FOLDER]

Beside it: the plain PyTorch of the model, eager and compiled: rotary, and SDPA on blocks of the window with their mask,
which is made beforehand. CUDA events, launches from Python included. Limit: a device copy, counting bytes read and
written, measured here; what the kernels move counts once: query, key, value and output forward; all of these, the
gradient of the output and three gradients backward.
"""

import argparse
import json
import pathlib

import torch
import triton
from benchmark_step_ops import MODEL, copy_bandwidth, drawing, is_right, relative, rotate, wide
from torch.nn import functional as F
from triton.testing import do_bench

from based_kernels import sliding_attention
from transformers_based import BasedConfig
from transformers_based.modeling_based import _MIN_BLOCK, _block_mask, _cut_in_blocks


SHAPES = ((16, 2048), (4, 8192), (1, 65536))


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


def with_gradients(function, inputs, more, d_output):
    """-> output and the gradients of query, key and value."""
    output = function(*inputs, *more)
    return output, *torch.autograd.grad(output, inputs, d_output.to(output.dtype))


def verify(function, device="cuda", B=2, T=301, **sizes):
    """[errors of `function`, errors of plain PyTorch] against the plain form in float64, for output and gradients."""
    inputs = make(drawing(device), B, T, **sizes)
    cos, sin = angles(inputs)
    d_output = torch.randn(inputs[0].shape, device=device).to(inputs[0].dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = mask_of(inputs)
    want = with_gradients(plain, exact, (cos.double(), sin.double(), mask), d_output)
    results = (with_gradients(f, inputs, (cos, sin, mask), d_output) for f in (function, plain))
    return [[relative(a, b) for a, b in zip(result, want)] for result in results]


def bytes_moved(B, T, heads, kv_heads, head_dim, size=2):
    """Forward, and forward with backward."""
    queries, keys = (B * T * n * head_dim * size for n in (heads, kv_heads))
    # query, output; then query, output, its gradient and that of query. Two of keys; then two read and two written
    return 2 * queries + 2 * keys, 6 * queries + 6 * keys


def measure(function, B, T):
    """Milliseconds forward, and with backward; MiB of memory that the latter takes beside its inputs."""
    inputs = make(drawing("cuda"), B, T)
    more = *angles(inputs), mask_of(inputs)
    d_output = torch.randn_like(inputs[0])
    with torch.no_grad():
        forward = do_bench(lambda: function(*inputs, *more), warmup=10, rep=60, return_mode="median")
    with_gradients(function, inputs, more, d_output)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_gradients(function, inputs, more, d_output)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    both = do_bench(lambda: with_gradients(function, inputs, more, d_output), warmup=10, rep=60, return_mode="median")
    return forward, both, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    size = {name: getattr(MODEL, name) for name in ("heads", "kv_heads", "head_dim")}
    result = {
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "copy_GB_s": copy_bandwidth(),
        "size": {**size, "window": MODEL.window},
        "verified": verify(ours),
        "rows": [],
    }
    print(f"against float64: ours {result['verified'][0]}, plain {result['verified'][1]}", flush=True)
    if not is_right(result["verified"]):
        raise SystemExit("sliding_attention is wrong here")
    ways = {"ours": ours, "plain": plain, "compiled": torch.compile(plain)}
    for B, T in SHAPES:
        moved = bytes_moved(B, T, **size)
        for way, function in ways.items():
            *times, memory = measure(function, B, T)
            row = {"B": B, "T": T, "way": way, "memory_MiB": memory}
            for name, ms, count in zip(("forward", "both"), times, moved):
                rate = count / ms / 1e6
                row[name] = {"ms": ms, "GB_s": rate, "fraction_of_copy": rate / result["copy_GB_s"]}
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "sliding_attention.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "sliding_attention.md").write_text(table(result))


def table(result):
    lines = [
        f"{result['card']}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "",
        "| batch | tokens | | forward, ms | GB/s | of the copy | and backward, ms | GB/s | of the copy | memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [
            f"{x['ms']:.3f} | {x['GB_s']:.0f} | {x['fraction_of_copy']:.0%}" for x in (row["forward"], row["both"])
        ]
        lines.append(f"| {row['B']} | {row['T']} | {row['way']} | {' | '.join(cells)} | {row['memory_MiB']:.0f} |")
    lines += [
        "",
        f"bf16, medians, {result['size']}; copy {result['copy_GB_s']:.0f} GB/s. Bytes: what a fused kernel must move, "
        "for every way. Memory: the peak with backward, beside the inputs; output and gradients are in it.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
