# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Speed of a training step by the length of its rows: Based beside a Llama of equal parameter count, in one run.

    python examples/benchmark_training.py [--shapes 1.3b 360m] [--lengths 2048 8192 32768] [--liger] [--budget 300]
    python examples/benchmark_training.py --plot-only

First verifies, then times, then a table and a plot. A step is forward and backward of transformers' own loss, which
holds the logits of every token, with weights and gradients in one dtype and no optimizer; Llama with SDPA, which takes
a flash kernel.

    batch          as many rows as make `--tokens` tokens, at least one
    share          (3 * arithmetic of the forward / rate of a large product) / time; what checkpointing computes again
                   is not counted
    memory         at the peak, weights and gradients included
    kernels        the time of the kernels alone, where the launches take most of the wall time
    checkpointing  `gradient_checkpointing_enable()`, of every layer
    Liger          its fused loss, which never holds the logits; the rest of either model as it is
    compiled       `torch.compile(model)`, all models in processes of their own at the same time, then timed in turns

The cells that matter most come first; what does not fit or would outlast the budget is listed.
"""

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark_report import NAMES, Panel, find, left_out_list, machine_line, markdown_table, noise, write_report
from benchmark_run import Apart, LeftOut, Models, Run, run_cells
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
    training_step,
    weight_bytes,
)
from model_shapes import CONFIGS, SHAPES, based_config, build
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel


KINDS = ("based", "llama")
MODES = ("", "checkpointing", "Liger", "compiled")
# From this length on, Llama needs checkpointing on most cards: a claim is about it with and without.
LONG = 32768
GUESS_SECONDS, GUESS_COMPILED_SECONDS = 10, 180
LIGER = {"fused_linear_cross_entropy": True} | dict.fromkeys(("cross_entropy", "rope", "rms_norm", "swiglu"), False)


def verify(shape: str, device: torch.device, dtype: torch.dtype, length: int = 515) -> dict:
    """
    Loss and gradients of what is going to be timed, against plain PyTorch in fp32, beside plain PyTorch in `dtype`.

    Raises:
        Wrong: the error of one is larger than rounding makes it.
    """
    model = build(based_config(shape), device, dtype).train()
    ids = random_ids(model, 2, length)

    def loss_and_gradients() -> tuple[torch.Tensor, torch.Tensor]:
        loss = training_step(model, ids)
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        model.zero_grad()
        return loss, gradients

    ours = loss_and_gradients()
    with plain_pytorch():
        plain = loss_and_gradients()
        model.float()
        exact = loss_and_gradients()
    errors = {}
    for name, *values in zip(("loss", "gradients"), ours, plain, exact):
        errors[name] = check_error(f"{name} of {shape}", *(distance(value, values[2]) for value in values[:2]))
    return errors


def steps(
    model: PreTrainedModel, forward: nn.Module, args: argparse.Namespace, rate: float, length: int, batch: int
) -> Callable[[], dict]:
    """What times training steps of `model`, which calls it as `forward`."""
    ids = random_ids(model, batch, length)

    def step() -> torch.Tensor:
        loss = training_step(forward, ids)
        model.zero_grad()
        return loss

    def check(loss: torch.Tensor) -> None:
        if not loss.isfinite():
            raise Wrong(f"The loss is {loss}.")

    def measure() -> dict:
        cell = speed(step, model.device, args.seconds, check)
        seconds, added = cell["ms"] / 1e3, cell.pop("added_bytes")
        flops = 3 * forward_flops(model, batch, length, kept=length)
        return {
            **cell,
            "tokens_per_second": batch * length / seconds,
            "flops": flops,
            "share_of_limit": flops / rate / seconds,
            "peak_bytes": weight_bytes(model) + added if model.device.type == "cuda" else 0,
        }

    return measure


def prepare_compiled(
    args: argparse.Namespace, rate: float, shape: str, model: str, mode: str, length: int, batch: int
) -> Callable[[], dict]:
    """In a process of its own: a compiled model, ready to be timed."""
    of_kind = build(CONFIGS[model](shape), args.device, getattr(torch, args.dtype)).train()
    forward = torch.compile(of_kind)
    # Others may have the memory now, which has many names; what is still wrong when this one's turn comes, shows then.
    with contextlib.suppress(Exception):
        training_step(forward, random_ids(of_kind, batch, length))
    of_kind.zero_grad()
    if args.device != "cpu":
        torch.cuda.empty_cache()
    return steps(of_kind, forward, args, rate, length, batch)


class TrainingRun(Run):
    def __init__(self, args: argparse.Namespace):
        device, dtype = torch.device(args.device), getattr(torch, args.dtype)
        super().__init__(
            args,
            "training",
            args.budget,
            dtype=args.dtype,
            product_flops_per_second=product_rate(device, dtype),
            verified={},
            models=[],
            cells=[],
        )
        self.models = Models(device, dtype)
        for shape in args.shapes:
            for kind in KINDS:
                parameters = build(CONFIGS[kind](shape), "meta").num_parameters()
                self.results["models"].append({"shape": shape, "model": kind, "parameters": parameters})

    def all(self) -> None:
        args = self.args
        for shape in args.shapes:
            try:
                self.results["verified"][shape] = verify(shape, self.device, getattr(torch, args.dtype))
            except Wrong as error:
                sys.exit(f"Not timed. {error}")
            release_memory()
            print(f"{shape}: verified, {self.results['verified'][shape]}", flush=True)
            cells = [(length, mode) for length in args.lengths for mode in ("", "checkpointing")]
            # What is claimed first: long rows with checkpointing, short ones without.
            for length, mode in sorted(cells, key=lambda cell: (cell[0] >= LONG) != (cell[1] == "checkpointing")):
                self.cells(shape, length, mode)
        self.compiled()
        for shape in args.shapes:
            for length in args.lengths if args.liger else []:
                self.cells(shape, length, "Liger")

    def names(self, shape: str, length: int, mode: str) -> list[dict]:
        batch = max(1, self.args.tokens // length)
        return [{"shape": shape, "model": kind, "mode": mode, "length": length, "batch": batch} for kind in KINDS]

    def cells(self, shape: str, length: int, mode: str) -> None:
        for name in self.names(shape, length, mode):
            kind = shape, name["model"], mode
            self.attempt(name, lambda: self.measure(**name), kind=kind, guess=GUESS_SECONDS)  # noqa: B023

    def compiled(self) -> None:
        shapes, lengths = self.args.shapes, self.args.compile_lengths
        names = [name for length in lengths for shape in shapes for name in self.names(shape, length, "compiled")]
        left = self.left()
        if not names or (left is not None and left < GUESS_COMPILED_SECONDS):
            for name in names:
                self.leave_out(name, "time limit")
            return
        self.models.built.clear()
        release_memory()
        rate = self.results["product_flops_per_second"]
        apart = [Apart(prepare_compiled, len(names), args=self.args, rate=rate, **name) for name in names]
        for each in apart:
            each.wait(self.left())
        for name, each in zip(names, apart):
            self.attempt(name, lambda: each.measure(self.left()), kind="compiled")  # noqa: B023
            each.kill()

    def measure(self, shape: str, model: str, mode: str, length: int, batch: int) -> dict:
        args, of_kind = self.args, self.models.get(shape, model).train()
        # What a cell before this one has left if it failed.
        of_kind.zero_grad()
        of_kind.gradient_checkpointing_disable()
        if mode == "checkpointing":
            of_kind.gradient_checkpointing_enable({"use_reentrant": False})
        if mode == "Liger":
            self.patch(of_kind)
        try:
            return steps(of_kind, of_kind, args, self.results["product_flops_per_second"], length, batch)()
        finally:
            of_kind.zero_grad()
            if mode == "Liger":
                self.models.drop(shape, model)

    def patch(self, model: PreTrainedModel) -> None:
        if not importlib.util.find_spec("liger_kernel"):
            raise LeftOut("liger_kernel is not installed")
        if self.device.type == "cpu":
            raise LeftOut("Liger's kernels do not run on a CPU")
        apply_liger_kernel(model, LIGER)


def label(cell: dict) -> str:
    return NAMES[cell["model"]] + (f", {cell['mode']}" if cell["mode"] else "")


def speed_table(results: dict, shape: str) -> list[str]:
    columns = ["model", "tokens of a row", "batch", "tokens/s", "±", "share of products", "memory"]
    rows = []

    def order(cell: dict) -> tuple:
        return MODES.index(cell["mode"]), cell["length"], KINDS.index(cell["model"])

    for cell in sorted(find(results, shape=shape), key=order):
        rows.append(
            [
                label(cell),
                f"{cell['length']:,}",
                f"{cell['batch']}",
                f"{cell['tokens_per_second']:,.0f}",
                noise(cell),
                f"{cell['share_of_limit']:.1%}",
                f"{cell['peak_bytes'] / 1e9:.1f} GB" if cell["peak_bytes"] else "-",
            ]
        )
        if "kernel_ms" in cell:
            rows[-1][3] += f" (kernels {cell['kernel_ms']:.0f} of {cell['ms']:.0f} ms)"
    return markdown_table(columns, rows)


def comparisons(results: dict, shape: str) -> list[str]:
    """Based over Llama, in speed and memory, by the way to train and the length; and what compilation gains."""
    lines = []
    for mode in MODES:
        ours, theirs = (
            {cell["length"]: cell for cell in find(results, shape=shape, model=k, mode=mode)} for k in KINDS
        )
        for length in sorted(ours.keys() & theirs.keys()):
            ratio, memory = (
                ours[length][key] / max(theirs[length][key], 1) for key in ("tokens_per_second", "peak_bytes")
            )
            with_memory = f", {memory:.2f} times its memory" if memory else ""
            how = f", {mode}" if mode else ""
            lines.append(f"- {length:,} tokens{how}: {ratio:.2f} times the speed of Llama{with_memory}")
    for kind in KINDS:
        plain, compiled = (
            {cell["length"]: cell for cell in find(results, shape=shape, model=kind, mode=mode)}
            for mode in ("", "compiled")
        )
        for length in sorted(plain.keys() & compiled.keys()):
            ratio = plain[length]["tokens_per_second"] / compiled[length]["tokens_per_second"]
            lines.append(f"- {NAMES[kind]} at {length:,}, not compiled over compiled, tokens/s: {ratio:.2f}")
    return lines


def describe(cell: dict) -> str:
    return f"{cell['shape']}, {label(cell)}, {cell['length']:,} tokens, batch {cell['batch']}"


def table(results: dict) -> str:
    lines = [
        "# Speed of a training step",
        "",
        f"{machine_line(results)}; forward and backward, weights and gradients in {results['dtype']}, random weights. "
        f"A large product makes {results['product_flops_per_second'] / 1e12:,.3g} TFLOP/s. Written by "
        "`examples/benchmark_training.py`, which says how each number comes about.",
    ]
    for shape, verified in results["verified"].items():
        models = [model for model in results["models"] if model["shape"] == shape]
        sizes = ", ".join(f"{NAMES[model['model']]} {model['parameters']:,}" for model in models)
        errors = ", ".join(
            f"{name} {error['error']:.1e} (plain PyTorch {error['plain_pytorch_error']:.1e})"
            for name, error in verified.items()
        )
        lines += ["", f"## {shape}", "", f"Parameters: {sizes}. Based before timing, off fp32 by: {errors}."]
        lines += ["", *speed_table(results, shape)]
        lines += ["", *found] if (found := comparisons(results, shape)) else []
    return "\n".join(lines + left_out_list(results, describe)) + "\n"


def panels(results: dict) -> list[list[Panel]]:
    """Tokens per second, and memory, over the length; one row for each shape."""
    rows = []
    for shape in results["verified"]:
        fast, large = {}, {}
        for cell in find(results, shape=shape):
            fast.setdefault(label(cell), []).append((cell["length"], cell["tokens_per_second"]))
            if cell["peak_bytes"]:
                large.setdefault(label(cell), []).append((cell["length"], cell["peak_bytes"] / 1e9))
        title = f"{shape}, {results['device']}, {results['dtype']}"
        rows.append(
            [
                Panel(title, "tokens of a row", "forward and backward, tokens per second", fast),
                Panel(shape, "tokens of a row", "peak memory, GB", large),
            ]
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times a training step of Based and of a Llama of equal size.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.3b", "360m"], help="in this order")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=16384, help="of all rows, where one is not longer")
    parser.add_argument(
        "--compile-lengths", type=int, nargs="*", default=[2048], help="for torch.compile, minutes for each model"
    )
    parser.add_argument("--liger", action="store_true", help="also with Liger's fused loss")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long a cell shall be timed")
    parser.add_argument("--budget", type=float, help="seconds; what would not be done by then is left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--plot-only", action="store_true", help="table and plot of the results that are there")
    args = parser.parse_args()
    if min(*args.lengths, *args.compile_lengths, 2) < 2:
        parser.error("--lengths and --compile-lengths must be at least 2: a token is predicted from those before it.")
    return args


def main() -> None:
    args = parse_arguments()
    failures = run_cells(args, TrainingRun)
    write_report(args.output, "training", table, panels)
    sys.exit(failures)


if __name__ == "__main__":
    main()
