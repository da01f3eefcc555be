# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The fused sliding-window attention of whole sequences, and its gradients, against softmax attention in float64.

Plain PyTorch is rotary and eager attention as transformers computes them, in the same dtype. What does not exist holds
NaN. Without a GPU the kernels run in Triton's interpreter; then follows the model with them, and the same in float64.
"""

import copy
import sys
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch


pytest.importorskip("triton", reason="the fused kernels need Triton")

from document_rows import document_rows, pad
from kernel_checks import (
    DEVICE,
    DTYPES,
    GPU,
    TOLERANCE,
    assert_compiles_nothing_new,
    assert_exact,
    assert_graph_replays,
    draw,
    on_gpu,
    poison_outputs,
    rms_error,
)
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from based_kernels import sliding_attention
from transformers_based import backend, modeling_based, ops
from transformers_based.cache_based import WindowCacheLayer


module = sys.modules["based_kernels.sliding_attention"]
# Names of what has gradients.
NAMES = ("query", "key", "value", "past_keys", "past_values")


@pytest.fixture(autouse=True)
def allow_for_gradients(monkeypatch):
    """A GPU takes three products of tf32 for one of fp32; and the interpreter cuts off weights as well as results."""
    monkeypatch.setitem(TOLERANCE, torch.float32, 3e-6 if GPU else 1e-6)
    if not GPU:
        monkeypatch.setitem(TOLERANCE, torch.bfloat16, 2**-6)


class Case(NamedTuple):
    """What the op is given; the tensors require gradients."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    past_keys: torch.Tensor | None
    past_values: torch.Tensor | None
    mask: torch.Tensor | None
    document_ids: torch.Tensor | None

    def leaves(self):
        return [x for x in (getattr(self, name) for name in NAMES) if x is not None and x.requires_grad]

    def call(self, op, window, scale=None):
        q, k, v, cos, sin, *rest = self
        return op(q, k, v, cos, sin, window=window, scale=scale, **dict(zip(self._fields[5:], rest)))

    def to_double(self):
        def convert(x):
            if x is None or not x.is_floating_point():
                return x
            return x.detach().double().requires_grad_(x.requires_grad)

        return Case(*(convert(x) for x in self))


def angles(B, T, D, first=0):
    """cos, sin [B, T, D] fp32; rows begin at different positions."""
    positions = first + torch.arange(T) + 9 * torch.arange(B)[:, None]
    x = positions[..., None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    x = torch.cat([x, x], dim=-1).to(DEVICE)
    return x.cos(), x.sin()


def make(B, T, H, HKV, D, dtype, P=0, masked=False, packed=False, seed=0):
    """`masked`: of the rows, one begins after half of the past, one does not exist, one begins with the second new
    token; and one in five of all tokens is missing."""
    tensors = [draw(B, T, heads, D, dtype=dtype, seed=seed + i) for i, heads in enumerate((H, HKV, HKV))]
    past = [draw(B, HKV, P, D, dtype=dtype, seed=seed + 3 + i) for i in range(2)] if P else [None, None]
    mask = document_ids = None
    if masked:
        first = torch.tensor([(0, P // 2 + 3, P + T, P + 1)[b % 4] for b in range(B)], device=DEVICE)
        mask = torch.arange(P + T, device=DEVICE) >= first[:, None]
        mask = mask & (draw(B, P + T, seed=seed + 5) > -0.8)
        for x in tensors:
            x[~mask[:, P:]] = float("nan")
        for x in past if P else []:
            x.transpose(1, 2)[~mask[:, :P]] = float("nan")
    if packed:
        starts = draw(B, T, seed=seed + 6) > 1.2
        document_ids = starts.long().cumsum(1)
    for x in (*tensors, *past):
        if x is not None:
            x.requires_grad_()
    return Case(*tensors, *angles(B, T, D, first=P), *past, mask, document_ids)


def clean(case):
    """0 in place of NaN under padding, for plain PyTorch to compare with."""
    return case._replace(**{n: x.detach().nan_to_num(0).requires_grad_() for n, x in zip(NAMES, case.leaves())})


def attention(q, k, v, cos, sin, *, window, scale=None, mask=None, document_ids=None, past_keys=None, past_values=None):
    """The definition, in the dtype of v."""
    T, D = q.shape[1], q.shape[3]
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k = (x.to(v.dtype) for x in apply_rotary_pos_emb(q, k, cos.to(wide), sin.to(wide), unsqueeze_dim=2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    P = 0
    if past_keys is not None:
        P = past_keys.shape[2]
        k, v = torch.cat([past_keys, k], dim=2), torch.cat([past_values, v], dim=2)
    i, j = torch.arange(P, P + T, device=q.device)[:, None], torch.arange(P + T, device=q.device)
    sees = ((j <= i) & (j > i - window))[None, None]
    exists = torch.ones(len(q), P + T, dtype=torch.bool, device=q.device) if mask is None else mask.bool()
    q, k, v = (x.masked_fill(~e[:, None, :, None], 0) for x, e in ((q, exists[:, P:]), (k, exists), (v, exists)))
    sees = sees & exists[:, None, None] & exists[:, None, P:, None]
    if document_ids is not None:
        sees = sees & (document_ids[:, None, :, None] == document_ids[:, None, None])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (D**-0.5 if scale is None else scale)
    # a row that does not exist sees nothing
    alone = (~sees.any(-1, keepdim=True)) & (i == j)
    weights = scores.masked_fill(~(sees | alone), float("-inf")).softmax(-1, dtype=wide).to(v.dtype)
    return (weights @ v).transpose(1, 2)


def evaluate(op, case, window, scale, d_output):
    output = case.call(op, window, scale)
    return output, torch.autograd.grad(output, case.leaves(), d_output.to(output.dtype))


def compare(case, window, scale=None, d_output=None):
    """Output and every gradient, ours and plain PyTorch's, against float64; -> ours."""
    if d_output is None:
        d_output = draw(*case.query.shape, dtype=case.value.dtype, seed=9)
    ours, plain = (evaluate(op, case, window, scale, d_output) for op in (sliding_attention, attention))
    exact = evaluate(attention, case.to_double(), window, scale, d_output)
    assert_exact(ours[0], plain[0], exact[0])
    for got, other, want in zip(ours[1], plain[1], exact[1]):
        if rms_error(torch.zeros_like(want), want + 1) > 1e-12 and want.abs().max() > 1e-9:
            # The roundings of a few dozen numbers are a matter of luck: three standard deviations of their mean square.
            luck = 1 + 3 / want.numel() ** 0.5 if got.dtype != torch.float32 else 1
            assert_exact(got, other, want, luck)
        else:
            # a window of one token: no score matters
            assert got.abs().max() < 1e-2 * d_output.abs().max()
    return ours


# B, T, H, HKV, D, W, P: tiles are of 16 and 32 tokens, windows reach none, one or several of them back
SIZES = [
    (2, 37, 2, 1, 16, 5, 0),
    (1, 1, 2, 2, 48, 3, 0),
    (1, 70, 1, 1, 112, 33, 0),
    (1, 33, 3, 1, 8, 7, 6),
    (1, 18, 2, 2, 24, 65, 64),
    (1, 32, 1, 1, 80, 1, 0),
    (1, 3, 2, 1, 128, 40, 70),
]


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(x, torch.float32) for x in SIZES] + [(x, dtype) for x in SIZES[3:5] for dtype in DTYPES[1:]],
    ids=str,
)
def test_sizes(monkeypatch, sizes, dtype):
    B, T, H, HKV, D, W, P = sizes
    case = make(B, T, H, HKV, D, dtype, P)
    poison_outputs(monkeypatch)
    compare(case, W)


@pytest.mark.parametrize(("T", "P", "W"), [(35, 0, 9), (19, 40, 33)])
def test_padding(monkeypatch, T, P, W):
    """Left and in between; a row of nothing but padding. NaN there reaches nobody; output and gradients there are 0."""
    case = make(4, T, 1, 1, 16, torch.float32, P, masked=True)
    poison_outputs(monkeypatch)
    missing = ~case.mask[:, P:]
    d_output = draw(*case.query.shape, seed=9)
    d_output[missing] = float("nan")
    finite = d_output.nan_to_num(0)
    output, gradients = evaluate(sliding_attention, case, W, None, d_output)
    assert not output[missing].any()
    assert not any(x[missing].any() for x in gradients[:3])
    assert not any(x.transpose(1, 2)[~case.mask[:, :P]].any() for x in gradients[3:])
    # Another dtype is another build, in which a GPU may contract products and sums otherwise.
    ours = compare(clean(case)._replace(mask=case.mask if GPU else case.mask.long()), W, d_output=finite)
    assert torch.equal(ours[0], output)
    assert all(torch.equal(a, b) for a, b in zip(ours[1], gradients))


@pytest.mark.parametrize("masked", [False, True])
def test_packed_documents(monkeypatch, masked):
    case = make(2, 37, 2 - masked, 1, 16, torch.float32, masked=masked, packed=True)
    zeroed = clean(case)
    poison_outputs(monkeypatch)
    ours = compare(zeroed, 17)
    narrow = zeroed._replace(document_ids=case.document_ids.int())
    assert torch.equal(ours[0], narrow.call(sliding_attention, 17))
    if not masked:
        # each document alone
        for document in case.document_ids[1].unique():
            here = case.document_ids[1] == document
            alone = Case(*(x[1:, here] for x in case[:5]), *[None] * 4)
            output = alone.call(sliding_attention, 17)
            torch.testing.assert_close(ours[0][1:, here], output, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("factor", [30, -30])
def test_weights_far_apart(monkeypatch, factor):
    """Scores of hundreds, the largest in any tile: the sum is rescaled without overflow."""
    # A score of hundreds in fp32 has an error of as many units of the exponent's, in any order of its sum.
    monkeypatch.setitem(TOLERANCE, torch.float32, 3e-5)
    case = make(1, 70, 1, 1, 16, torch.float32)
    compare(case._replace(query=(case.query.detach() * factor).requires_grad_()), 45)


def test_scale_is_used():
    compare(make(1, 9, 2, 1, 16, torch.float32), 5, scale=0.7)


def test_only_what_is_asked_for():
    """Each gradient alone; keys and values that want none cost no kernel."""
    case = make(1, 20, 2, 1, 16, torch.float32, P=5)
    _, want = evaluate(sliding_attention, case, 9, None, torch.ones_like(case.query))
    frozen = {name: getattr(case, name).detach() for name in NAMES}
    for name, gradient in zip(NAMES, want):
        one = case._replace(**{**frozen, name: getattr(case, name)})
        assert torch.equal(evaluate(sliding_attention, one, 9, None, torch.ones_like(case.query))[1][0], gradient)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sliding_attention_bwd_key_kernel", None)
        one = case._replace(**{**frozen, "query": case.query})
        evaluate(sliding_attention, one, 9, None, torch.ones_like(case.query))
    with torch.no_grad():
        assert not case.call(sliding_attention, 9).requires_grad


def test_a_second_derivative_is_refused():
    case = make(1, 3, 1, 1, 16, torch.float32)
    with pytest.raises(RuntimeError, match="sliding_attention: got create_graph=True"):
        torch.autograd.grad(case.call(sliding_attention, 2).sum(), case.leaves(), create_graph=True)


def test_mixed_dtypes():
    """An adapter may leave query in fp32 where value is not: all is rounded to value's dtype, once."""
    case = make(1, 20, 2, 1, 16, torch.float16)
    case = case._replace(query=draw(1, 20, 2, 16, seed=7).requires_grad_())
    ours = compare(case, 9)
    assert [x.dtype for x in (ours[0], *ours[1])] == [torch.float16, torch.float32, torch.float16, torch.float16]


def test_strides_of_any_kind():
    """A merged projection, odd addresses, swapped dimensions, expanded gradients, one row of angles for all."""
    case = make(2, 9, 2, 2, 16, torch.float32, P=3)
    leaves = [x.detach() for x in case.leaves()]
    q, k, v, past_k, past_v = leaves
    cos, sin = case.cos[:1].clone(), case.sin[:1].clone()
    weight = torch.ones((), device=DEVICE)

    def run(q, k, v, cos, sin, past_k, past_v):
        inputs = [x.detach().as_strided(x.shape, x.stride(), x.storage_offset()) for x in (q, k, v, past_k, past_v)]
        inputs = [x.requires_grad_() for x in inputs]
        output = sliding_attention(*inputs[:3], cos, sin, window=5, past_keys=inputs[3], past_values=inputs[4])
        return output, *torch.autograd.grad(output, inputs, weight.expand(output.shape))

    want = run(q, k, v, cos.repeat(2, 1, 1), sin.repeat(2, 1, 1), past_k, past_v)
    merged = torch.cat([q, k, v], dim=-1)
    swapped = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    heads_first = [x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3) for x in (q, k, v)]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (past_k, past_v)]
    both = torch.cat([cos, sin], dim=-1).split(16, dim=-1)
    folded = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cos, sin)]
    for inputs, angle, past in (
        (merged.split(16, dim=-1), both, (past_k, past_v)),
        (swapped, folded, turned),
        (heads_first, (cos, both[1]), (past_k, turned[1])),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run(*inputs, *angle, *past), want))
    odd = torch.nn.functional.pad(merged, (3, 2))[..., 3:-2].split(16, dim=-1)
    assert all(torch.equal(a, b) for a, b in zip(run(*odd, cos, sin, past_k, past_v), want))
    # mask and documents with gaps
    case = make(2, 9, 2, 2, 16, torch.float32, masked=True, packed=True)
    spread = {n: torch.stack([getattr(case, n)] * 2, dim=-1)[..., 0] for n in ("mask", "document_ids")}
    assert torch.equal(case._replace(**spread).call(sliding_attention, 5), case.call(sliding_attention, 5))


def test_two_runs_and_other_rows_give_the_same_bits():
    case = make(2, 20, 1, 1, 16, torch.bfloat16)
    d_output = draw(*case.query.shape, dtype=torch.bfloat16, seed=9)
    first, again = (evaluate(sliding_attention, case, 9, None, d_output) for _ in range(2))
    one = case._replace(**{n: getattr(case, n)[1:2].detach().requires_grad_() for n in NAMES[:3]})
    one = one._replace(cos=case.cos[1:2], sin=case.sin[1:2])
    alone = evaluate(sliding_attention, one, 9, None, d_output[1:2])
    for a, b, c in zip((first[0], *first[1]), (again[0], *again[1]), (alone[0], *alone[1])):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


def test_a_sequence_in_pieces_is_the_sequence():
    """Each piece goes on from the rotated keys of those before it, gradients included."""
    case = make(1, 40, 1, 1, 16, torch.float32)
    whole = evaluate(sliding_attention, case, 9, None, torch.ones_like(case.query))
    _, rotated = apply_rotary_pos_emb(case.query, case.key, case.cos, case.sin, unsqueeze_dim=2)
    outputs, ends = [], [0, 1, 7, 40]
    for start, end in pairwise(ends):
        past = [x[:, max(start - 8, 0) : start].transpose(1, 2) if start else None for x in (rotated, case.value)]
        piece = Case(*(x[:, start:end] for x in case[:5]), *past, None, None)
        outputs.append(piece.call(sliding_attention, 9))
    output = torch.cat(outputs, dim=1)
    gradients = torch.autograd.grad(output, case.leaves(), torch.ones_like(output))
    for a, b in zip((output, *gradients), (whole[0], *whole[1])):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def bad_calls():
    def replace(**changes):
        def call():
            case = make(2, 3, 4, 2, 16, torch.float32, P=5)._asdict()
            case = {**case, "window": 4, "scale": None}
            case.update({name: change(case[name]) for name, change in changes.items()})
            return sliding_attention(**case)

        return call

    ids = torch.zeros(2, 3, dtype=torch.long, device=DEVICE)
    no_past = {name: lambda x: None for name in ("past_keys", "past_values")}
    return [
        ("query", TypeError, "float16 or bfloat16", replace(query=lambda x: x.double())),
        ("query", ValueError, r"\[batch, time, heads, head_dim\]", replace(query=lambda x: x[0])),
        ("query", ValueError, r"\[batch, time, heads, head_dim\]", replace(query=lambda x: x[:, :0])),
        ("query", ValueError, "multiple of 8 up to 128", replace(query=lambda x: x[..., :12])),
        ("query", ValueError, "multiple of 8 up to 128", replace(query=lambda x: x.repeat(1, 1, 1, 9))),
        ("key", ValueError, "a divisor of 4", replace(key=lambda x: x.repeat(1, 1, 2, 1)[:, :, :3])),
        ("key", ValueError, r"\[2, 3, a divisor of 4, 16\]", replace(key=lambda x: x[:, :2])),
        ("value", ValueError, "shape of key", replace(value=lambda x: x[:, :, :1])),
        ("value", TypeError, "float16 or bfloat16", replace(value=lambda x: None)),
        ("cos", TypeError, "float32 fits", replace(cos=lambda x: x.bfloat16())),
        ("sin", ValueError, r"\[2 or 1, 3, 16\]", replace(sin=lambda x: x[:, :1])),
        ("window", TypeError, "int", replace(window=lambda x: 4.0)),
        ("window", ValueError, "1 or more", replace(window=lambda x: 0)),
        ("scale", ValueError, "> 0", replace(scale=lambda x: -1)),
        ("mask", ValueError, r"\[2, 8\]", replace(mask=lambda x: torch.ones(2, 3, device=DEVICE))),
        ("mask", TypeError, "a tensor", replace(mask=lambda x: True)),
        ("document_ids", TypeError, "int32 or int64", replace(document_ids=lambda x: ids.float(), **no_past)),
        ("document_ids", ValueError, r"\[2, 3\]", replace(document_ids=lambda x: ids[:1], **no_past)),
        ("document_ids", ValueError, "one document a row", replace(document_ids=lambda x: ids)),
        ("past_keys", ValueError, "both or neither", replace(past_values=lambda x: None)),
        ("past_keys", ValueError, r"\[2, 2, P, 16\]", replace(past_keys=lambda x: x.transpose(1, 2))),
        ("past_keys", TypeError, "float32 fits", replace(past_keys=lambda x: x.half())),
        ("past_values", ValueError, "shape of past_keys", replace(past_values=lambda x: x[:, :, :1])),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "error", "fix", "call"), bad_calls())
def test_errors_name_the_argument_and_the_fix(name, error, fix, call):
    with pytest.raises(error, match=rf"^{name}: got .*{fix}"):
        call()


# The 1.3B shape: heads, head_dim, window; and that of 360M.
BIG, SMALL = (16, 112, 65), (16, 64, 65)
OPTIONS = {
    "plain": {},
    "past": {"P": 64, "masked": True},
    "packed": {"packed": True, "masked": True},
}


@on_gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [BIG, SMALL], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_model_size(monkeypatch, shape, options, dtype):
    """Every build of a dtype: output and all gradients."""
    H, D, W = shape
    case = clean(make(3, 517, H, H, D, dtype, **OPTIONS[options]))
    poison_outputs(monkeypatch)
    compare(case, W)


@on_gpu
@pytest.mark.parametrize(
    ("D", "HKV", "W", "P"),
    [
        (8, 2, 129, 0),
        (16, 6, 64, 200),
        (24, 3, 1, 0),
        (32, 2, 65, 64),
        (48, 6, 129, 128),
        (72, 2, 33, 0),
        (80, 1, 65, 3),
        (96, 3, 100, 0),
        (128, 2, 129, 70),
    ],
)
def test_gpu_sizes(monkeypatch, D, HKV, W, P):
    case = make(2, 301, 6, HKV, D, torch.bfloat16, P)
    poison_outputs(monkeypatch)
    compare(case, W)


@on_gpu
@pytest.mark.parametrize(("T", "W"), [(3001, 1024), (2100, 5000), (5000, 129)])
def test_gpu_long(T, W):
    compare(make(1, T, 4, 2, 112, torch.bfloat16), W)


@on_gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_gpu_repeats_bit_by_bit(options):
    H, D, W = BIG
    case = clean(make(4, 2048, H, H, D, torch.bfloat16, **OPTIONS[options]))
    d_output = draw(*case.query.shape, dtype=torch.bfloat16, seed=9)
    output, gradients = evaluate(sliding_attention, case, W, None, d_output)
    for _ in range(20):
        again = evaluate(sliding_attention, case, W, None, d_output)
        assert all(torch.equal(a, b) for a, b in zip((output, *gradients), (again[0], *again[1])))


@on_gpu
def test_gpu_more_than_2_to_the_31_elements():
    """The last tokens of a row of 1.3 million, and their gradients, have the bits of a row of these alone."""
    T, (H, D, W), size = 1_300_032, BIG, 512
    assert T * H * D > 2**31
    merged = torch.randn(1, T, 3 * H * D, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = (x.view(1, T, H, D).detach().requires_grad_() for x in merged.split(H * D, dim=-1))
    x = torch.arange(T, device=DEVICE)[:, None] * 10000.0 ** (-torch.arange(0, D, 2, device=DEVICE) / D)
    cos, sin = (f(torch.cat([x, x], dim=-1))[None] for f in (torch.cos, torch.sin))
    output = sliding_attention(q, k, v, cos, sin, window=W)
    weight = torch.ones((), device=DEVICE, dtype=torch.bfloat16)
    gradients = torch.autograd.grad(output, (q, k, v), weight.expand(output.shape))
    last = [x[:, -size:].detach().requires_grad_() for x in (q, k, v)]
    alone = sliding_attention(*last, cos[:, -size:], sin[:, -size:], window=W)
    # tiles begin with the same tokens; the second half sees none of those left out
    seen = slice(-size // 2, None)
    assert torch.equal(output[:, seen], alone[:, seen])
    for a, b in zip(gradients, torch.autograd.grad(alone, last, weight.expand(alone.shape))):
        assert torch.equal(a[:, seen], b[:, seen])
        assert b[:, seen].abs().max() > 0


@on_gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_gpu_cuda_graph(options):
    H, D, W = BIG
    case = clean(make(2, 100, H, H, D, torch.bfloat16, **OPTIONS[options]))
    with torch.no_grad():
        assert_graph_replays(lambda: case.call(sliding_attention, W))


@on_gpu
def test_gpu_cuda_graph_of_a_training_step():
    H, D, W = BIG
    case = make(2, 100, H, H, D, torch.bfloat16)
    d_output = draw(*case.query.shape, dtype=torch.bfloat16, seed=9)

    def step():
        output, gradients = evaluate(sliding_attention, case, W, None, d_output)
        return output.detach(), *gradients

    assert_graph_replays(step)


@on_gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_gpu_compiles_whole(options):
    """Forward and backward, with and without gradients."""
    H, D, W = BIG
    case = clean(make(2, 100, H, H, D, torch.bfloat16, **OPTIONS[options]))
    leaves = case.leaves()

    def function(query, key, value, past_keys=None, past_values=None):
        # a product each, for the compiler to have something of its own
        output = sliding_attention(
            query * 2,
            key,
            value,
            case.cos,
            case.sin,
            window=W,
            mask=case.mask,
            document_ids=case.document_ids,
            past_keys=past_keys,
            past_values=past_values,
        )
        return output.float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    want, got = function(*leaves), compiled(*leaves)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)):
        assert rms_error(a, b.double()) < 1e-2
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), function(*leaves))


@on_gpu
def test_gpu_autocast_changes_nothing():
    case = make(1, 100, 2, 1, 16, torch.float32)
    d_output = draw(*case.query.shape, seed=9)
    want = evaluate(sliding_attention, case, 9, None, d_output)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = evaluate(sliding_attention, case, 9, None, d_output)
    for a, b in zip((got[0], *got[1]), (want[0], *want[1])):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@on_gpu
def test_gpu_new_lengths_compile_nothing():
    def call(size):
        B, T, W, P = size
        for options in ({}, {"P": P, "masked": True}, {"packed": True}):
            case = make(B, T, 2, 1, 48, torch.bfloat16, **options)
            case.call(sliding_attention, W).float().sum().backward()

    assert_compiles_nothing_new(
        call, [(1, 1, 1, 1), (2, 16, 16, 16), (1, 64, 65, 64), (3, 777, 129, 5), (1, 4096, 2, 1)]
    )


@on_gpu
def test_gpu_memory():
    """Besides output and gradients only the log-sum-exp and the row sums: linear in T."""
    T, (H, D, W) = 16384, BIG
    q, k, v = (draw(1, T, H, D, dtype=torch.bfloat16, seed=i).requires_grad_() for i in range(3))
    cos, sin = angles(1, T, D)
    d_output = torch.randn_like(q)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = sliding_attention(q, k, v, cos, sin, window=W)
    torch.autograd.grad(output, (q, k, v), d_output)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 1.02 * (4 * q.nbytes + 2 * 4 * T * H)


# The model. Its masks of T x T and of blocks belong to plain PyTorch, which alone may make them.

MASKS = ("_block_mask", "create_sliding_window_causal_mask")
PLAIN = [(modeling_based, name, getattr(modeling_based, name)) for name in MASKS]


@pytest.fixture
def fused(monkeypatch):
    """The model takes the fused attention; -> the numbers of tokens it was called with."""
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "triton")
    monkeypatch.setattr(backend, "INTERPRETS_ALL", True)
    # a rounding of the first layer goes through all that follow
    monkeypatch.setitem(TOLERANCE, torch.float32, 1e-5)
    if not GPU:
        # the interpreter takes its time: the other ops have tests of their own
        choose = ops._is_fused
        monkeypatch.setattr(ops, "_is_fused", lambda op, x: op == "sliding-window attention" and choose(op, x))
    lengths, op = [], modeling_based.sliding_attention

    def logged(query, *arguments, **options):
        lengths.append(query.shape[1])
        return op(query, *arguments, **options)

    monkeypatch.setattr(modeling_based, "sliding_attention", logged)
    for *place, _ in PLAIN:
        monkeypatch.setattr(*place, None)
    return lengths


def plainly(function, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
        for place in PLAIN:
            patch.setattr(*place)
        return function(*arguments)


def logits_and_gradients(model, batch, exist):
    """Of the tokens that exist, and of every parameter."""
    model.zero_grad()
    output = model(**batch, use_cache=False)
    output.loss.backward()
    return {"logits": output.logits[exist], **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.fixture
def two_windows(tiny_model):
    return (
        tiny_model(layer_types=["sliding_attention"] * 2, num_attention_heads=2, num_key_value_heads=1)
        .to(DEVICE)
        .train()
    )


@pytest.mark.parametrize("layout", ["packed", "left", "right"])
def test_model_gradients(two_windows, fused, layout):
    rows = document_rows([5, 1, 14])
    if layout == "packed":
        batch = {name: torch.cat([row[name] for row in rows])[None].to(DEVICE) for name in rows[0]}
        batch["seq_idx"] = torch.tensor([0] * 5 + [1] + [2] * 14, device=DEVICE)[None]
        exist = torch.ones(1, 20, dtype=torch.bool)
    else:
        batch = {name: x.to(DEVICE) for name, x in pad(rows, layout).items()}
        exist = batch["attention_mask"].bool()
    ours = logits_and_gradients(two_windows, batch, exist)
    assert len(fused) == 2
    plain = plainly(logits_and_gradients, two_windows, batch, exist)
    exact = plainly(logits_and_gradients, two_windows.double(), batch, exist)
    for name, want in exact.items():
        assert want.square().mean().sqrt() > 1e-5, name
        assert_exact(ours[name], plain[name], want)


def keys_of(cache, window):
    """The last window - 1 keys and values of every layer, whatever holds them."""
    return [
        x[:, :, 1 - window :]
        for layer in cache.layers
        for x in (layer.window() if isinstance(layer, WindowCacheLayer) else (layer.keys, layer.values))
    ]


def in_turns(model, cache, ids, mask, *lengths):
    """The logits of each turn, those of padding left out, and the cache."""
    logits, end = [], 0
    for length in lengths:
        start, end = end, end + length
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        logits.append(output.logits[mask[:, start:end].bool()])
    return logits, cache


@torch.no_grad()
@pytest.mark.parametrize(("kind", "padding"), [(DynamicCache, 9), (StaticCache, 9), (StaticCache, 0)])
def test_model_goes_on_from_a_cache(two_windows, fused, kind, padding):
    """Turns longer and shorter than the window; padding on the left, longer than the first turn."""
    model, window = two_windows.eval(), two_windows.config.sliding_window
    ids = torch.randint(97, (2, 26), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    options = {} if kind is DynamicCache else {"max_cache_len": 40}
    turns = 8, 14, 1, 3
    logits, cache = in_turns(model, kind(config=model.config, **options), ids, mask, *turns)
    assert fused == [x for x in turns for _ in range(2) if x > 1 or kind is DynamicCache]
    other, same = plainly(in_turns, model, kind(config=model.config, **options), ids, mask, *turns)
    for a, b in zip(keys_of(cache, window), keys_of(same, window)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == same.get_seq_length()
    if kind is StaticCache:
        assert all(torch.equal(a.seen, b.seen) for a, b in zip(cache.layers, same.layers))
    exact, _ = plainly(in_turns, model.double(), DynamicCache(config=model.config), ids, mask, *turns)
    for ours, plain, want in zip(logits, other, exact):
        assert_exact(ours, plain, want)


@torch.no_grad()
def test_model_takes_back_what_it_recorded(two_windows, fused):
    model = two_windows.eval()
    ids = torch.arange(1, 41, device=DEVICE)[None]
    cache = DynamicCache(config=model.config)
    model(ids[:, :15], past_key_values=cache)
    cache.activate_past_recording()
    for start, end, extra in ((15, 22, 5), (17, 30, 9)):
        model(ids[:, start:end], past_key_values=cache)
        cache.crop(-extra)
    logits = model(ids[:, 21:], past_key_values=cache).logits
    assert len(fused) == 8
    plain, exact = (plainly(m, ids).logits[:, 21:] for m in (model, copy.deepcopy(model).double()))
    assert_exact(logits, plain, exact)


class OwnLayer(DynamicSlidingWindowLayer):
    """It may hold the past in ways of its own."""


@torch.no_grad()
@pytest.mark.parametrize(
    "way", ["padding between tokens", "padding behind tokens and a cache", "eager", "attentions", "own cache"]
)
def test_model_does_without(two_windows, fused, monkeypatch, way):
    """What the kernel is not for goes the old way, and right."""
    for place in PLAIN:
        monkeypatch.setattr(*place)
    model = two_windows.eval()
    ids = torch.arange(1, 21, device=DEVICE)[None]
    mask, options = torch.ones_like(ids), {"use_cache": "cache" in way}
    if "padding" in way:
        mask[:, slice(4, 7) if "between" in way else slice(17, None)] = 0
    if way == "own cache":
        options["past_key_values"] = DynamicCache(config=model.config)
        options["past_key_values"].layers = [OwnLayer(model.config.sliding_window) for _ in model.model.layers]
    if way == "eager":
        model.set_attn_implementation("eager")
    options |= {"output_attentions": True} if way == "attentions" else {}
    logits = model(ids, attention_mask=mask, **options).logits[:, mask[0].bool()]
    assert fused == []
    plain, exact = (plainly(m, ids[:, mask[0].bool()]).logits for m in (model, copy.deepcopy(model).double()))
    assert_exact(logits, plain, exact)


@pytest.mark.parametrize("length", [3, 29])
def test_model_with_a_layer_where_no_kernel_runs(two_windows, fused, monkeypatch, length):
    """The masks are made where the tokens are; a layer on another device makes its own of them."""
    for place in PLAIN:
        monkeypatch.setattr(*place)
    answers = [True]
    monkeypatch.setattr(modeling_based, "can_attend_fused", lambda *arguments: bool(answers) and answers.pop())
    batch = {"input_ids": torch.arange(2 * length, device=DEVICE).view(2, -1)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 0] = 0
    batch["labels"] = batch["input_ids"]
    exist = batch["attention_mask"].bool()
    ours = logits_and_gradients(two_windows, batch, exist)
    assert (answers, fused) == ([], [])
    plain = plainly(logits_and_gradients, two_windows, batch, exist)
    exact = plainly(logits_and_gradients, two_windows.double(), batch, exist)
    for name in ("logits", "model.layers.0.self_attn.k_proj.weight"):
        assert_exact(ours[name], plain[name], exact[name])


def test_model_with_heads_that_do_not_fit(tiny_model, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "triton")
    monkeypatch.setattr(backend, "INTERPRETS_ALL", True)
    model = tiny_model(layer_types=["sliding_attention"], hidden_size=24, num_attention_heads=2).to(DEVICE)
    monkeypatch.setattr(modeling_based, "sliding_attention", None)
    ids = torch.arange(9, device=DEVICE)[None]
    exact = plainly(copy.deepcopy(model).double(), ids)
    torch.testing.assert_close(model(ids).logits.double(), exact.logits, atol=1e-4, rtol=0)
