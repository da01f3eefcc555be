# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks of ops on whole sequences share: ours, the plain PyTorch of the model and that compiled, timed.

CUDA events, launches from Python included. Limit: a device copy, counting bytes read and written, measured here; what a
fused kernel moves counts once, for every way. No program of its own.
"""

import argparse
import json
import pathlib
from collections.abc import Callable

import torch
import triton
from benchmark_step_ops import copy_bandwidth, is_right, relative
from triton.testing import do_bench


# Rows and tokens.
SHAPES = ((16, 2048), (4, 8192), (1, 65536))


def with_gradients(function, inputs, more, d_output):
    """-> output and the gradients of the inputs; `more` are further arguments."""
    output = function(*inputs, *more)
    return output, *torch.autograd.grad(output, inputs, d_output.to(output.dtype))


def errors(functions, plain, inputs, more, d_output):
    """Of each function against the plain form in float64, for output and gradients."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    more_exact = [x.double() if x.is_floating_point() else x for x in more]
    want = with_gradients(plain, exact, more_exact, d_output)
    results = (with_gradients(f, inputs, more, d_output) for f in functions)
    return [[relative(a, b) for a, b in zip(result, want)] for result in results]


def measure(function, inputs, more, d_output):
    """Milliseconds forward, and with backward; MiB of memory that the latter takes beside its inputs."""
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


def run(name: str, description: str, size: dict, ours: Callable, plain: Callable, verify, prepare, bytes_moved) -> None:
    """
    The program: `verify(function)` gives the errors of function and plain, `prepare(B, T)` what `measure` takes,
    `bytes_moved(B, T)` those of forward, and of forward with backward.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "copy_GB_s": copy_bandwidth(),
        "size": size,
        "verified": verify(ours),
        "rows": [],
    }
    print(f"against float64: ours {result['verified'][0]}, plain {result['verified'][1]}", flush=True)
    if not is_right(result["verified"]):
        raise SystemExit(f"{name} is wrong here")
    for B, T in SHAPES:
        for way, function in {"ours": ours, "plain": plain, "compiled": torch.compile(plain)}.items():
            *times, memory = measure(function, *prepare(B, T))
            row = {"B": B, "T": T, "way": way, "memory_MiB": memory}
            for part, ms, moved in zip(("forward", "both"), times, bytes_moved(B, T)):
                rate = moved / ms / 1e6
                row[part] = {"ms": ms, "GB_s": rate, "fraction_of_copy": rate / result["copy_GB_s"]}
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / f"{name}.md").write_text(table(result))


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
