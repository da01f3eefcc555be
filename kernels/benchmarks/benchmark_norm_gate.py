# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Verifies RMSNorm, SwiGLU and the projections of many tokens, forward and backward, then times them on a CUDA GPU.

    PYTHONPATH=src:kernels/torch-ext python kernels/benchmarks/benchmark_norm_gate.py [--output FOLDER]

Beside the plain PyTorch of the model, eager and compiled. CUDA events around one call, medians, the L2 cache emptied
before each. All three see rows of tokens: 16 x 2048 tokens and 4 x 8192 are one case. Limits: a device copy, counting
bytes read and written, and the product of the same size alone, both measured here.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from benchmark_step_ops import (
    MODEL,
    copy_bandwidth,
    drawing,
    gate,
    is_right,
    norm,
    plain_gate,
    plain_norm,
    relative,
    wide,
)
from torch import nn
from triton.testing import do_bench

from transformers_based.ops import _Projections


TOKENS = (16 * 2048, 65536)
# Of queries and keys in the linear attention of the 1.3B model.
KEYS = 256


class Op(NamedTuple):
    """
    `ours` and `plain` take what `make` returns and give a tuple of outputs. `work`: the bytes that a forward pass
    moves, or the operations that it makes, and those that a backward pass adds.
    """

    make: Callable
    ours: Callable
    plain: Callable
    work: Callable
    unit: str


def make_norm(draw, N, s):
    residual = draw(1, N, s.hidden)
    return draw(1, N, s.hidden), draw(s.hidden), residual.to(wide(residual.dtype))


def make_gate(draw, N, s):
    return draw(1, N, 2 * s.intermediate).chunk(2, -1)


def make_projections(draw, N, hidden, *sizes):
    """x and the weights, parts of one tensor, as `lay_side_by_side` leaves them."""
    return draw(1, N, hidden), *(draw(sum(sizes), hidden) * hidden**-0.5).split(sizes)


def plain_projections(x, *weights):
    return tuple(nn.functional.linear(x, weight) for weight in weights)


OPS = {
    "rms_norm": Op(make_norm, norm, plain_norm, lambda N, s: (12 * N * s.hidden, 16 * N * s.hidden), "GB/s"),
    "swiglu": Op(make_gate, gate, plain_gate, lambda N, s: (6 * N * s.intermediate, 10 * N * s.intermediate), "GB/s"),
    "q, k, v": Op(
        lambda draw, N, s: make_projections(draw, N, s.hidden, KEYS, KEYS, s.hidden),
        _Projections.apply,
        plain_projections,
        lambda N, s: (2 * N * s.hidden * (s.hidden + 2 * KEYS), 4 * N * s.hidden * (s.hidden + 2 * KEYS)),
        "TFLOP/s",
    ),
    "gate, up": Op(
        lambda draw, N, s: make_projections(draw, N, s.hidden, s.intermediate, s.intermediate),
        _Projections.apply,
        plain_projections,
        lambda N, s: (4 * N * s.hidden * s.intermediate, 8 * N * s.hidden * s.intermediate),
        "TFLOP/s",
    ),
}


def gradients_of_outputs(outputs):
    """Of their size, side by side if they are."""
    sizes = [y.shape[-1] for y in outputs]
    if len({y.untyped_storage().data_ptr() for y in outputs}) == 1:
        return torch.cos(3 * torch.cat([y.detach() for y in outputs], -1)).split(sizes, -1)
    return [torch.cos(3 * y.detach()) for y in outputs]


def with_gradients(function, leaves):
    d_outputs = gradients_of_outputs(function(*leaves))

    def call(*leaves):
        outputs = function(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, d_outputs)

    return call


def verify(op, size, N=5, device="cuda"):
    """[errors of ours, errors of plain PyTorch] against the plain form in float64, for outputs and gradients."""
    inputs = [x.detach() for x in op.make(drawing(device), N, size)]
    d_outputs = gradients_of_outputs(op.ours(*inputs))
    results = []
    for function, dtype in ((op.plain, torch.float64), (op.ours, None), (op.plain, None)):
        leaves = [x.to(dtype or x.dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, [d.to(dtype or d.dtype) for d in d_outputs])])
    want, *others = ([x.detach() for x in result] for result in results)
    return [[relative(a, b) for a, b in zip(result, want, strict=True)] for result in others]


def measure(function, inputs):
    return do_bench(lambda: function(*inputs), warmup=10, rep=60, return_mode="median")


def peak_bytes(function, inputs):
    """Allocated beyond what is there before the call."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function(*inputs)
    return torch.cuda.max_memory_allocated() - before


def product_rate(N, s):
    """TFLOP/s of one large product in bf16."""
    x, w = drawing("cuda")(N, s.hidden), drawing("cuda")(s.hidden, 2 * s.intermediate)
    return 4e-9 * N * s.hidden * s.intermediate / measure(torch.mm, (x, w))


def timings(name, op, N, limits):
    """Of one op: a row for each way to run it, and each of forward alone and forward and backward."""
    leaves = [x.detach().requires_grad_() for x in op.make(drawing("cuda"), N, MODEL)]
    ways = {"ours": (op.ours, leaves), "plain": (op.plain, leaves)}
    if op.unit == "GB/s":
        ways["plain, compiled"] = torch.compile(op.plain, dynamic=False), leaves
    else:
        ways["ours, weights apart"] = op.ours, [x.detach().clone().requires_grad_() for x in leaves]
    forward, backward = op.work(N, MODEL)
    for way, (function, inputs) in ways.items():
        both = with_gradients(function, inputs)
        for what, call, work in (("forward", function, forward), ("and backward", both, forward + backward)):
            ms = measure(call, inputs)
            rate = work / ms / (1e6 if op.unit == "GB/s" else 1e9)
            row = {"op": name, "tokens": N, "way": way, "pass": what, "ms": ms, "rate": rate, "unit": op.unit}
            yield row | {"fraction": rate / limits[op.unit], "peak_MiB": peak_bytes(call, inputs) / 2**20}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    limits = {"GB/s": copy_bandwidth(), "TFLOP/s": product_rate(TOKENS[0], MODEL)}
    result = {
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "limits": limits,
        "size": MODEL._asdict(),
        "verified": {},
        "rows": [],
    }
    for name, op in OPS.items():
        errors = result["verified"][name] = verify(op, MODEL, N=1027)
        print(f"{name:10s} against float64: ours {errors[0]}, plain {errors[1]}", flush=True)
        if not is_right(errors):
            raise SystemExit(f"{name} is wrong here")
    for N in TOKENS:
        for name, op in OPS.items():
            for row in timings(name, op, N, limits):
                result["rows"].append(row)
                print(line(row), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "norm_gate.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "norm_gate.md").write_text(table(result))


def line(r):
    return (
        f"| {r['op']} | {r['tokens']} | {r['pass']} | {r['way']} | {r['ms']:.3f} | {r['rate']:.0f} {r['unit']} "
        f"| {r['fraction']:.0%} | {r['peak_MiB']:.0f} |"
    )


def table(result):
    lines = [
        f"{result['card']}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "",
        "| op | tokens | | | ms | rate | of the limit | peak, MiB |",
        "|---|---|---|---|---|---|---|---|",
        *map(line, result["rows"]),
        "",
        f"Medians, bf16 with the residual stream in fp32, {result['size']}. Limits: copy "
        f"{result['limits']['GB/s']:.0f} GB/s, product {result['limits']['TFLOP/s']:.0f} TFLOP/s. Bytes: every tensor "
        "read or written once in each pass. Peak: beyond the inputs.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
