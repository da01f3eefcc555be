# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: the machine and its limits, timing, errors, and the arithmetic of a model.

    limits       bytes a second of a copy, operations a second of a matrix product; measured, not looked up
    arithmetic   2 operations for each weight of a product and each token, and what the attention needs at least
    share        arithmetic / time / rate of a product

No program of its own.
"""

import contextlib
import gc
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_based import BasedConfig


RESULTS = Path(__file__).resolve().parent / "results"
BACKEND_VARIABLE = "TRANSFORMERS_BASED_BACKEND"
# From this share on of a step's time that its launches take, its kernels may be waiting for them.
HOST_BOUND = 0.8
LIBRARIES = ("triton", "mamba-ssm", "causal-conv1d", "flash-attn", "liger-kernel")


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
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
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


def training_step(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Forward and backward of transformers' own loss, which comes back; the gradients are in the parameters."""
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


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
    have passed; what takes three times as long alone runs once. `check` is given what the first call returns.
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
    is_long = runs[0][0] > 3 * seconds
    while not is_long and (len(runs) < 3 or (sum(wall for wall, _ in runs) < seconds and len(runs) < 100)):
        runs.append(once())
    walls, hosts = zip(*runs)
    first, middle, third = quantiles(walls, n=4) if len(walls) > 1 else walls * 3
    added = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    return Timing(middle, (third - first) / middle, len(walls), median(hosts), added)


def trace(call: Callable[[], object], device: torch.device, operators: bool = True) -> list[dict]:
    """
    The events of a call, as the profiler writes them for chrome://tracing; times in microseconds. Kernels alone,
    without the `operators` that launch them, are had sooner.
    """
    wanted = {ProfilerActivity.CPU: operators, ProfilerActivity.CUDA: device.type == "cuda"}
    with profile(activities=[activity for activity, is_wanted in wanted.items() if is_wanted]) as profiler:
        call()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def kernel_events(events: list[dict]) -> list[dict]:
    return [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Time during which at least one of several (start, duration) runs, which are in microseconds."""
    busy, until = 0.0, float("-inf")
    for start, duration in sorted(spans):
        busy += max(0.0, start + duration - max(start, until))
        until = max(until, start + duration)
    return busy / 1e6


def speed(call: Callable[[], object], device: torch.device, seconds: float, check: Callable[[object], object]) -> dict:
    """The part of a cell that `timed` measures; of what may wait for the host, also the time of the kernels alone."""
    timing = timed(call, device, seconds, check)
    cell = {"ms": timing.seconds * 1e3, "noise": timing.noise, "runs": timing.runs, "added_bytes": timing.added_bytes}
    if device.type == "cuda" and timing.host_seconds > HOST_BOUND * timing.seconds:
        kernels = kernel_events(trace(call, device, operators=False))
        cell["kernel_ms"] = busy_seconds((event["ts"], event["dur"]) for event in kernels) * 1e3
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
    """|got - exact| / |exact|; `exact` in fp32."""
    # In the last step only: a double of all gradients is large.
    difference, size = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (got - exact, exact))
    return float(difference / size)


def check_error(what: str, ours: float, plain: float) -> dict[str, float]:
    """
    Errors of the same thing against fp32: `ours`, and that of plain PyTorch in our dtype, which ours may hardly exceed.

    Raises:
        Wrong: it does, or is not a number.
    """
    if not (plain < 0.5 and ours <= 1.5 * plain + 2e-3):
        raise Wrong(f"{what}: off by {ours:.1e} of fp32, plain PyTorch by {plain:.1e}.")
    return {"error": ours, "plain_pytorch_error": plain}
