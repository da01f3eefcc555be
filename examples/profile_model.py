# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Where the time of a prefill and of a training step goes: kernel time by family, plain PyTorch beside the kernels.

    python examples/profile_model.py [--shapes 1.3b] [--backends auto torch] [--optimizer] [--budget 60]

    wall       the median of a few steps, not profiled
    kernels    of one more step, profiled: the time during which a kernel runs, and how often one is launched
    family     of a kernel: matrix products are what `mm` and `addmm` launch; all else belongs to the module whose
               forward launched it, or launched what it is the backward of, unless the kernel's own name tells
    share      (arithmetic of the step / rate of a large product) / wall

A CPU has no kernels: there, the time of each operator without those that it calls takes their place.
"""

import argparse
import contextlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from benchmark_report import left_out_list, machine_line, markdown_table, noise, write_report
from benchmark_run import Run
from benchmark_tools import (
    RESULTS,
    backend,
    busy_seconds,
    forward_flops,
    kernel_events,
    product_rate,
    random_ids,
    release_memory,
    timed,
    trace,
    training_step,
    weight_bytes,
)
from model_shapes import SHAPES, based_config, build
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import record_function
from transformers import PreTrainedModel
from transformers.utils import logging


PRODUCTS, TAYLOR, WINDOW, CONV = "matrix products", "Taylor attention", "window attention", "gated convolution"
NORMS, SWIGLU, ELEMENTWISE, LOSS = "norms", "SwiGLU", "sums and copies", "cross entropy"
OPTIMIZER, OTHER = "optimizer", "other"
FAMILIES = (PRODUCTS, TAYLOR, WINDOW, CONV, NORMS, SWIGLU, ELEMENTWISE, LOSS, OPTIMIZER, OTHER)

# What a module launches itself, other than products and through the modules inside it.
FAMILY_OF_MODULE = {
    "BasedGatedConv1d": CONV,
    "BasedShortConv": CONV,
    "BasedLinearAttention": TAYLOR,
    "BasedAttention": WINDOW,
    "LlamaRotaryEmbedding": WINDOW,
    "BasedRMSNorm": NORMS,
    "BasedMLP": SWIGLU,
    "BasedDecoderLayer": ELEMENTWISE,
    "BasedModel": OTHER,
    "BasedForCausalLM": LOSS,
}
FAMILY_OF_KERNEL = {
    TAYLOR: r"taylor_attention|sum_shares",
    WINDOW: r"sliding_attention",
    CONV: r"gated_short_conv",
    NORMS: r"rms_norm",
    SWIGLU: r"swiglu",
}
PRODUCT_OPS = ("aten::mm", "aten::addmm", "aten::_addmm_activation")
SCOPE, NODE = "family: ", "autograd::engine::evaluate_function: "
LABELS = {"auto": "fused", "torch": "plain PyTorch", "triton": "fused"}


@contextlib.contextmanager
def scopes() -> Iterator[None]:
    """Inside, every module of `FAMILY_OF_MODULE` marks its forward in the trace."""
    thread = threading.local()

    def enter(module, args):
        if family := FAMILY_OF_MODULE.get(type(module).__name__):
            # Without gradients there is no loss.
            mark = record_function(SCOPE + (OTHER if family == LOSS and not torch.is_grad_enabled() else family))
            mark.__enter__()
            thread.open = [*getattr(thread, "open", []), mark]

    def leave(module, args, output):
        if type(module).__name__ in FAMILY_OF_MODULE:
            thread.open.pop().__exit__(None, None, None)

    # For all modules at once: a hook on a module itself may change what the model does.
    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Span:
    """An operator or a mark of `scopes` on a thread of the CPU, inside another one."""

    def __init__(self, event: dict, parent: "Span | None"):
        self.name, self.start, self.duration = event["name"], event["ts"], event["dur"]
        self.sequence = event.get("args", {}).get("Sequence number")
        self.parent, self.of_children = parent, 0.0
        self.is_backward = self.name.startswith(NODE) or (parent is not None and parent.is_backward)

    def outwards(self) -> Iterator["Span"]:
        span = self
        while span is not None:
            yield span
            span = span.parent


class Kernel(NamedTuple):
    """A launch; `start` and `duration` in microseconds."""

    family: str
    name: str
    start: float
    duration: float


def kernels_of(events: list[dict]) -> list[Kernel]:
    """In the order of their launches; without a GPU, each operator that does something itself."""
    kernels = kernel_events(events)
    without_launch = {event["args"]["correlation"]: event for event in kernels}
    threads = {}
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation"):
            threads.setdefault(event["tid"], []).append((event, None))
        elif event.get("cat") in ("cuda_runtime", "cuda_driver"):
            launched = without_launch.pop(event.get("args", {}).get("correlation"), None)
            if launched is not None:
                threads.setdefault(event["tid"], []).append((event, launched))

    launches, spans, forward = [], [], {}
    for of_thread in threads.values():
        innermost = None
        for event, launched in sorted(of_thread, key=lambda pair: (pair[0]["ts"], -pair[0]["dur"])):
            while innermost is not None and event["ts"] >= innermost.start + innermost.duration:
                innermost = innermost.parent
            if launched is not None:
                launches.append((launched, innermost))
                continue
            span = Span(event, innermost)
            if innermost is not None:
                innermost.of_children += span.duration
            innermost = span
            spans.append(span)
            if span.sequence is not None and not span.is_backward:
                # The last operator with this number is the one that recorded the node of the backward.
                forward[span.sequence] = span
    if kernels:
        launches += [(event, None) for event in without_launch.values()]
        return [
            Kernel(family(launched["name"], span, forward), launched["name"], launched["ts"], launched["dur"])
            for launched, span in launches
        ]
    return [
        Kernel(family("", span, forward), span.name, span.start, span.duration - span.of_children)
        for span in spans
        if span.name.startswith("aten::") and span.duration > span.of_children
    ]


def family(kernel: str, span: Span | None, forward: dict[int, Span]) -> str:
    """Of a kernel of this name, launched in `span`; `forward` has the operators that recorded nodes of the backward."""
    for name, pattern in FAMILY_OF_KERNEL.items():
        if re.search(pattern, kernel):
            return name
    outwards = list(span.outwards()) if span is not None else []
    for outer in outwards:
        if outer.name in PRODUCT_OPS:
            return PRODUCTS
        if outer.name.startswith(SCOPE):
            break
    for outer in outwards:
        if outer.name.startswith(SCOPE):
            return outer.name.removeprefix(SCOPE)
        if outer.name.startswith("Optimizer."):
            return OPTIMIZER
        if outer.name.startswith(NODE):
            recorded = forward.get(outer.sequence)
            if recorded is None:
                return ELEMENTWISE
            return next((x.name.removeprefix(SCOPE) for x in recorded.outwards() if x.name.startswith(SCOPE)), OTHER)
    return OTHER


class Step:
    """One pass of a model, and its arithmetic."""

    def __init__(self, model: PreTrainedModel, kind: str, batch: int, length: int, optimizer: bool):
        self.model, self.kind = model, kind
        self.ids = random_ids(model, batch, length)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6) if optimizer and kind == "training" else None
        kept = length if kind == "training" else 1
        # The backward of a product is two products.
        self.flops = (3 if kind == "training" else 1) * forward_flops(model, batch, length, kept)

    def __call__(self) -> None:
        if self.kind == "prefill":
            with torch.no_grad():
                self.model(self.ids, use_cache=True, logits_to_keep=1)
            return
        training_step(self.model, self.ids)
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad()


def measure(step: Step, device: torch.device, rate: float, seconds: float) -> dict:
    timing = timed(step, device, seconds)
    with scopes():
        kernels = kernels_of(trace(step, device))
    if device.type == "cuda":
        busy = busy_seconds((kernel.start, kernel.duration) for kernel in kernels)
    else:
        # Operators are one inside the other, and take turns.
        busy = sum(kernel.duration for kernel in kernels) / 1e6
    milliseconds, launches, of_name = Counter(), Counter(), Counter()
    for kernel in kernels:
        milliseconds[kernel.family] += kernel.duration / 1e3
        launches[kernel.family] += 1
        of_name[kernel.family, kernel.name[:120]] += kernel.duration / 1e3
    return {
        "wall_ms": timing.seconds * 1e3,
        "noise": timing.noise,
        "runs": timing.runs,
        "kernel_ms": busy * 1e3,
        "host_share": max(0.0, 1 - busy / timing.seconds),
        "launches": len(kernels),
        "families": {
            name: {"ms": milliseconds[name], "launches": launches[name]} for name in FAMILIES if launches[name]
        },
        "longest": [{"family": family, "kernel": name, "ms": ms} for (family, name), ms in of_name.most_common(20)],
        "tokens_per_second": step.ids.numel() / timing.seconds,
        "flops": step.flops,
        "share_of_limit": step.flops / rate / timing.seconds,
        "peak_bytes": weight_bytes(step.model) + timing.added_bytes if device.type == "cuda" else 0,
    }


class ProfileRun(Run):
    def __init__(self, args: argparse.Namespace):
        rate = product_rate(torch.device(args.device), getattr(torch, args.dtype))
        super().__init__(
            args, "profile", args.budget, dtype=args.dtype, length=args.length, product_flops_per_second=rate, cells=[]
        )

    def shape(self, shape: str) -> None:
        args = self.args
        model = build(based_config(shape), self.device, getattr(torch, args.dtype))
        for name in args.backends:
            with backend(name):
                for kind, batch in (("prefill", args.prefill_batch), ("training", args.training_batch)):
                    # Plain PyTorch keeps more for the backward: a step that does not fit is made smaller, and says so.
                    while batch and not self.cell(model, shape, name, kind, batch):
                        batch //= 2
            release_memory()

    def cell(self, model: PreTrainedModel, shape: str, backend_name: str, kind: str, batch: int) -> bool:
        def made() -> dict:
            model.train(kind == "training")
            step = Step(model, kind, batch, self.args.length, self.args.optimizer)
            return measure(step, self.device, self.results["product_flops_per_second"], self.args.seconds)

        name = {"shape": shape, "pass": kind, "backend": backend_name, "batch": batch, "optimizer": self.args.optimizer}
        fitted = self.attempt(name, made, kind=(shape, kind, backend_name), guess=10)
        model.zero_grad()
        release_memory()
        return fitted


def pass_table(cells: list[dict]) -> list[str]:
    """The cells of one pass side by side, those of plain PyTorch first."""
    cells = sorted(cells, key=lambda cell: cell["backend"] != "torch")

    def row(name: str, value: Callable[[dict], str]) -> list[str]:
        return [name, *map(value, cells)]

    def of_family(name: str) -> Callable[[dict], str]:
        def value(cell: dict) -> str:
            found = cell["families"].get(name)
            if found is None:
                return "-"
            share = found["ms"] / max(sum(other["ms"] for other in cell["families"].values()), 1e-9)
            return f"{found['ms']:,.2f} ms, {share:.0%}, {found['launches']:,} launches"

        return value

    rows = [row(name, of_family(name)) for name in FAMILIES if any(name in cell["families"] for cell in cells)]
    rows += [
        row("all kernels", lambda cell: f"{cell['kernel_ms']:,.2f} ms, {cell['launches']:,} launches"),
        row("wall, of which noise", lambda cell: f"{cell['wall_ms']:,.2f} ms, {noise(cell)}"),
        row("waiting for the host", lambda cell: f"{cell['host_share']:.0%}"),
        row("tokens/s", lambda cell: f"{cell['tokens_per_second']:,.0f}"),
        row("share of the product rate", lambda cell: f"{cell['share_of_limit']:.1%}"),
        row("peak memory", lambda cell: f"{cell['peak_bytes'] / 1e9:,.1f} GB" if cell["peak_bytes"] else "-"),
    ]
    return markdown_table(["", *(f"{LABELS[cell['backend']]}, batch {cell['batch']}" for cell in cells)], rows)


def table(results: dict) -> str:
    lines = [
        "# Where the time goes",
        "",
        f"{machine_line(results)}; {results['dtype']}, random weights; rows of {results['length']:,} tokens. A large "
        f"product makes {results['product_flops_per_second'] / 1e12:,.3g} TFLOP/s. Written by "
        "`examples/profile_model.py`, which says how each number comes about.",
    ]
    for shape, kind in dict.fromkeys((cell["shape"], cell["pass"]) for cell in results["cells"]):
        cells = [cell for cell in results["cells"] if (cell["shape"], cell["pass"]) == (shape, kind)]
        names = {"prefill": "prefill", "training": "forward and backward"}
        title = names[kind] + (" and AdamW" if kind == "training" and cells[0]["optimizer"] else "")
        lines += ["", f"## {shape}, {title}", "", *pass_table(cells)]
    return "\n".join(lines + left_out_list(results, describe)) + "\n"


def describe(cell: dict) -> str:
    return f"{cell['shape']}, {cell['pass']}, {LABELS[cell['backend']]}, batch {cell['batch']}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kernel time of a prefill and a training step of Based, by family.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.3b"], help="in this order")
    parser.add_argument(
        "--backends", "--backend", nargs="+", choices=["auto", "torch", "triton"], default=["auto", "torch"]
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--prefill-batch", type=int, default=16, help="rows; 0 leaves the prefill out")
    parser.add_argument("--training-batch", type=int, default=8, help="rows; 0 leaves the training step out")
    parser.add_argument("--optimizer", action="store_true", help="a training step of AdamW, too")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a step shall be timed")
    parser.add_argument("--budget", type=float, help="seconds; what would not be done by then is left out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    parser.add_argument("--plot-only", action="store_true", help="the table of the results that are there")
    args = parser.parse_args()
    if args.length < 1 or min(args.prefill_batch, args.training_batch) < 0:
        parser.error("--length must be at least 1, the batches at least 0.")
    return args


def main() -> None:
    args = parse_arguments()
    failures = None
    if not args.plot_only:
        logging.set_verbosity_error()
        run = ProfileRun(args)
        for shape in args.shapes:
            run.shape(shape)
        run.write()
        failures = run.failures()
    write_report(args.output, "profile", table)
    sys.exit(failures)


if __name__ == "__main__":
    main()
