# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of the gated short convolution: what it verifies before it times, and that a wrong kernel stops it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

from kernel_checks import DEVICE, GPU


FOLDER = Path(__file__).parents[1] / "kernels" / "benchmarks"
# The interpreter cuts bf16 off instead of rounding it.
ROUNDING = 2**-9 if GPU else 2**-5
SIZES = {"device": DEVICE, "B": 1, "T": 5, "channels": 24, "taps": 3}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(
        "benchmark_gated_short_conv", FOLDER / "benchmark_gated_short_conv.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verification(benchmark):
    torch.manual_seed(0)
    errors = benchmark.verify(benchmark.ours, **SIZES)
    assert all(0 < error < 0.01 for error in errors[1])
    assert sys.modules["benchmark_step_ops"].is_right(errors, ROUNDING)


@pytest.mark.parametrize("name", ["output", "projected", "weight"])
def test_verification_sees_a_wrong_result(benchmark, name):
    def wrong(projected, weight):
        if name == "output":
            return benchmark.plain(projected, weight) * 1.02
        if name == "projected":
            return benchmark.plain(projected * 0.02 + projected.detach() * 0.98, weight)
        return benchmark.plain(projected, weight * 0.02 + weight.detach() * 0.98)

    assert not sys.modules["benchmark_step_ops"].is_right(benchmark.verify(wrong, **SIZES), ROUNDING)


def test_bytes_count_every_tensor_once(benchmark):
    inputs = benchmark.make(benchmark.drawing("cpu"), 1, 5, 24, 3)
    projected, output = inputs[0], benchmark.plain(*inputs)
    forward = projected.nbytes + output.nbytes
    backward = output.nbytes + 2 * projected.nbytes
    assert benchmark.bytes_moved(1, 5, 24) == (forward, forward + backward)


def test_table(benchmark):
    numbers = {"ms": 0.5, "GB_s": 100.0, "fraction_of_copy": 0.25}
    row = {"B": 1, "T": 5, "way": "ours", "forward": numbers, "both": {**numbers, "ms": 2.0}, "memory_MiB": 7.2}
    result = {"card": "none", "versions": {"torch": "2"}, "copy_GB_s": 400.0, "size": {"taps": 3}, "rows": [row]}
    assert "| 1 | 5 | ours | 0.500 | 100 | 25% | 2.000 | 100 | 25% | 7 |" in sys.modules["sequence_ops"].table(result)
