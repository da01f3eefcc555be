# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The fused gate of the MLP and its gradients against float64; plain PyTorch is the model's `act_fn(gate) * up`.

Without a GPU the kernel runs in Triton's interpreter.
"""

import importlib

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

from kernel_checks import (
    DEVICE,
    DTYPES,
    assert_compiles_nothing_new,
    assert_compiles_whole,
    assert_exact,
    assert_gradients_compile_whole,
    assert_graph_replays,
    draw,
    gradients,
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


def compare_gradients(gate, up, d_output):
    exact = [x.double() for x in (gate, up)]
    want = gradients(oracle, exact, [d_output.double()])
    plain_, ours = (gradients(op, (gate, up), [d_output]) for op in (plain, swiglu))
    for got, near, exact in zip(ours, plain_, want, strict=True):
        assert_exact(got, near, exact)


@pytest.mark.parametrize("shape", [(24,), (1, 1, 80), (3, 1, 7), (2, 3, 1, 600), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(monkeypatch, shape, dtype):
    poison_outputs(monkeypatch)
    compare_gradients(*make(shape, dtype), draw(*shape, dtype=dtype, seed=5))


def test_tile_of_many_rows(monkeypatch):
    """More than one block a row, the last of them not full."""
    monkeypatch.setattr(importlib.import_module("based_kernels.swiglu"), "_tile", lambda N: (1024, 4))
    poison_outputs(monkeypatch)
    gate, up = make((3, 2056), torch.float32)
    compare(gate, up)
    compare_gradients(gate, up, draw(3, 2056, seed=5))


def test_gradients_of_any_strides():
    gate, up = make((3, 2, 24), torch.float32)
    d_output = draw(3, 2, 24, seed=5)
    want = gradients(swiglu, (gate, up), [d_output])
    halves = torch.cat([gate, up], -1).chunk(2, -1)
    swapped = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (gate, up, d_output)]
    padded = torch.nn.functional.pad(d_output, (3, 2))[..., 3:-2]
    for *inputs, d in ((*halves, d_output), swapped, (gate, up, padded), (gate, halves[1], swapped[2])):
        assert all(torch.equal(a, b) for a, b in zip(gradients(swiglu, inputs, [d]), want))
    for size in ((1, 1, 1), (1, 1, 24), (3, 1, 24)):
        d = d_output[tuple(slice(n) for n in size)].expand(3, 2, 24)
        got, want = (gradients(swiglu, (gate, up), [x]) for x in (d, d.clone()))
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_gradients_lie_side_by_side():
    """As the product that made gate and up wants them."""
    d_gate, d_up = gradients(swiglu, make((2, 3, 24), torch.float32), [draw(2, 3, 24)])
    assert d_up.data_ptr() == d_gate.data_ptr() + d_gate.element_size() * 24
    assert d_gate.stride() == d_up.stride() == (3 * 48, 48, 1)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gradients_at_the_two_ends_of_silu():
    gate = torch.tensor([-1e4, -80, -8, -1e-20, 0, 1e-20, 80, 1e30], device=DEVICE)
    up = d_output = torch.ones_like(gate)
    want = gradients(oracle, [gate.double(), up.double()], [d_output.double()])
    for got, exact in zip(gradients(swiglu, [gate, up], [d_output]), want):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-30)


def test_differentiable_once():
    gate, up = make((2, 8), torch.float32)
    output = swiglu(gate.requires_grad_(), up)
    with pytest.raises(RuntimeError, match="swiglu: got create_graph=True"):
        torch.autograd.grad(output.sum(), gate, create_graph=True)


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


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 3, 1023, 4100])
def test_gpu_gradients(monkeypatch, N, dtype):
    poison_outputs(monkeypatch)
    d_output = draw(1, N, C, dtype=dtype, seed=5)
    both = draw(1, N, 2 * C, dtype=dtype).chunk(2, -1)
    compare(*both)
    compare_gradients(*both, d_output)
    compare_gradients(*make((1, N, C), dtype), d_output)


@on_gpu
@pytest.mark.parametrize("C", [1, 7, 513, 1000])
def test_gpu_gradients_of_any_width(C):
    compare_gradients(*make((1025, C), torch.bfloat16), draw(1025, C, dtype=torch.bfloat16, seed=5))


@on_gpu
def test_gpu_gradients_repeat_bit_by_bit():
    inputs, d_output = make((2, 2048, C), torch.bfloat16), draw(2, 2048, C, dtype=torch.bfloat16, seed=5)
    first = gradients(swiglu, inputs, [d_output])
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(gradients(swiglu, inputs, [d_output]), first))


@on_gpu
def test_gpu_gradients_in_a_cuda_graph():
    inputs, d_output = make((2, 600, C), torch.bfloat16), draw(2, 600, C, dtype=torch.bfloat16, seed=5)
    assert_graph_replays(lambda: gradients(swiglu, inputs, [d_output]))


@on_gpu
def test_gpu_gradients_compile_whole():
    both, d_output = draw(3, 50, 2 * C, dtype=torch.bfloat16), draw(3, 50, C, dtype=torch.bfloat16, seed=5)
    assert_gradients_compile_whole(lambda x: swiglu(*x.chunk(2, -1)), (both,), [d_output])


@on_gpu
def test_gpu_new_lengths_compile_nothing():
    def call(T):
        inputs = make((2, T, C), torch.bfloat16)
        gradients(swiglu, inputs, [draw(2, T, C, dtype=torch.bfloat16, seed=5)])

    # two tiles, for few rows and for many
    assert_compiles_nothing_new(lambda T: [call(t) for t in ([1, 512] if T == 0 else [T])], [0, 2, 3, 17, 513, 1024])


@on_gpu
def test_gpu_more_than_two_to_the_31():
    """The last rows are like those rows alone; each half of the gradient is past the end of 32 bits."""
    N = 2**31 // C + 5
    gate = torch.empty((N, C), dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    up = draw(1, C, dtype=torch.bfloat16, seed=1).expand(N, C)
    last = gate.detach()[-3:].clone().requires_grad_()
    output, few = swiglu(gate, up), swiglu(last, up[-3:])
    assert torch.equal(output[-3:], few)
    (got,) = torch.autograd.grad(output, gate, up)
    (want,) = torch.autograd.grad(few, last, up[-3:])
    assert torch.equal(got[-3:], want)
