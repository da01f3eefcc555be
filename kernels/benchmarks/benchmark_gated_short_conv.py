# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Verifies the gated short convolution of whole sequences, then times it, on a CUDA GPU.

    PYTHONPATH=kernels/torch-ext python kernels/benchmarks/benchmark_gated_short_conv.py [--output FOLDER]

Beside it: the plain PyTorch of the model, eager and compiled. CUDA events, launches from Python included. Limit: a
device copy, counting bytes read and written, measured here; what the kernel moves counts once: u, g and the output
forward; u, g and three gradients backward.
"""

import argparse
import json
import pathlib

import torch
import triton
from benchmark_step_ops import copy_bandwidth, drawing, is_right, relative, wide
from torch.nn import functional as F
from triton.testing import do_bench

from based_kernels import gated_short_conv


# Of the 1.3B model.
CHANNELS, TAPS = 3584, 3
SHAPES = ((16, 2048), (4, 8192), (1, 65536))


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


def with_gradients(function, inputs, d_output):
    """-> output and the gradients of projected and weight."""
    output = function(*inputs)
    return output, *torch.autograd.grad(output, inputs, d_output.to(output.dtype))


def verify(function, device="cuda", B=2, T=301, **sizes):
    """[errors of `function`, errors of plain PyTorch] against the plain form in float64, for output and gradients."""
    inputs = make(drawing(device), B, T, **sizes)
    d_output = torch.randn(B, T, inputs[1].shape[0], device=device).to(inputs[0].dtype)
    want = with_gradients(plain, [x.detach().double().requires_grad_() for x in inputs], d_output)
    results = (with_gradients(f, inputs, d_output) for f in (function, plain))
    return [[relative(a, b) for a, b in zip(result, want)] for result in results]


def bytes_moved(B, T, channels, size=2):
    """Forward, and forward with backward."""
    return 3 * B * T * channels * size, 8 * B * T * channels * size


def measure(function, B, T):
    """Milliseconds forward, and with backward; MiB of memory that the latter takes beside its inputs."""
    inputs = make(drawing("cuda"), B, T)
    d_output = torch.randn(B, T, CHANNELS, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        forward = do_bench(lambda: function(*inputs), warmup=10, rep=60, return_mode="median")
    with_gradients(function, inputs, d_output)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_gradients(function, inputs, d_output)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    both = do_bench(lambda: with_gradients(function, inputs, d_output), warmup=10, rep=60, return_mode="median")
    return forward, both, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "copy_GB_s": copy_bandwidth(),
        "size": {"channels": CHANNELS, "taps": TAPS},
        "verified": verify(ours),
        "rows": [],
    }
    print(f"against float64: ours {result['verified'][0]}, plain {result['verified'][1]}", flush=True)
    if not is_right(result["verified"]):
        raise SystemExit("gated_short_conv is wrong here")
    ways = {"ours": ours, "plain": plain, "compiled": torch.compile(plain)}
    for B, T in SHAPES:
        moved = bytes_moved(B, T, CHANNELS)
        for way, function in ways.items():
            *times, memory = measure(function, B, T)
            row = {"B": B, "T": T, "way": way, "memory_MiB": memory}
            for name, ms, size in zip(("forward", "both"), times, moved):
                rate = size / ms / 1e6
                row[name] = {"ms": ms, "GB_s": rate, "fraction_of_copy": rate / result["copy_GB_s"]}
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "gated_short_conv.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "gated_short_conv.md").write_text(table(result))


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
