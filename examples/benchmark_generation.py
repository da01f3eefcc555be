# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Speed of `generate()`: Based beside a Llama of equal parameter count, in one run on one device.

    python examples/benchmark_generation.py [--shapes 1.3b 360m] [--batches 1 16 128 512] [--time-limit 480]
    python examples/benchmark_generation.py --resume [--shapes 360m]
    python examples/benchmark_generation.py --plot-only

First verifies, then times, then a table and a plot. Only public calls: `generate()` as it comes for both models, and
with `cache_implementation="static"` for Llama, which transformers compiles on a GPU.

    step      (time of N new tokens - time of 1) / (N - 1), the fastest of a few runs each; the time of 1 is the prefill
    limit     (weights + what the cache makes a step read and write) / copy bandwidth: a recurrent state is read and
              written, keys and values are read; measured here, on the tensors themselves
    best      the batch whose caches at full length fill the memory that is free, computed, halved where it does not fit
    position  a step of `generate()` that goes on from a cache which holds that many tokens

Every number is written to results/generation.json as soon as it is there; a run that is cut short keeps the others, and
what was left out is listed with the reason. `--resume` measures what is not there yet.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from benchmark_run import Run
from benchmark_tools import (
    BACKEND_VARIABLE,
    RESULTS,
    Wrong,
    copy_bandwidth,
    does_not_fit,
    free_bytes,
    plain_pytorch,
    random_ids,
    release_memory,
    synchronize,
)
from generation_report import write_report
from model_shapes import CONFIGS, SHAPES, based_config, build
from safetensors.torch import load_file
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.utils import logging

from transformers_based import BasedForCausalLM


REFERENCE = RESULTS.parent.parent / "tests" / "reference" / "based-tiny"
SHORT_PROMPT, WARM_UP_TOKENS = 16, 8
POSITION_BATCH, PREFILL_PIECE = 16, 4096
# Of the free memory, for caches and activations; the rest is for what the allocator splits.
SHARE_OF_MEMORY = 0.92
# How long a cell is taken to last before one like it is known: any, one of the best batch, one with a compilation.
GUESS_SECONDS, GUESS_BEST_SECONDS, GUESS_COMPILED_SECONDS = 15, 45, 120


def generate(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **options):
    """Greedy, exactly `new_tokens`: without a token that ends a text, and the passes over the logits to suppress it."""
    model.generation_config.eos_token_id = None
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


def verify(shape: str, device: torch.device) -> dict:
    """
    Greedy tokens of what is going to be timed, in fp32, against two others: what the original code computed for the
    reference checkpoint, and plain PyTorch on the first layers of this shape, one mixer of each kind among them.

    Raises:
        Wrong: they differ, other than after a tie (two logits closer than 1e-3 of the spread of all).
    """
    golden = load_file(REFERENCE / "golden.safetensors", device=str(device))
    model = BasedForCausalLM.from_pretrained(REFERENCE).to(device).eval()
    prompt, expected = golden["prompt_ids"], golden["greedy_ids"]
    original_steps = expected.shape[1] - prompt.shape[1]
    tokens = generate(model, prompt, original_steps)
    if not torch.equal(tokens, expected):
        raise Wrong(f"generate() differs from the original code on {REFERENCE.name}: {tokens.tolist()}")

    layer_types = based_config(shape).layer_types[:5]
    cut = {"vocab_size": 1000, "bos_token_id": 999, "eos_token_id": 999, "layer_types": layer_types}
    model = build(based_config(shape, num_hidden_layers=len(layer_types), **cut), device)
    # Longer than the window, which so is full and turns round.
    plain_prompt, steps = random_ids(model, 3, model.config.sliding_window + 12), 64
    tokens = generate(model, plain_prompt, steps)[:, plain_prompt.shape[1] :]
    with plain_pytorch():
        plain = generate(
            model, plain_prompt, steps, disable_compile=True, return_dict_in_generate=True, output_logits=True
        )
    compared = compare_greedy(tokens, plain.sequences[:, plain_prompt.shape[1] :], torch.stack(plain.logits, dim=1))
    return {"original": len(prompt) * original_steps, "plain_pytorch": compared}


def compare_greedy(tokens: torch.Tensor, expected: torch.Tensor, logits: torch.Tensor) -> int:
    """How many tokens [B, N] were found equal. `logits` [B, N, vocabulary] are those that `expected` was taken from."""
    compared = 0
    for row, (got, wanted, of_row) in enumerate(zip(tokens, expected, logits.float())):
        differs = (got != wanted).nonzero().flatten().tolist()
        step = differs[0] if differs else len(wanted)
        if differs:
            margin = float((of_row[step, wanted[step]] - of_row[step, got[step]]) / of_row[step].std())
            if not margin < 1e-3:
                raise Wrong(
                    f"generate() differs from plain PyTorch in row {row} at step {step}: token {got[step]} instead of "
                    f"{wanted[step]}, whose logit is {margin:.1e} standard deviations higher."
                )
        compared += step
    # Rows are not looked at after a tie, so that ties must be rare.
    if compared < 0.75 * expected.numel():
        raise Wrong(f"Only {compared} of {expected.numel()} tokens could be compared before a tie.")
    return compared


def step_seconds(once: Sequence[float], whole: Sequence[float], tokens: int) -> float:
    """A step, from the times of 1 and of `tokens` new tokens."""
    step = (min(whole) - min(once)) / (tokens - 1)
    if step <= 0:
        raise Wrong(f"{tokens} tokens took no longer than one: the machine is not quiet enough to time them.")
    return step


def cache_bytes(cache) -> tuple[int, int]:
    """
    Bytes that the tensors of a cache take, and those that a step has to read and write of them. Of the tokens that wait
    beside a recurrent state it has to move none: they are there so that it need not write the state.
    """
    held = moved = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            size = layer.keys.nbytes + layer.values.nbytes
            held, moved = held + size, moved + size
        else:
            waiting = sum(x.nbytes for x in getattr(layer, "pending", {}).values())
            held, moved = held + layer.state.nbytes + waiting, moved + 2 * layer.state.nbytes
    return held, moved


@torch.no_grad()
def cache_size(model: PreTrainedModel) -> dict[str, Callable[[float], float]]:
    """`held` and `moved` of `cache_bytes` for one sequence, as functions of its length, from 256 on."""
    short, long = 256, 320
    ids = random_ids(model, 1, long)

    def size_at(length: int) -> tuple[int, int]:
        cache = model(ids[:, : length - 1], use_cache=True).past_key_values
        # A step makes what steps keep.
        return cache_bytes(model(ids[:, length - 1 : length], past_key_values=cache).past_key_values)

    sizes = [size_at(length) for length in (short, long)]

    def line(at_short: int, at_long: int) -> Callable[[float], float]:
        slope = (at_long - at_short) / (long - short)
        return lambda length: at_short + slope * (length - short)

    return {name: line(*pair) for name, pair in zip(("held", "moved"), zip(*sizes))}


@torch.no_grad()
def activation_bytes(model: PreTrainedModel) -> float:
    """Memory that a forward without cache needs for each token at its peak; only known on a GPU."""
    if model.device.type != "cuda":
        return 0.0
    ids = random_ids(model, 4, 1024)
    model(ids, use_cache=False, logits_to_keep=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(ids, use_cache=False, logits_to_keep=1)
    return (torch.cuda.max_memory_allocated() - before) / ids.numel()


class GenerationRun(Run):
    def __init__(self, args: argparse.Namespace):
        super().__init__(
            args,
            "generation",
            args.time_limit,
            dtype=args.dtype,
            backend=os.environ.get(BACKEND_VARIABLE, "auto"),
            prompt=args.prompt,
            new_tokens=args.new_tokens,
            copy_bytes_per_second=copy_bandwidth(torch.device(args.device)),
            verified={},
            models=[],
            cells=[],
            positions=[],
        )
        if args.resume:
            settings = ["dtype", "backend", "prompt", "new_tokens"]
            self.resume(settings, lambda cell: cell["shape"] in args.shapes)

    def cell(self, name: dict, measure: Callable[[], dict], into: str = "cells", compiles: bool = False) -> bool:
        """See `attempt`."""
        kind = (name["shape"], name["model"], name["mode"], name.get("best"), into)
        guess = GUESS_COMPILED_SECONDS if compiles else GUESS_BEST_SECONDS if "best" in name else GUESS_SECONDS
        return self.attempt(name, measure, into, kind, guess)

    def seconds(self, model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **options) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        output = generate(model, ids, new_tokens, **options)
        synchronize(self.device)
        lasted = time.perf_counter() - start
        if output.shape != (ids.shape[0], ids.shape[1] + new_tokens):
            raise Wrong(f"generate() made {tuple(output.shape)} of {tuple(ids.shape)} and {new_tokens} new tokens.")
        return lasted

    def shape(self, shape: str) -> None:
        """Everything about one shape, the cheap cells first."""
        try:
            self.results["verified"][shape] = verify(shape, self.device)
        except Wrong as error:
            sys.exit(f"Not timed. {error}")
        print(f"{shape}: verified, {self.results['verified'][shape]}", flush=True)
        args = self.args
        modes = {"based": [("default", args.batches)]}
        if not args.without_llama:
            modes["llama"] = [("default", args.batches), ("static", args.llama_static_batches)]
        for kind, of_kind in modes.items():
            bench = ModelRun(self, shape, kind)
            for mode, batches in of_kind:
                for batch in batches:
                    bench.batch(mode, batch)
                if mode == "default" and args.positions:
                    bench.positions(args.positions)
                if not args.without_best:
                    bench.best_batch(mode)
            del bench
            release_memory()


class ModelRun:
    """The cells of one model of one shape."""

    def __init__(self, run: GenerationRun, shape: str, kind: str):
        self.run, self.shape, self.kind, self.model = run, shape, kind, None
        self.renew()
        self.sizes, self.activations = cache_size(self.model), activation_bytes(self.model)
        release_memory()
        self.weight_bytes = sum(parameter.nbytes for parameter in self.model.parameters())
        length = run.args.prompt + run.args.new_tokens
        self.bytes_per_sequence = round(self.sizes["held"](length))
        facts = {
            "shape": shape,
            "model": kind,
            "parameters": self.model.num_parameters(),
            "weight_bytes": self.weight_bytes,
            "bytes_per_sequence": self.bytes_per_sequence,
            "activation_bytes_per_token": self.activations,
        }
        if not any((old["shape"], old["model"]) == (shape, kind) for old in run.results["models"]):
            run.results["models"].append(facts)

    def renew(self) -> None:
        """A new model: caches and captured graphs of `generate` hang on the old one."""
        self.model = None
        release_memory()
        self.model = build(CONFIGS[self.kind](self.shape), self.run.device, getattr(torch, self.run.args.dtype))
        self.free = free_bytes(self.run.device)

    def name(self, mode: str, **what) -> dict:
        return {"shape": self.shape, "model": self.kind, "mode": mode, **what}

    def step_limit(self, batch: int, length: float) -> float:
        """Seconds that the bytes of a step take which reads and writes each state once."""
        moved = self.weight_bytes + batch * self.sizes["moved"](length)
        return moved / self.run.results["copy_bytes_per_second"]

    def bytes_for(self, mode: str, batch: int) -> float:
        """Memory for caches at full length, logits (fp32, and what is made of them), and a prefill."""
        args, layers = self.run.args, self.model.config.num_hidden_layers
        tokens = batch * args.prompt
        if mode == "static":
            cache = self.bytes_per_sequence
        else:
            # One layer at a time is there twice while it grows.
            cache, tokens = self.bytes_per_sequence * (1 + 2 / layers), min(tokens, args.prefill_tokens)
        return batch * (cache + 16 * self.model.config.vocab_size) + self.activations * tokens

    def options(self, mode: str, batch: int) -> dict:
        args = self.run.args
        if mode == "static":
            # Room for the whole task, though fewer tokens are timed. In pieces, its prefill would be compiled too.
            return {"cache_implementation": "static", "max_cache_len": args.prompt + args.new_tokens}
        if batch * args.prompt > args.prefill_tokens:
            return {"prefill_chunk_size": max(1, args.prefill_tokens // batch)}
        return {}

    def batch(self, mode: str, batch: int, **marks) -> bool:
        """Times `batch` sequences; False where they did not fit."""
        name = self.name(mode, batch=batch, **marks)
        if self.bytes_for(mode, batch) > self.free:
            self.run.leave_out(name, does_not_fit(self.bytes_for(mode, batch), self.free))
            return False
        fitted = self.run.cell(name, lambda: self.measure(mode, batch), compiles=mode == "static")
        if mode == "static" or not fitted:
            self.renew()
        return fitted

    def best_batch(self, mode: str) -> None:
        args = self.run.args
        self.renew()
        batch = args.largest_batch
        if self.free < float("inf"):
            low, high = 1, args.largest_batch
            while low < high:
                middle = (low + high + 1) // 2
                fits = self.bytes_for(mode, middle) <= SHARE_OF_MEMORY * self.free
                low, high = (middle, high) if fits else (low, middle - 1)
            batch = low if low < 16 else low // 16 * 16
        while not self.batch(mode, batch, best=True) and batch > 1:
            batch //= 2

    def measure(self, mode: str, batch: int) -> dict:
        run, args = self.run, self.run.args
        options, ids = self.options(mode, batch), random_ids(self.model, batch, args.prompt)
        short = ids[:, :SHORT_PROMPT]
        run.seconds(self.model, short, WARM_UP_TOKENS, **options)
        few = [run.seconds(self.model, short, tokens, **options) for tokens in (1, WARM_UP_TOKENS)]
        # Noise may leave nothing of the difference where a step is short.
        estimate = max(few[1] - few[0], few[1] / 10) / WARM_UP_TOKENS
        # The first prefill of this size also asks the driver for memory.
        run.seconds(self.model, ids, 1, **options)
        prefill, whole, started = [], [], time.perf_counter()
        for _ in range(args.repeats):
            prefill.append(run.seconds(self.model, ids, 1, **options))
            if not whole:
                # Against a long prefill, whose own noise is in the difference, few steps would not stand out.
                wanted = max(args.seconds, prefill[0] / 2) / estimate
                tokens = int(min(max(wanted, 33), args.new_tokens))
            whole.append(run.seconds(self.model, ids, tokens, **options))
            if time.perf_counter() - started > 3 * args.seconds:
                break
        step = step_seconds(prefill, whole, tokens)
        return {
            "timed_tokens": tokens,
            "runs": len(whole),
            "ms_per_step": step * 1e3,
            "tokens_per_second": batch / step,
            "limit_ms": self.step_limit(batch, args.prompt + tokens / 2) * 1e3,
            "fraction_of_limit": self.step_limit(batch, args.prompt + tokens / 2) / step,
            "bytes_per_sequence": self.bytes_per_sequence,
            "prefill_seconds": min(prefill),
            "prefill_tokens_per_second": batch * args.prompt / min(prefill),
        }

    def positions(self, positions: list[int]) -> None:
        """One cache that grows from each position to the next, so that the prefill is paid once."""
        batch = self.run.args.position_batch
        config = self.model.config
        # What `generate` takes by default: for Based on a GPU a static cache, whose size does not grow.
        is_based = isinstance(self.model, BasedForCausalLM)
        cache = StaticCache(config, max_cache_len=config.sliding_window) if is_based else DynamicCache(config=config)
        ids = random_ids(self.model, batch, max(positions) + 2048)
        for position in sorted(set(positions)):
            name = self.name("default", batch=batch, position=position)
            # Growing, one layer is held twice; a piece of the prompt and its mask come on top.
            layers = self.model.config.num_hidden_layers
            needed = batch * self.sizes["held"](position + 512) * (1 + 2 / layers)
            needed += self.activations * batch * min(position, PREFILL_PIECE)
            measure = partial(self.measure_position, cache, ids, position)
            if self.run.has(name, "positions"):
                continue
            if needed > self.free:
                self.run.leave_out(name, does_not_fit(needed, self.free))
            elif not self.run.cell(name, measure, into="positions"):
                break

    @torch.no_grad()
    def measure_position(self, cache: Cache, ids: torch.Tensor, position: int) -> dict:
        run = self.run
        if cache.get_seq_length() > position:
            raise Wrong(f"The cache is at {cache.get_seq_length()} already: take positions further apart.")
        while (held := cache.get_seq_length()) < position:
            end = min(held + PREFILL_PIECE, position)
            self.model(ids[:, held:end], past_key_values=cache, use_cache=True, logits_to_keep=1)

        def seconds(new_tokens: int) -> float:
            # One token that the cache has not seen, and those that `generate` goes on with, but for the last.
            start = cache.get_seq_length()
            lasted = run.seconds(self.model, ids[:, : start + 1], new_tokens, past_key_values=cache)
            if cache.get_seq_length() != start + new_tokens:
                raise Wrong(f"The cache went from {start} to {cache.get_seq_length()} with {new_tokens} new tokens.")
            return lasted

        seconds(WARM_UP_TOKENS)
        estimate = seconds(WARM_UP_TOKENS) / WARM_UP_TOKENS
        tokens = int(min(max(run.args.seconds / 4 / estimate, 17), 65))
        once, whole = zip(*((seconds(1), seconds(tokens)) for _ in range(run.args.repeats)))
        step = step_seconds(once, whole, tokens)
        return {"timed_tokens": tokens, "ms_per_step": step * 1e3, "tokens_per_second": ids.shape[0] / step}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times generate() of Based and of a Llama of equal size.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.3b", "360m"], help="in this order")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 128, 512])
    parser.add_argument(
        "--llama-static-batches",
        type=int,
        nargs="*",
        default=[1, 16, 128, 512],
        help="each compiles for a minute or two on a GPU",
    )
    parser.add_argument("--positions", type=int, nargs="*", default=[256, 1024, 4096, 16384, 65536])
    parser.add_argument("--position-batch", type=int, default=POSITION_BATCH)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument(
        "--new-tokens", type=int, default=1024, help="room is made for them; how many are timed is chosen"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="how long the timed steps of a cell shall take")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing, unless a cell takes long")
    parser.add_argument(
        "--largest-batch", type=int, default=4096, help="bound of the best batch; without a GPU, the best"
    )
    parser.add_argument("--prefill-tokens", type=int, default=131072, help="larger prompts are read in pieces")
    parser.add_argument("--without-best", action="store_true", help="only the batches given")
    parser.add_argument("--without-llama", action="store_true")
    parser.add_argument("--time-limit", type=float, help="seconds; what would not be done by then is left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--resume", action="store_true", help="measure only what the JSON in --output lacks")
    parser.add_argument("--plot-only", action="store_true", help="table and plot of the results that are there")
    args = parser.parse_args()
    if args.prompt < 1 or args.new_tokens < 2 or min([1, *args.batches, *args.llama_static_batches]) < 1:
        parser.error("--prompt and the batches must be at least 1, --new-tokens at least 2: a step is a difference.")
    return args


def main() -> None:
    args = parse_arguments()
    failures = None
    if not args.plot_only:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        run = GenerationRun(args)
        for shape in args.shapes:
            run.shape(shape)
        run.write()
        failures = run.failures()
    write_report(args.output)
    sys.exit(failures)


if __name__ == "__main__":
    main()
