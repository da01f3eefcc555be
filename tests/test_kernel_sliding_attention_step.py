# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The fused step of sliding-window attention against softmax attention over the whole sequence in float64.

Plain PyTorch is rotary and eager attention as transformers computes them, in the same dtype. Slots of the ring that no
token has filled hold NaN. Without a GPU the kernel runs in Triton's interpreter.
"""

import sys

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

from kernel_checks import (
    DEVICE,
    DTYPES,
    TOLERANCE,
    assert_compiles_nothing_new,
    assert_compiles_whole,
    assert_exact,
    assert_graph_replays,
    assert_refuses_gradients,
    draw,
    on_gpu,
    poison_outputs,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from based_kernels import sliding_attention_step


module = sys.modules["based_kernels.sliding_attention_step"]


def make(B, T, H, HKV, DH, dtype, seed=0):
    """query [B, T, H, DH], key, value [B, T, HKV, DH], cos, sin [B, T, DH] fp32; rows begin at different positions."""
    positions = torch.arange(T) + 9 * torch.arange(B)[:, None]
    angles = positions[..., None] * 10000.0 ** (-torch.arange(0, DH, 2) / DH)
    angles = torch.cat([angles, angles], -1).to(DEVICE)
    shapes = (B, T, H, DH), (B, T, HKV, DH), (B, T, HKV, DH)
    q, k, v = (draw(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes))
    return q, k, v, angles.cos(), angles.sin()


def attention(q, k, v, cos, sin, W, scale=None, start=None):
    """The definition in the dtype of q; row b begins at token start[b]."""
    T, DH = q.shape[1], q.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.to(q.dtype) for x in apply_rotary_pos_emb(q, k, cos.to(wide), sin.to(wide), unsqueeze_dim=2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (DH**-0.5 if scale is None else scale)
    i = torch.arange(T, device=q.device)
    sees = (i <= i[:, None]) & (i > i[:, None] - W)
    if start is not None:
        sees = sees & (i >= start[:, None, None, None])
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1, dtype=wide).to(v.dtype)
    return (weights @ v).transpose(1, 2)


def make_ring(k, v, cos, sin, W, seen):
    """The ring and the count after the last seen[b] of the tokens of row b, keys rotated in float64 and rounded."""
    _, keys = apply_rotary_pos_emb(k.double(), k.double(), cos.double(), sin.double(), unsqueeze_dim=2)
    B, T, HKV, DH = k.shape
    ring = torch.full((2, B, HKV, W, DH), float("nan"), dtype=k.dtype, device=k.device)
    for b, n in enumerate(seen):
        for r in range(max(n - W, 0), n):
            ring[0, b, :, r % W] = keys[b, T - n + r].to(k.dtype)
            ring[1, b, :, r % W] = v[b, T - n + r]
    count = torch.tensor(seen, device=k.device)[:, None].repeat(1, HKV)
    return ring[0], ring[1], count


def run(q, k, v, cos, sin, keys, values, count, mask=None, scale=None):
    """Token by token; the ring and the count are changed."""
    outputs = []
    for t in range(q.shape[1]):
        token = [x[:, t : t + 1] for x in (q, k, v, cos, sin)]
        m = None if mask is None else mask[:, t : t + 1]
        outputs.append(sliding_attention_step(*token, keys, values, count, scale=scale, mask=m))
    return torch.cat(outputs, 1)


def compare(inputs, W, seen=None, steps=None, scale=None):
    """Row b begins with a ring of the seen[b] tokens before the last `steps`, which are computed one by one."""
    q, k, v, cos, sin = inputs
    B, T = q.shape[:2]
    seen = [0] * B if seen is None else seen
    past = T - (T if steps is None else steps)
    ring = make_ring(*(x[:, :past] for x in (k, v, cos, sin)), W, seen)
    start = torch.tensor([past - n for n in seen], device=DEVICE)
    output = run(*(x[:, past:] for x in inputs), *ring, scale=scale)
    plain = attention(*inputs, W, scale, start)[:, past:]
    oracle = attention(*(x.double() for x in inputs), W, scale, start)[:, past:]
    assert_exact(output, plain, oracle)
    keys, values, count = make_ring(k, v, cos, sin, W, [n + T - past for n in seen])
    # a unit in the last place: two roundings of the same number, and the interpreter rounds bf16 down
    torch.testing.assert_close(ring[0], keys, rtol=2 * torch.finfo(k.dtype).eps, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(ring[1], values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ring[2], count)


@pytest.mark.parametrize(
    ("B", "H", "HKV", "DH", "W"), [(2, 2, 2, 48, 5), (1, 4, 2, 80, 3), (2, 3, 1, 112, 1), (1, 2, 1, 8, 2)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_the_sequence(monkeypatch, B, H, HKV, DH, W, dtype):
    """From an empty ring on, longer than two windows."""
    inputs = make(B, 2 * W + 3, H, HKV, DH, dtype)
    poison_outputs(monkeypatch)
    compare(inputs, W)


@pytest.mark.parametrize(("H", "HKV", "DH"), [(2, 2, 112), (3, 1, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_of_65_on_its_way_round(H, HKV, DH, dtype):
    """A ring nearly full, one just full, and one with three tokens among NaNs."""
    compare(make(3, 70, H, HKV, DH, dtype), 65, seen=[63, 66, 3], steps=4)


@pytest.mark.parametrize(("DH", "W"), [(256, 70), (8, 300)])
def test_several_blocks(monkeypatch, DH, W):
    monkeypatch.setattr(module, "_TILE", dict.fromkeys((2, 4), 16 * DH))
    compare(make(2, W + 6, 2, 1, DH, torch.float32), W, seen=[W + 3, 40], steps=3)


@pytest.mark.parametrize("factor", [30, -30])
def test_weights_far_apart(monkeypatch, factor):
    """Scores of hundreds, the largest in any block: the sum is rescaled without overflow."""
    # A score of hundreds in fp32 has an error of as many units of the exponent's, in any order of its sum.
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-5)
    monkeypatch.setattr(module, "_TILE", dict.fromkeys((2, 4), 4 * 16))
    q, k, v, cos, sin = make(2, 22, 2, 2, 16, torch.float32)
    compare((q * factor, k, v, cos, sin), 17, seen=[19, 5], steps=3)


def test_scale_is_used():
    compare(make(1, 9, 2, 1, 16, torch.float32), 5, scale=0.7)


def test_finished_rows_change_nothing():
    """Rows that finish at different times, one that never was, one with a gap: as if the others were all there is."""
    q, k, v, cos, sin = make(4, 8, 2, 1, 16, torch.float32)
    W = 3
    exists = torch.arange(8, device=DEVICE) < torch.tensor([[8], [5], [0], [8]], device=DEVICE)
    exists[3, 2:4] = False
    for x in (q, k, v, cos, sin):
        x[~exists] = float("nan")
    for kind in (torch.bool, torch.int64):
        ring = make_ring(*(x[:, :0] for x in (k, v, cos, sin)), W, [0] * 4)
        output = run(q, k, v, cos, sin, *ring, mask=exists.to(kind))
        assert not output[~exists].any()
        for row in range(4):
            inputs = [x[row : row + 1, exists[row]] for x in (q, k, v, cos, sin)]
            want = make_ring(*inputs[1:], W, [inputs[0].shape[1]])
            for a, b in zip(ring, want):
                torch.testing.assert_close(a[row : row + 1], b, rtol=1e-6, atol=1e-6, equal_nan=True)
            if exists[row].any():
                oracle = attention(*(x.double() for x in inputs), W)
                assert_exact(output[row : row + 1, exists[row]], attention(*inputs, W), oracle)


def test_the_sum_does_not_depend_on_where_the_ring_stands():
    """The same tokens elsewhere in the ring, behind a count of any size, give the same bits."""
    q, k, v, cos, sin = make(1, 8, 2, 1, 16, torch.bfloat16)
    keys, values, count = make_ring(*(x[:, :7] for x in (k, v, cos, sin)), 5, [7])
    token = [x[:, 7:] for x in (q, k, v, cos, sin)]
    outputs = []
    for shift in (0, 1, 3, 2**40 + 2):
        ring = [x.roll(shift % 5, dims=2) for x in (keys, values)]
        later = count + shift
        outputs.append(sliding_attention_step(*token, *ring, later))
        assert (later == 8 + shift).all()
    assert all(torch.equal(x, outputs[0]) for x in outputs)


def test_strides_of_any_kind():
    q, k, v, cos, sin = make(2, 1, 2, 2, 16, torch.float32, seed=3)

    def step(q, k, v, cos, sin, keys=None, values=None, count=None):
        ring = [draw(2, 2, 5, 16, seed=s) for s in (5, 6)]
        n = torch.full((2, 2), 7, device=DEVICE)
        for given, x in zip((keys, values, count), (*ring, n)):
            if given is not None:
                given.copy_(x)
        keys, values, count = keys if keys is not None else ring[0], values if values is not None else ring[1], count
        count = n if count is None else count
        return sliding_attention_step(q, k, v, cos, sin, keys, values, count), keys, values, count

    want = step(q, k, v, cos, sin)
    fused = torch.cat([q, k, v], -1)
    views = fused.split(16, -1)
    odd = torch.nn.functional.pad(fused, (3, 2))[..., 3:-2].split(16, -1)
    swapped = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    heads_first = [x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3) for x in (q, k, v)]
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (cos, sin)]
    both = torch.cat([cos, sin], -1).split(16, -1)
    for inputs in (views, odd, swapped, heads_first, (q, views[1], v), (q, k, views[2])):
        for angles in ((cos, sin), turned, both, (cos, both[1])):
            assert all(torch.equal(a, b) for a, b in zip(step(*inputs, *angles), want))
    # the ring and the count inside larger ones
    pool, other = torch.full((4, 3, 9, 16), 7.0, device=DEVICE), torch.full((3, 4, 5, 16), 7.0, device=DEVICE)
    counts = torch.full((4, 3, 2), 7, device=DEVICE)
    parts = pool[1:3, 1:, 2:7], other.transpose(0, 1)[1:3, 1:], counts[1:3, 1:, 1]
    assert all(torch.equal(a, b) for a, b in zip(step(q, k, v, cos, sin, *parts), want))
    for x in parts:
        x.fill_(7)
    assert (pool == 7).all()
    assert (other == 7).all()
    assert (counts == 7).all()
    # one position for all rows
    one = step(q, k, v, cos[:1], sin[:1])
    repeated = step(q, k, v, cos[:1].repeat(2, 1, 1), sin[:1].expand(2, 1, 16))
    assert all(torch.equal(a, b) for a, b in zip(one, repeated))


def bad_calls():
    def replace(**changes):
        def call():
            q, k, v, cos, sin = make(2, 1, 4, 2, 16, torch.float32)
            ring = torch.zeros(2, 2, 2, 5, 16, device=DEVICE)
            arguments = {"query": q, "key": k, "value": v, "cos": cos, "sin": sin, "keys": ring[0], "values": ring[1]}
            arguments["count"] = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
            arguments.update({name: change(arguments.get(name)) for name, change in changes.items()})
            return sliding_attention_step(**arguments)

        return call

    return [
        ("query", TypeError, "float32 or float16", replace(query=lambda x: x.double())),
        ("query", ValueError, r"\[batch, 1, heads, head_dim\]", replace(query=lambda x: x[0])),
        ("query", ValueError, r"\[batch, 1, heads, head_dim\]", replace(query=lambda x: x[:0])),
        ("query", ValueError, "exactly 1", replace(query=lambda x: x.repeat(1, 2, 1, 1))),
        ("query", ValueError, "multiple of 8 up to 256", replace(query=lambda x: x[..., :12])),
        ("query", ValueError, "multiple of 8 up to 256", replace(query=lambda x: x.repeat(1, 1, 1, 17))),
        ("key", TypeError, "dtype of query", replace(key=lambda x: x.half())),
        ("key", ValueError, "a divisor of 4", replace(query=lambda x: x, key=lambda x: x.repeat(1, 1, 2, 1)[:, :, :3])),
        ("key", ValueError, r"\[2, 1, a divisor of 4, 16\]", replace(key=lambda x: x[:1])),
        ("value", TypeError, "dtype of query", replace(value=lambda x: x.half())),
        ("value", ValueError, "shape of key", replace(value=lambda x: x[:, :, :1])),
        ("cos", TypeError, "float32 fits", replace(cos=lambda x: x.bfloat16())),
        ("cos", ValueError, r"\[2 or 1, 1, 16\]", replace(cos=lambda x: x.repeat(3, 1, 1))),
        ("sin", ValueError, r"\[2 or 1, 1, 16\]", replace(sin=lambda x: x[..., :8])),
        ("keys", ValueError, "W from 1 to 4096", replace(keys=lambda x: x[:, :, :0])),
        ("keys", ValueError, "W from 1 to 4096", replace(keys=lambda x: x[0])),
        ("keys", ValueError, "W from 1 to 4096", replace(keys=lambda x: None)),
        ("keys", TypeError, "float32 fits", replace(keys=lambda x: x.half())),
        ("keys", ValueError, r"\[2, 2, 5, 16\]", replace(keys=lambda x: x[:, :1])),
        ("keys", ValueError, "contiguous last two", replace(keys=lambda x: x.mT.contiguous().mT)),
        ("keys", ValueError, "row of its own", replace(keys=lambda x: x[:, :1].expand(2, 2, 5, 16))),
        ("keys", ValueError, "multiples of 8", replace(keys=lambda x: x.as_strided(x.shape, (153, 80, 16, 1)))),
        ("values", ValueError, r"\[2, 2, 5, 16\]", replace(values=lambda x: x[:, :, :4])),
        ("count", TypeError, "int64", replace(count=lambda x: x.int())),
        ("count", TypeError, "int64", replace(count=lambda x: 3)),
        ("count", ValueError, r"\[2, 2\]", replace(count=lambda x: x[:, 0])),
        ("count", ValueError, "row of its own", replace(count=lambda x: x[:, :1].expand(2, 2))),
        ("scale", ValueError, "> 0", replace(scale=lambda x: -1)),
        ("scale", TypeError, "number", replace(scale=lambda x: torch.ones(()))),
        ("mask", ValueError, r"\[2, 1\]", replace(mask=lambda x: torch.ones(2, 5, device=DEVICE))),
        ("mask", TypeError, "a tensor", replace(mask=lambda x: True)),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "error", "fix", "call"), bad_calls())
def test_errors_name_the_argument_and_the_fix(name, error, fix, call):
    with pytest.raises(error, match=rf"^{name}: got .*{fix}"):
        call()


@pytest.mark.parametrize("name", ["query", "key", "value", "keys", "values"])
def test_forward_only(name):
    inputs = dict(zip(("query", "key", "value", "cos", "sin"), make(1, 1, 1, 1, 8, torch.float32)))
    inputs["keys"], inputs["values"] = torch.zeros(2, 1, 1, 3, 8, device=DEVICE)
    inputs["count"] = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    assert_refuses_gradients(lambda: sliding_attention_step(**inputs), name, inputs[name])


# The 1.3B shape.
H, DH, W = 16, 112, 65


def model_size(B, seen=100, dtype=torch.bfloat16):
    """One token and its ring, for B rows that have seen different numbers of tokens."""
    inputs = make(B, 1, H, H, DH, dtype)
    ring = [draw(B, H, W, DH, dtype=dtype, seed=s) for s in (5, 6)]
    count = (seen + torch.arange(B, device=DEVICE))[:, None].repeat(1, H)
    return inputs, [*ring, count]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 3, 128])
def test_gpu_model_size(monkeypatch, B, dtype):
    inputs = make(B, W + 20, H, H, DH, dtype)
    poison_outputs(monkeypatch)
    compare(inputs, W, seen=[(7 * b) % (W + 10) for b in range(B)], steps=10)


@on_gpu
@pytest.mark.parametrize("DH", [8, 48, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize(("HKV", "W"), [(2, 129), (6, 64), (3, 1)])
def test_gpu_sizes(DH, HKV, W):
    compare(make(2, W + 9, 6, HKV, DH, torch.bfloat16), W, seen=[W + 1, W // 2], steps=8)


@on_gpu
def test_gpu_longest_window():
    compare(make(1, 4106, 2, 1, 64, torch.bfloat16), 4096, seen=[4100], steps=6)


@on_gpu
def test_gpu_repeats_bit_by_bit():
    inputs, ring = model_size(128)
    first = sliding_attention_step(*inputs, *(x.clone() for x in ring))
    for _ in range(20):
        assert torch.equal(sliding_attention_step(*inputs, *(x.clone() for x in ring)), first)


@on_gpu
@pytest.mark.parametrize("B", [1, 128])
def test_gpu_cuda_graph(B):
    """Past the end of the ring and on: the slot is read on the GPU."""
    inputs, ring = model_size(B, seen=W - 2)
    mask = torch.arange(B, device=DEVICE)[:, None] % 3 != 1
    assert_graph_replays(lambda: sliding_attention_step(*inputs, *ring, mask=mask), *ring)


@on_gpu
def test_gpu_compiles_whole():
    inputs, ring = model_size(3)
    mask = torch.tensor([[1], [0], [1]], device=DEVICE)
    for m in (None, mask):
        call = lambda q, *rest, m=m: sliding_attention_step(q * 2, *rest, mask=m)  # noqa: E731
        assert_compiles_whole(call, *inputs, *ring, changed=ring)


@on_gpu
def test_gpu_new_batches_and_counts_compile_nothing():
    def call(B):
        inputs, ring = model_size(B, seen=B)
        sliding_attention_step(*inputs, *ring)
        sliding_attention_step(*inputs, *ring, mask=torch.ones(B, 1, device=DEVICE))

    assert_compiles_nothing_new(call, [1, 2, 3, 16, 17, 128])
