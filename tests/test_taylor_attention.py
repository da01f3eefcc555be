# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Taylor attention in plain PyTorch against the quadratic form in fp64, and the choice of a backend."""

import inspect
import logging
import subprocess
import sys

import pytest
import torch

from transformers_based import backend
from transformers_based import taylor_attention as attention_op
from transformers_based import taylor_attention_step as step_op
from transformers_based.backend import BACKEND_VARIABLE, _logged
from transformers_based.taylor_attention import (
    _choose_backend,
    num_features,
    state_shape,
    taylor_state,
)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")


def quadratic(query, key, value, scale=None, mask=None):
    """Every weight of every pair, in the dtype of the inputs."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    weights = (1 + scores + scores**2 / 2).tril()
    if mask is not None:
        weights = weights * mask[:, None, None, :]
    total = weights.sum(-1).transpose(1, 2)[..., None]
    output = torch.einsum("bhij,bjhv->bihv", weights, value) / total.where(total != 0, 1)
    return output if mask is None else output.masked_fill(~mask[:, :, None, None].bool(), 0)


def key_features(key, scale):
    """One feature for each pair a <= b of [key sqrt(scale), 1], in the order of the state's columns."""
    extended = torch.cat([key * scale**0.5, torch.ones_like(key[..., :1])], dim=-1)
    size = extended.shape[-1]
    pairs = [extended[..., a] * extended[..., b] for a in range(size) for b in range(a, size)]
    features = torch.stack(pairs, dim=-1)
    return torch.nn.functional.pad(features, (0, num_features(key.shape[-1]) - len(pairs)))


def quadratic_state(key, value, scale=None):
    scale = key.shape[-1] ** -0.5 if scale is None else scale
    extended = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    return torch.einsum("bjhv,bjhf->bhvf", extended, key_features(key, scale))


def make(batch, length, heads, feature_dim, head_dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads)
    query, key = torch.randn(2, *shape, feature_dim, generator=generator).to(dtype)
    value = torch.randn(*shape, head_dim, generator=generator).to(dtype)
    return query, key, value


def error(ours, exact):
    return (ours.double() - exact).abs().max().item()


SIZES = [
    (1, 1, 1, 8, 48),
    (2, 2, 2, 16, 80),
    (1, 63, 2, 24, 112),
    (2, 127, 1, 5, 7),
    (1, 128, 3, 16, 48),
    (2, 129, 2, 8, 80),
    (1, 300, 2, 16, 112),
    (1, 300, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_state_and_gradients(size, dtype):
    """No worse than the quadratic form in the same dtype."""
    inputs = make(*size, dtype=dtype)
    weight = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(9)).to(dtype)

    def run(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = function(*leaves)
        (output * weight.to(dtype)).sum().backward()
        return output.detach(), *(x.grad for x in leaves)

    exact, plain = run(quadratic, torch.float64), run(quadratic, dtype)
    ours = run(lambda *x: attention_op(*x)[0], dtype)
    for name, a, b, c in zip(["output", "query", "key", "value"], ours, plain, exact):
        assert a.dtype == dtype
        assert c.abs().max() > 0 or (size[1] == 1 and name in ("query", "key"))  # one key: always weight 1
        largest = max(c.abs().max().item(), 1.0)
        assert error(a, c) <= error(b, c) + 4 * EPSILON[dtype] * largest, name

    _, state = attention_op(*inputs, output_final_state=True)
    exact_state = quadratic_state(inputs[1].double(), inputs[2].double())
    assert state.dtype == torch.float32
    assert error(state, exact_state) <= 1e-6 * size[1] * exact_state.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 130])
def test_initial_state(length, dtype):
    """Output, final state and all gradients, that of the initial state included, against one long sequence in fp64."""
    query, key, value = make(2, 40 + length, 2, 16, 48, dtype)
    exact_inputs = [x.double().requires_grad_() for x in (query, key, value)]
    exact_output = quadratic(*exact_inputs)[:, 40:]
    exact_state = quadratic_state(exact_inputs[1], exact_inputs[2])
    state_weight = torch.randn(exact_state.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 50
    (exact_output.sin().sum() + (exact_state * state_weight).sum()).backward()

    early_key = key[:, :40].double().requires_grad_()
    early_value = value[:, :40].double().requires_grad_()
    initial_state = quadratic_state(early_key, early_value).float()
    leaves = [x[:, 40:].clone().requires_grad_() for x in (query, key, value)]
    output, state = attention_op(*leaves, initial_state=initial_state, output_final_state=True)
    (output.double().sin().sum() + (state.double() * state_weight).sum()).backward()

    tolerance = 100 * EPSILON[dtype]
    assert state.dtype == torch.float32
    torch.testing.assert_close(output.double(), exact_output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state.double(), exact_state, atol=1e-4, rtol=1e-4)
    for leaf, exact in zip(leaves, exact_inputs):
        torch.testing.assert_close(leaf.grad.double(), exact.grad[:, 40:], atol=tolerance, rtol=tolerance)
    # What flows through the initial state is the gradient of the tokens before it.
    early_tolerance = max(tolerance / 10, 1e-4)
    for early, exact in ((early_key, exact_inputs[1]), (early_value, exact_inputs[2])):
        assert exact.grad[:, :40].abs().max() > 100 * early_tolerance or dtype != torch.float32
        torch.testing.assert_close(early.grad, exact.grad[:, :40], atol=early_tolerance, rtol=early_tolerance)


def test_initial_state_is_not_changed():
    query, key, value = make(1, 200, 2, 8, 16)
    state = quadratic_state(key, value)
    before = state.clone()
    attention_op(query, key, value, initial_state=state, output_final_state=True)
    assert torch.equal(state, before)


def test_fp64_accumulates_in_fp64():
    inputs = make(1, 260, 2, 16, 48, torch.float64)
    output, state = attention_op(*inputs, output_final_state=True)
    assert output.dtype == state.dtype == torch.float64
    assert error(output, quadratic(*inputs)) < 1e-12
    assert error(state, quadratic_state(*inputs[1:])) < 1e-11
    generator_inputs = [x.requires_grad_() for x in make(1, 4, 1, 3, 2, torch.float64)]
    initial = torch.rand(state_shape(1, 1, 3, 2), dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda q, k, v, s: attention_op(q, k, v, initial_state=s + 1, output_final_state=True),
        (*generator_inputs, initial),
    )


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_scale(scale):
    query, key, value = make(2, 140, 2, 16, 32)
    output, state = attention_op(query, key, value, scale=scale, output_final_state=True)
    exact = quadratic(query.double(), key.double(), value.double(), scale=scale)
    assert error(output, exact) < 1e-5
    assert error(output, quadratic(query.double(), key.double(), value.double())) > 0.1
    step = step_op(query[:, -1:], key[:, -1:], value[:, -1:], attention_op_state(query, key, value, scale), scale=scale)
    assert error(step[:, 0], exact[:, -1]) < 1e-5
    assert error(state, quadratic_state(key.double(), value.double(), scale)) < 1e-3


def attention_op_state(query, key, value, scale=None):
    """The state before the last token."""
    return attention_op(query[:, :-1], key[:, :-1], value[:, :-1], scale=scale, output_final_state=True)[1]


def test_strided_and_expanded_inputs():
    """Views of a fused projection, a transposed layout, one key head for all: as for contiguous copies."""
    fused = torch.randn(2, 150, 3, 2 * 16 + 48)
    query, key, value = fused.split([16, 16, 48], dim=-1)
    transposed = torch.randn(2, 3, 150, 16).transpose(1, 2)
    shared = torch.randn(2, 150, 1, 16).expand(-1, -1, 3, -1)
    for q, k in ((query, key), (transposed, key), (query, shared)):
        assert not (q.is_contiguous() and k.is_contiguous())
        output, state = attention_op(q, k, value, output_final_state=True)
        copies = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, value)]
        expected, expected_state = attention_op(*copies, output_final_state=True)
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(state, expected_state, atol=1e-4, rtol=1e-6)
        assert error(output, quadratic(*(x.double() for x in copies))) < 1e-5


def test_strided_and_expanded_gradients():
    """Gradients to a fused projection, to an expanded key, and from an expanded output gradient."""
    fused = torch.randn(1, 140, 2, 2 * 8 + 16, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(1, 140, 1, 8, dtype=torch.float64, requires_grad=True)

    def gradients(function, dtype):
        query, key, value = fused.to(dtype).split([8, 8, 16], dim=-1)
        output = function(query, key + shared.to(dtype).expand(-1, -1, 2, -1), value)
        return torch.autograd.grad(output.sum(), (fused, shared))  # the gradient of `sum` is expanded

    exact = gradients(quadratic, torch.float64)
    ours = gradients(lambda *x: attention_op(*x)[0], torch.float32)
    for a, b in zip(ours, exact):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


MASKS = {
    "left": lambda n: torch.arange(n) >= n // 3,
    "right": lambda n: torch.arange(n) < n // 2,
    "middle": lambda n: (torch.arange(n) < n // 3) | (torch.arange(n) > n // 2),
    "scattered": lambda n: torch.arange(n) % 3 == 1,
}


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("length", [9, 300])
def test_mask(length, where, mask_dtype):
    """One masked row, one whole, one empty; NaN under the mask reaches neither outputs, state nor gradients."""
    inputs = make(3, length, 2, 16, 24)
    mask = torch.stack([MASKS[where](length), torch.ones(length).bool(), torch.zeros(length).bool()])
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    exact = quadratic(*exact_inputs, mask=mask)
    exact[mask].sin().sum().backward()

    leaves = [x.masked_fill(~mask[..., None, None], float("nan")).requires_grad_() for x in inputs]
    output, state = attention_op(*leaves, mask=mask.to(mask_dtype), output_final_state=True)
    assert not output[~mask].any()
    assert not state[2].any()
    assert error(output.detach(), exact.detach()) < 1e-5
    kept_key, kept_value = (x[0, mask[0]][None].double() for x in inputs[1:])
    torch.testing.assert_close(state[0].double(), quadratic_state(kept_key, kept_value)[0], atol=1e-4, rtol=1e-4)
    output.sin().sum().backward()
    for leaf, exact_leaf in zip(leaves, exact_inputs):
        assert not leaf.grad[~mask].any()
        torch.testing.assert_close(leaf.grad.double(), exact_leaf.grad, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_documents(dtype, masked):
    """Equal, to the bit, to separate calls: outputs, states, gradients. One document is a single token."""
    lengths = [3, 1, 200, 128, 1, 40]
    inputs = make(1, sum(lengths), 2, 16, 24, dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    mask = torch.rand(1, sum(lengths)) > 0.3 if masked else None
    initial = torch.randn(state_shape(6, 2, 16, 24)).abs()

    def run(packed):
        leaves = [x.clone().requires_grad_() for x in (*inputs, initial)]
        if packed:
            output, state = attention_op(
                *leaves[:3], mask=mask, cu_seqlens=cu_seqlens, initial_state=leaves[3], output_final_state=True
            )
        else:
            pieces = []
            for i, part in enumerate(torch.arange(sum(lengths)).split(lengths)):
                pieces.append(
                    attention_op(
                        *(x[:, part] for x in leaves[:3]),
                        mask=None if mask is None else mask[:, part],
                        initial_state=leaves[3][i : i + 1],
                        output_final_state=True,
                    )
                )
            output, state = (torch.cat(x, dim=d) for x, d in zip(zip(*pieces), (1, 0)))
        (output.float().sin().sum() + state.sin().sum()).backward()
        return output, state, *(x.grad for x in leaves)

    packed, separate = run(True), run(False)
    assert all(x.abs().max() > 0 for x in separate)
    assert all(torch.equal(a, b) for a, b in zip(packed, separate))
    # Without any state too, and against fp64.
    output, state = attention_op(*inputs, cu_seqlens=cu_seqlens)
    assert state is None
    exact = torch.cat(
        [quadratic(*x) for x in zip(*(x.double().split(lengths, dim=1) for x in inputs))],
        dim=1,
    )
    assert error(output, exact) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_and_steps_equal_the_whole(dtype):
    """The state carries everything: any split, down to single tokens, and a masked token in between."""
    query, key, value = make(2, 270, 2, 16, 48, dtype)
    mask = torch.rand(2, 270, generator=torch.Generator().manual_seed(1)) > 0.2
    whole, final = attention_op(query, key, value, mask=mask, output_final_state=True)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * EPSILON[dtype]
    for lengths in ([100, 170], [1, 128, 141], [129, 5, 136], [250, *[1] * 20]):
        state, outputs = None, []
        for q, k, v, m in zip(*(x.split(lengths, dim=1) for x in (query, key, value, mask))):
            if q.shape[1] == 1 and state is not None:
                address = state.data_ptr()
                outputs.append(step_op(q, k, v, state, mask=m))
                assert state.data_ptr() == address
            else:
                output, state = attention_op(q, k, v, mask=m, initial_state=state, output_final_state=True)
                outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(state, final, atol=1e-3, rtol=1e-4)


def test_step_from_zeros():
    """Steps only, from a state of zeros, against fp64."""
    query, key, value = make(2, 30, 2, 5, 7)
    state = torch.zeros(state_shape(2, 2, 5, 7))
    parts = zip(*(x.split(1, dim=1) for x in (query, key, value)))
    output = torch.cat([step_op(q, k, v, state) for q, k, v in parts], dim=1)
    assert error(output, quadratic(query.double(), key.double(), value.double())) < 1e-5
    assert error(state, quadratic_state(key.double(), value.double())) < 1e-4


def test_step_mask():
    """A row with 0 neither changes nor reads its state, NaN or not; the other rows do not notice."""
    query, key, value = make(2, 21, 2, 16, 24)
    _, state = attention_op(query[:, :20], key[:, :20], value[:, :20], output_final_state=True)
    before, expected_state = state.clone(), state.clone()
    expected = step_op(query[:, 20:], key[:, 20:], value[:, 20:], expected_state)
    step = [x[:, 20:].clone() for x in (query, key, value)]
    for x in step:
        x[0] = float("nan")
    for mask in (torch.tensor([[0], [1]]), torch.tensor([[False], [True]])):
        state = before.clone()
        output = step_op(*step, state, mask=mask)
        assert torch.equal(state[0], before[0])
        assert not output[0].any()
        torch.testing.assert_close(state[1], expected_state[1])
        torch.testing.assert_close(output[1], expected[1])
        assert not torch.equal(state[1], before[1])


def test_fp16_extremes():
    """The largest fp16 queries and keys: fp32 inside, so no overflow, forward and backward."""
    query, key, value = make(1, 150, 2, 16, 24, torch.float16)
    query, key = query.sign() * 6e4, key.sign() * 6e4
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output, state = attention_op(*leaves, output_final_state=True)
    output.float().square().sum().backward()
    exact = quadratic(*(x.detach().double() for x in leaves))
    assert state.isfinite().all()
    assert error(output.detach(), exact) < 0.01
    assert all(x.grad.isfinite().all() for x in leaves)
    state = state.detach()
    step = step_op(query[:, :1], key[:, :1], value[:, :1], state)
    assert step.isfinite().all()
    assert step.any()


def test_autocast_leaves_the_state_in_fp32():
    inputs = make(1, 300, 2, 16, 24)
    expected, expected_state = attention_op(*inputs, output_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = attention_op(*inputs, output_final_state=True)
        stepped = state.clone()
        step = step_op(*(x[:, -1:] for x in inputs), stepped)
    assert torch.equal(output, expected)
    assert state.dtype == stepped.dtype == torch.float32
    assert torch.equal(state, expected_state)
    reference_state = expected_state.clone()
    assert torch.equal(step, step_op(*(x[:, -1:] for x in inputs), reference_state))
    assert torch.equal(stepped, reference_state)


@pytest.mark.parametrize("feature_dim", [1, 5, 8, 16, 24])
def test_number_of_features(feature_dim):
    """(D + 1)(D + 2) / 2 of them, 153 for 16; what pads them to a multiple of 8 stays 0."""
    pairs = {1: 3, 5: 21, 8: 45, 16: 153, 24: 325}[feature_dim]
    assert num_features(feature_dim) == -(-pairs // 8) * 8
    _, key, value = make(2, 400, 1, feature_dim, 4)
    _, state = attention_op(key, key, value, output_final_state=True)
    assert state.shape == state_shape(2, 1, feature_dim, 4) == (2, 1, 5, num_features(feature_dim))
    # Of the paper's features, 1, x and x x^T.
    if feature_dim >= 16:
        assert state.shape[-1] <= 0.65 * (1 + feature_dim + feature_dim**2)
    assert state[..., :pairs].abs().amin(dim=-2).min() > 0
    assert not state[..., pairs:].any()


def test_state_without_output():
    """`taylor_state` is the final state of `taylor_attention`, from nothing or from a state."""
    query, key, value = make(2, 300, 2, 16, 24)
    mask = torch.rand(2, 300) > 0.2
    _, half = attention_op(query[:, :140], key[:, :140], value[:, :140], mask=mask[:, :140], output_final_state=True)
    _, final = attention_op(query, key, value, mask=mask, output_final_state=True)
    for start, state in ((0, None), (140, half)):
        folded = taylor_state(state, key[:, start:], value[:, start:], mask[:, start:], 16**-0.5)
        torch.testing.assert_close(folded, final, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 64])
def test_memory_is_linear(tensor_log, head_dim):
    """Forward and backward create no [T, T] and no [T, F, V]: the largest tensor grows no faster than T."""
    heads, feature_dim, largest = 2, 16, {}
    for length in (2048, 4096):
        leaves = [x.requires_grad_() for x in make(1, length, heads, feature_dim, head_dim)]
        with tensor_log() as log:
            output, _ = attention_op(*leaves, output_final_state=True)
            output.sum().backward()
        largest[length] = log.largest
        assert all(x.grad is not None for x in leaves)
        assert log.largest <= length * heads * 128
    assert largest[4096] <= 2 * largest[2048]


def test_long_sequence_keeps_little_for_backward():
    """What the graph keeps between forward and backward is a state a chunk, not the features or weights of a token."""
    kept = {}
    for length in (1024, 2048):
        leaves = [x.requires_grad_() for x in make(1, length, 1, 16, 64)]
        seen = set()

        def pack(x, seen=seen):
            seen.add((x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output, _ = attention_op(*leaves)
        kept[length] = sum(size for _, size in seen) / 4
        del output
        # A chunk of 128 tokens: its inputs (96 + 1 numbers a token), weights and features would be 288 more a token.
        assert kept[length] <= length * 288
    assert kept[2048] <= 2.2 * kept[1024]


GOOD = {"query": (2, 4, 2, 8), "key": (2, 4, 2, 8), "value": (2, 4, 2, 16)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", {"query": torch.zeros(2, 4, 8)}),
        ("query", {name: torch.zeros(2, 0, *shape[2:]) for name, shape in GOOD.items()}),
        ("key", {"key": torch.zeros(2, 4, 1, 8)}),
        ("key", {"key": torch.zeros(2, 5, 2, 8)}),
        ("value", {"value": torch.zeros(2, 4, 3, 16)}),
        ("value", {"value": torch.zeros(2, 4, 16)}),
        ("value", {"value": torch.zeros(2, 4, 2, 16, dtype=torch.float16)}),
        ("query", {name: torch.zeros(shape, dtype=torch.long) for name, shape in GOOD.items()}),
        ("scale", {"scale": 0.0}),
        ("scale", {"scale": -1.0}),
        ("scale", {"scale": float("nan")}),
        ("mask", {"mask": torch.ones(2, 5)}),
        ("mask", {"mask": torch.ones(2, 4, 1)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4])}),
        ("initial_state", {"initial_state": torch.zeros(2, 2, 16, 48)}),
        ("initial_state", {"initial_state": torch.zeros(1, 2, 17, 48)}),
        ("initial_state", {"initial_state": torch.zeros(2, 2, 17, 48, dtype=torch.bfloat16)}),
    ],
)
def test_errors_name_the_argument(name, change):
    arguments = {name: torch.zeros(shape) for name, shape in GOOD.items()} | change
    with pytest.raises(ValueError, match=f"`{name}`"):
        attention_op(**arguments)


@pytest.mark.parametrize(
    "bounds", [[0, 2, 3], [1, 2, 4], [0, 3, 2, 4], [0, 2, 2, 4], [0, 5], [0], [[0, 4]]], ids=lambda x: str(x)
)
def test_errors_of_cu_seqlens(bounds):
    query, key, value = make(1, 4, 2, 8, 16)
    with pytest.raises(ValueError, match="`cu_seqlens`"):
        attention_op(query, key, value, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@pytest.mark.parametrize(
    ("name", "length", "state", "mask"),
    [
        ("query", 2, torch.zeros(2, 2, 17, 48), None),
        ("state", 1, torch.zeros(2, 2, 17, 45), None),
        ("state", 1, torch.zeros(2, 2, 17, 48, dtype=torch.float16), None),
        ("state", 1, torch.zeros(2, 1, 17, 48).expand(2, 2, 17, 48), None),
        ("mask", 1, torch.zeros(2, 2, 17, 48), torch.ones(2, 2)),
    ],
)
def test_step_errors_name_the_argument(name, length, state, mask):
    with pytest.raises(ValueError, match=f"`{name}`"):
        step_op(*make(2, length, 2, 8, 16), state, mask=mask)


def test_initial_states_of_packed_documents():
    """One for each document, not for each row."""
    query, key, value = make(1, 6, 2, 8, 16)
    with pytest.raises(ValueError, match="`initial_state`"):
        attention_op(
            query, key, value, cu_seqlens=torch.tensor([0, 2, 6]).int(), initial_state=torch.zeros(1, 2, 17, 48)
        )


@pytest.fixture
def log_lines(monkeypatch):
    """What the choice of a backend logs, from the first choice on."""
    logger = logging.getLogger("transformers.transformers_based.backend")
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    _logged.clear()
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
    _logged.clear()


@pytest.mark.parametrize("wanted", ["auto", "torch"])
def test_backend_on_cpu_is_logged_once_with_the_reason(monkeypatch, log_lines, wanted):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(BACKEND_VARIABLE, wanted)
    for _ in range(3):
        attention_op(*make(1, 4, 1, 8, 8))
    assert len(log_lines) == 1
    assert "plain PyTorch" in log_lines[0]
    reasons = ["on cpu", "not installed"] if wanted == "auto" else [f"{BACKEND_VARIABLE}=torch"]
    assert any(reason in log_lines[0] for reason in reasons)


def test_backend_variable_is_checked(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"{BACKEND_VARIABLE}.*'cuda'"):
        attention_op(*make(1, 4, 1, 8, 8))


def test_backend_triton_on_cpu_raises(monkeypatch):
    """Never silently something else than what was asked for."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    inputs = make(1, 1, 1, 8, 8)
    with pytest.raises(RuntimeError, match=f"{BACKEND_VARIABLE}=triton, but"):
        attention_op(*inputs)
    with pytest.raises(RuntimeError, match=f"{BACKEND_VARIABLE}=triton, but"):
        step_op(*inputs, torch.zeros(state_shape(1, 1, 8, 8)))


def test_backend_choice_with_kernels(monkeypatch, log_lines):
    """With kernels installed: fused on CUDA for what they take, else plain with the reason."""

    class Kernels:
        @staticmethod
        def is_available():
            return True

    monkeypatch.setattr(backend, "based_kernels", Kernels)
    monkeypatch.setenv(BACKEND_VARIABLE, "auto")
    assert _choose_backend("cuda", "torch.bfloat16", 16, 64) == "triton"
    assert _choose_backend("cuda", "torch.float64", 16, 64) == "torch"
    assert _choose_backend("cuda", "torch.bfloat16", 5, 64) == "torch"
    assert [("Triton" in line, "float64" in line, "feature_dim" in line) for line in log_lines] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    for name, capability, hip in (("capability 8.0", (7, 5), None), ("AMD", (9, 0), "7.0")):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
            patch.setattr(torch.version, "hip", hip)
            backend._obstacle_of_gpu.cache_clear()
            assert _choose_backend("cuda", "torch.bfloat16", 16, 64) == "torch"
        assert name in log_lines[-1]
    backend._obstacle_of_gpu.cache_clear()
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    assert _choose_backend("cuda", "torch.bfloat16", 16, 64) == "torch"
    monkeypatch.setattr(backend, "based_kernels", None)
    monkeypatch.setenv(BACKEND_VARIABLE, "auto")
    assert _choose_backend("cuda", "torch.bfloat16", 16, 64) == "torch"
    assert "not installed" in log_lines[-1]


def test_without_the_kernels_package():
    """`based_kernels` is optional."""
    code = """
import sys
sys.modules["based_kernels"] = None
import torch
from transformers_based import taylor_attention
x = torch.ones(1, 3, 1, 8)
assert torch.equal(taylor_attention(x, x, x)[0], x)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("ours", [attention_op, step_op], ids=lambda op: op.__name__)
def test_kernels_have_the_same_signature(ours):
    kernels = pytest.importorskip("based_kernels", reason="the package based_kernels is not installed")
    if not kernels.is_available():
        pytest.skip("triton is not installed, so based_kernels holds stubs")
    theirs = getattr(kernels, ours.__name__)

    def parameters(op):
        return [(p.name, p.kind, p.default) for p in inspect.signature(op).parameters.values()]

    assert parameters(ours) == parameters(theirs)
