# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Plain-PyTorch Based on a CPU: chunked Taylor attention against the quadratic form, and the cost of a cached step.

    python examples/benchmark_cpu.py

Nothing is timed before it is right: both forms against the quadratic one in fp64, a step against the whole forward.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from transformers_based import BasedForCausalLM, taylor_attention


SMALL_MODEL = Path(__file__).resolve().parent.parent / "tests" / "reference" / "based-tiny"
FEATURE_DIM, HEAD_DIM = 16, 64


def quadratic(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Every weight written out, [B, H, T, T], in the dtype of the input."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = (1 + scores + scores.square() / 2).tril()
    return (weights @ value / weights.sum(-1, keepdim=True)).transpose(1, 2)


def chunked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return taylor_attention(query, key, value)[0]


def error(form: Callable, inputs: list[torch.Tensor]) -> float:
    """Largest difference to fp64, relative to the largest output; one head at a time, to save memory."""
    differences, largest = [], []
    for head in range(inputs[0].shape[2]):
        part = [x[:, :, head : head + 1] for x in inputs]
        exact = quadratic(*(x.double() for x in part))
        differences.append((form(*part) - exact).abs().max())
        largest.append(exact.abs().max())
    return float(max(differences) / max(largest))


def seconds(call: Callable, repeats: int) -> float:
    """Median of `repeats` runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def compare_forms(tokens: int, heads: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (FEATURE_DIM, FEATURE_DIM, HEAD_DIM)
    inputs = [torch.randn(1, tokens, heads, size, generator=generator) for size in sizes]
    print(f"Taylor attention, forward, fp32: {tokens:,} tokens, {heads} heads, D {FEATURE_DIM}, V {HEAD_DIM}")
    print(f"{'':12}{'error to fp64':>16}{'ms':>12}")
    times = {}
    for form in (quadratic, chunked):
        difference = error(form, inputs)
        if not difference < 1e-4:
            sys.exit(f"{form.__name__} is off by {difference:.1e}: not timed.")
        times[form] = seconds(lambda form=form: form(*inputs), repeats)
        print(f"{form.__name__:12}{difference:>16.1e}{times[form] * 1e3:>12.1f}", flush=True)
    print(f"chunked is {times[quadratic] / times[chunked]:.1f} times faster\n")


def compare_positions(positions: list[int], repeats: int) -> None:
    model = BasedForCausalLM.from_pretrained(SMALL_MODEL).eval()
    vocab_size = model.config.unpadded_vocab_size
    ids = torch.randint(vocab_size, (1, max(positions) + 1), generator=torch.Generator().manual_seed(0))
    full = model(ids, use_cache=False).logits
    print(f"One cached step of {SMALL_MODEL.name}, batch 1")
    print(f"{'position':>12}{'error':>16}{'ms':>12}")
    caches, differences, times = {}, {}, {position: [] for position in positions}
    for position in positions:
        caches[position] = model(ids[:, :position], logits_to_keep=1).past_key_values

    def step(position: int) -> tuple[float, torch.Tensor]:
        cache = copy.deepcopy(caches[position])
        start = time.perf_counter()
        logits = model(ids[:, position : position + 1], past_key_values=cache).logits[:, 0]
        return time.perf_counter() - start, logits

    for position in positions:
        expected = full[:, position]
        differences[position] = float((step(position)[1] - expected).abs().max() / expected.abs().max())
        if not differences[position] < 1e-3:
            sys.exit(f"The step at position {position} is off by {differences[position]:.1e}: not timed.")
    # In turns, so that whatever else the machine does hits every position alike.
    for _ in range(repeats):
        for position in positions:
            times[position].append(step(position)[0])
    for position in positions:
        print(f"{position:>12,}{differences[position]:>16.1e}{median(times[position]) * 1e3:>12.2f}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Times plain-PyTorch Based on a CPU.")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    compare_forms(args.tokens, args.heads, args.repeats)
    compare_positions(args.positions, 20 * args.repeats)


if __name__ == "__main__":
    main()
