# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: the machine and its limits, timing, arithmetic, and a run that keeps what it measured.

    limits       bytes a second of a copy, operations a second of a matrix product; measured, not looked up
    arithmetic   2 operations for each weight of a product and each token, and what the attention needs at least
    share        arithmetic / time / rate of a product

No program of its own.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
import transformers
from model_shapes import CONFIGS, build
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_based import BasedConfig


RESULTS = Path(__file__).resolve().parent / "results"
BACKEND_VARIABLE = "TRANSFORMERS_BASED_BACKEND"
# From this share on of a step's time that its launches take, its kernels may be waiting for them.
HOST_BOUND = 0.8
LIBRARIES = ("triton", "mamba_ssm", "causal_conv1d", "flash_attn", "liger_kernel")


class Wrong(Exception):
    """What is about to be timed does not compute what it should."""


def random_ids(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    """[batch, length]. Never 0, which serves as padding."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside, Based runs on this backend: auto, torch or triton."""
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[BACKEND_VARIABLE]
        if before is not None:
            os.environ[BACKEND_VARIABLE] = before


def plain_pytorch() -> contextlib.AbstractContextManager[None]:
    """No kernels inside."""
    return backend("torch")


def machine(device: torch.device) -> dict:
    """For the head of a report: the card, and what is installed."""
    cuda = device.type == "cuda"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in LIBRARIES:
        if importlib.util.find_spec(name):
            versions[name] = getattr(importlib.import_module(name), "__version__", "installed")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> float:
    """Unknown, and taken as endless, without a GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def does_not_fit(needed: float, free: float) -> str:
    return f"does not fit: needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def training_step(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Forward and backward of transformers' own loss, which comes back; the gradients are in the parameters."""
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


class LeftOut(Exception):
    """A cell that is not worth its time; the message says why."""


class Timing(NamedTuple):
    """
    Of some calls: the median; interquartile range / median; how many; how long the host took to launch one, the rest
    of the time waiting; and the memory that they needed at the peak beside what was there before, 0 without a GPU.
    """

    seconds: float
    noise: float
    runs: int
    host_seconds: float
    added_bytes: int


def timed(
    call: Callable[[], object],
    device: torch.device,
    seconds: float = 1.0,
    check: Callable[[object], object] = lambda output: None,
) -> Timing:
    """
    Wall clock of `call`, the device done before and after: once to warm up, then at least 3 times and until `seconds`
    have passed; what takes longer than that alone runs once. `check` is given what the first call returns.
    """
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def once() -> tuple[float, float]:
        synchronize(device)
        start = time.perf_counter()
        # What it returns is free again before the next one starts.
        call()
        launched = time.perf_counter()
        synchronize(device)
        return time.perf_counter() - start, launched - start

    check(call())
    runs = [once()]
    is_long = runs[0][0] > seconds
    while not is_long and (len(runs) < 3 or (sum(wall for wall, _ in runs) < seconds and len(runs) < 100)):
        runs.append(once())
    walls, hosts = zip(*runs)
    first, middle, third = quantiles(walls, n=4) if len(walls) > 1 else walls * 3
    added = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    return Timing(middle, (third - first) / middle, len(walls), median(hosts), added)


def kernel_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the sum over its kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize(device)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6


def speed(call: Callable[[], object], device: torch.device, seconds: float, check: Callable[[object], object]) -> dict:
    """The part of a cell that `timed` measures; of what may wait for the host, also the time of the kernels alone."""
    timing = timed(call, device, seconds, check)
    cell = {"ms": timing.seconds * 1e3, "noise": timing.noise, "runs": timing.runs, "added_bytes": timing.added_bytes}
    if device.type == "cuda" and timing.host_seconds > HOST_BOUND * timing.seconds:
        cell["kernel_ms"] = kernel_seconds(call, device) * 1e3
    return cell


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).view(torch.int32)
    target, times = torch.empty_like(source), []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large square product of random matrices, kept up for a while."""
    size, products = (8192, 20) if device.type == "cuda" else (512, 2)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def several():
        for _ in range(products):
            torch.mm(left, right)

    return products * 2 * size**3 / timed(several, device, seconds=0.3).seconds


def attention_flops(config: PreTrainedConfig, length: int) -> int:
    """
    Operations that a forward of `length` tokens needs in what mixes them, beside the products with weights.

    Taylor attention of D features and values of V: F (V + 1) products into the state and as many out of it, with
    F = (D + 1)(D + 2) / 2. Softmax attention: the scores and the sum of the values, of the visible keys. Convolutions
    and the scan of a Mamba are not matrix products and count 0.
    """
    if isinstance(config, BasedConfig):
        features = (config.linear_feature_dim + 1) * (config.linear_feature_dim + 2) // 2
        taylor = 4 * features * (config.linear_head_dim + 1) * config.linear_num_heads * length
        reach = min(config.sliding_window, length)
        pairs = reach * (reach + 1) // 2 + (length - reach) * reach
        window = 4 * pairs * config.num_attention_heads * config.head_dim
        of_layer = {"linear_attention": taylor, "sliding_attention": window}
        return sum(of_layer.get(layer_type, 0) for layer_type in config.layer_types)
    if getattr(config, "num_attention_heads", None) and not hasattr(config, "state_size"):
        size = config.num_attention_heads * (getattr(config, "head_dim", None) or 0)
        return config.num_hidden_layers * 4 * (length * (length + 1) // 2) * (size or config.hidden_size)
    return 0


def forward_flops(model: PreTrainedModel, batch: int, length: int, kept: int) -> int:
    """Operations of a forward of `[batch, length]` tokens, which makes logits for the last `kept` of each row."""
    head = model.get_output_embeddings()
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    products = 2 * ((weights - head.weight.numel()) * length + head.weight.numel() * kept)
    return batch * (products + attention_flops(model.config, length))


def weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def distance(got: torch.Tensor, exact: torch.Tensor) -> float:
    """|got - exact| / |exact|."""
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def check_error(what: str, ours: float, plain: float) -> dict[str, float]:
    """
    Errors of the same thing against fp32: `ours`, and that of plain PyTorch in our dtype, which ours may hardly exceed.

    Raises:
        Wrong: it does, or is not a number.
    """
    if not (plain < 0.5 and ours <= 1.5 * plain + 2e-3):
        raise Wrong(f"{what}: off by {ours:.1e} of fp32, plain PyTorch by {plain:.1e}.")
    return {"error": ours, "plain_pytorch_error": plain}


class Models:
    """The models that the cells ask for, by shape and kind. The last two are kept, to be measured in turns."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.built = device, dtype, {}

    def get(self, shape: str, kind: str) -> PreTrainedModel:
        key = shape, kind
        if key in self.built:
            self.built[key] = self.built.pop(key)
        else:
            for old in list(self.built)[:-1]:
                del self.built[old]
            release_memory()
            self.built[key] = build(CONFIGS[kind](shape), self.device, self.dtype)
        return self.built[key]

    def drop(self, shape: str, kind: str) -> None:
        """One that has been changed."""
        self.built.pop((shape, kind), None)


class Run:
    """
    The clock, and the results, which are on the disk whenever a cell is done: a run that is cut short keeps the others,
    and what was left out is listed with the reason.
    """

    def __init__(self, args: argparse.Namespace, name: str, budget: float | None, **results):
        """`args` has the `device` and, as `output`, the folder for `name`.json; `budget` in seconds."""
        self.args, self.file_name, self.budget = args, f"{name}.json", budget
        self.started, self.lasted = time.perf_counter(), {}
        self.device = torch.device(args.device)
        self.results = {**machine(self.device), **results, "left_out": []}

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def write(self) -> None:
        self.results["seconds"] = self.elapsed()
        self.args.output.mkdir(parents=True, exist_ok=True)
        path = self.args.output / self.file_name
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(path)

    def attempt(
        self, name: dict, measure: Callable[[], dict], into: str = "cells", kind: object = None, guess: float = 15
    ) -> bool:
        """
        Adds the cell `name | measure()`, or says why it is left out. Whether memory sufficed.

        A cell is not begun if it would outlast the budget: it is taken to last as long as the slowest of its `kind` so
        far, or `guess` seconds.
        """
        if self.budget and self.elapsed() + self.lasted.get(kind, guess) > self.budget:
            self.leave_out(name, "time limit")
            return True
        started, failure = time.perf_counter(), None
        try:
            cell = name | measure()
        except Exception as error:
            # The other cells are worth having; the run ends with an error all the same, if it is not about memory.
            if is_out_of_memory(error):
                failure = "out of memory"
            elif isinstance(error, LeftOut):
                failure = str(error)
            else:
                if not isinstance(error, Wrong):
                    traceback.print_exc()
                failure = f"failed: {type(error).__name__}: {str(error).strip()[:200]}"
        if failure:
            release_memory()
            self.leave_out(name, failure)
            return failure != "out of memory"
        self.lasted[kind] = max(self.lasted.get(kind, 0), time.perf_counter() - started)
        self.results[into].append(cell)
        # What is nested is for the file.
        flat = {key: value for key, value in cell.items() if not isinstance(value, dict | list)}
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in flat.items()}
        print(f"[{self.elapsed():5.0f} s] " + ", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
        self.write()
        return True

    def leave_out(self, name: dict, reason: str) -> None:
        self.results["left_out"].append(name | {"reason": reason})
        print(f"[{self.elapsed():5.0f} s] left out, {reason}: {name}", flush=True)
        self.write()

    def failures(self) -> str | None:
        """For `sys.exit`: cells that did not end for want of time or memory."""
        failed = [cell for cell in self.results["left_out"] if cell["reason"].startswith("failed")]
        return f"{len(failed)} cells failed: see above and the list of what was left out." if failed else None
