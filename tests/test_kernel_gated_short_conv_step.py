# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The fused step of the gated short convolution against the sum over its taps in float64.

Plain PyTorch is the model's own convolution, token by token. Without a GPU the kernel runs in Triton's interpreter.
"""

import os
from unittest import mock

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
)

from based_kernels import gated_short_conv_step
from transformers_based.modeling_based import BasedGatedConv1d


def make(B, T, C, K, dtype, seed=0):
    """projected [B, T, 2C], weight [C, K], state [B, K - 1, C]."""
    return (
        draw(B, T, 2 * C, dtype=dtype, seed=seed),
        draw(C, K, dtype=dtype, seed=seed + 1),
        draw(B, K - 1, C, dtype=dtype, seed=seed + 2),
    )


def oracle(projected, weight, state):
    """All tokens of rows without gaps, in float64."""
    u, g = projected.double().chunk(2, -1)
    u = torch.cat([state.double(), u], 1)
    c = torch.einsum("btck,ck->btc", u.unfold(1, weight.shape[1], 1), weight.double())
    return c * torch.sigmoid(c) * g


def plain(projected, weight, state):
    conv = BasedGatedConv1d(*weight.shape).to(DEVICE, weight.dtype)
    outputs = []
    with torch.no_grad(), mock.patch.dict(os.environ, TRANSFORMERS_BASED_BACKEND="torch"):
        conv.weight.copy_(weight[:, None])
        for token in projected.split(1, 1):
            output, state = conv(token, state)
            outputs.append(output)
    return torch.cat(outputs, 1)


def run(projected, weight, state, mask=None):
    """Token by token; the state is changed."""
    masks = [None] * projected.shape[1] if mask is None else mask.split(1, 1)
    steps = [gated_short_conv_step(x, weight, state, mask=m) for x, m in zip(projected.split(1, 1), masks)]
    assert all(x.is_contiguous() for x in steps)
    return torch.cat(steps, 1)


def last_inputs(projected, state):
    u = projected[..., : projected.shape[2] // 2]
    return torch.cat([state, u], 1)[:, u.shape[1] :]


def compare(projected, weight, state):
    ours, before = state.clone(), state.clone()
    output = run(projected, weight, ours)
    assert_exact(output, plain(projected, weight, state), oracle(projected, weight, state))
    assert torch.equal(ours, last_inputs(projected, before))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "C", "K"), [(2, 24, 3), (1, 80, 2), (2, 80, 8), (1, 600, 4), (3, 7, 3)])
def test_steps_are_the_sequence(monkeypatch, B, C, K, dtype):
    inputs = make(B, K + 3, C, K, dtype)
    poison_outputs(monkeypatch)
    compare(*inputs)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_finished_rows_change_nothing(kind):
    """Rows that finish at different times, one that never was, one with a gap."""
    projected, weight, state = make(5, 7, 24, 3, torch.float32)
    exists = torch.arange(7, device=DEVICE) < torch.tensor([[7], [4], [1], [0], [7]], device=DEVICE)
    exists[4, 2:4] = False
    projected[~exists] = float("nan")
    before = state.clone()
    output = run(projected, weight, state, exists.to(kind))
    assert not output[~exists].any()
    for row in range(5):
        tokens, start = projected[row : row + 1, exists[row]], before[row : row + 1]
        assert torch.equal(state[row : row + 1], last_inputs(tokens, start))
        if tokens.shape[1]:
            want = oracle(tokens, weight, start)
            assert_exact(output[row : row + 1, exists[row]], plain(tokens, weight, start), want)


def test_a_mask_of_ones_is_none():
    projected, weight, state = make(2, 4, 24, 3, torch.bfloat16)
    twin = state.clone()
    want = run(projected, weight, state)
    assert torch.equal(run(projected, weight, twin, torch.ones(2, 4, device=DEVICE).T.contiguous().T), want)
    assert torch.equal(state, twin)


def test_strides_of_any_kind():
    projected, weight, state = make(2, 1, 24, 3, torch.float32)
    ended = state.clone()
    want = gated_short_conv_step(projected, weight, ended)
    odd = torch.nn.functional.pad(projected, (3, 2))[..., 3:-2]
    swapped = projected.transpose(0, 2).contiguous().transpose(0, 2)
    for x in (odd, swapped):
        for y in (weight, weight.T.contiguous().T):
            twin = state.clone()
            assert torch.equal(gated_short_conv_step(x, y, twin), want)
            assert torch.equal(twin, ended)
    twin = state.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(gated_short_conv_step(projected, weight, twin), want)
    assert torch.equal(twin, ended)
    # one row for all, read with stride 0
    one = projected[:1].expand(2, 1, -1)
    want = gated_short_conv_step(one.contiguous(), weight, state.clone())
    assert torch.equal(gated_short_conv_step(one, weight, state), want)


@pytest.mark.parametrize("left", [8, 3])
def test_state_is_a_part_of_a_larger_one(left):
    projected, weight, state = make(2, 1, 24, 3, torch.float32)
    pool = torch.full((4, 4, 40), 7.0, device=DEVICE)
    part = pool[1:3, 1:3, left : left + 24]
    part.copy_(state)
    want = gated_short_conv_step(projected, weight, state)
    assert torch.equal(gated_short_conv_step(projected, weight, part), want)
    assert torch.equal(part, state)
    part.fill_(7)
    assert (pool == 7).all()


def test_weight_of_another_dtype():
    projected, _, state = make(2, 1, 24, 3, torch.bfloat16)
    weight = draw(24, 3, seed=5)
    want = oracle(projected, weight, state)
    assert_exact(gated_short_conv_step(projected, weight, state.clone()), want.bfloat16(), want)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_at_its_two_ends():
    """e^-x overflows on one side, and the result is still a number; each value is its own root mean square."""
    projected, weight, state = make(1, 1, 24, 2, torch.float32)
    state.fill_(0)
    weight.fill_(1)
    projected[..., :24] = torch.tensor([-1e4, -80, -8, -1e-20, 0, 1e-20, 80, 1e30], device=DEVICE).repeat(3)
    projected[..., 24:] = 1
    output, want = gated_short_conv_step(projected, weight, state), oracle(projected, weight, torch.zeros_like(state))
    torch.testing.assert_close(output.double(), want, rtol=1e-6, atol=1e-30)


def bad_calls():
    def replace(**changes):
        def call():
            projected, weight, state = make(2, 1, 24, 3, torch.float32)
            arguments = {"projected": projected, "weight": weight, "state": state}
            arguments.update({name: change(arguments.get(name)) for name, change in changes.items()})
            return gated_short_conv_step(**arguments)

        return call

    return [
        ("projected", TypeError, "float32 or float16 or bfloat16", replace(projected=lambda x: x.double())),
        ("projected", TypeError, "a tensor", replace(projected=lambda x: None)),
        ("projected", ValueError, r"\[batch, 1, 2 \* channels\]", replace(projected=lambda x: x[..., :47])),
        ("projected", ValueError, r"\[batch, 1, 2 \* channels\]", replace(projected=lambda x: x[:, 0])),
        ("projected", ValueError, r"\[batch, 1, 2 \* channels\]", replace(projected=lambda x: x[:0])),
        ("projected", ValueError, "exactly 1", replace(projected=lambda x: x.repeat(1, 2, 1))),
        ("weight", TypeError, "float32", replace(weight=lambda x: x.long())),
        ("weight", ValueError, "K from 2 to 8", replace(weight=lambda x: x[:, :1])),
        ("weight", ValueError, "K from 2 to 8", replace(weight=lambda x: x[:, None])),
        ("weight", ValueError, "K from 2 to 8", replace(weight=lambda x: x.repeat(1, 3))),
        ("weight", ValueError, r"\[24, K\]", replace(weight=lambda x: x[:8])),
        ("state", TypeError, "float32 fits", replace(state=lambda x: x.half())),
        ("state", TypeError, "a tensor", replace(state=lambda x: None)),
        ("state", ValueError, r"\[2, 2, 24\]", replace(state=lambda x: x[:, :1])),
        ("state", ValueError, "contiguous last", replace(state=lambda x: x.mT.contiguous().mT)),
        ("state", ValueError, "row of its own", replace(state=lambda x: x[:1].expand(2, 2, 24))),
        ("mask", TypeError, "a tensor", replace(mask=lambda x: [1, 1])),
        ("mask", ValueError, r"\[2, 1\]", replace(mask=lambda x: torch.ones(2, device=DEVICE))),
    ]


@pytest.mark.parametrize(("name", "error", "fix", "call"), bad_calls())
def test_errors_name_the_argument_and_the_fix(name, error, fix, call):
    with pytest.raises(error, match=rf"^{name}: got .*({fix})"):
        call()


@pytest.mark.parametrize("name", ["projected", "weight", "state"])
def test_forward_only(name):
    inputs = dict(zip(("projected", "weight", "state"), make(1, 1, 8, 2, torch.float32)))
    assert_refuses_gradients(lambda: gated_short_conv_step(**inputs), name, inputs[name])


# The 1.3B shape.
C, K = 3584, 3


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 3, 128])
def test_gpu_model_size(monkeypatch, B, dtype):
    inputs = make(B, 5, C, K, dtype)
    poison_outputs(monkeypatch)
    compare(*inputs)


@on_gpu
@pytest.mark.parametrize(("C", "K"), [(24, 2), (7, 8), (1000, 5), (513, 3)])
def test_gpu_sizes(C, K):
    compare(*make(3, 9, C, K, torch.bfloat16))


@on_gpu
def test_gpu_repeats_bit_by_bit():
    projected, weight, state = make(128, 4, C, K, torch.bfloat16)
    first = run(projected, weight, state.clone())
    assert all(torch.equal(run(projected, weight, state.clone()), first) for _ in range(20))


@on_gpu
@pytest.mark.parametrize("B", [1, 128])
def test_gpu_cuda_graph(B):
    projected, weight, state = make(B, 1, C, K, torch.bfloat16)
    mask = torch.arange(B, device=DEVICE)[:, None] % 3 != 1
    assert_graph_replays(lambda: gated_short_conv_step(projected, weight, state, mask=mask), state)


@on_gpu
def test_gpu_compiles_whole():
    projected, weight, state = make(3, 1, C, K, torch.bfloat16)
    mask = torch.tensor([[1], [0], [1]], device=DEVICE)
    for m in (None, mask):
        assert_compiles_whole(
            lambda x, w, s, m=m: gated_short_conv_step(x * 1.5, w, s, mask=m), projected, weight, state, changed=[state]
        )


@on_gpu
def test_gpu_new_batches_compile_nothing():
    def call(B):
        projected, weight, state = make(B, 1, C, K, torch.bfloat16)
        gated_short_conv_step(projected, weight, state)
        gated_short_conv_step(projected, weight, state, mask=torch.ones(B, 1, device=DEVICE))

    assert_compiles_nothing_new(call, [1, 2, 3, 16, 17, 128])
