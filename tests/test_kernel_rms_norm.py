# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The fused residual sum and RMSNorm and their gradients against float64; plain PyTorch is the model's own norm.

Without a GPU the kernel runs in Triton's interpreter.
"""

import functools
import importlib

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
    assert_gradients_compile_whole,
    assert_graph_replays,
    assert_refuses_gradients,
    draw,
    gradients,
    on_gpu,
    poison_outputs,
    rms_error,
)

from based_kernels import rms_norm, rms_norm_of_parts
from transformers_based import ops
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_sum_in_place(monkeypatch, dtype):
    hidden_states, weight, residual = make((2, 3, 24), dtype, torch.float32)
    want = rms_norm(hidden_states, weight, EPS, residual=residual)
    poison_outputs(monkeypatch)
    with torch.no_grad():
        normed, total = rms_norm(hidden_states, weight, EPS, residual=residual, in_place=True)
    assert total is residual
    assert torch.equal(total, want[1])
    assert torch.equal(normed, want[0])


def test_refuses_a_sum_that_cannot_be_in_place():
    hidden_states, weight, residual = make((2, 3, 24), torch.float32, torch.float16)
    with pytest.raises(ValueError, match=r"in_place: got True where gradients are enabled"):
        rms_norm(hidden_states, weight, EPS, residual=residual.float(), in_place=True)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"in_place: got True without residual"):
            rms_norm(hidden_states, weight, EPS, in_place=True)
        with pytest.raises(ValueError, match=r"residual: got torch.float16, contiguous, torch.float32 and contiguous"):
            rms_norm(hidden_states, weight, EPS, residual=residual, in_place=True)
        apart = residual.float().transpose(0, 1).contiguous().transpose(0, 1)
        with pytest.raises(ValueError, match=r"residual: got torch.float32, not contiguous"):
            rms_norm(hidden_states, weight, EPS, residual=apart, in_place=True)


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
        ("residual", TypeError, "float32 or float16 or bfloat16", replace(residual=lambda x: x.double())),
        ("residual", ValueError, "shape of hidden_states", replace(residual=lambda x: x[:1])),
    ]


@pytest.mark.parametrize(("name", "error", "fix", "call"), bad_calls())
def test_errors_name_the_argument_and_the_fix(name, error, fix, call):
    with pytest.raises(error, match=rf"^{name}: got .*{fix}"):
        call()


def make_parts(shape, P, dtype, residual_dtype, has_bias=True):
    """Parts, weight, residual, bias."""
    _, weight, residual = make(shape, dtype, residual_dtype)
    return draw(P, *shape, seed=3), weight, residual, draw(shape[-1], dtype=dtype, seed=4) if has_bias else None


def compare_parts(parts, weight, residual, bias, **options):
    """Plain PyTorch knows no parts: it rounds their sum to the dtype of the layers, then adds it to the stream."""
    exact = residual.double() + parts.double().sum(0) + (0 if bias is None else bias.double())
    rounded = parts.sum(0).to(weight.dtype) if bias is None else (parts.sum(0) + bias).to(weight.dtype)
    plain_total = residual + rounded
    with torch.no_grad():
        normed, total = rms_norm_of_parts(parts, weight, EPS, residual=residual, bias=bias, **options)
    assert_exact(total, plain_total, exact)
    assert_exact(normed, plain(plain_total, weight, EPS), oracle(exact, weight, EPS))
    return normed, total


@pytest.mark.parametrize(("shape", "P"), [((1, 1, 80), 1), ((3, 1, 7), 2), ((2, 3, 1, 600), 4), ((24,), 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts(monkeypatch, shape, P, dtype):
    poison_outputs(monkeypatch)
    for residual_dtype in dict.fromkeys((torch.float32, dtype)):
        for has_bias in (False, True):
            compare_parts(*make_parts(shape, P, dtype, residual_dtype, has_bias))


def test_parts_in_place_and_of_any_stride():
    parts, weight, residual, bias = make_parts((3, 2, 24), 4, torch.float16, torch.float32)
    want = compare_parts(parts, weight, residual, bias)
    odd = torch.nn.functional.pad(parts, (3, 2))[..., 3:-2]
    swapped = parts.transpose(0, 2).contiguous().transpose(0, 2)
    for change in (odd, swapped):
        got = compare_parts(change, weight, residual, bias.repeat_interleave(2)[::2])
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    with torch.no_grad():
        normed, total = rms_norm_of_parts(parts, weight, EPS, residual=residual, bias=bias, in_place=True)
    assert total is residual
    assert torch.equal(total, want[1])
    assert torch.equal(normed, want[0])


def bad_calls_of_parts():
    def odd(x):
        return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]

    def replace(**changes):
        def call():
            names = ("parts", "weight", "residual", "bias")
            arguments = dict(zip(names, make_parts((2, 1, 24), 4, torch.bfloat16, torch.float32)), eps=EPS)
            arguments.update({name: change(arguments.get(name)) for name, change in changes.items()})
            with torch.no_grad():
                return rms_norm_of_parts(**arguments)

        return call

    return [
        ("parts", ValueError, "torch.float32 of shape", replace(parts=lambda x: x.half())),
        ("parts", ValueError, r"\[P, .., C\] with P up to 16", replace(parts=lambda x: x[:1].repeat(17, 1, 1, 1))),
        ("parts", ValueError, r"\[P, .., C\]", replace(parts=lambda x: x[0, 0, 0])),
        ("parts", TypeError, "a tensor", replace(parts=lambda x: None)),
        ("residual", TypeError, "a tensor", replace(residual=lambda x: None)),
        ("residual", ValueError, "shape of hidden_states", replace(residual=lambda x: x[:1])),
        ("residual", ValueError, "torch.float32 and contiguous", replace(residual=odd, in_place=lambda x: True)),
        ("weight", ValueError, r"\[24\]", replace(weight=lambda x: x[:8])),
        ("bias", ValueError, "shape of weight", replace(bias=lambda x: x[:8])),
        ("bias", TypeError, "float32 or float16 or bfloat16", replace(bias=lambda x: x.double())),
    ]


@pytest.mark.parametrize(("name", "error", "fix", "call"), bad_calls_of_parts())
def test_errors_of_parts_name_the_argument_and_the_fix(name, error, fix, call):
    with pytest.raises(error, match=rf"^{name}: got .*{fix}"):
        call()


def test_parts_refuse_gradients():
    parts, weight, residual, bias = make_parts((1, 24), 2, torch.float32, torch.float32)
    call = functools.partial(rms_norm_of_parts, parts, weight, EPS, residual=residual, bias=bias)
    for name, x in (("parts", parts), ("weight", weight), ("residual", residual), ("bias", bias)):
        assert_refuses_gradients(call, name, x)
        x.requires_grad_(False)


def exact_sum_and_norm(hidden_states, weight, residual):
    total = hidden_states if residual is None else hidden_states.double() + residual.double()
    normed = oracle(total, weight, EPS)
    return normed if residual is None else (normed, total)


def plain_sum_and_norm(hidden_states, weight, residual):
    normed, total = ops.rms_norm(hidden_states, weight, EPS, residual)
    return normed if residual is None else (normed, total)


def fused_sum_and_norm(hidden_states, weight, residual):
    normed, total = rms_norm(hidden_states, weight, EPS, residual=residual)
    return normed if residual is None else (normed, total)


def draw_gradients(hidden_states, weight, residual):
    """Of the norm, and of the sum if there is one."""
    shape = hidden_states.shape
    d_normed = draw(*shape, dtype=weight.dtype, seed=5)
    if residual is None:
        return [d_normed]
    dtype = torch.promote_types(hidden_states.dtype, residual.dtype)
    return [d_normed, draw(*shape, dtype=dtype, seed=6)]


def compare_gradients(inputs, d_outputs=None):
    """Of hidden_states, weight, and residual if there is one; -> ours."""
    d_outputs = d_outputs or draw_gradients(*inputs)
    exact = [x if x is None else x.double() for x in inputs]
    want = gradients(exact_sum_and_norm, exact, [x.double() for x in d_outputs])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
        plain = gradients(plain_sum_and_norm, inputs, d_outputs)
    ours = gradients(fused_sum_and_norm, inputs, d_outputs)
    for got, near, exact in zip(ours, plain, want, strict=True):
        assert_exact(got, near, exact)
    return ours


@pytest.fixture
def short_runs(monkeypatch):
    """So that few rows are several runs, the last of them shorter."""
    module = importlib.import_module("based_kernels.rms_norm")
    monkeypatch.setattr(module, "_RUNS", 3)
    monkeypatch.setattr(module, "_SHORTEST_RUN", 1)
    return module


@pytest.mark.parametrize("shape", [(24,), (1, 1, 7), (5, 1, 80), (2, 7, 600), (1, 2, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(monkeypatch, short_runs, shape, dtype):
    poison_outputs(monkeypatch)
    for residual_dtype in dict.fromkeys((None, torch.float32, dtype)):
        inputs = make(shape, dtype, residual_dtype)
        if shape[-1] == 1:
            # y is 1 or -1, next to whatever x is, and eps keeps its slope from being 0
            inputs[0].mul_(1e-2)
        compare_gradients(inputs)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "residual_dtype"),
    [
        # autocast, a model in half a type with a wider norm, a narrow stream of another type
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_gradients_of_mixed_dtypes(short_runs, dtype, weight_dtype, residual_dtype):
    inputs = make((4, 3, 24), dtype, residual_dtype, weight_dtype)
    assert [x.dtype for x in compare_gradients(inputs)] == [dtype, weight_dtype, residual_dtype]
    total = fused_sum_and_norm(*inputs)[1]
    torch.testing.assert_close(total, inputs[2] + inputs[0], rtol=0, atol=0)


def test_many_runs_are_added(short_runs, monkeypatch):
    """More than the second stage takes in at once."""
    monkeypatch.setattr(short_runs, "_RUNS", 200)
    compare_gradients(make((150, 9), torch.float32, torch.float32))


def test_gradients_of_any_strides():
    inputs = make((3, 2, 24), torch.float32, torch.float32)
    d_outputs = draw_gradients(*inputs)
    want = gradients(fused_sum_and_norm, inputs, d_outputs)

    def padded(x):
        return torch.nn.functional.pad(x, (3, 2))[..., 3:-2]

    def swapped(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for change in (padded, swapped):
        got = gradients(fused_sum_and_norm, [change(x) for x in inputs], [change(x) for x in d_outputs])
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    for i in (0, 1):
        mixed = [padded(x) if i == j else x for j, x in enumerate(d_outputs)]
        assert all(torch.equal(a, b) for a, b in zip(gradients(fused_sum_and_norm, inputs, mixed), want))
    for size in ((1, 1, 1), (1, 1, 24), (3, 1, 24)):
        small = [x[tuple(slice(n) for n in size)] for x in d_outputs]
        expanded, copies = ([f(x.expand(3, 2, 24)) for x in small] for f in (lambda x: x, torch.clone))
        got, want = (gradients(fused_sum_and_norm, inputs, d) for d in (expanded, copies))
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_one_output_alone():
    """The gradient of the other is 0."""
    inputs = make((3, 24), torch.float32, torch.float32)
    d_outputs = draw_gradients(*inputs)
    for i in (0, 1):
        zeros = [x if i == j else torch.zeros_like(x) for j, x in enumerate(d_outputs)]
        want = gradients(exact_sum_and_norm, [x.double() for x in inputs], [x.double() for x in zeros])
        leaves = [x.clone().requires_grad_() for x in inputs]
        got = torch.autograd.grad(fused_sum_and_norm(*leaves)[i], leaves, d_outputs[i])
        for a, b in zip(got, want):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_what_is_frozen_costs_nothing(short_runs, monkeypatch):
    inputs = make((4, 24), torch.bfloat16, torch.float32)
    d_outputs = draw_gradients(*inputs)
    want = gradients(fused_sum_and_norm, inputs, d_outputs)
    for needed in (0, 1, 2):
        leaves = [x.clone().requires_grad_(i == needed) for i, x in enumerate(inputs)]
        if needed != 1:
            # no second stage, nothing for it
            monkeypatch.setattr(short_runs, "_rms_norm_sum_kernel", None)
        (got,) = torch.autograd.grad(fused_sum_and_norm(*leaves), [leaves[needed]], d_outputs)
        assert torch.equal(got, want[needed])
        monkeypatch.undo()


def test_gradients_of_rows_of_any_size():
    """Over zeros, over a tiny row and a huge one."""
    hidden_states, weight, _ = make((4, 40), torch.float32)
    hidden_states *= torch.tensor([[1e-3], [0], [1e15], [1]], device=DEVICE)
    d_normed = draw(4, 40, seed=5)
    got, _ = gradients(fused_sum_and_norm, (hidden_states, weight, None), [d_normed])
    exact = (hidden_states.double(), weight.double(), None)
    want, _ = gradients(exact_sum_and_norm, exact, [d_normed.double()])
    for row in (0, 2, 3):
        # plain PyTorch loses the huge row: in fp32 the third power of 1e-15 is 0
        assert rms_error(got[row], want[row]) < 5e-7
    torch.testing.assert_close(got[1], d_normed[1] * weight * EPS**-0.5)


def test_differentiable_once():
    hidden_states, weight, _ = make((2, 8), torch.float32)
    normed, _ = rms_norm(hidden_states.requires_grad_(), weight, EPS)
    with pytest.raises(RuntimeError, match="rms_norm: got create_graph=True"):
        torch.autograd.grad(normed.sum(), hidden_states, create_graph=True)


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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "P"), [(1, 4), (3, 1), (128, 4), (128, 16)])
def test_gpu_parts(monkeypatch, B, P, dtype):
    poison_outputs(monkeypatch)
    for residual_dtype in dict.fromkeys((torch.float32, dtype)):
        compare_parts(*make_parts((B, 1, C), P, dtype, residual_dtype))


@on_gpu
def test_gpu_parts_in_a_cuda_graph():
    parts, weight, residual, bias = make_parts((128, 1, C), 4, torch.bfloat16, torch.float32)

    def call():
        with torch.no_grad():
            return rms_norm_of_parts(parts, weight, EPS, residual=residual, bias=bias, in_place=True)

    assert_graph_replays(call, residual)


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


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 3, 2049, 16384])
def test_gpu_gradients(monkeypatch, N, dtype):
    poison_outputs(monkeypatch)
    for residual_dtype in dict.fromkeys((None, torch.float32, dtype)):
        compare(*make((1, N, C), dtype, residual_dtype))
        compare_gradients(make((1, N, C), dtype, residual_dtype))


@on_gpu
@pytest.mark.parametrize("C", [1, 7, 1000, 4096, 16383, 16384])
def test_gpu_gradients_of_any_width(C):
    hidden_states, *others = make((513, C), torch.bfloat16, torch.float32)
    compare_gradients((hidden_states * (1e-2 if C == 1 else 1), *others))


@on_gpu
def test_gpu_gradients_repeat_bit_by_bit():
    inputs = make((8, 2048, C), torch.bfloat16, torch.float32)
    d_outputs = draw_gradients(*inputs)
    first = gradients(fused_sum_and_norm, inputs, d_outputs)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(gradients(fused_sum_and_norm, inputs, d_outputs), first))


@on_gpu
def test_gpu_gradients_in_a_cuda_graph():
    inputs = make((2, 300, C), torch.bfloat16, torch.float32)
    d_outputs = draw_gradients(*inputs)
    assert_graph_replays(lambda: gradients(fused_sum_and_norm, inputs, d_outputs))


@on_gpu
def test_gpu_gradients_compile_whole():
    inputs = make((3, 50, C), torch.bfloat16, torch.float32)
    assert_gradients_compile_whole(lambda *x: fused_sum_and_norm(*x), inputs, draw_gradients(*inputs))
    inputs = (*inputs[:2], None)
    assert_gradients_compile_whole(lambda *x: fused_sum_and_norm(*x), inputs, draw_gradients(*inputs))


@on_gpu
def test_gpu_new_lengths_compile_nothing():
    def call(T):
        inputs = make((2, T, C), torch.bfloat16, torch.float32)
        gradients(fused_sum_and_norm, inputs, draw_gradients(*inputs))

    assert_compiles_nothing_new(call, [1, 2, 3, 16, 17, 512, 513, 1024, 1027, 4096])


@on_gpu
def test_gpu_more_than_two_to_the_31():
    """The last rows are like those rows alone."""
    N = 2**31 // C + 5
    hidden_states = torch.empty((N, C), dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    weight = draw(C, dtype=torch.bfloat16, seed=1)
    last = hidden_states.detach()[-3:].clone().requires_grad_()
    normed, few = rms_norm(hidden_states, weight, EPS)[0], rms_norm(last, weight, EPS)[0]
    assert torch.equal(normed[-3:], few)
    d_normed = draw(1, C, dtype=torch.bfloat16, seed=5)
    (got,) = torch.autograd.grad(normed, hidden_states, d_normed.expand_as(normed))
    (want,) = torch.autograd.grad(few, last, d_normed.expand_as(few))
    assert torch.equal(got[-3:], want)
