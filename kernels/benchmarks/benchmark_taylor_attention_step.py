# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Times one decoding step of Taylor attention on one CUDA GPU; first verifies, then times, then a table and a JSON.

    PYTHONPATH=kernels/torch-ext python kernels/benchmarks/benchmark_taylor_attention_step.py [--output FOLDER]

Three ways of the same step: the state read and written by every step, the lazy step with 64 tokens beside the state (64
steps, so that each number holds one fold), and plain PyTorch. Steps run from a CUDA graph, over so many states that
they exceed the L2 cache three times, as the layers of a model do. The limit is a device copy, bytes read and written,
measured in the same run.
"""

import argparse
import functools
import json
import math
import pathlib
import statistics

import torch
import triton
from triton.testing import do_bench

from based_kernels import taylor_attention_lazy_step, taylor_attention_step


BATCHES, VALUE_SIZES = (1, 16, 128, 512), (64, 112)
H, D, N = 16, 16, 64
F = (D + 1) * (D + 2) // 2
F_PAD = -(-F // 8) * 8
# no pair of twins merged
F_UNPACKED = 1 + D + D * D
# a graph holds at least so many steps, so that its launch does not count
STEPS_PER_GRAPH = 8
REPEATS = 5


@functools.cache
def pairs(D, device):
    """The two factors of each feature among [x, 1, 0], and what a query multiplies it with."""
    a, b = torch.nn.functional.pad(torch.triu_indices(D + 1, D + 1), (0, -((D + 1) * (D + 2) // 2) % 8), value=D + 1)
    return tuple(x.to(device) for x in (a, b, torch.where((a == b) & (a < D), 0.5, 1.0)))


def features(x):
    """[..., D] float32 -> [..., F_PAD], and the factor for queries."""
    one = torch.ones_like(x[..., :1])
    y = torch.cat([x * x.shape[-1] ** -0.25, one, torch.zeros_like(one)], -1)
    a, b, coefficient = pairs(x.shape[-1], x.device)
    return y.index_select(-1, a) * y.index_select(-1, b), coefficient


def plain_step(q, k, v, state):
    """[B, 1, H, *] and [B, H, V + 1, F_PAD]: a rank-one update and a product."""
    one = torch.cat([v, torch.ones_like(v[..., :1])], -1)[:, 0, :, :, None].float()
    state.addcmul_(one, features(k[:, 0].float())[0][:, :, None])
    phi, coefficient = features(q[:, 0].float())
    mixed = (state @ (phi * coefficient)[..., None])[..., 0]
    return (mixed[..., :-1] / mixed[..., -1:].clamp(min=0.5)).to(v.dtype)[:, None]


def buffers(B, H, N, D, V, device="cuda", dtype=torch.bfloat16):
    """What a layer holds: the state, and for the lazy step N tokens and their count."""
    state = torch.zeros(B, H, V + 1, -(-(D + 1) * (D + 2) // 16) * 8, device=device)
    keys, values = (torch.zeros(B, H, N, size, device=device, dtype=dtype) for size in (D, V))
    return state, keys, values, torch.zeros(B, H, device=device, dtype=torch.int32)


STEPS = {
    "plain PyTorch": lambda token, held: plain_step(*token, held[0]),
    "step": lambda token, held: taylor_attention_step(*token, held[0]),
    "lazy step": lambda token, held: taylor_attention_lazy_step(*token, *held),
}


def draw(B, T, H, D, V, device="cuda", dtype=torch.bfloat16):
    return [torch.randn(B, T, H, size, device=device).to(dtype) for size in (D, D, V)]


def oracle(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    w = (1 + s + s * s / 2).tril()
    return (w @ v / w.sum(-1, keepdim=True)).transpose(1, 2)


def verify(name, B=2, H=H, D=D, V=112, N=N, device="cuda"):
    """Relative error against float64 over steps that fill the lazy step's buffer twice and begin a third."""
    tokens = draw(B, 2 * N + 3, H, D, V, device)
    held = buffers(B, H, N, D, V, device)
    outputs = [STEPS[name]([x[:, t : t + 1] for x in tokens], held) for t in range(2 * N + 3)]
    want = oracle(*tokens)
    return ((torch.cat(outputs, 1).double() - want).norm() / want.norm()).item()


def moved_bytes(name, B, V):
    """What a step has to move: state, pending tokens, and the token itself, in and out."""
    state, token = 4 * B * H * (V + 1) * F_PAD, 2 * B * H * (2 * D + 2 * V)
    if name == "lazy step":
        # on average (N - 1) / 2 tokens are read, one is written
        return state * (1 + 1 / N) + 2 * B * H * (D + V) * ((N - 1) / 2 + 1) + token
    return 2 * state + token


def measure(step, B, V, cache_bytes):
    """Milliseconds a step: the median of several runs of N steps on each of the states."""
    copies = math.ceil(3 * cache_bytes / (4 * B * H * (V + 1) * F_PAD))
    rounds = 1
    while copies * rounds < STEPS_PER_GRAPH:
        rounds *= 2
    layers = [buffers(B, H, N, D, V) for _ in range(copies)]
    token = draw(B, 1, H, D, V)
    # compiled before the capture
    step(token, buffers(B, H, N, D, V))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for held in layers:
                step(token, held)

    def steps():
        for _ in range(N // rounds):
            graph.replay()

    steps()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        steps()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / (N * copies))
    return statistics.median(times)


def copy_rate():
    x, y = torch.empty(2**30, device="cuda"), torch.randn(2**30, device="cuda")
    return 8 * 2**30 / do_bench(lambda: x.copy_(y), return_mode="median") / 1e9


def table(result):
    lines = [f"{result['card']}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()), ""]
    lines += [
        f"bf16, {H} heads, D = {D}, {N} tokens beside the state; copy {result['copy_TB_s']:.2f} TB/s. "
        f"State: {result['state_share']:.3f} of the bytes of {F_UNPACKED} features.",
        "",
        "| B, V | state, MB | way | ms | GB moved | TB/s | of the copy |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['B']}, {r['V']} | {r['state_bytes'] / 1e6:.1f} | {r['name']} | {r['ms']:.4f} | {r['GB']:.4f} | "
        f"{r['TB_s']:.2f} | {r['fraction_of_copy']:.0%} |"
        for r in result["steps"]
    ]
    lines += [
        "",
        "Moved: state read and written, or read and written once in "
        f"{N} steps, with the tokens beside it and the token itself; for plain PyTorch the same as for the step.",
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    torch.manual_seed(0)
    verified = {name: verify(name) for name in STEPS}
    print("relative error against float64:", {name: f"{error:.1e}" for name, error in verified.items()}, flush=True)
    if not all(error < 5e-3 for error in verified.values()):
        raise SystemExit("a step is wrong here, nothing is timed")
    copy = copy_rate()
    result = {
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "verified": verified,
        "copy_TB_s": copy,
        "state_share": F_PAD / F_UNPACKED,
        "steps": [],
    }
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    for V in VALUE_SIZES:
        for B in BATCHES:
            for name, step in STEPS.items():
                ms, gigabytes = measure(step, B, V, cache_bytes), moved_bytes(name, B, V) / 1e9
                row = {"B": B, "V": V, "name": name, "ms": ms, "GB": gigabytes, "TB_s": gigabytes / ms}
                row["fraction_of_copy"] = row["TB_s"] / copy
                row["state_bytes"] = 4 * B * H * (V + 1) * F_PAD
                result["steps"].append(row)
                print(
                    f"B {B:4d}  V {V:4d}  {name:14s} {ms:8.4f} ms  {gigabytes:.4f} GB  {row['TB_s']:.2f} TB/s, "
                    f"{row['fraction_of_copy']:.0%} of the copy",
                    flush=True,
                )
    print(f"{result['card']}, {result['versions']}, copy {copy:.2f} TB/s")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "taylor_attention_step.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "taylor_attention_step.md").write_text(table(result))


if __name__ == "__main__":
    main()
