# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of norm, gate and projections: what it verifies before it times, here on tensors small enough for the
interpreter, and that a wrong kernel would stop it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

from kernel_checks import DEVICE, GPU


FOLDER = Path(__file__).parents[1] / "kernels" / "benchmarks"
# Where a script finds its neighbours.
sys.path.append(str(FOLDER))
spec = importlib.util.spec_from_file_location("benchmark_norm_gate", FOLDER / "benchmark_norm_gate.py")
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
SIZE = benchmark.MODEL._replace(hidden=40, intermediate=48)
# The interpreter cuts bf16 off instead of rounding it.
ROUNDING = 2**-9 if GPU else 2**-5


@pytest.mark.parametrize("name", benchmark.OPS)
def test_verification(name):
    op = benchmark.OPS[name]
    torch.manual_seed(0)
    errors = benchmark.verify(op, SIZE, device=DEVICE)
    assert all(0 <= error < 0.02 for error in errors[1])
    assert benchmark.is_right(errors, ROUNDING)

    def wrong_backward(*inputs):
        # the outputs are right, their gradients are 2 percent too large
        return tuple(y.detach() + 1.02 * (y - y.detach()) for y in op.ours(*inputs))

    def wrong_forward(*inputs):
        return tuple(1.02 * y.detach() + y - y.detach() for y in op.ours(*inputs))

    for wrong in (wrong_backward, wrong_forward):
        assert not benchmark.is_right(benchmark.verify(op._replace(ours=wrong), SIZE, device=DEVICE), ROUNDING)


def test_bytes_count_every_tensor_once_a_pass():
    for name in ("rms_norm", "swiglu"):
        op = benchmark.OPS[name]
        inputs = op.make(benchmark.drawing("cpu"), 2, SIZE)
        outputs = op.plain(*inputs)
        tensors = [x.nbytes for x in (*inputs, *outputs) if x.dim() > 1]
        forward, backward = op.work(2, SIZE)
        assert forward == sum(tensors)
        # all of them again as gradients; of the norm's inputs only their sum is read again, of the gate's both
        read_again = outputs[1].nbytes if name == "rms_norm" else sum(x.nbytes for x in inputs)
        assert backward == sum(tensors) + read_again


def test_table():
    row = {"op": "swiglu", "tokens": 8, "way": "ours", "pass": "forward", "ms": 0.5, "rate": 2000.4, "unit": "GB/s"}
    row |= {"fraction": 0.854, "peak_MiB": 12.3}
    limits = {"GB/s": 3000.0, "TFLOP/s": 700.0}
    result = {"card": "none", "versions": {"torch": "2"}, "limits": limits, "size": SIZE._asdict(), "rows": [row]}
    assert "| swiglu | 8 | forward | ours | 0.500 | 2000 GB/s | 85% | 12 |" in benchmark.table(result)
