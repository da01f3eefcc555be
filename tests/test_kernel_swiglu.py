# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The fused gate of the MLP against float64; plain PyTorch is the model's `act_fn(gate) * up`.

Without a GPU the kernel runs in Triton's interpreter.
"""

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

from kernel_checks import (
    DEVICE,
    DTYPES,
    assert_compiles_nothing_new,
    assert_compiles_whole,
    assert_exact,
    assert_graph_replays,
    assert_refuses_gradients,
    draw,
    on_gpu,
    poison_outputs,
    rms_error,
)

from based_kernels import swiglu


def oracle(gate, up):
    gate = gate.double()
    return gate * torch.sigmoid(gate) * up.double()


def plain(gate, up):
    return torch.nn.functional.silu(gate) * up


def make(shape, dtype):
    return draw(*shape, dtype=dtype, seed=0) * 2, draw(*shape, dtype=dtype, seed=1)


def compare(gate, up):
    output = swiglu(gate, up)
    assert output.is_contiguous()
    assert_exact(output, plain(gate, up), oracle(gate, up))


@pytest.mark.parametrize("shape", [(24,), (1, 1, 80), (3, 1, 7), (2, 3, 1, 600), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_dtypes(monkeypatch, shape, dtype):
    poison_outputs(monkeypatch)
    compare(*make(shape, dtype))


def test_more_exact_than_two_roundings():
    """In half types plain PyTorch rounds the silu as well: not the same bits, and never nearer."""
    gate, up = make((4, 1000), torch.float16)
    want = oracle(gate, up)
    assert not torch.equal(swiglu(gate, up), plain(gate, up))
    assert rms_error(swiglu(gate, up), want) < 0.9 * rms_error(plain(gate, up), want)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_at_its_two_ends():
    gate = torch.tensor([-1e4, -80, -8, -1e-20, 0, 1e-20, 80, 1e30], device=DEVICE)
    up = torch.ones_like(gate)
    torch.testing.assert_close(swiglu(gate, up).double(), oracle(gate, up), rtol=1e-6, atol=1e-30)


def test_strides_of_any_kind():
    gate, up = make((3, 2, 24), torch.float32)
    want = swiglu(gate, up)
    halves = torch.cat([gate, up], -1).chunk(2, -1)
    odd = torch.nn.functional.pad(torch.cat([gate, up], -1), (3, 2))[..., 3:-2].chunk(2, -1)
    swapped = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (gate, up)]
    rows_swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (gate, up)]
    for pair in (halves, odd, swapped, rows_swapped, (gate, halves[1]), (swapped[0], up)):
        assert torch.equal(swiglu(*pair), want)
    one = gate[:1].expand(3, 2, 24)
    assert torch.equal(swiglu(one, up), swiglu(one.clone(), up))


def bad_calls():
    def replace(**changes):
        def call():
            arguments = dict(zip(("gate", "up"), make((2, 1, 24), torch.bfloat16)))
            arguments.update({name: change(arguments[name]) for name, change in changes.items()})
            return swiglu(**arguments)

        return call

    return [
        ("gate", TypeError, "float32 or float16", replace(gate=lambda x: x.double())),
        ("gate", TypeError, "a tensor", replace(gate=lambda x: [1.0])),
        ("gate", ValueError, r"\[.., C\]", replace(gate=lambda x: x[0, 0, 0])),
        ("gate", ValueError, r"\[.., C\]", replace(gate=lambda x: x[:0])),
        ("up", TypeError, "bfloat16 fits", replace(up=lambda x: x.float())),
        ("up", ValueError, "shape of gate", replace(up=lambda x: x[:1])),
    ]


@pytest.mark.parametrize(("name", "error", "fix", "call"), bad_calls())
def test_errors_name_the_argument_and_the_fix(name, error, fix, call):
    with pytest.raises(error, match=rf"^{name}: got .*{fix}"):
        call()


@pytest.mark.parametrize("name", ["gate", "up"])
def test_forward_only(name):
    inputs = dict(zip(("gate", "up"), make((1, 8), torch.float32)))
    assert_refuses_gradients(lambda: swiglu(**inputs), name, inputs[name])


# The 1.3B shape.
C = 4864


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 3, 128])
def test_gpu_model_size(monkeypatch, B, dtype):
    poison_outputs(monkeypatch)
    compare(*make((B, 1, C), dtype))
    compare(*draw(B, 1, 2 * C, dtype=dtype).chunk(2, -1))


@on_gpu
@pytest.mark.parametrize("C", [1, 7, 24, 513, 1000])
def test_gpu_sizes(C):
    compare(*make((5, C), torch.bfloat16))


@on_gpu
def test_gpu_repeats_bit_by_bit():
    inputs = make((128, 1, C), torch.bfloat16)
    first = swiglu(*inputs)
    assert all(torch.equal(swiglu(*inputs), first) for _ in range(20))


@on_gpu
@pytest.mark.parametrize("B", [1, 128])
def test_gpu_cuda_graph(B):
    gate, up = make((B, 1, C), torch.bfloat16)

    def call():
        output = swiglu(gate, up)
        up.copy_(output)
        return output

    assert_graph_replays(call, up)


@on_gpu
def test_gpu_compiles_whole():
    both = draw(3, 1, 2 * C, dtype=torch.bfloat16)
    assert_compiles_whole(lambda x: swiglu(*(x * 2).chunk(2, -1)), both)


@on_gpu
def test_gpu_new_batches_compile_nothing():
    assert_compiles_nothing_new(lambda B: swiglu(*make((B, 1, C), torch.bfloat16)), [1, 2, 3, 16, 17, 128])
