# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Speed of a prefill by its length: Based beside Llama, Mamba 2 and Mamba of equal parameter count, in one run.

    python examples/benchmark_prefill.py [--shapes 1.3b 360m] [--lengths 4096 16384 65536] [--budget 300]
    python examples/benchmark_prefill.py --plot-only

First verifies, then times, then a table and a plot. A prefill is one forward of the whole text, which fills a cache and
makes the logits of the last token; models as transformers has them, Llama with SDPA, which takes a flash kernel.

    batch     as many rows as make `--tokens` tokens, at least one
    share     (arithmetic / rate of a large product) / time; see benchmark_tools.py
    memory    at the peak, weights included; `cache` is the part of it that is kept
    kernels   the time of the kernels alone, where the launches take most of the wall time
    compiled  `torch.compile`, at one length, without a cache, beside the same without compilation
    one row   a batch of 1 at `--row-lengths`: the Mambas, which without kernels of their own need memory or seconds
              that no larger batch allows, and Based beside them

The cells that matter most come first; what does not fit, takes too long, or would outlast the budget is listed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_report import NAMES, Panel, find, left_out_list, machine_line, markdown_table, noise, write_report
from benchmark_run import LeftOut, Models, Run, run_cells
from benchmark_tools import (
    RESULTS,
    Wrong,
    check_error,
    distance,
    forward_flops,
    plain_pytorch,
    product_rate,
    random_ids,
    release_memory,
    speed,
    synchronize,
    timed,
    weight_bytes,
)
from model_shapes import CONFIGS, SHAPES, based_config, build


MODES = {"": "", "one row": ", one row", "without cache": ", no cache", "compiled": ", compiled, no cache"}
# Tokens of a row from which the time of a long one is foretold.
PILOT_LENGTH = 128
GUESS_SECONDS, GUESS_COMPILED_SECONDS = 10, 120


@torch.no_grad()
def verify(shape: str, device: torch.device, dtype: torch.dtype, length: int = 515) -> dict:
    """
    The last logits of what is going to be timed, against plain PyTorch in fp32, beside plain PyTorch in `dtype`.

    Raises:
        Wrong: their error is larger than rounding makes it.
    """
    model = build(based_config(shape), device, dtype)
    ids = random_ids(model, 2, length)

    def logits() -> torch.Tensor:
        return model(ids, use_cache=True, logits_to_keep=1).logits[:, -1]

    ours = logits()
    with plain_pytorch():
        plain = logits()
        model.float()
        exact = logits()
    return check_error(f"last logits of {shape}", distance(ours, exact), distance(plain, exact))


def cache_bytes(cache) -> int:
    """Of every tensor in a cache of transformers, or ours."""
    tensors = {}

    def collect(value) -> None:
        if isinstance(value, torch.Tensor):
            tensors[value.data_ptr()] = value.nbytes
        elif isinstance(value, dict):
            list(map(collect, value.values()))
        elif isinstance(value, list | tuple):
            list(map(collect, value))

    for part in getattr(cache, "layers", [cache]):
        collect(vars(part))
    return sum(tensors.values())


class PrefillRun(Run):
    def __init__(self, args: argparse.Namespace):
        device, dtype = torch.device(args.device), getattr(torch, args.dtype)
        super().__init__(
            args,
            "prefill",
            args.budget,
            dtype=args.dtype,
            product_flops_per_second=product_rate(device, dtype),
            verified={},
            models=[],
            cells=[],
        )
        self.models = Models(device, dtype)
        for shape in args.shapes:
            for kind in args.models:
                parameters = build(CONFIGS[kind](shape), "meta").num_parameters()
                self.results["models"].append({"shape": shape, "model": kind, "parameters": parameters})

    def all(self) -> None:
        args = self.args
        compared = [kind for kind in args.models if kind in ("based", "llama")]
        for shape in args.shapes:
            try:
                self.results["verified"][shape] = verify(shape, self.device, getattr(torch, args.dtype))
            except Wrong as error:
                sys.exit(f"Not timed. {error}")
            release_memory()
            print(f"{shape}: verified, {self.results['verified'][shape]}", flush=True)
            for length in args.lengths:
                for kind in compared:
                    self.cell(shape, kind, length)
        others = [kind for kind in args.models if kind not in compared]
        if "based" in args.models and args.compile_length:
            for shape in args.shapes:
                self.cell(shape, "based", args.compile_length, "without cache")
        for shape in args.shapes:
            for kind in ["based", *others] if others else []:
                # From short to long: where one takes too long or too much, those after it do as well.
                for length in sorted(args.row_lengths):
                    self.cell(shape, kind, length, "one row")
        if "based" in args.models and args.compile_length:
            for shape in args.shapes:
                self.cell(shape, "based", args.compile_length, "compiled")

    def cell(self, shape: str, kind: str, length: int, mode: str = "") -> None:
        batch = 1 if mode == "one row" else max(1, self.args.tokens // length)
        name = {"shape": shape, "model": kind, "mode": mode, "length": length, "batch": batch}
        guess = GUESS_COMPILED_SECONDS if mode == "compiled" else GUESS_SECONDS
        self.attempt(name, lambda: self.measure(**name), kind=(shape, kind, mode), guess=guess)
        if mode == "compiled":
            release_memory()

    @torch.no_grad()
    def measure(self, shape: str, model: str, mode: str, length: int, batch: int) -> dict:
        args, of_kind = self.args, self.models.get(shape, model)
        ids, use_cache = random_ids(of_kind, batch, length), mode in ("", "one row")
        forward = torch.compile(of_kind) if mode == "compiled" else of_kind

        def prefill(ids: torch.Tensor = ids):
            return forward(ids, use_cache=use_cache, logits_to_keep=1)

        if use_cache and length > PILOT_LENGTH:
            self.check_time(prefill, ids)
        kept = {"cache_bytes": 0}

        def check(output) -> None:
            if not output.logits.isfinite().all():
                raise Wrong(f"{NAMES[model]} makes logits that are not finite.")
            if use_cache:
                kept["cache_bytes"] = cache_bytes(output.get("past_key_values", output.get("cache_params")))

        cell = speed(prefill, self.device, args.seconds, check)
        seconds, added = cell["ms"] / 1e3, cell.pop("added_bytes")
        flops = forward_flops(of_kind, batch, length, kept=1)
        return {
            **cell,
            **kept,
            "tokens_per_second": batch * length / seconds,
            "us_per_token": 1e6 * seconds / (batch * length),
            "flops": flops,
            "share_of_limit": flops / self.results["product_flops_per_second"] / seconds,
            "peak_bytes": weight_bytes(of_kind) + added if self.device.type == "cuda" else 0,
        }

    def check_time(self, prefill: Callable[[torch.Tensor], object], ids: torch.Tensor) -> None:
        """Raises `LeftOut` if a prefill takes too long, as the time of its beginning tells."""
        synchronize(self.device)
        pilot = timed(lambda: prefill(ids[:, :PILOT_LENGTH]), self.device, seconds=0.0)
        foretold = pilot.seconds * ids.shape[1] / PILOT_LENGTH
        # Short rows may cost more for a token, never ten times more.
        if foretold > 10 * self.args.cell_limit or (foretold > self.args.cell_limit and pilot.seconds > 0.1):
            raise LeftOut(f"too slow: about {foretold:.0f} s by the time of {PILOT_LENGTH} tokens")


def label(cell: dict) -> str:
    return NAMES[cell["model"]] + MODES[cell["mode"]]


def speed_table(results: dict, shape: str) -> list[str]:
    columns = ["model", "tokens", "batch", "tokens/s", "±", "µs a token", "share of products", "memory", "cache"]
    rows = []
    kinds = list(NAMES)
    cells = find(results, shape=shape)
    for cell in sorted(cells, key=lambda cell: (list(MODES).index(cell["mode"]), kinds.index(cell["model"]))):
        rows.append(
            [
                label(cell),
                f"{cell['length']:,}",
                f"{cell['batch']}",
                f"{cell['tokens_per_second']:,.0f}",
                noise(cell),
                f"{cell['us_per_token']:.2f}",
                f"{cell['share_of_limit']:.1%}",
                f"{cell['peak_bytes'] / 1e9:.2f} GB" if cell["peak_bytes"] else "-",
                f"{cell['cache_bytes'] / 1e6:,.1f} MB" if cell["cache_bytes"] else "-",
            ]
        )
        if "kernel_ms" in cell:
            rows[-1][3] += f" (kernels {cell['kernel_ms']:.1f} of {cell['ms']:.1f} ms)"
    return markdown_table(columns, rows)


def comparisons(results: dict, shape: str) -> list[str]:
    """Based over the others at each length, its own evenness, and what compilation gains."""
    lines = []

    def by_length(kind: str, mode: str) -> dict[int, dict]:
        return {cell["length"]: cell for cell in find(results, shape=shape, model=kind, mode=mode)}

    ours = by_length("based", "")
    for kind, mode in [(kind, mode) for mode in ("", "one row") for kind in list(NAMES)[1:]]:
        mine, theirs = by_length("based", mode), by_length(kind, mode)
        ratios = [
            f"{mine[length]['tokens_per_second'] / theirs[length]['tokens_per_second']:.2f} at {length:,}"
            for length in sorted(mine.keys() & theirs.keys())
        ]
        lines += [f"- Based over {NAMES[kind]}{MODES[mode]}, tokens/s: {', '.join(ratios)}"] if ratios else []
    long = [cell["us_per_token"] for length, cell in ours.items() if length >= 4096]
    if len(long) > 1:
        lines.append(f"- Based, time per token from 4,096 tokens on: slowest over fastest {max(long) / min(long):.2f}")
    modes = [find(results, shape=shape, mode=mode) for mode in ("without cache", "compiled")]
    if all(modes):
        eager, compiled = (cells[0] for cells in modes)
        ratio = eager["tokens_per_second"] / compiled["tokens_per_second"]
        lines.append(f"- Based at {eager['length']:,}, not compiled over compiled, tokens/s: {ratio:.2f}")
    return lines


def describe(cell: dict) -> str:
    return f"{cell['shape']}, {label(cell)}, {cell['length']:,} tokens, batch {cell['batch']}"


def table(results: dict) -> str:
    lines = [
        "# Speed of a prefill",
        "",
        f"{machine_line(results)}; {results['dtype']}, random weights. A large product makes "
        f"{results['product_flops_per_second'] / 1e12:,.3g} TFLOP/s. Written by `examples/benchmark_prefill.py`, which "
        "says how each number comes about.",
    ]
    for shape, verified in results["verified"].items():
        models = [model for model in results["models"] if model["shape"] == shape]
        sizes = ", ".join(f"{NAMES[model['model']]} {model['parameters']:,}" for model in models)
        error = f"{verified['error']:.1e} of fp32 (plain PyTorch {verified['plain_pytorch_error']:.1e})"
        lines += ["", f"## {shape}", "", f"Parameters: {sizes}. Last logits of Based before timing: off by {error}."]
        lines += ["", *speed_table(results, shape)]
        lines += ["", *found] if (found := comparisons(results, shape)) else []
    return "\n".join(lines + left_out_list(results, describe)) + "\n"


def panels(results: dict) -> list[list[Panel]]:
    """Tokens per second, and memory, over the length; one row for each shape."""
    rows = []
    for shape in results["verified"]:
        fast, large = {}, {}
        for cell in find(results, shape=shape):
            if cell["mode"] in ("", "one row"):
                fast.setdefault(label(cell), []).append((cell["length"], cell["tokens_per_second"]))
                if cell["peak_bytes"] and cell["batch"] == 1:
                    large.setdefault(NAMES[cell["model"]], []).append((cell["length"], cell["peak_bytes"] / 1e9))
        title = f"{shape}, {results['device']}, {results['dtype']}"
        rows.append(
            [
                Panel(title, "tokens of a row", "prefill, tokens per second", fast),
                Panel(f"{shape}, one row", "tokens of a row", "peak memory, GB", large),
            ]
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times the prefill of Based and of other models of equal size.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.3b", "360m"], help="in this order")
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=["based", "llama", "mamba2", "mamba"])
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[4096, 65536, 16384, 131072, 1024, 32768, 2048, 8192],
        help="tokens of a row, in this order",
    )
    parser.add_argument("--tokens", type=int, default=32768, help="of all rows, where one is not longer")
    parser.add_argument("--row-lengths", type=int, nargs="+", default=[1024, 4096], help="of a batch of 1")
    parser.add_argument("--compile-length", type=int, default=4096, help="0 leaves torch.compile out")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long a cell shall be timed")
    parser.add_argument("--cell-limit", type=float, default=10.0, help="seconds a prefill may take")
    parser.add_argument("--budget", type=float, help="seconds; what would not be done by then is left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--plot-only", action="store_true", help="table and plot of the results that are there")
    args = parser.parse_args()
    if min(args.lengths + args.row_lengths) < 1 or args.compile_length < 0:
        parser.error("--lengths and --row-lengths must be at least 1, --compile-length at least 0.")
    return args


def main() -> None:
    args = parse_arguments()
    failures = run_cells(args, PrefillRun)
    write_report(args.output, "prefill", table, panels)
    sys.exit(failures)


if __name__ == "__main__":
    main()
