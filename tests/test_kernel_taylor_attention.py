# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The fused Taylor attention against a float64 quadratic oracle.

Without a GPU the kernels run in Triton's interpreter on tiny shapes, every code path; with one, `gpu` tests run the real
kernels on larger shapes. A result passes if its error is at most that of plain PyTorch in the same dtype plus a tolerance
that all zeros, or a missing term, would miss by far.
"""

# ruff: noqa: E501, RUF043

import os
import sys
import weakref

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

import based_kernels
from based_kernels import taylor_attention, taylor_attention_step


GPU = torch.cuda.is_available()
chunk_module = sys.modules["based_kernels.taylor_attention_chunk"]
launch_module = sys.modules["based_kernels.launch"]
segments_module = sys.modules["based_kernels.segments"]

DEVICE = "cuda" if GPU else "cpu"
# relative to the root mean square of the oracle, on top of what plain PyTorch does in the same dtype
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def columns(D):
    return torch.triu_indices(D + 1, D + 1)


def padded(D):
    return -(-((D + 1) * (D + 2) // 2) // 8) * 8


def features(x, scale):
    """The packed features of the public state, [.., F]."""
    y = torch.cat([x * scale**0.5, torch.ones_like(x[..., :1])], -1)
    a, b = columns(x.shape[-1]).to(x.device)
    return y[..., a] * y[..., b]


def quadratic(q, k, v, *, scale=None, mask=None, cu_seqlens=None, initial_state=None):
    """The definition, in whatever dtype comes in: output and final state."""
    B, T, _H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    exists = torch.ones(B, T, dtype=torch.bool, device=q.device) if mask is None else mask.bool()
    q, k, v = (torch.where(exists[..., None, None], x, 0) for x in (q, k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    w = (1 + s + s * s / 2).tril() * exists[:, None, None, :]
    document = torch.zeros(T, dtype=torch.long, device=q.device)
    if cu_seqlens is not None:
        document = torch.bucketize(torch.arange(T, device=q.device), cu_seqlens[1:].long(), right=True)
        w = w * (document[:, None] == document[None, :])
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    numerator = torch.einsum("bhij,bjhv->bihv", w, v)
    z = w.sum(-1).transpose(1, 2)
    phi_k = features(k, scale) * exists[..., None, None]
    one = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = torch.einsum("bthv,bthf->bthvf", one, phi_k)
    if cu_seqlens is None:
        state = state.sum(1)
    else:
        state = torch.zeros(N, *state.shape[2:], dtype=state.dtype, device=q.device).index_add(0, document, state[0])
    if initial_state is not None:
        initial = initial_state.to(q.dtype)[..., : phi_k.shape[-1]]
        a, b = columns(D).to(q.device)
        phi_q = features(q, scale) * torch.where((a == b) & (a < D), 0.5, 1.0).to(q.dtype)
        index = torch.arange(B, device=q.device)[:, None].expand(B, T) if cu_seqlens is None else document[None]
        read = torch.einsum("bthf,bthvf->bthv", phi_q, initial[index])
        numerator, z = numerator + read[..., :-1], z + read[..., -1]
        state = state + initial
    output = numerator / z.clamp(min=0.5)[..., None] * exists[..., None, None]
    return output, torch.nn.functional.pad(state, (0, padded(D) - state.shape[-1]))


def make(B, T, H, D, V, dtype, *, seed=0, initial=0):
    """Random inputs with gradients; `initial`: that many states, each of seven tokens."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    q, k, v = draw(B, T, H, D), draw(B, T, H, D), draw(B, T, H, V)
    q, k, v = (x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v))
    state = None
    if initial:
        _, state = quadratic(draw(initial, 7, H, D), draw(initial, 7, H, D), draw(initial, 7, H, V))
        state = state.to(DEVICE).requires_grad_()
    return q, k, v, state


def rms_error(x, reference):
    x, reference = x.double(), reference.double()
    size = reference.square().mean().sqrt().item()
    # what is exactly zero, as the gradient of a lone query, is compared as it is
    return (x - reference).square().mean().sqrt().item() / (size if size > 1e-9 else 1.0)


def compare(q, k, v, initial, *, with_state=True, **arguments):
    """Output, final state and all gradients of the kernels, beside plain PyTorch, against the float64 oracle."""
    dtype = q.dtype
    inputs = [x for x in (q, k, v, initial) if x is not None]
    results = []
    for step in ("ours", "plain", "oracle"):
        if step == "ours":
            output, state = taylor_attention(q, k, v, initial_state=initial, output_final_state=with_state, **arguments)
            g = torch.Generator().manual_seed(9)
            d_output = torch.randn(output.shape, generator=g).to(DEVICE, dtype)
            d_state = torch.randn(q.shape[0], generator=g).to(DEVICE)
            if with_state:
                assert state.dtype == torch.float32
                assert state.shape[-1] == padded(q.shape[-1])
                d_state = torch.randn(state.shape, generator=g).to(DEVICE) / 8
            assert output.dtype == dtype
            assert output.shape == v.shape
        else:
            cast = torch.float64 if step == "oracle" else dtype
            twin = [None if x is None else x.detach().to(cast).requires_grad_() for x in (q, k, v, initial)]
            output, state = quadratic(*twin[:3], initial_state=twin[3], **arguments)
        leaves = inputs if step == "ours" else [x for x in twin if x is not None]
        outputs, grads = [output], [d_output.to(output.dtype)]
        if with_state:
            outputs.append(state)
            grads.append(d_state.to(state.dtype))
        gradients = torch.autograd.grad(outputs, leaves, grads)
        names = ["output", *(["state"] if with_state else []), "d_query", "d_key", "d_value", "d_initial"]
        results.append(dict(zip(names, [x.detach() for x in (*outputs, *gradients)])))
    ours, plain, oracle = results
    for name, want in oracle.items():
        assert torch.isfinite(ours[name]).all(), name
        error, allowed = rms_error(ours[name], want), rms_error(plain[name], want) + TOLERANCE[dtype]
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        if want.abs().max() > 1e-9:
            assert rms_error(torch.zeros_like(want), want) > allowed
    return ours


def segments_of(monkeypatch, length):
    """Cut every sequence into segments of `length` tokens, as happens on a large card with few heads."""
    monkeypatch.setattr(chunk_module, "_segment_length", lambda *args: length)


@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_lengths_around_a_chunk(T):
    compare(*make(1, T, 1, 8, 16, torch.float32))


@pytest.mark.parametrize("V", [8, 48, 80, 112])
def test_value_sizes(V):
    compare(*make(1, 33, 1, 8, V, torch.float32, initial=1))


@pytest.mark.parametrize("D", [8, 16, 24, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_feature_sizes_and_dtypes(D, dtype):
    compare(*make(1, 40, 1, D, 16, dtype, initial=1))


@pytest.mark.parametrize("side", ["left", "right", "middle", "all"])
def test_mask_hides_tokens_and_their_garbage(side):
    q, k, v, initial = make(2, 40, 1, 8, 16, torch.float32, initial=2)
    mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    hidden = {"left": slice(0, 11), "right": slice(30, 40), "middle": slice(9, 23), "all": slice(0, 40)}[side]
    mask[1, hidden] = False
    with torch.no_grad():
        for x in (q, k, v):
            x[1, hidden] = float("nan")
    output, state = taylor_attention(q, k, v, mask=mask, initial_state=initial, output_final_state=True)
    assert torch.equal(output[1, hidden], torch.zeros_like(output[1, hidden]))
    gradients = torch.autograd.grad(output.sum() + state.sum(), (q, k, v))
    assert all(torch.equal(x[1, hidden], torch.zeros_like(x[1, hidden])) for x in gradients)
    # finite everywhere and right elsewhere
    with torch.no_grad():
        for x in (q, k, v):
            x[1, hidden] = 0
    compare(q, k, v, initial, mask=mask)
    as_numbers, _ = taylor_attention(q, k, v, mask=mask.long(), initial_state=initial)
    assert torch.equal(as_numbers, output)


def test_row_that_sees_nothing_is_zero():
    q, k, v, _ = make(1, 5, 1, 8, 8, torch.float32)
    mask = torch.tensor([[0, 0, 0, 0, 0]], device=DEVICE)
    output, state = taylor_attention(q, k, v, mask=mask, output_final_state=True)
    assert output.abs().max() == 0
    assert state.abs().max() == 0


@pytest.mark.parametrize("length", [10**6, 32], ids=["whole", "cut"])
def test_packed_documents(monkeypatch, length):
    segments_of(monkeypatch, length)
    cu_seqlens = torch.tensor([0, 1, 2, 40, 41, 80], dtype=torch.int32, device=DEVICE)
    q, k, v, initial = make(1, 80, 1, 8, 16, torch.float32, initial=5)
    compare(q, k, v, initial, cu_seqlens=cu_seqlens)
    packed, states = taylor_attention(q, k, v, cu_seqlens=cu_seqlens, output_final_state=True)
    for n, (a, b) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())):
        alone, state = taylor_attention(q[:, a:b], k[:, a:b], v[:, a:b], output_final_state=True)
        torch.testing.assert_close(packed[:, a:b], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[n : n + 1], state, rtol=1e-5, atol=1e-5)


def test_packed_documents_with_mask(monkeypatch):
    segments_of(monkeypatch, 32)
    cu_seqlens = torch.tensor([0, 70, 75], dtype=torch.int32, device=DEVICE)
    mask = torch.arange(75, device=DEVICE)[None] % 7 != 3
    compare(*make(1, 75, 1, 8, 8, torch.float32, initial=2), cu_seqlens=cu_seqlens, mask=mask)


@pytest.mark.parametrize("with_state", [True, False])
def test_split_over_the_sequence(monkeypatch, with_state):
    segments_of(monkeypatch, 32)
    inputs = make(2, 100, 1, 8, 16, torch.float32, initial=2)
    cut = compare(*inputs, with_state=with_state)
    segments_of(monkeypatch, 128)
    whole = compare(*inputs, with_state=with_state)
    for name in cut:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=1e-4)


def test_split_without_states(monkeypatch):
    segments_of(monkeypatch, 64)
    compare(*make(1, 130, 2, 8, 8, torch.bfloat16), with_state=False)


@pytest.mark.parametrize("length", [10**6, 32])
@pytest.mark.parametrize("left", [0, 10**6])
@pytest.mark.parametrize(("D", "V"), [(8, 24), (16, 40), (16, 72), (8, 128), (24, 40)])
def test_values_and_features_are_shared_out(monkeypatch, D, V, left, length):
    """For the gradients of query and key, several programs a head; both at once if there is memory left for them."""
    segments_of(monkeypatch, length)
    monkeypatch.setattr(chunk_module, "_memory_left", lambda *arguments: left)
    inputs = make(1, 49, 2, D, V, torch.bfloat16, initial=1)
    assert chunk_module._num_shares(V, chunk_module._config(D, torch.bfloat16)) > 1
    compare(*inputs, mask=torch.arange(49, device=DEVICE)[None] % 5 != 1)


def test_two_halves_with_a_state_are_the_whole():
    q, k, v, _ = make(1, 50, 1, 16, 24, torch.float32)
    whole, last = taylor_attention(q, k, v, output_final_state=True)
    first, state = taylor_attention(q[:, :17], k[:, :17], v[:, :17], output_final_state=True)
    second, state = taylor_attention(q[:, 17:], k[:, 17:], v[:, 17:], initial_state=state, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_padding_columns_are_zero_whatever_comes_in():
    q, k, v, initial = make(1, 9, 1, 8, 8, torch.float32, initial=1)
    with torch.no_grad():
        initial[..., 45:] = 5.0
    output, state = taylor_attention(q, k, v, initial_state=initial, output_final_state=True)
    assert state[..., 45:].abs().max() == 0
    (gradient,) = torch.autograd.grad(output.sum() + state.sum(), initial)
    assert gradient[..., 45:].abs().max() == 0


def test_strides_of_any_kind():
    q, k, v, _ = make(2, 20, 2, 8, 16, torch.float32)
    want, _ = taylor_attention(q, k, v)
    d_want = torch.autograd.grad(want, (q, k, v), torch.ones_like(want))
    # views of one projection, heads before time, and one head for all
    fused = torch.cat([q, k, v], -1)
    views = fused[..., :8], fused[..., 8:16], fused[..., 16:]
    assert torch.equal(taylor_attention(*views)[0], want)
    odd = torch.nn.functional.pad(fused, (3, 2))[..., 3:-2]
    assert torch.equal(taylor_attention(odd[..., :8], odd[..., 8:16], odd[..., 16:])[0], want)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    got, _ = taylor_attention(*swapped)
    assert torch.equal(got, want)
    # an expanded gradient has stride 0
    for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), d_want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    shared = [x[:, :, :1].expand_as(x) for x in (q, k, v)]
    repeated = [x[:, :, :1].repeat(1, 1, 2, 1) for x in (q, k, v)]
    assert torch.equal(taylor_attention(*shared)[0], taylor_attention(*repeated)[0])


def test_scale_is_used():
    compare(*make(1, 20, 1, 8, 8, torch.float32, initial=1)[:3], None, scale=0.7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_queries_and_keys_stay_finite(dtype):
    q, k, v, _ = make(1, 20, 1, 8, 8, dtype)
    output, state = taylor_attention(q * 300, k * 300, v, output_final_state=True)
    assert torch.isfinite(output).all()
    assert torch.isfinite(state).all()
    want, _ = quadratic(q.double() * 300, k.double() * 300, v.double())
    assert rms_error(output, want) < 5 * TOLERANCE[dtype]


def test_runs_repeat_bit_by_bit(monkeypatch):
    segments_of(monkeypatch, 32)
    first, second = (compare(*make(1, 70, 1, 8, 8, torch.float32, initial=1)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_element_is_written(monkeypatch):
    """Buffers the kernels write start as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: poisoned(x.shape, dtype=x.dtype, device=x.device))
    for length in (10**6, 32):
        segments_of(monkeypatch, length)
        for mask in (None, torch.arange(75, device=DEVICE)[None] % 5 != 1):
            compare(*make(1, 75, 1, 8, 8, torch.float32, initial=1), mask=mask)


@pytest.mark.parametrize(("D", "V"), [(8, 16), (16, 48), (24, 8), (32, 112)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_sequence(D, V, dtype):
    q, k, v, state = make(2, 4, 2, D, V, dtype, initial=2)
    state = state.detach()
    want, last = quadratic(q.double(), k.double(), v.double(), initial_state=state)
    running, outputs = state.clone(), []
    for t in range(4):
        outputs.append(taylor_attention_step(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], running))
        assert outputs[-1].dtype == dtype
    assert rms_error(torch.cat(outputs, 1), want) < TOLERANCE[dtype]
    assert rms_error(running, last) < 1e-5
    assert running[..., (D + 1) * (D + 2) // 2 :].abs().sum() == 0


def test_step_leaves_finished_rows_alone():
    q, k, v, state = make(3, 1, 1, 8, 16, torch.float32, initial=3)
    state = state.detach()
    with torch.no_grad():
        for x in (q, k, v):
            x[1] = float("nan")
    before = state.clone()
    output = taylor_attention_step(q, k, v, state, mask=torch.tensor([[1], [0], [1]], device=DEVICE))
    assert torch.equal(state[1], before[1])
    assert output[1].abs().max() == 0
    want, last = quadratic(q.double()[::2], k.double()[::2], v.double()[::2], initial_state=before[::2])
    assert rms_error(output[::2], want) < 1e-5
    assert rms_error(state[::2], last) < 1e-5


def test_step_on_a_part_of_a_larger_state():
    q, k, v, state = make(2, 1, 1, 8, 8, torch.float32, initial=2)
    pool = torch.full((4, 3, *state.shape[2:]), 7.0, device=DEVICE)
    pool[1:3, 1:2] = state.detach()
    want, last = quadratic(q.double(), k.double(), v.double(), initial_state=state.detach())
    output = taylor_attention_step(q, k, v, pool[1:3, 1:2])
    assert rms_error(output, want) < 1e-5
    assert rms_error(pool[1:3, 1:2], last) < 1e-5
    assert (pool[0] == 7).all()
    assert (pool[3] == 7).all()
    assert (pool[:, 0] == 7).all()
    assert (pool[:, 2] == 7).all()


def bad_calls():
    def replace(**changes):
        def call():
            q, k, v, _ = make(2, 6, 1, 8, 16, torch.float32)
            arguments = {"query": q, "key": k, "value": v}
            arguments.update({name: change(q, k, v) for name, change in changes.items()})
            return taylor_attention(**arguments)

        return call

    def i32(*values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    return [
        ("key", TypeError, replace(key=lambda q, k, v: k.half())),
        ("value", TypeError, replace(value=lambda q, k, v: v.half())),
        ("query", TypeError, replace(query=lambda q, k, v: q.double())),
        ("query", TypeError, replace(query=lambda q, k, v: None)),
        ("query", ValueError, replace(query=lambda q, k, v: q[0])),
        ("key", ValueError, replace(key=lambda q, k, v: k[:, :5])),
        ("value", ValueError, replace(value=lambda q, k, v: v[:, :5])),
        ("value", ValueError, replace(value=lambda q, k, v: v[..., :12])),
        ("value", ValueError, replace(value=lambda q, k, v: v.repeat(1, 1, 1, 17))),
        (
            "query",
            ValueError,
            replace(query=lambda q, k, v: q.repeat(1, 1, 1, 5), key=lambda q, k, v: k.repeat(1, 1, 1, 5)),
        ),
        ("scale", ValueError, replace(scale=lambda q, k, v: 0.0)),
        ("scale", TypeError, replace(scale=lambda q, k, v: torch.ones(()))),
        ("mask", ValueError, replace(mask=lambda q, k, v: torch.ones(2, 5, device=DEVICE))),
        ("mask", TypeError, replace(mask=lambda q, k, v: [1])),
        ("cu_seqlens", ValueError, replace(cu_seqlens=lambda q, k, v: i32(0, 6))),
        ("cu_seqlens", TypeError, replace(cu_seqlens=lambda q, k, v: i32(0, 6).long())),
        ("initial_state", TypeError, replace(initial_state=lambda q, k, v: torch.zeros(2, 1, 17, 48).half())),
        ("initial_state", ValueError, replace(initial_state=lambda q, k, v: torch.zeros(2, 1, 16, 48))),
    ]


@pytest.mark.parametrize(("name", "error", "call"), bad_calls())
def test_errors_name_the_argument(name, error, call):
    with pytest.raises(error, match=rf"^{name}: got .* (fit|need)"):
        call()


@pytest.mark.skipif(GPU, reason="on a GPU the caller's cu_seqlens are not read back")
def test_cu_seqlens_must_cover_the_sequence():
    q, k, v, _ = make(1, 6, 1, 8, 16, torch.float32)
    for ends in ([1, 6], [0, 5], [0, 4, 3, 6]):
        with pytest.raises(ValueError, match="^cu_seqlens: got .* fit"):
            taylor_attention(q, k, v, cu_seqlens=torch.tensor(ends, dtype=torch.int32))


def test_step_errors_name_the_argument():
    q, k, v, state = make(2, 1, 1, 8, 16, torch.float32, initial=2)
    state = state.detach()
    with pytest.raises(ValueError, match="^query: got 2 tokens"):
        taylor_attention_step(*(x.repeat(1, 2, 1, 1) for x in (q, k, v)), state)
    with pytest.raises(TypeError, match="^state: got torch.bfloat16"):
        taylor_attention_step(q, k, v, state.bfloat16())
    with pytest.raises(ValueError, match="^state: got shape"):
        taylor_attention_step(q, k, v, state[:1])
    with pytest.raises(ValueError, match="^state: got strides"):
        taylor_attention_step(q, k, v, state.transpose(2, 3).contiguous().transpose(2, 3))
    size = state[0].numel()
    with pytest.raises(ValueError, match="^state: got strides .* multiples of 8"):
        taylor_attention_step(q, k, v, state.new_zeros(2, size + 4)[:, :size].view_as(state))
    with pytest.raises(ValueError, match="^state: got strides"):
        taylor_attention_step(q, k, v, state[:1].expand_as(state))
    with pytest.raises(ValueError, match="^mask: got shape"):
        taylor_attention_step(q, k, v, state, mask=torch.ones(2, device=DEVICE))


@pytest.mark.skipif(GPU, reason="the interpreter is off")
def test_cpu_tensors_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    q, k, v, _ = make(1, 2, 1, 8, 8, torch.float32)
    with pytest.raises(ValueError, match="^query: got a tensor on the CPU"):
        taylor_attention(q, k, v)


class Recorder:
    """Stands for a kernel of Triton and for what it compiled: says who launched it, and with what."""

    arg_names = ("p_x", "p_y", "N", "SIZE", "FLAG")

    def __init__(self):
        self.fn = lambda: None
        self.calls = []
        self.compiled = self.Compiled(self.calls)

    def __getitem__(self, grid):
        def call(*args, **constants):
            self.calls.append(("triton", grid, args, constants))
            return self.compiled

        return call

    class Compiled:
        def __init__(self, calls):
            self.calls = calls

        def __getitem__(self, grid):
            return lambda *args: self.calls.append(("compiled", grid, args, {}))


def test_launch_goes_to_the_compiled_kernel_only_with_arguments_that_fit_it():
    kernel, (x, y) = Recorder(), torch.zeros(2, 64, device=DEVICE)
    constants = {"num_warps": 4, "FLAG": True, "SIZE": 7}

    def launched(key, x, number, flag=True):
        kernel.calls.clear()
        launch_module.launch(kernel, key, 3, (x, y), (number,), lambda: {**constants, "FLAG": flag})
        ((who, grid, args, given),) = kernel.calls
        assert grid[0] == 3
        if who == "triton":
            assert args == (x, y, number)
            assert given == {**constants, "FLAG": flag}
        else:
            assert args == (x.data_ptr(), y.data_ptr(), number, 7, flag)
        return who

    # what does not fit is not kept either
    assert launched("a", x[1:], 5) == "triton"
    assert launched("a", x, 2**31) == "triton"
    assert launched("a", x, 5) == "triton"
    assert launched("a", x, 5) == "compiled"
    assert launched("a", x[4:], 6) == "compiled"
    assert launched("a", x[1:], 5) == "triton"
    assert launched("a", x, 2**31) == "triton"
    assert launched("b", x, 5, flag=False) == "triton"
    assert launched("b", x, 5, flag=False) == "compiled"
    assert launched("a", x, 5) == "compiled"


def test_second_derivative_is_refused():
    q, k, v, _ = make(1, 3, 1, 8, 8, torch.float32)
    output, _ = taylor_attention(q, k, v)
    with pytest.raises(RuntimeError, match=r"^taylor_attention: got create_graph=True, a first derivative fits"):
        torch.autograd.grad(output.sum(), q, create_graph=True)


@pytest.mark.parametrize("lengths", [[100], [32, 33, 1, 64, 0, 31], [1] * 300 + [65, 7, 99]])
def test_table_of_cuts(lengths):
    """Against the same table made document by document."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    segments = segments_module.cut(1, int(bounds[-1]), bounds.int().to(DEVICE), 32)
    table = segments_module.cut_table(segments, bounds.int().to(DEVICE)).tolist()
    first, slot, count, document, slots = [], [], [], [], 0
    for n, length in enumerate(lengths):
        count.append(max(-(-length // 32), 1))
        first.append(len(document))
        slot.append(slots if count[-1] > 1 else -1)
        slots += count[-1] if count[-1] > 1 else 0
        document += [n] * count[-1]
    assert len(document) <= segments.programs
    assert slots <= segments.slots
    assert table == first + slot + count + document + [len(lengths)] * (segments.programs - len(document))


def test_import_without_triton():
    import subprocess

    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import based_kernels\n"
        "assert not based_kernels.is_available()\n"
        "try:\n    based_kernels.taylor_attention()\n"
        "except ImportError as error:\n    assert 'Triton' in str(error)\n"
        "else:\n    raise SystemExit(1)\n"
    )
    folder = os.path.dirname(os.path.dirname(based_kernels.__file__))
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": folder})
    assert based_kernels.is_available()


def test_layer_is_the_op():
    layer = based_kernels.TaylorAttention()
    q, k, v, _ = make(1, 6, 1, 8, 8, torch.float32)
    output, state = layer(q, k, v, output_final_state=True)
    want, last = taylor_attention(q, k, v, output_final_state=True)
    assert torch.equal(output, want)
    assert torch.equal(state, last)
    copy = last.detach().clone()
    one, updated = layer(q[:, :1], k[:, :1], v[:, :1], state=copy)
    assert updated is copy
    assert not torch.equal(copy, last)
    assert one.shape == (1, 1, 1, 8)


def on_gpu(function):
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")(function))


@on_gpu
@pytest.mark.parametrize("options", range(16), ids=lambda i: f"{i:04b}")
@pytest.mark.parametrize(
    ("D", "V", "dtype"), [(16, 64, torch.bfloat16), (16, 112, torch.bfloat16), (8, 48, torch.bfloat16)]
)
def test_gpu_every_combination_of_options(monkeypatch, options, D, V, dtype):
    """mask, initial state, packed documents, final state: each combination is another kernel."""
    mask, initial, packed, state = (bool(options >> i & 1) for i in range(4))
    B, T = (1, 517) if packed else (2, 389)
    arguments = {}
    if mask:
        arguments["mask"] = torch.arange(T, device=DEVICE).expand(B, T) % 7 != 3
    if packed:
        arguments["cu_seqlens"] = torch.tensor([0, 1, 64, 300, 301, 517], dtype=torch.int32, device=DEVICE)
    for length in (10**6, 128):
        segments_of(monkeypatch, length)
        for seed in range(3):
            inputs = make(B, T, 2, D, V, dtype, seed=seed, initial=(5 if packed else B) if initial else 0)
            first = compare(*inputs, with_state=state, **arguments)
            second = compare(*inputs, with_state=state, **arguments)
            assert all(torch.equal(first[name], second[name]) for name in first)


@on_gpu
@pytest.mark.parametrize("V", [8, 80, 96, 128, 256])
@pytest.mark.parametrize("D", [8, 16, 24, 32])
def test_gpu_sizes(D, V):
    for T in (1, 63, 65, 200):
        compare(*make(2, T, 3, D, V, torch.bfloat16, initial=2))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("D", "V"), [(8, 80), (16, 64), (24, 48), (32, 112)])
def test_gpu_precise_dtypes(monkeypatch, D, V, dtype):
    for length in (10**6, 64):
        segments_of(monkeypatch, length)
        mask = torch.arange(150, device=DEVICE).expand(2, 150) % 5 != 1
        compare(*make(2, 150, 2, D, V, dtype, initial=2), mask=mask)


@on_gpu
@pytest.mark.parametrize(("B", "T", "H", "V"), [(1, 4099, 2, 64), (2, 2048, 4, 112), (1, 1500, 3, 128)])
def test_gpu_long_sequences(B, T, H, V):
    compare(*make(B, T, H, 16, V, torch.bfloat16, initial=B))


@on_gpu
def test_gpu_twenty_runs_repeat_bit_by_bit():
    q, k, v, _ = make(2, 3001, 4, 16, 64, torch.bfloat16)
    g = torch.randn_like(v)

    def run():
        output, state = taylor_attention(q, k, v, output_final_state=True)
        return output, state, *torch.autograd.grad(output, (q, k, v), g)

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


@on_gpu
def test_gpu_beyond_two_to_the_31_elements():
    B, T, H, D, V = 1, 280_000, 120, 16, 64
    v = torch.randn(B, T, H, V, dtype=torch.bfloat16, device=DEVICE)
    assert v.numel() > 2**31
    q = torch.randn(B, T, 1, D, dtype=torch.bfloat16, device=DEVICE).expand(B, T, H, D)
    output, _ = taylor_attention(q, q, v)
    alone, _ = taylor_attention(q[:, :, -1:], q[:, :, -1:], v[:, :, -1:])
    # cut in other places, so not the same bits
    assert rms_error(output[:, -5000:, -1:], alone[:, -5000:]) < TOLERANCE[torch.bfloat16]


@on_gpu
def test_gpu_backward_beyond_two_to_the_31_elements():
    B, T, H, D, V = 1, 300_000, 120, 16, 64
    q, k = (torch.randn(B, T, H, D, dtype=torch.bfloat16, device=DEVICE).requires_grad_() for _ in range(2))
    v = torch.randn(B, T, H, V, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    assert chunk_module._num_shares(V, chunk_module._config(D, torch.bfloat16)) * q.numel() > 2**31
    gradients = torch.autograd.grad(taylor_attention(q, k, v)[0], (q, k, v), torch.ones_like(v))
    last = [x.detach()[:, :, -1:].clone().requires_grad_() for x in (q, k, v)]
    alone = torch.autograd.grad(taylor_attention(*last)[0], last, torch.ones_like(last[2]))
    for a, b in zip(gradients, alone):
        assert rms_error(a[:, :, -1:], b) < TOLERANCE[torch.bfloat16]


@on_gpu
def test_gpu_compiles_whole_without_gradients():
    mask = torch.arange(130, device=DEVICE).expand(2, 130) % 5 != 1
    q, k, v = (x.detach() for x in make(2, 130, 2, 16, 64, torch.bfloat16)[:3])

    def function(q, k, v):
        return taylor_attention(q * 1.5, k, v, mask=mask, output_final_state=True)

    for a, b in zip(torch.compile(function, fullgraph=True)(q, k, v), function(q, k, v)):
        assert rms_error(a, b) < TOLERANCE[torch.bfloat16]
    cu_seqlens = torch.tensor([0, 50, 130], dtype=torch.int32, device=DEVICE)
    packed = torch.compile(lambda *x: taylor_attention(*x, cu_seqlens=cu_seqlens)[0], fullgraph=True)
    one = [x[:1] for x in (q, k, v)]
    assert rms_error(packed(*one), taylor_attention(*one, cu_seqlens=cu_seqlens)[0]) < TOLERANCE[torch.bfloat16]
    state = torch.zeros(2, 2, 65, 160, device=DEVICE)
    step = torch.compile(lambda *x: taylor_attention_step(*x), fullgraph=True)
    twin = state.clone()
    token = [x[:, :1] for x in (q, k, v)]
    torch.testing.assert_close(step(*token, state), taylor_attention_step(*token, twin))
    assert torch.equal(state, twin)


@on_gpu
def test_gpu_compiles_whole_with_gradients():
    mask = torch.arange(130, device=DEVICE).expand(2, 130) % 5 != 1

    def function(q, k, v, initial):
        output, state = taylor_attention(q, k * 1.5, v, mask=mask, initial_state=initial, output_final_state=True)
        return output.float().square().sum() + state.square().sum() * 1e-3

    inputs = make(2, 130, 2, 16, 64, torch.bfloat16, initial=2)
    want, got = function(*inputs), torch.compile(function, fullgraph=True)(*inputs)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)):
        assert rms_error(a, b) < TOLERANCE[torch.bfloat16]


@on_gpu
def test_gpu_autocast_changes_nothing():
    q, k, v, _ = make(1, 100, 2, 16, 64, torch.float32)
    want, _ = taylor_attention(q, k, v)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got, _ = taylor_attention(q, k, v)
        gradients = torch.autograd.grad(got.sum(), (q, k, v))
    assert torch.equal(got, want)
    assert all(x.dtype == torch.float32 for x in gradients)


@on_gpu
def test_gpu_cuda_graph():
    q, k, v, _ = make(1, 700, 2, 16, 64, torch.bfloat16)
    state = torch.zeros(1, 2, 65, 160, device=DEVICE)

    def run():
        output, _ = taylor_attention(q, k, v)
        step = taylor_attention_step(q[:, :1].detach(), k[:, :1].detach(), v[:, :1].detach(), state)
        return output, step, *torch.autograd.grad(output.float().square().sum(), (q, k, v))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
    state.zero_()
    graph.replay()
    result = [x.clone() for x in captured]
    state.zero_()
    assert all(torch.equal(a, b) for a, b in zip(result, run()))


@on_gpu
def test_gpu_new_lengths_compile_nothing():
    from triton import knobs

    compiled = []
    for T in (5, 64, 700, 4096):
        for B in (1, 2):
            q, k, v, _ = make(B, T, 2, 16, 64, torch.bfloat16)
            torch.autograd.grad(taylor_attention(q, k, v)[0].sum(), (q, k, v))
    hook = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda **details: compiled.append(details["repr"])
    try:
        for i in range(50):
            B, T = 1 + i % 3, 1 + 97 * i + i % 5
            q, k, v, _ = make(B, T, 2, 16, 64, torch.bfloat16)
            torch.autograd.grad(taylor_attention(q, k, v)[0].sum(), (q, k, v))
    finally:
        knobs.runtime.jit_post_compile_hook = hook
    assert compiled == []


@on_gpu
@pytest.mark.parametrize(("B", "T", "H"), [(2, 4096, 16), (1, 16384, 16)])
def test_gpu_memory(B, T, H):
    q, k, v, _ = make(B, T, H, 16, 64, torch.bfloat16)
    g = torch.randn_like(v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, _ = taylor_attention(q, k, v)
    torch.autograd.grad(output, (q, k, v), g)
    extra = torch.cuda.max_memory_allocated() - before
    tensors = 2 * sum(x.numel() * x.element_size() for x in (q, k, v, v)) - v.numel() * v.element_size()
    # output and gradients are among the extra
    assert extra <= 1.5 * tensors


@pytest.mark.skipif(GPU, reason="launches are left out")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("B", "T", "H", "D", "V", "documents"),
    [
        (8, 2048, 16, 16, 64, 0),
        (1, 4096, 16, 16, 64, 4),
        (4, 8192, 16, 16, 112, 0),
        (1, 16384, 16, 16, 112, 0),
        (1, 2048, 4, 32, 64, 0),
        (1, 4096, 1, 32, 256, 0),
        (1, 8192, 2, 32, 64, 3),
        (1, 8192, 2, 24, 248, 3),
        (1, 4096, 16, 16, 16, 2),
    ],
)
def test_memory_on_a_large_card(monkeypatch, B, T, H, D, V, documents, dtype):
    """What is allocated beside inputs and outputs, at most 1.5 times these; states of segments are a part of it."""
    held, peak, empty = 0, 0, torch.empty

    def counted(*arguments, **options):
        nonlocal held, peak
        x = empty(*arguments, **options)

        def freed(size=x.nbytes):
            nonlocal held
            held -= size

        held += x.nbytes
        peak = max(peak, held)
        weakref.finalize(x, freed)
        return x

    monkeypatch.setattr(chunk_module, "_processors", lambda device: 132)
    monkeypatch.setattr(chunk_module, "_fixed_by_kind", {})
    q, k, v = (torch.zeros(B, T, H, size, dtype=dtype) for size in (D, D, V))
    chunk_module._fixed(D, dtype, q.device)
    monkeypatch.setattr(chunk_module, "launch", lambda *arguments: None)
    monkeypatch.setattr(chunk_module, "cut_table", lambda segments, cu_seqlens: cu_seqlens)
    monkeypatch.setattr(torch, "empty", counted)
    cu_seqlens = torch.linspace(0, T, documents + 1).int() if documents else None
    output, z, slots, table, _ = chunk_module._taylor_attention_fwd(q, k, v, 0.25, None, cu_seqlens, None, False)
    gradients = chunk_module._taylor_attention_bwd(
        q, k, v, 0.25, None, cu_seqlens, None, slots, table, output, z, torch.zeros_like(v), None, False
    )[:3]
    outputs = sum(x.nbytes for x in (output, *gradients))
    assert outputs < peak
    assert peak - outputs <= 1.5 * (outputs + sum(x.nbytes for x in (q, k, v)))


@on_gpu
@pytest.mark.parametrize(("B", "T", "V"), [(4, 2048, 112), (2, 2048, 256), (1, 16384, 112)])
@pytest.mark.parametrize(("D", "dtype"), [(16, torch.bfloat16), (32, torch.bfloat16), (16, torch.float16)])
def test_gpu_memory_of_wide_values(B, T, V, D, dtype):
    q, k, v, _ = make(B, T, 16, D, V, dtype)
    g = torch.randn_like(v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, _ = taylor_attention(q, k, v)
    outputs = (output, *torch.autograd.grad(output, (q, k, v), g))
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in outputs)
    assert extra <= 1.5 * sum(x.nbytes for x in (q, k, v, *outputs))


@pytest.mark.parametrize(
    ("capability", "D", "V", "dtype"),
    [(90, 16, 64, "bfloat16"), (80, 8, 48, "float16")],
)
def test_compiles_for_a_gpu_without_one(capability, D, V, dtype):
    """
    What the interpreter cannot see. Hopper's asynchronous products are kept out: Triton 3.6 built them wrongly. A mask
    of bytes lays out products for bytes. torch.compile copies functions and plain constants of a kernel, and no table
    for example: such a name would follow the two words.
    """
    import subprocess

    command = [sys.executable, os.path.join(os.path.dirname(__file__), "compile_for_gpu.py")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, str(capability), str(D), str(V), dtype], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert {tuple(kind) for _, *kind in kernels} == {("sync", "words")}
    names = {f"taylor_attention_{name}_kernel" for name in ("sum", "slope", "partial")}
    names |= {f"_taylor_attention_{name}_kernel" for name in ("step", "lazy_step")}
    names |= {f"_{op}_step_kernel" for op in ("gated_short_conv", "sliding_attention")}
    names |= {f"_{op}_{way}_kernel" for op in ("rms_norm", "swiglu") for way in ("fwd", "bwd")}
    names |= {"_rms_norm_sum_kernel"} | {f"_gated_short_conv_{way}_kernel" for way in ("fwd", "bwd", "weight")}
    names |= {f"sliding_attention_{way}_kernel" for way in ("fwd", "bwd_query", "bwd_key")}
    assert names < {name for name, *_ in kernels}
