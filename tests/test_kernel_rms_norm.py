# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The fused residual sum and RMSNorm against float64; plain PyTorch is the model's own norm.

Without a GPU the kernel runs in Triton's interpreter.
"""

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

from kernel_checks import (
    DEVICE,
    DTYPES,
    GPU,
    assert_compiles_nothing_new,
    assert_compiles_whole,
    assert_exact,
    assert_graph_replays,
    assert_refuses_gradients,
    draw,
    on_gpu,
    poison_outputs,
)

from based_kernels import rms_norm
from transformers_based.modeling_based import BasedRMSNorm


EPS = 1e-5


def oracle(x, weight, eps):
    x = x.double()
    return weight.double() * x * (x.square().mean(-1, keepdim=True) + eps) ** -0.5


def plain(x, weight, eps):
    norm = BasedRMSNorm(weight.shape[0], eps).to(DEVICE, weight.dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        return norm(x)


def make(shape, dtype, residual_dtype=None, weight_dtype=None, seed=0):
    """hidden_states, weight, residual."""
    residual = draw(*shape, dtype=residual_dtype, seed=seed + 2) if residual_dtype else None
    return draw(*shape, dtype=dtype, seed=seed), draw(shape[-1], dtype=weight_dtype or dtype, seed=seed + 1), residual


def compare(hidden_states, weight, residual, eps=EPS):
    normed, total = rms_norm(hidden_states, weight, eps, residual=residual)
    if residual is None:
        assert total is hidden_states
    else:
        want = residual + hidden_states
        assert total.dtype == want.dtype
        # the interpreter cuts bf16 off instead of rounding it
        rounds = GPU or want.dtype != torch.bfloat16
        torch.testing.assert_close(total, want, rtol=0 if rounds else 2**-7, atol=0)
    assert_exact(normed, plain(total, weight, eps), oracle(total, weight, eps))
    return normed, total


@pytest.mark.parametrize("shape", [(24,), (1, 1, 80), (3, 1, 7), (2, 3, 1, 600), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_dtypes(monkeypatch, shape, dtype):
    """The stream is in fp32, in the dtype of the layers, or absent."""
    poison_outputs(monkeypatch)
    for residual_dtype in dict.fromkeys((None, torch.float32, dtype)):
        compare(*make(shape, dtype, residual_dtype))


def test_longest_row():
    compare(*make((1, 16384), torch.float16, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weight_of_another_dtype(dtype):
    other = torch.float32 if dtype == torch.float16 else torch.float16
    normed, _ = compare(*make((2, 1, 24), dtype, torch.float32, other))
    assert normed.dtype == other


def test_eps_and_rows_of_any_size():
    """eps decides over a tiny row, nothing does over zeros; rows do not see one another."""
    hidden_states, weight, _ = make((4, 40), torch.float32)
    hidden_states *= torch.tensor([[1e-3], [0], [1e15], [1]], device=DEVICE)
    for eps in (1e-5, 1e-2):
        normed, _ = rms_norm(hidden_states, weight, eps)
        for row in (0, 2, 3):
            one = hidden_states[row]
            assert_exact(normed[row], plain(one, weight, eps), oracle(one, weight, eps))
        assert not normed[1].any()
    normed, _ = rms_norm(hidden_states[3], weight, 0)
    assert_exact(normed, plain(hidden_states[3], weight, 0.0), oracle(hidden_states[3], weight, 0.0))


def test_the_sum_is_taken_in_the_wider_dtype():
    hidden_states = torch.full((1, 8), 2.0**-10, dtype=torch.bfloat16, device=DEVICE)
    residual, weight = torch.full((1, 8), 256.0, device=DEVICE), torch.ones(8, device=DEVICE)
    assert (rms_norm(hidden_states, weight, EPS, residual=residual)[1] == 256 + 2**-10).all()


def test_inputs_are_left_alone():
    inputs = make((2, 24), torch.float32, torch.float32)
    before = [x.clone() for x in inputs]
    compare(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


def test_strides_of_any_kind():
    hidden_states, weight, residual = make((3, 2, 24), torch.float32, torch.float32)
    want = rms_norm(hidden_states, weight, EPS, residual=residual)

    def odd(x):
        return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]

    def swapped(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    def rows_swapped(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x

    for change in (odd, swapped, rows_swapped):
        got = rms_norm(change(hidden_states), change(weight), EPS, residual=change(residual))
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        assert all(x.is_contiguous() for x in got)
    got = rms_norm(hidden_states, weight, EPS, residual=odd(residual))
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    stepped = weight.repeat_interleave(2)[::2]
    one = hidden_states[:1].expand(3, 2, 24)
    want = rms_norm(one.clone(), weight, EPS, residual=residual)
    assert all(torch.equal(a, b) for a, b in zip(rms_norm(one, stepped, EPS, residual=residual), want))


def bad_calls():
    def replace(**changes):
        def call():
            hidden_states, weight, residual = make((2, 1, 24), torch.bfloat16, torch.float32)
            arguments = {"hidden_states": hidden_states, "weight": weight, "eps": EPS, "residual": residual}
            arguments.update({name: change(arguments[name]) for name, change in changes.items()})
            return rms_norm(**arguments)

        return call

    return [
        ("hidden_states", TypeError, "float32 or float16", replace(hidden_states=lambda x: x.double())),
        ("hidden_states", TypeError, "a tensor", replace(hidden_states=lambda x: None)),
        ("hidden_states", ValueError, r"\[.., C\]", replace(hidden_states=lambda x: x[0, 0, 0])),
        ("hidden_states", ValueError, r"\[.., C\]", replace(hidden_states=lambda x: x[:0])),
        ("hidden_states", ValueError, "16384", replace(hidden_states=lambda x: x[..., :1].repeat(1, 1, 16385))),
        ("weight", TypeError, "float32", replace(weight=lambda x: x.int())),
        ("weight", ValueError, r"\[24\]", replace(weight=lambda x: x[:8])),
        ("weight", ValueError, r"\[24\]", replace(weight=lambda x: x[None])),
        ("eps", TypeError, "number", replace(eps=lambda x: torch.tensor(x))),
        ("eps", TypeError, "number", replace(eps=lambda x: None)),
        ("eps", ValueError, ">= 0", replace(eps=lambda x: -x)),
        ("residual", TypeError, "float32 or bfloat16", replace(residual=lambda x: x.half())),
        ("residual", ValueError, "shape of hidden_states", replace(residual=lambda x: x[:1])),
    ]


@pytest.mark.parametrize(("name", "error", "fix", "call"), bad_calls())
def test_errors_name_the_argument_and_the_fix(name, error, fix, call):
    with pytest.raises(error, match=rf"^{name}: got .*{fix}"):
        call()


@pytest.mark.parametrize("name", ["hidden_states", "weight", "residual"])
def test_forward_only(name):
    inputs = dict(zip(("hidden_states", "weight", "residual"), make((1, 8), torch.float32, torch.float32)))
    assert_refuses_gradients(lambda: rms_norm(eps=EPS, **inputs), name, inputs[name])


# The 1.3B shape.
C = 1792


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 3, 128])
def test_gpu_model_size(monkeypatch, B, dtype):
    poison_outputs(monkeypatch)
    for residual_dtype in dict.fromkeys((None, torch.float32, dtype)):
        compare(*make((B, 1, C), dtype, residual_dtype))


@on_gpu
@pytest.mark.parametrize("C", [1, 7, 24, 1000, 4096, 16383, 16384])
def test_gpu_sizes(C):
    compare(*make((3, C), torch.bfloat16, torch.float32))


@on_gpu
def test_gpu_repeats_bit_by_bit():
    hidden_states, weight, residual = make((128, 1, C), torch.bfloat16, torch.float32)
    first = rms_norm(hidden_states, weight, EPS, residual=residual)
    for _ in range(20):
        again = rms_norm(hidden_states, weight, EPS, residual=residual)
        assert all(torch.equal(a, b) for a, b in zip(again, first))


@on_gpu
@pytest.mark.parametrize("B", [1, 128])
def test_gpu_cuda_graph(B):
    hidden_states, weight, residual = make((B, 1, C), torch.bfloat16, torch.float32)

    def call():
        normed, total = rms_norm(hidden_states, weight, EPS, residual=residual)
        residual.copy_(total)
        return normed, total

    assert_graph_replays(call, residual)


@on_gpu
def test_gpu_compiles_whole():
    hidden_states, weight, residual = make((3, 1, C), torch.bfloat16, torch.float32)
    assert_compiles_whole(lambda x, w, r: rms_norm(x * 2, w, EPS, residual=r), hidden_states, weight, residual)
    assert_compiles_whole(lambda x, w: rms_norm(x * 2, w, EPS)[0], hidden_states, weight)


@on_gpu
def test_gpu_new_batches_compile_nothing():
    def call(B):
        hidden_states, weight, residual = make((B, 1, C), torch.bfloat16, torch.float32)
        rms_norm(hidden_states, weight, EPS, residual=residual)
        rms_norm(hidden_states, weight, EPS)

    assert_compiles_nothing_new(call, [1, 2, 3, 16, 17, 128])
