# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of the small decoding kernels: what it verifies before it times, here on tensors small enough for the
interpreter, and that a wrong kernel would stop it."""

import importlib.util
from pathlib import Path

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

from kernel_checks import DEVICE, GPU


PATH = Path(__file__).parents[1] / "kernels" / "benchmarks" / "benchmark_step_ops.py"
spec = importlib.util.spec_from_file_location("benchmark_step_ops", PATH)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
SIZE = benchmark.Size(40, 48, 24, 3, 4, 2, 16, 5)
# The interpreter cuts bf16 off instead of rounding it.
ROUNDING = 2**-9 if GPU else 2**-5


@pytest.mark.parametrize("name", benchmark.OPS)
def test_verification(name):
    op = benchmark.OPS[name]
    torch.manual_seed(0)
    errors = benchmark.verify(op, SIZE, device=DEVICE)
    assert 0 < errors[1][0] < 0.01
    assert benchmark.is_right(errors, ROUNDING)

    def wrong(*inputs):
        output, *changed = op.ours(*inputs)
        return output * 1.02, *changed

    assert not benchmark.is_right(benchmark.verify(op._replace(ours=wrong), SIZE, device=DEVICE), ROUNDING)


@pytest.mark.parametrize("name", ["gated_short_conv_step", "sliding_attention_step"])
def test_verification_sees_what_changes_in_place(name):
    op = benchmark.OPS[name]

    def forgets(*inputs):
        output, *changed = op.ours(*inputs)
        return output, *(torch.zeros_like(x) for x in changed)

    assert not benchmark.is_right(benchmark.verify(op._replace(ours=forgets), SIZE, device=DEVICE), ROUNDING)


@pytest.mark.parametrize("name", benchmark.OPS)
def test_bytes_count_every_tensor_once(name):
    op = benchmark.OPS[name]
    inputs = op.make(benchmark.drawing("cpu"), 2, SIZE)
    tensors = [*inputs, *op.plain(*inputs)]
    if name == "sliding_attention_step":
        # one slot of the ring is written and not read; angles and counts are next to nothing
        q, k, v, _, _, keys, values, _, output, *_ = tensors
        tensors = q, k, v, keys, values, output
    assert op.bytes(2, SIZE) == sum(x.nbytes for x in tensors)


def test_table():
    row = {"op": "swiglu", "B": 1, "us": 2.0, "plain_us": 5.0, "GB_s": 10.0, "fraction_of_copy": 0.01, "cold": False}
    result = {"card": "none", "versions": {"torch": "2"}, "copy_GB_s": 3000.0, "size": SIZE._asdict(), "rows": [row]}
    assert "| swiglu | 1 | 2.00 | 5.00 | 2.5x | 10 | 1% | L2 |" in benchmark.table(result)
