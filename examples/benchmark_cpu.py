# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Plain-PyTorch Based on a CPU: chunked Taylor attention against the quadratic form; beside a Llama of equal size, a
prefill, and the cost of a cached step behind few and many tokens.

    python examples/benchmark_cpu.py

Nothing is timed before it is right: both forms against the quadratic one in fp64, the prefill against the same model in
fp64, a step against the whole forward.
"""

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from model_shapes import build, llama_like
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from transformers_based import BasedForCausalLM, taylor_attention


SMALL_MODEL = Path(__file__).resolve().parent.parent / "tests" / "reference" / "based-tiny"
FEATURE_DIM, HEAD_DIM = 16, 64
# Steps taken with one copy of a cache, and tokens that are read at once before.
STEPS, PIECE = 9, 1024


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


def small_models() -> dict[str, PreTrainedModel]:
    """The small checkpoint, and a Llama like it; says how many parameters they have."""
    based = BasedForCausalLM.from_pretrained(SMALL_MODEL).eval()
    models = {"Based": based, "Llama": build(llama_like(based.config))}
    sizes = ", ".join(f"{name} {model.num_parameters():,}" for name, model in models.items())
    print(f"Batch 1, fp32; parameters: {sizes}")
    return models


def random_ids(models: dict[str, PreTrainedModel], length: int) -> torch.Tensor:
    vocab_size = models["Based"].config.unpadded_vocab_size
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def in_turns(keys: list, repeats: int) -> Iterator:
    """
    Each of `keys` `repeats` times: so that whatever else the machine does hits all alike, and shuffled, so that none
    always follows another.
    """
    for turn in range(repeats):
        yield from random.Random(turn).sample(keys, len(keys))


def compare_prefill(tokens: int, repeats: int) -> None:
    """A forward of the whole text that fills a cache and makes the logits of the last token."""
    models = small_models()
    ids = random_ids(models, tokens)

    def prefill(model: PreTrainedModel) -> torch.Tensor:
        return model(ids, use_cache=True, logits_to_keep=1).logits[0, -1]

    differences, walls, processors = {}, {}, {}
    for name, model in models.items():
        exact = prefill(copy.deepcopy(model).double())
        differences[name] = float((prefill(model) - exact).abs().max() / exact.abs().max())
        if not differences[name] < 1e-3:
            sys.exit(f"The prefill of {name} is off by {differences[name]:.1e}: not timed.")
    for name in in_turns(list(models), repeats):
        wall, processor = time.perf_counter(), time.process_time()
        prefill(models[name])
        walls.setdefault(name, []).append(time.perf_counter() - wall)
        processors.setdefault(name, []).append(time.process_time() - processor)
    print(f"A prefill of {tokens:,} tokens, the fastest of {repeats}, and the least time of all processors together")
    print(f"{'':12}{'error to fp64':>16}{'ms':>12}{'processors':>12}{'tokens/s':>12}")
    for name, difference in differences.items():
        wall, processor = min(walls[name]), min(processors[name])
        print(f"{name:12}{difference:>16.1e}{wall * 1e3:>12.1f}{processor * 1e3:>12.1f}{tokens / wall:>12,.0f}")
    wall, processor = (min(times["Llama"]) / min(times["Based"]) for times in (walls, processors))
    print(f"A prefill of Llama takes {wall:.2f} of one of Based, {processor:.2f} of its time of processors.\n")


def take_steps(
    model: PreTrainedModel, cache: Cache, ids: torch.Tensor, position: int
) -> Iterator[tuple[float, torch.Tensor]]:
    """Seconds and logits of the steps from `position` on, on a copy of the cache."""
    cache = copy.deepcopy(cache)
    for i in range(position, position + STEPS):
        start = time.perf_counter()
        logits = model(ids[:, i : i + 1], past_key_values=cache).logits[:, 0]
        yield time.perf_counter() - start, logits


def compare_positions(positions: list[int], repeats: int) -> None:
    """A step of each model behind so many tokens; Llama's cache grows as in `generate()`, or is static (its length)."""
    models = small_models()
    ids = random_ids(models, max(positions) + STEPS)
    caches, differences, times = {}, {}, {}
    for name, model in models.items():
        full = model(ids, use_cache=False).logits[0]
        for position in positions:
            kinds = {name: DynamicCache(config=model.config)}
            if name == "Llama":
                kinds["Llama, static"] = StaticCache(config=model.config, max_cache_len=position + STEPS)
            for kind, cache in kinds.items():
                for start in range(0, position, PIECE):
                    model(ids[:, start : min(start + PIECE, position)], past_key_values=cache, logits_to_keep=1)
                caches[kind, position] = model, cache
                expected = full[position : position + STEPS]
                logits = torch.cat([logits for _, logits in take_steps(model, cache, ids, position)])
                differences[kind, position] = float((logits - expected).abs().max() / expected.abs().max())
                if not differences[kind, position] < 1e-3:
                    off = f"{differences[kind, position]:.1e}"
                    sys.exit(f"The step of {kind} at position {position} is off by {off}: not timed.")
    for key in in_turns(list(caches), repeats):
        # The first steps find the processor's caches full of what was timed before.
        times.setdefault(key, []).extend(lasted for lasted, _ in list(take_steps(*caches[key], ids, key[1]))[2:])
    print("One cached step")
    print(f"{'':14}{'position':>10}{'error':>12}{'ms':>10}")
    for kind, position in sorted(caches):
        error, ms = differences[kind, position], median(times[kind, position]) * 1e3
        print(f"{kind:14}{position:>10,}{error:>12.1e}{ms:>10.2f}")
    first, last = (median(times["Based", position]) for position in (min(positions), max(positions)))
    print(f"\nA step of Based at position {max(positions):,} takes {last / first:.2f} of one at {min(positions):,}.")
    for position in positions:
        for kind in ("Llama", "Llama, static"):
            ratio = median(times[kind, position]) / median(times["Based", position])
            print(f"At position {position:,} a step of {kind} takes {ratio:.2f} of one of Based.")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description="Times plain-PyTorch Based on a CPU.")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--prefill-tokens", type=int, default=8192)
    parser.add_argument("--positions", type=int, nargs="+", default=[256, 4096, 16_000])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    compare_forms(args.tokens, args.heads, args.repeats)
    compare_prefill(args.prefill_tokens, args.repeats)
    compare_positions(args.positions, 4 * args.repeats)


if __name__ == "__main__":
    main()
