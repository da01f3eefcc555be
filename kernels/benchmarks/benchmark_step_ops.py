# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Verifies the small kernels of a decoding step, then times them beside the plain PyTorch of the model, on a CUDA GPU.

    PYTHONPATH=kernels/torch-ext python kernels/benchmarks/benchmark_step_ops.py [--output kernels/benchmarks/results]

Everything is replayed from CUDA graphs, as in decoding: launches from Python do not count, gaps between kernels do.
Calls go round among copies of their tensors, which come from memory where 64 copies are larger than the L2 cache, and
from that where not. Limit: a device copy, counting bytes read and written, measured here.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch.nn import functional as F
from triton.testing import do_bench

from based_kernels import gated_short_conv_step, rms_norm, sliding_attention_step, swiglu


BATCHES = (1, 16, 128, 512)
EPS = 1e-5
# More than the L2 cache of an H200, and the copies that are made to get there.
COLD_BYTES, MOST_COPIES = 128 * 2**20, 64


class Size(NamedTuple):
    hidden: int
    intermediate: int
    channels: int
    taps: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int


MODEL = Size(1792, 4864, 3584, 3, 16, 16, 112, 65)


class Op(NamedTuple):
    """A step both ways: `ours` and `plain` take what `make` returns and give the output and what they changed."""

    make: Callable
    ours: Callable
    plain: Callable
    bytes: Callable


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def make_conv(draw, B, s):
    return draw(B, 1, 2 * s.channels), draw(s.channels, s.taps), draw(B, s.taps - 1, s.channels)


def conv(projected, weight, state):
    return gated_short_conv_step(projected, weight, state), state


def plain_conv(projected, weight, state):
    u, g = projected.chunk(2, -1)
    inputs = torch.cat([state, u], 1)
    state.copy_(inputs[:, 1:])
    inputs, weight = inputs.to(wide(u.dtype)), weight.to(wide(u.dtype))
    output = inputs[:, -1:] * weight[:, -1]
    for tap in range(weight.shape[1] - 1):
        output = torch.addcmul(output, inputs[:, tap : tap + 1], weight[:, tap])
    return (F.silu(output) * g).to(g.dtype), state


def make_attention(draw, B, s):
    """The window is full and slot 0 is next: the oldest token is first, for the ring as for the plain form."""
    q, k, v = (draw(B, 1, heads, s.head_dim) for heads in (s.heads, s.kv_heads, s.kv_heads))
    angles = torch.arange(s.head_dim, device=q.device, dtype=wide(q.dtype)).remainder(s.head_dim // 2)[None, None]
    ring = [draw(B, s.kv_heads, s.window, s.head_dim) for _ in range(2)]
    count = torch.full((B, s.kv_heads), 3 * s.window, device=q.device)
    return q, k, v, angles.cos(), angles.sin(), *ring, count


def attention(*inputs):
    *_, keys, values, _ = inputs
    return sliding_attention_step(*inputs), keys[:, :, 0], values[:, :, 0]


def rotate(x, cos, sin):
    low, high = x.chunk(2, -1)
    return (x * cos[:, :, None] + torch.cat([-high, low], -1) * sin[:, :, None]).to(x.dtype)


def plain_attention(q, k, v, cos, sin, keys, values, count):
    """Rotary, the static sliding cache of transformers once its window is full, SDPA; `count` is not needed."""
    q, k, v = (x.transpose(1, 2) for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
    for window, new in ((keys, k), (values, v)):
        window.copy_(torch.cat([window[:, :, 1:], new], 2))
    output = F.scaled_dot_product_attention(q, keys, values, enable_gqa=q.shape[1] != keys.shape[1])
    return output.transpose(1, 2), keys[:, :, -1], values[:, :, -1]


def make_norm(draw, B, s):
    residual = draw(B, 1, s.hidden)
    return draw(B, 1, s.hidden), draw(s.hidden), residual.to(wide(residual.dtype))


def norm(hidden_states, weight, residual):
    return rms_norm(hidden_states, weight, EPS, residual=residual)


def plain_norm(hidden_states, weight, residual):
    total = residual + hidden_states
    x = total.to(wide(total.dtype))
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return (weight * x).to(weight.dtype), total


def make_gate(draw, B, s):
    return draw(B, 1, 2 * s.intermediate).chunk(2, -1)


def gate(gate, up):
    return (swiglu(gate, up),)


def plain_gate(gate, up):
    return (F.silu(gate) * up,)


OPS = {
    "gated_short_conv_step": Op(
        make_conv, conv, plain_conv, lambda B, s: 2 * s.channels * (B * (2 + 2 * (s.taps - 1) + 1) + s.taps)
    ),
    "sliding_attention_step": Op(
        make_attention,
        attention,
        plain_attention,
        lambda B, s: 2 * B * s.head_dim * (2 * s.heads + 2 * s.kv_heads * (1 + s.window)),
    ),
    "rms_norm": Op(make_norm, norm, plain_norm, lambda B, s: s.hidden * (B * (2 + 4 + 4 + 2) + 2)),
    "swiglu": Op(make_gate, gate, plain_gate, lambda B, s: 2 * B * s.intermediate * 3),
}


def drawing(device, dtype=torch.bfloat16):
    return lambda *shape: torch.randn(shape, device=device, dtype=dtype)


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def verify(op, size, B=3, device="cuda"):
    """[errors of ours, errors of plain PyTorch] against the plain form in float64, for output and what is changed."""
    inputs = op.make(drawing(device), B, size)
    twin = [x.clone() if x.dtype == torch.int64 else x.double() for x in inputs]
    want = op.plain(*twin)
    results = (function(*(x.clone() for x in inputs)) for function in (op.ours, op.plain))
    return [[relative(a, b) for a, b in zip(result, want)] for result in results]


def is_right(errors, rounding=2**-9):
    """At most plain PyTorch's error, and a tenth of a rounding of bf16 to chance."""
    return all(ours <= plain + 0.1 * rounding for ours, plain in zip(*errors))


def measure(function, sets):
    """Milliseconds a call, in a graph of one call or more for each set of tensors."""
    calls = max(len(sets), 20)
    function(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            function(*sets[i % len(sets)])
    return do_bench(graph.replay, warmup=10, rep=50, return_mode="median") / calls


def copy_bandwidth():
    x, y = (torch.zeros(2**29, device="cuda") for _ in range(2))
    return 8 * 2**29 / do_bench(lambda: x.copy_(y), return_mode="median") / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "copy_GB_s": copy_bandwidth(),
        "size": MODEL._asdict(),
        "verified": {},
        "rows": [],
    }
    for name, op in OPS.items():
        errors = result["verified"][name] = verify(op, MODEL)
        print(f"{name:24s} against float64: ours {errors[0]}, plain {errors[1]}", flush=True)
        if not is_right(errors):
            raise SystemExit(f"{name} is wrong here")
    with torch.no_grad():
        for name, op in OPS.items():
            for B in BATCHES:
                moved = op.bytes(B, MODEL)
                copies = min(MOST_COPIES, -(-COLD_BYTES // moved))
                sets = [op.make(drawing("cuda"), B, MODEL) for _ in range(copies)]
                ours, plain = (1e3 * measure(function, sets) for function in (op.ours, op.plain))
                rate = moved / ours / 1e3
                row = {"op": name, "B": B, "us": ours, "plain_us": plain, "bytes": moved, "GB_s": rate}
                row |= {"fraction_of_copy": rate / result["copy_GB_s"], "cold": copies * moved >= COLD_BYTES}
                result["rows"].append(row)
                print(f"{name:24s} B {B:4d}  {ours:8.2f} us, plain {plain:8.2f} us, {rate:6.0f} GB/s", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "step_ops.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "step_ops.md").write_text(table(result))


def table(result):
    lines = [
        f"{result['card']}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "",
        "| op | batch | µs | plain PyTorch, µs | | GB/s | of the copy | from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['op']} | {r['B']} | {r['us']:.2f} | {r['plain_us']:.2f} | {r['plain_us'] / r['us']:.1f}x "
        f"| {r['GB_s']:.0f} | {r['fraction_of_copy']:.0%} | {'memory' if r['cold'] else 'L2'} |"
        for r in result["rows"]
    ]
    lines += [
        "",
        f"One call in a CUDA graph, medians, bf16 with the residual stream in fp32, {result['size']}; "
        f"copy {result['copy_GB_s']:.0f} GB/s. Bytes: every tensor read or written once.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
