# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of the sliding-window attention: what it verifies before it times, and that a wrong kernel stops it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

from kernel_checks import DEVICE, GPU


FOLDER = Path(__file__).parents[1] / "kernels" / "benchmarks"
# The interpreter cuts bf16 off instead of rounding it.
ROUNDING = 2**-9 if GPU else 2**-3
SIZES = {"device": DEVICE, "B": 1, "T": 75, "heads": 2, "kv_heads": 1, "head_dim": 16}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    path = FOLDER / "benchmark_sliding_attention.py"
    spec = importlib.util.spec_from_file_location("benchmark_sliding_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verification(benchmark):
    torch.manual_seed(0)
    errors = benchmark.verify(benchmark.ours, **SIZES)
    assert all(0 < error < 0.01 for error in errors[1])
    assert sys.modules["benchmark_step_ops"].is_right(errors, ROUNDING)


@pytest.mark.parametrize("name", ["output", "query", "key", "value"])
def test_verification_sees_a_wrong_result(benchmark, name):
    def wrong(query, key, value, *more):
        inputs = {"query": query, "key": key, "value": value}
        if name in inputs:
            inputs[name] = inputs[name] * 0.02 + inputs[name].detach() * 0.98
        return benchmark.plain(*inputs.values(), *more) * (1.02 if name == "output" else 1)

    assert not sys.modules["benchmark_step_ops"].is_right(benchmark.verify(wrong, **SIZES), ROUNDING)


def test_bytes_count_every_tensor_once(benchmark):
    query, key, value = benchmark.make(benchmark.drawing("cpu"), 1, 5, 4, 2, 16)
    forward = 2 * query.nbytes + key.nbytes + value.nbytes
    backward = 4 * query.nbytes + 2 * (key.nbytes + value.nbytes)
    assert benchmark.bytes_moved(1, 5, 4, 2, 16) == (forward, forward + backward)
