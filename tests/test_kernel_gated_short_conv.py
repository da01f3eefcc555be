# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The fused gated short convolution, forward and backward, against the sum over its taps in float64, row by row.

Plain PyTorch is the model's own convolution. Without a GPU the kernels run in Triton's interpreter.
"""

import itertools
import os
import sys
from unittest import mock

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

from kernel_checks import (
    DEVICE,
    DTYPES,
    TOLERANCE,
    assert_compiles_nothing_new,
    assert_graph_replays,
    draw,
    on_gpu,
    rms_error,
)

from based_kernels import conv_places, gated_short_conv
from transformers_based import backend
from transformers_based.modeling_based import BasedGatedConv1d


op_module = sys.modules["based_kernels.gated_short_conv"]


def make(B, T, C, K, dtype, *, state=True, mask=None, documents=False, seed=0):
    """projected [B, T, 2C], weight [C, K], state [B, K - 1, C], mask and document_ids [B, T]; gradients throughout."""
    inputs = {
        "projected": draw(B, T, 2 * C, dtype=dtype, seed=seed),
        "weight": draw(C, K, dtype=dtype, seed=seed + 1),
        "state": draw(B, K - 1, C, dtype=dtype, seed=seed + 2) if state else None,
    }
    for x in inputs.values():
        if x is not None:
            x.requires_grad_()
    inputs["mask"] = MASKS[mask](B, T) if mask else None
    starts = draw(B, T, seed=seed + 3) > 0.3
    inputs["document_ids"] = starts.int().cumsum(1) if documents else None
    return inputs


def steps(B, T):
    return torch.arange(T, device=DEVICE).expand(B, T)


# Of the last row nothing exists, in the first nothing is hidden.
MASKS = {
    "left": lambda B, T: steps(B, T) * (B - 1) >= T * torch.arange(B, device=DEVICE)[:, None],
    "right": lambda B, T: MASKS["left"](B, T).flip(1),
    "gaps": lambda B, T: (draw(B, T, seed=9) > 0.2) & MASKS["right"](B, T),
}


def definition(projected, weight, state=None, mask=None, document_ids=None):
    """In whatever dtype comes in: each row made of the tokens that exist, behind its state."""
    (B, T, C), K = projected.shape, weight.shape[1]
    C //= 2
    outputs, states = [], []
    for b in range(B):
        tokens = torch.arange(T, device=projected.device) if mask is None else mask[b].nonzero()[:, 0]
        u, g = projected[b, tokens].split(C, -1)
        x = torch.cat([u.new_zeros(K - 1, C) if state is None else state[b], u])
        windows = x.unfold(0, K, 1) if len(tokens) else x.new_zeros(0, C, K)
        if document_ids is not None and len(tokens):
            ids = torch.nn.functional.pad(document_ids[b, tokens], (K - 1, 0), value=-1)
            windows = windows * (ids.unfold(0, K, 1) == ids[K - 1 :, None])[:, None]
        c = torch.einsum("nck,ck->nc", windows, weight)
        outputs.append(torch.zeros(T, C, dtype=c.dtype, device=c.device).index_put((tokens,), c * torch.sigmoid(c) * g))
        states.append(x[len(tokens) :])
    return torch.stack(outputs), torch.stack(states)


def plain(projected, weight, **options):
    conv = BasedGatedConv1d(*weight.shape)
    # the parameter would be another leaf
    del conv.weight
    conv.weight = weight[:, None]
    mask = options.get("mask")
    with mock.patch.dict(os.environ, TRANSFORMERS_BASED_BACKEND="torch"):
        output, state = conv(projected, **options)
    return output if mask is None else torch.where(mask[..., None], output, 0), state


def ours(projected, weight, **options):
    return gated_short_conv(projected, weight, **options, output_final_state=True)


def run(function, inputs, dtype=None, wanted=("projected", "weight", "state")):
    """Output, final state and the gradients that are wanted, by name."""
    inputs = dict(inputs)
    leaves = {}
    for name in ("projected", "weight", "state"):
        x = inputs[name]
        if x is not None:
            x = inputs[name] = x.detach().to(dtype or x.dtype).requires_grad_(name in wanted)
            if name in wanted:
                leaves[name] = x
    outputs = function(**inputs)
    # of plain PyTorch, the final state depends on no weight
    differentiable = [x for x in outputs if x.requires_grad]
    gradients = [draw(*x.shape, seed=20 + i).to(x.dtype) for i, x in enumerate(differentiable)]
    found = torch.autograd.grad(differentiable, leaves.values(), gradients)
    return dict(zip(["output", "final state"], outputs)) | dict(zip(leaves, found))


def poison(monkeypatch):
    """Buffers that kernels write start as NaN."""
    empty = torch.empty
    monkeypatch.setattr(op_module.torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def compare(inputs, **options):
    results = [run(function, inputs, **options) for function in (ours, plain)]
    want = run(definition, inputs, dtype=torch.float64, **options)
    assert [list(x) for x in results] == [list(want)] * 2
    for name, exact in want.items():
        got, other = (result[name] for result in results)
        dtype = inputs["projected" if name in ("output", "final state") else name].dtype
        assert got.dtype == other.dtype == dtype, name
        assert got.shape == exact.shape, name
        assert torch.isfinite(got).all(), name
        if name == "final state":
            assert torch.equal(got.double(), exact), name
        elif exact.any():
            error, allowed = rms_error(got, exact), rms_error(other, exact) + TOLERANCE[dtype]
            assert error <= allowed < 0.1, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        else:
            assert not got.any(), name
    return results[0]


def in_segments_of(monkeypatch, length):
    """Cut rows into segments of `length` inputs, as long rows are."""
    monkeypatch.setattr(op_module, "_segment_length", lambda *args: length)


@pytest.fixture
def poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "C", "K"), [(2, 11, 24, 3), (1, 1, 7, 2), (1, 9, 520, 4), (1, 10, 9, 8)])
def test_sizes_and_dtypes(B, T, C, K, dtype):
    compare(make(B, T, C, K, dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("state", [False, True], ids=["", "state"])
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_options(mask, state, documents):
    compare(make(3, 6, 8, 3, torch.float32, mask=mask, state=state, documents=documents))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("T", "K"), [(1, 4), (3, 8)])
def test_fewer_tokens_than_taps(T, K):
    """The final state then has rows of the first one."""
    for mask in (None, "gaps"):
        compare(make(2, T, 8, K, torch.float32, mask=mask))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("length", [8, 64])
@pytest.mark.parametrize("mask", [None, "gaps"])
def test_segments(mask, length, monkeypatch):
    """A segment of one block of tokens, and one of several; the taps reach over the bounds of both."""
    in_segments_of(monkeypatch, length)
    compare(make(2, 19, 8, 3, torch.float32, mask=mask))


def test_weight_gradient_of_many_segments(monkeypatch):
    """More shares than its kernel takes at once."""
    monkeypatch.setattr(op_module, "_BLOCK_R", 2)
    in_segments_of(monkeypatch, 4)
    compare(make(1, 21, 40, 2, torch.float32, state=False), wanted=["weight"])


def test_a_tap_reaches_no_document_of_another_number():
    """Also where the same number comes back."""
    inputs = make(1, 7, 8, 4, torch.float32)
    inputs["document_ids"] = torch.tensor([[0, 1, 0, 0, 1, 1, 0]], device=DEVICE)
    compare(inputs)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_what_does_not_exist_is_not_looked_at(kind):
    inputs = make(2, 8, 8, 3, torch.float32, mask="gaps")
    hidden = ~inputs["mask"]
    want = run(ours, inputs)
    with torch.no_grad():
        inputs["projected"][hidden] = float("nan")
    inputs["mask"] = inputs["mask"].to(kind)
    got = run(ours, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not got["output"][hidden].any()
    assert not got["projected"][hidden].any()


def test_places_stand_for_the_mask():
    inputs = make(3, 9, 8, 4, torch.float32, mask="gaps")
    want = run(ours, inputs)
    places = conv_places(inputs.pop("mask"), 4)
    assert places.dtype == torch.int32
    # strided, as a part of something larger is
    inputs["places"] = places.T.contiguous().T
    got = run(ours, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_mask_of_ones_is_none():
    inputs = make(2, 7, 8, 3, torch.bfloat16)
    want = run(ours, inputs)
    got = run(ours, {**inputs, "mask": torch.ones(2, 7, device=DEVICE)})
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_two_halves_with_a_state_are_the_whole():
    inputs = make(2, 9, 8, 3, torch.float32)
    projected, weight, state = (inputs[name] for name in ("projected", "weight", "state"))

    def halves(projected, weight, state, **_):
        first, state = ours(projected[:, :4], weight, state=state)
        second, state = ours(projected[:, 4:], weight, state=state)
        return torch.cat([first, second], 1), state

    want, got = (run(f, {"projected": projected, "weight": weight, "state": state}) for f in (ours, halves))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


def test_strides_of_any_kind():
    """Views, transposed and expanded ones, as inputs and as gradients of the output."""
    inputs = make(2, 5, 8, 3, torch.float32)
    projected, weight, state = (inputs[name].detach() for name in ("projected", "weight", "state"))
    swapped = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (projected, weight, state)]
    odd = torch.nn.functional.pad(projected, (3, 2))[..., 3:-2], weight, state
    one = [projected[:1].expand(2, -1, -1), weight, state[:1].expand(2, -1, -1)]
    steps = [projected[:, :1].expand(-1, 5, -1), weight, state]
    for some in (swapped, odd, one, steps):
        results = []
        for x in (some, [x.contiguous() for x in some]):
            leaves = [y.detach().requires_grad_() for y in x]
            output, final = ours(leaves[0], leaves[1], state=leaves[2])
            # expanded to stride 0, or transposed
            d_output = [torch.ones_like(output), draw(5, 2, 8).transpose(0, 1)]
            if x is some:
                d_output[0] = torch.ones((), device=DEVICE).expand_as(output)
            else:
                d_output[1] = d_output[1].contiguous()
            gradients = [torch.autograd.grad(output, leaves, d, retain_graph=True) for d in d_output]
            results.append([output, final, *itertools.chain(*gradients)])
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("wanted", [["projected"], ["weight"], ["state"], ["projected", "weight"]])
def test_only_some_gradients(wanted):
    compare(make(2, 6, 8, 3, torch.float32, mask="gaps"), wanted=wanted)


def test_a_frozen_weight_costs_nothing(monkeypatch):
    """No memory is taken for a gradient that nobody wants, and no kernel launched."""
    inputs = make(1, 5, 8, 3, torch.float32, state=False)
    inputs["weight"].requires_grad_(False)
    output, _ = gated_short_conv(**inputs)
    monkeypatch.setattr(op_module, "_gated_short_conv_weight_kernel", None)
    made, empty = [], torch.empty
    monkeypatch.setattr(op_module.torch, "empty", lambda *a, **k: made.append(1) or empty(*a, **k))
    output.sum().backward()
    assert len(made) == 1


def test_second_derivative_is_refused():
    inputs = make(1, 3, 8, 2, torch.float32)
    output, _ = ours(**inputs)
    with pytest.raises(RuntimeError, match=r"^gated_short_conv: got create_graph=True"):
        torch.autograd.grad(output.sum(), inputs["projected"], create_graph=True)


def test_autocast_follows_the_plain_path():
    """Under autocast the projection is half, the weight is not; its gradient is neither."""
    inputs = make(1, 7, 8, 3, torch.bfloat16)
    inputs["weight"] = draw(8, 3, seed=5).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        compare(inputs)


def test_runs_repeat_bit_by_bit(monkeypatch):
    in_segments_of(monkeypatch, 8)
    inputs = make(2, 20, 8, 3, torch.float32)
    first, second = run(ours, inputs), run(ours, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_checkpointing_changes_nothing():
    inputs = make(1, 7, 8, 3, torch.float32, mask="left")

    def checkpointed(**inputs):
        return torch.utils.checkpoint.checkpoint(ours, **inputs, use_reentrant=False)

    want, got = run(ours, inputs), run(checkpointed, inputs)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_at_its_two_ends():
    """e^-x overflows on one side; output and gradients are still numbers, and right one by one."""
    ends = torch.tensor([-1e4, -80, -8, -1e-20, 0, 1e-20, 80, 1e30], device=DEVICE)
    projected = torch.cat([ends, torch.ones_like(ends)])[None, None].requires_grad_()
    weight = torch.tensor([0.0, 1.0], device=DEVICE).repeat(8, 1)
    results = []
    for function, x in ((ours, projected), (definition, projected.detach().double().requires_grad_())):
        output, _ = function(x, weight.to(x.dtype))
        results.append([output.double(), torch.autograd.grad(output.sum(), x)[0].double()])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-30)


def bad_calls():
    def replace(**changes):
        def call():
            arguments = {name: x for name, x in make(2, 5, 24, 3, torch.float32).items() if x is not None}
            arguments.update({name: change(arguments.get(name)) for name, change in changes.items()})
            return gated_short_conv(**arguments)

        return call

    ids = torch.zeros(2, 5, dtype=torch.int64)
    return [
        ("projected", TypeError, "float32 or float16 or bfloat16", replace(projected=lambda x: x.double())),
        ("projected", TypeError, "a tensor", replace(projected=lambda x: None)),
        ("projected", ValueError, r"\[batch, time, 2 \* channels\]", replace(projected=lambda x: x[..., :47])),
        ("projected", ValueError, r"\[batch, time, 2 \* channels\]", replace(projected=lambda x: x[:, :0])),
        ("weight", TypeError, "float32", replace(weight=lambda x: x.long())),
        ("weight", ValueError, "K from 2 to 8", replace(weight=lambda x: x[:, :1])),
        ("weight", ValueError, r"\[24, K\]", replace(weight=lambda x: x[:8])),
        ("state", TypeError, "float32 fits", replace(state=lambda x: x.half())),
        ("state", ValueError, r"\[2, 2, 24\]", replace(state=lambda x: x[:, :1])),
        ("mask", TypeError, "a tensor", replace(mask=lambda x: [1, 1])),
        ("mask", ValueError, r"\[2, 5\]", replace(mask=lambda x: torch.ones(2, device=DEVICE))),
        ("places", TypeError, "int32", replace(places=lambda x: torch.zeros(2, 7, device=DEVICE))),
        ("places", ValueError, r"\[2, 7\]", replace(places=lambda x: ids.int().to(DEVICE))),
        ("document_ids", TypeError, "int32 or int64", replace(document_ids=lambda x: ids.double().to(DEVICE))),
        ("document_ids", ValueError, r"\[2, 5\]", replace(document_ids=lambda x: ids[:, :4].to(DEVICE))),
    ]


@pytest.mark.parametrize(("name", "error", "fix", "call"), bad_calls())
def test_errors_name_the_argument_and_the_fix(name, error, fix, call):
    with pytest.raises(error, match=rf"^{name}: got .*({fix})"):
        call()


def model_results(model, arguments, exists):
    logits = model(**arguments, use_cache=False).logits
    kept = logits[exists]
    loss = (kept * draw(*kept.shape, seed=3).to(kept.dtype)).mean()
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    return {"logits": kept.detach()} | dict(zip((name for name, _ in model.named_parameters()), gradients))


@pytest.mark.parametrize("way", ["packed", "padded"])
def test_model(way, tiny_model, monkeypatch):
    """Logits and the gradients of all parameters, with the kernels, plain in the same dtype, and plain in float64."""
    B, T = 2, 9
    ids = torch.randint(97, (B, T), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exists = torch.ones(B, T, dtype=torch.bool, device=DEVICE)
    if way == "packed":
        arguments = {"input_ids": ids, "seq_idx": (steps(B, T) // torch.tensor([[4], [5]], device=DEVICE)).int()}
    else:
        exists[0, :3] = exists[1, 5] = exists[1, 8] = False
        arguments = {"input_ids": ids, "attention_mask": exists.long()}
    called, results = [], []
    fused = backend.based_kernels.gated_short_conv
    monkeypatch.setattr(backend.based_kernels, "gated_short_conv", lambda *a, **k: called.append(k) or fused(*a, **k))
    monkeypatch.setattr(backend, "INTERPRETS_ALL", True)
    for chosen, dtype in (("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", chosen)
        model = tiny_model(layer_types=["conv", "conv"]).to(DEVICE, dtype)
        results.append(model_results(model, arguments, exists))
        assert len(called) == 2
    # made once for both layers
    assert called[0]["places"] is called[1]["places"]
    assert (called[0]["places"] is None) == (way == "packed")
    ours, plain, exact = results
    for name, want in exact.items():
        error, allowed = rms_error(ours[name], want), rms_error(plain[name], want) + 1e-6
        assert error <= allowed < 1e-3, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


# The 1.3B shape.
C, K = 3584, 3


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T"), [(1, 2048), (3, 517), (16, 1)])
def test_gpu_model_size(monkeypatch, B, T, dtype):
    poison(monkeypatch)
    compare(make(B, T, C, K, dtype))


@on_gpu
@pytest.mark.parametrize("options", itertools.product([None, *MASKS], [False, True], [False, True]), ids=str)
@pytest.mark.parametrize(("C", "K", "dtype"), [(1000, 3, torch.bfloat16), (80, 8, torch.float32)])
def test_gpu_options(monkeypatch, options, C, K, dtype):
    mask, state, documents = options
    poison(monkeypatch)
    in_segments_of(monkeypatch, 64)
    compare(make(3, 301, C, K, dtype, mask=mask, state=state, documents=documents))


@on_gpu
@pytest.mark.parametrize(("C", "K"), [(24, 2), (7, 8), (1000, 5), (513, 3), (2048, 4), (520, 6), (64, 7)])
def test_gpu_sizes(C, K):
    for dtype in DTYPES:
        compare(make(2, 77, C, K, dtype, mask="gaps"))


def test_segments_are_whole_blocks_and_leave_enough_programs():
    for tokens in (1, 300, 2048, 32768, 131072):
        for block_c, block_t in ((512, 8), (256, 4)):
            length = op_module._segment_length(tokens * C // block_c, block_t)
            assert length % block_t == 0
            assert block_t <= length <= 256
            assert length == block_t or tokens * C / (length * block_c) >= 4096


@on_gpu
def test_gpu_repeats_bit_by_bit():
    inputs = make(4, 2048, C, K, torch.bfloat16, mask="left")
    first = run(ours, inputs)
    for _ in range(20):
        again = run(ours, inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@on_gpu
def test_gpu_beyond_two_to_the_31_elements():
    """Of one row, and of a batch; the last tokens are those of a short row."""
    for B, T in ((1, 310_000), (2, 155_000)):
        projected = torch.randn(B, T, 2 * C, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
        assert projected.numel() > 2**31
        weight = draw(C, K, dtype=torch.bfloat16).requires_grad_()
        output, _ = gated_short_conv(projected, weight)
        (gradient,) = torch.autograd.grad(output[-1, -500:].float().sum(), projected)
        tail = projected.detach()[-1:, -1000:].clone().requires_grad_()
        alone, _ = gated_short_conv(tail, weight)
        (wanted,) = torch.autograd.grad(alone[-1, -500:].float().sum(), tail)
        assert torch.equal(output[-1:, -500:], alone[:, -500:])
        assert torch.equal(gradient[-1:, -600:], wanted[:, -600:])
        assert not gradient[:, :-1000].any()
        del projected, output, gradient


@on_gpu
def test_gpu_compiles_whole():
    def call(projected, weight, state, mask, document_ids):
        output, final = gated_short_conv(
            projected * 1.5, weight, state=state, mask=mask, document_ids=document_ids, output_final_state=True
        )
        return output, final

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    for T in (130, 131, 257):
        for options in ({}, {"mask": "gaps", "documents": True}):
            inputs = make(2, T, C, K, torch.bfloat16, **options)
            want, got = run(call, inputs), run(compiled, inputs)
            assert all(torch.equal(got[name], want[name]) for name in want)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(compiled(**inputs), call(**inputs)))


@on_gpu
def test_gpu_cuda_graph():
    inputs = make(2, 300, C, K, torch.bfloat16, mask="gaps")

    def call():
        output, final = ours(**inputs)
        leaves = [inputs[name] for name in ("projected", "weight", "state")]
        return output.detach(), final.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)

    assert_graph_replays(call)


@on_gpu
def test_gpu_new_lengths_compile_nothing():
    def call(size):
        for mask in (None, "left"):
            run(ours, make(*size, C, K, torch.bfloat16, mask=mask))

    sizes = [(2, 5), (1, 1), (1, 16), (3, 64), (16, 700), (1, 4096), (1, 17)]
    assert_compiles_nothing_new(call, sizes)


@on_gpu
def test_gpu_waits_for_nothing():
    inputs = make(2, 300, C, K, torch.bfloat16, mask="gaps", documents=True)
    run(ours, inputs)
    gradient = torch.ones(2, 300, C, dtype=torch.bfloat16, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = ours(**inputs)
        torch.autograd.grad(output, inputs["projected"], gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_gpu_memory():
    """Beside output and gradients, the shares of the weight's gradient: 7 percent."""
    inputs = make(4, 4096, C, K, torch.bfloat16, state=False)
    projected, weight = inputs["projected"], inputs["weight"]
    gradient = torch.ones(4, 4096, C, dtype=torch.bfloat16, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, _ = gated_short_conv(projected, weight)
    torch.autograd.grad(output, (projected, weight), gradient)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 1.1 * (output.nbytes + projected.nbytes)
