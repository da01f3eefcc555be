# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The lazy step, fused and plain, against the definition in float64: every pair of tokens, and the sum for the state.

Without a GPU the kernel runs in Triton's interpreter; with one, the same tests and the `gpu` tests run it for real.
"""

import inspect
import sys

import pytest
import torch
from programs import load_program

from transformers_based.backend import BACKEND_VARIABLE
from transformers_based.taylor_attention import (
    fold_pending,
    num_features,
    taylor_attention_lazy_step,
    torch_taylor_attention_lazy_step,
)


GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Relative to the root mean square of the oracle, on top of what plain PyTorch does in the same dtype.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["kernel", "plain"])
def op(request):
    if request.param == "plain":
        return torch_taylor_attention_lazy_step
    return kernel()


def kernel():
    pytest.importorskip("triton", reason="the fused kernel needs Triton")
    import based_kernels

    return based_kernels.taylor_attention_lazy_step


def quadratic(query, key, value, mask=None, scale=None):
    """The definition, in whatever dtype comes in, [B, T, H, *]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    exists = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device) if mask is None else mask
    key, value = (x.masked_fill(~exists[..., None, None], 0) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    weights = (1 + scores + scores**2 / 2).tril() * exists[:, None, None]
    output = torch.einsum("bhij,bjhv->bihv", weights, value) / weights.sum(-1).transpose(1, 2)[..., None]
    return output.masked_fill(~exists[..., None, None], 0)


def exact_state(key, value, mask=None, scale=None):
    """The sum over tokens in float64, a column for each pair a <= b of [key sqrt(scale), 1]."""
    scale = key.shape[-1] ** -0.5 if scale is None else scale
    key, value = key.double(), value.double()
    exists = torch.ones_like(value[..., :1]) if mask is None else mask[..., None, None].expand_as(value[..., :1])
    key, value = (x.masked_fill(exists == 0, 0) for x in (key, value))
    extended = torch.cat([key * scale**0.5, torch.ones_like(key[..., :1])], -1)
    size = extended.shape[-1]
    columns = [extended[..., a] * extended[..., b] for a in range(size) for b in range(a, size)]
    columns += [torch.zeros_like(columns[0])] * (num_features(size - 1) - len(columns))
    return torch.einsum("bthv,bthf->bhvf", torch.cat([value, exists.double()], -1), torch.stack(columns, -1))


def make(B, T, H, D, V, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, H, size, generator=generator).to(DEVICE, dtype) for size in (D, D, V)]


def buffers(B, H, N, D, V, dtype):
    """Empty buffers, as an allocator may hand them out."""
    nan = [torch.full((B, H, N, size), float("nan"), dtype=dtype, device=DEVICE) for size in (D, V)]
    return [*nan, torch.zeros(B, H, dtype=torch.int32, device=DEVICE)]


def root_mean_square(x):
    return x.double().square().mean().sqrt().item()


def assert_close(ours, exact, plain=None, *, tolerance):
    """No further from `exact` than `plain` is, but for a tolerance that neither zeros nor a lost token would meet."""
    assert torch.isfinite(ours).all()
    size = root_mean_square(exact)
    allowed = tolerance + (root_mean_square(plain.double() - exact) / size if plain is not None else 0)
    assert allowed < 0.1
    error = root_mean_square(ours.double() - exact) / size
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def run(op, tokens, state, pending, mask=None, **options):
    """Token after token -> output [B, T, H, V]."""
    outputs = []
    for t in range(tokens[0].shape[1]):
        token = [x[:, t : t + 1] for x in tokens]
        step_mask = None if mask is None else mask[:, t : t + 1]
        outputs.append(op(*token, state, *pending, mask=step_mask, **options))
    return torch.cat(outputs, 1)


def check(op, B, T, H, D, V, N, dtype, *, before=5, mask=None, scale=None):
    """T steps on the state of the tokens `before` them; -> everything that came out."""
    tokens = make(B, before + T, H, D, V, dtype)
    state = exact_state(*(x[:, :before] for x in tokens[1:]), scale=scale).float()
    pending = buffers(B, H, N, D, V, dtype)
    whole_mask = None if mask is None else torch.nn.functional.pad(mask, (before, 0), value=True)
    output = run(op, [x[:, before:] for x in tokens], state, pending, mask, scale=scale)
    exact = quadratic(*(x.double() for x in tokens), whole_mask, scale)
    plain = quadratic(*tokens, whole_mask, scale)
    assert output.dtype == dtype
    assert_close(output, exact[:, before:], plain[:, before:], tolerance=TOLERANCE[dtype])

    steps = T if mask is None else mask.sum(1)[:, None]
    assert torch.equal(pending[2], torch.zeros_like(pending[2]) + steps % N)
    at_fold = state.clone()
    fold_pending(state, *pending, scale=scale)
    assert pending[2].count_nonzero() == 0
    last = exact_state(*tokens[1:], whole_mask, scale)
    assert_close(state, last, tolerance=3e-6)
    for row in range(B):
        # Between folds nothing is written: what the state lacks are the pending tokens.
        count = T % N if mask is None else int(mask[row].sum()) % N
        if count:
            kept = [x[row, -T:] if mask is None else x[row, -T:][mask[row]] for x in tokens[1:]]
            missing = exact_state(*(x[None, -count:] for x in kept), scale=scale)
            assert_close((state - at_fold)[row : row + 1], missing, tolerance=3e-5)
    return output, state, *pending


@pytest.mark.parametrize(("D", "V", "N"), [(8, 8, 32), (16, 48, 16), (24, 80, 16), (32, 8, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_over_two_folds(op, D, V, N, dtype):
    check(op, 1, 2 * N + 3, 1, D, V, N, dtype)


def test_sixty_four_pending_tokens_in_fp16(op):
    check(op, 1, 2 * 64 + 3, 1, 16, 16, 64, torch.float16)


def test_rows_that_finish_and_fold_at_different_times(op):
    """Row 0 has every token, row 1 ends after 5, row 2 has every second one, row 3 none."""
    mask = torch.ones(4, 35, dtype=torch.bool, device=DEVICE)
    mask[1, 5:] = False
    mask[2, ::2] = False
    mask[3] = False
    output, *_ = check(op, 4, 35, 2, 8, 16, 16, torch.float32, mask=mask)
    assert torch.equal(output[~mask], torch.zeros_like(output[~mask]))


def test_a_finished_row_is_left_alone(op):
    tokens = make(3, 1, 2, 8, 16, torch.float32)
    for x in tokens:
        x[1] = float("nan")
    everything = [torch.ones(3, 2, 17, num_features(8), device=DEVICE), *buffers(3, 2, 16, 8, 16, torch.float32)]
    everything[1][:, :, 0] = everything[2][:, :, 0] = 1
    everything[3][:] = 1
    # It would fold next.
    everything[3][1] = 15
    before = [x.clone() for x in everything]
    output = op(*tokens, *everything, mask=torch.tensor([[1], [0], [1]], device=DEVICE))
    assert output[1].abs().max() == 0
    assert torch.isfinite(output).all()
    for x, old in zip(everything, before):
        assert torch.equal(x[1].nan_to_num(7), old[1].nan_to_num(7))
    assert torch.equal(everything[3][:, 0].cpu(), torch.tensor([2, 15, 2], dtype=torch.int32))


def test_scale_is_used(op):
    check(op, 1, 20, 1, 8, 8, 16, torch.float32, scale=0.7)


def test_padding_columns_stay_zero(op):
    _, state, *_ = check(op, 1, 17, 1, 8, 8, 16, torch.float32)
    assert state[..., 45:].abs().max() == 0


def test_views_of_a_projection_and_parts_of_larger_buffers(op):
    """Also where rows are not 16 bytes apart. The fourth step folds."""
    tokens = make(2, 5, 2, 8, 16, torch.bfloat16)

    def with_room_for_four(state, keys, values, num_pending):
        state[:] = 1
        keys[:, :, :12], values[:, :, :12], num_pending[:] = 0.5, 0.25, 12
        return state, [keys, values, num_pending]

    state, pending = with_room_for_four(
        torch.empty(2, 2, 17, 48, device=DEVICE), *buffers(2, 2, 16, 8, 16, torch.bfloat16)
    )
    want = run(op, tokens, state, pending)
    fused = torch.cat(tokens, -1)
    odd = torch.nn.functional.pad(fused, (3, 2))[..., 3:-2]
    for x in (fused, odd):
        pools = [torch.full((4, 3, 17, 48), 7.0, device=DEVICE), *buffers(4, 3, 16, 8, 16, torch.bfloat16)[:2]]
        part, beside = with_room_for_four(
            *(pool[1:3, :2] for pool in pools), torch.empty(2, 2, dtype=torch.int32, device=DEVICE)
        )
        assert torch.equal(run(op, [x[..., :8], x[..., 8:16], x[..., 16:]], part, beside), want)
        assert torch.equal(part, state)
        assert torch.equal(beside[2], torch.ones_like(beside[2]))
        assert (pools[0][:, 2] == 7).all()
        assert (pools[0][::3] == 7).all()
        assert all(pool[:, 2].isnan().all() and pool[::3].isnan().all() for pool in pools[1:])


def test_runs_repeat_bit_by_bit(op):
    first, second = (check(op, 2, 19, 1, 8, 8, 16, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(first, second))


def test_every_element_of_the_output_is_written(monkeypatch):
    op, empty = kernel(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    mask = torch.tensor([[True] * 3, [True, False, False]], device=DEVICE)
    check(op, 2, 3, 2, 8, 48, 16, torch.float32, mask=mask)


def test_fold_pending_of_nothing_and_of_some():
    tokens = make(3, 16, 2, 8, 16, torch.float32)
    keys, values, count = buffers(3, 2, 16, 8, 16, torch.float32)
    count.copy_(torch.tensor([[0, 15], [3, 1], [0, 0]]))
    for row in range(3):
        for head in range(2):
            n = count[row, head]
            keys[row, head, :n], values[row, head, :n] = (x[row, :n, head] for x in tokens[1:])
    expected = torch.zeros(3, 2, 17, 48, dtype=torch.float64, device=DEVICE)
    for row in range(3):
        for head in range(2):
            n = count[row, head]
            part = exact_state(*(x[row : row + 1, :n, head : head + 1] for x in tokens[1:]))
            expected[row : row + 1, head : head + 1] = part
    state = torch.zeros(3, 2, 17, 48, device=DEVICE)
    fold_pending(state, keys, values, count)
    assert_close(state, expected, tolerance=1e-6)
    assert state[2].abs().max() == 0
    again = state.clone()
    fold_pending(state, keys, values, count)
    assert torch.equal(state, again)


@pytest.mark.parametrize("count", [0, 15])
def test_plain_twin_and_fold_trace_whole(count):
    """Whether or not a row folds is not known while tracing, so both must be in the graph."""

    def steps(query, key, value, state, keys, values, num_pending):
        output = torch_taylor_attention_lazy_step(query, key, value, state, keys, values, num_pending)
        seen = num_pending.clone()
        fold_pending(state, keys, values, num_pending)
        return output, seen

    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    tokens = make(2, 1, 2, 8, 16, torch.float32)
    results = []
    for function in (steps, compiled):
        state, pending = torch.ones(2, 2, 17, 48, device=DEVICE), buffers(2, 2, 16, 8, 16, torch.float32)
        pending[0][:, :, :count], pending[1][:, :, :count] = 0.5, 0.25
        pending[2][0] = count
        results.append((*function(*tokens, state, *pending), state, *pending))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert results[1][1][0, 0] == (count + 1) % 16


def arguments(**changes):
    query, key, value = make(2, 1, 2, 8, 16, torch.float32)
    keys, values, num_pending = buffers(2, 2, 16, 8, 16, torch.float32)
    state = torch.zeros(2, 2, 17, 48, device=DEVICE)
    good = {"query": query, "key": key, "value": value, "state": state}
    good |= {"pending_keys": keys, "pending_values": values, "num_pending": num_pending}
    return good | {name: change(good[name]) for name, change in changes.items()}


# What is done to an argument, what the kernel raises, and what the front does in plain PyTorch (any strides fit).
BAD = [
    ("query", lambda x: x.repeat(1, 2, 1, 1), ValueError, ValueError),
    ("key", lambda x: x.half(), TypeError, ValueError),
    ("value", lambda x: x[:, :, :1], ValueError, ValueError),
    ("state", lambda x: x.bfloat16(), TypeError, ValueError),
    ("state", lambda x: x[..., :45], ValueError, ValueError),
    ("state", lambda x: x.mT.contiguous().mT, ValueError, None),
    ("state", lambda x: x.new_zeros(2, 2, 17 * 48 + 4)[..., 4:].unflatten(-1, (17, 48)), ValueError, None),
    ("state", lambda x: x[:, :1].expand(2, 2, 17, 48), ValueError, ValueError),
    ("pending_keys", lambda x: x[:, :, :12], ValueError, ValueError),
    ("pending_keys", lambda x: x[0], ValueError, ValueError),
    ("pending_keys", lambda x: x.half(), TypeError, ValueError),
    ("pending_keys", lambda x: x.mT.contiguous().mT, ValueError, None),
    ("pending_values", lambda x: x.repeat(1, 1, 2, 1), ValueError, ValueError),
    ("pending_values", lambda x: x[..., :8], ValueError, ValueError),
    ("pending_values", lambda x: x.bfloat16(), TypeError, ValueError),
    ("num_pending", lambda x: x.long(), TypeError, ValueError),
    ("num_pending", lambda x: x[0], ValueError, ValueError),
    ("num_pending", lambda x: x.mT.contiguous().mT, ValueError, None),
]


def bad_arguments(name, change):
    bad = arguments(**{name: change})
    if name == "query":
        bad |= {other: change(bad[other]) for other in ("key", "value")}
    return bad


@pytest.mark.parametrize(("name", "change", "error", "_"), BAD)
def test_errors_of_the_kernel_name_the_argument(name, change, error, _):
    with pytest.raises(error, match=rf"^{name}: got .* (fits?|takes exactly 1)"):
        kernel()(**bad_arguments(name, change))


@pytest.mark.parametrize(("name", "change", "_", "error"), BAD)
def test_errors_of_the_front_name_the_argument(monkeypatch, name, change, _, error):
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    if error is None:
        taylor_attention_lazy_step(**bad_arguments(name, change))
    else:
        with pytest.raises(error, match=f"`{name}`"):
            taylor_attention_lazy_step(**bad_arguments(name, change))


@pytest.mark.parametrize("name", ["pending_keys", "pending_values", "num_pending"])
def test_kernel_wants_tensors(name):
    op = kernel()
    with pytest.raises(TypeError, match=rf"^{name}: got list, a tensor fits"):
        op(**arguments(**{name: lambda x: x.tolist()}))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long])
def test_front_takes_either_backend(monkeypatch, mask_dtype):
    tokens = make(2, 1, 2, 8, 16, torch.float32)
    results = []
    for backend in ["torch"] + ["triton"] * ("triton" in sys.modules):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        state, pending = torch.ones(2, 2, 17, 48, device=DEVICE), buffers(2, 2, 16, 8, 16, torch.float32)
        mask = torch.tensor([[1], [0]], device=DEVICE).to(mask_dtype)
        results.append(taylor_attention_lazy_step(*tokens, state, *pending, mask=mask))
        assert pending[2].tolist() == [[1, 1], [0, 0]]
    torch.testing.assert_close(results[0], results[-1])


def test_signatures_agree():
    def parameters(op):
        return [(p.name, p.kind, p.default) for p in inspect.signature(op).parameters.values()]

    for ours in (taylor_attention_lazy_step, torch_taylor_attention_lazy_step):
        assert parameters(ours) == parameters(kernel())


def test_benchmark_verifies_and_counts_bytes():
    kernel()
    benchmark = load_program("kernels/benchmarks/benchmark_taylor_attention_step.py")
    for name in benchmark.STEPS:
        assert 0 < benchmark.verify(name, B=1, H=1, D=8, V=16, N=16, device=DEVICE) < 5e-3
    benchmark.STEPS["zero"] = lambda token, held: torch.zeros_like(token[2])
    assert benchmark.verify("zero", B=1, H=1, D=8, V=16, N=16, device=DEVICE) == 1
    # B 128, V 112, 148 MB of state; of the tokens beside it, 31.5 are read and one is written
    state, token = 128 * 16 * 113 * 160 * 4, 128 * 16 * 2 * (16 + 112) * 2
    assert benchmark.moved_bytes("step", 128, 112) == 2 * state + token
    assert benchmark.moved_bytes("lazy step", 128, 112) == state * 65 / 64 + 32.5 * token / 2 + token
    row = {
        "B": 128,
        "V": 112,
        "name": "step",
        "ms": 0.1,
        "GB": 0.3,
        "TB_s": 3.0,
        "fraction_of_copy": 0.9,
        "state_bytes": state,
    }
    facts = {"card": "a card", "versions": {"torch": "2"}, "copy_TB_s": 3.3, "state_share": 160 / 273, "steps": [row]}
    assert "| 128, 112 | 148.1 | step | 0.1000 | 0.3000 | 3.00 | 90% |" in benchmark.table(facts)


def on_gpu(function):
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")(function))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("V", [64, 112])
@pytest.mark.parametrize("N", [16, 32, 64])
def test_gpu_two_hundred_steps(N, V, dtype):
    op, chunk = kernel(), 16
    # In parts of the batch for the oracle's sake; one call for the kernel.
    tokens = make(128, 200, 16, 16, V, dtype)
    state = torch.zeros(128, 16, V + 1, 160, device=DEVICE)
    pending = buffers(128, 16, N, 16, V, dtype)
    output = run(op, tokens, state, pending)
    fold_pending(state, *pending)
    for i in range(0, 128, chunk):
        part = [x[i : i + chunk] for x in tokens]
        exact, plain = quadratic(*(x.double() for x in part)), quadratic(*part)
        assert_close(output[i : i + chunk], exact, plain, tolerance=TOLERANCE[dtype])
        for row in range(i, i + chunk, 8):
            want = exact_state(*(x[row : row + 1] for x in tokens[1:]))
            assert_close(state[row : row + 1], want, tolerance=3e-6)


@on_gpu
@pytest.mark.parametrize("V", [8, 80, 256])
@pytest.mark.parametrize("D", [8, 16, 24, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_sizes(D, V, dtype):
    mask = torch.arange(35, device=DEVICE).expand(3, 35) % 5 != torch.arange(3, device=DEVICE)[:, None]
    for N in (16, 32, 64):
        check(kernel(), 3, 35, 3, D, V, N, dtype, mask=mask)


@on_gpu
def test_gpu_twenty_runs_repeat_bit_by_bit():
    op = kernel()
    tokens = make(16, 70, 16, 16, 112, torch.bfloat16)
    results = []
    for _ in range(20):
        state, pending = torch.zeros(16, 16, 113, 160, device=DEVICE), buffers(16, 16, 64, 16, 112, torch.bfloat16)
        results.append((run(op, tokens, state, pending), state, *pending))
        assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[-1][:2]))
        assert torch.equal(results[0][4], results[-1][4])


@on_gpu
def test_gpu_cuda_graph_goes_through_folds():
    """One graph of one step, replayed 2 N times with new tokens and masks, is the eager steps to the bit."""
    op, N = kernel(), 64
    tokens = make(5, 2 * N, 16, 16, 64, torch.bfloat16)
    mask = torch.rand(5, 2 * N, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.8
    fresh = [torch.zeros(5, 16, 65, 160, device=DEVICE), *buffers(5, 16, N, 16, 64, torch.bfloat16)]
    eager = [x.clone() for x in fresh]
    want = run(op, tokens, eager[0], eager[1:], mask)
    held = [x.clone() for x in fresh]
    token, step_mask = [x[:, :1].clone() for x in tokens], mask[:, :1].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(*token, *held, mask=step_mask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = op(*token, *held, mask=step_mask)
    for x, start in zip(held, fresh):
        x.copy_(start)
    for t in range(2 * N):
        for x, all_tokens in zip(token, tokens):
            x.copy_(all_tokens[:, t : t + 1])
        step_mask.copy_(mask[:, t : t + 1])
        graph.replay()
        assert torch.equal(output, want[:, t : t + 1])
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(held, eager))
    assert (eager[3] < mask.sum(1, keepdim=True)).all()


@on_gpu
def test_gpu_compiles_whole():
    op = kernel()
    tokens = make(2, 1, 2, 16, 64, torch.bfloat16)
    results = []
    for function in (op, torch.compile(lambda *x: op(*x), fullgraph=True)):
        state, pending = torch.ones(2, 2, 65, 160, device=DEVICE), buffers(2, 2, 16, 16, 64, torch.bfloat16)
        pending[0][:, :, :15], pending[1][:, :, :15], pending[2][:] = 0.5, 0.25, 15
        results.append((function(*tokens, state, *pending), state, *pending))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    assert results[1][4].count_nonzero() == 0
