# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""One table: every way to run the model x {torch, triton} x {fp32, bf16, fp16} x {batch 1, batch 3}.

`FORWARD` holds the ways that end in logits, `GENERATE` those that end in tokens, `REFUSED` those that cannot work. The
oracle is each row alone: unpadded, unsplit, one forward without a cache. In fp32 the real tokens' logits and the final
states agree to 1e-4 and the tokens are equal. In half precision the error against fp64 (root mean square over the
logits) is at most `MARGIN` times that of the plain forward in the same dtype.
"""

import copy
import os
from contextlib import contextmanager, nullcontext

import pytest
import torch
from transformers import DynamicCache, StaticCache

from transformers_based import (
    BasedConfig,
    BasedForCausalLM,
    CacheSnapshot,
    TaylorCacheLayer,
    cache_based,
    modeling_based,
)
from transformers_based import backend as backend_choice
from transformers_based.cache_based import WindowCacheLayer


VOCAB, WINDOW, PAD, NEW_TOKENS = 61, 7, 0, 12
# The same sums in another order; the ratios measured on this table stay below 1.01.
MARGIN = 1.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "linear_attention", "sliding_attention", "conv"],
        "num_attention_heads": 2,
        "linear_num_heads": 2,
        "linear_feature_dim": 8,
        "sliding_window": WINDOW,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    return BasedForCausalLM(BasedConfig(**{**values, **changes})).eval().to(DEVICE, dtype)


def rows_of(count, length=41):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(1, VOCAB, (count, length), generator=generator).to(DEVICE))


def shortened(rows):
    """Rows of different lengths, for the padded ways."""
    return [row[: len(row) - 6 * i] for i, row in enumerate(rows)]


def padded(rows, side, length, fill=PAD):
    """The rows as one batch, with its mask. In the "middle" means between the two halves of a row."""
    ids, mask = (
        torch.full((len(rows), length), fill, device=DEVICE),
        torch.zeros(len(rows), length, device=DEVICE).int(),
    )
    for i, row in enumerate(rows):
        places = torch.arange(len(row), device=DEVICE)
        moved = {"left": places >= 0, "right": places < 0, "middle": places >= len(row) // 2}[side]
        places = places + (length - len(row)) * moved
        ids[i, places], mask[i, places] = row, 1
    return ids, mask


def real(values, mask):
    return [row[keep.bool()] for row, keep in zip(values, mask)]


# Ways that end in logits: (model, rows, fill) -> (rows seen, their logits, cache or None); `fill` stands under padding.


def full_forward(model, rows, fill):
    return rows, list(model(torch.stack(rows), use_cache=False).logits), None


def static_cache(config):
    return StaticCache(config=config, max_cache_len=64)


def short_static_cache(config):
    return StaticCache(config=config, max_cache_len=WINDOW - 2)


def dynamic_cache(config):
    return DynamicCache(config=config)


def in_pieces(*sizes, cache_of=dynamic_cache):
    def run(model, rows, fill):
        ids, cache, logits, start = torch.stack(rows), cache_of(model.config), [], 0
        while start < ids.shape[1]:
            end = start + sizes[len(logits) % len(sizes)]
            logits.append(model(ids[:, start:end], past_key_values=cache).logits)
            start = end
        return rows, list(torch.cat(logits, dim=1)), cache

    return run


def with_padding(side, cache_of=dynamic_cache):
    def run(model, rows, fill):
        rows = shortened(rows)
        ids, mask = padded(rows, side, len(rows[0]) + 3, fill)
        output = model(ids, attention_mask=mask, past_key_values=cache_of(model.config))
        return rows, real(output.logits, mask), output.past_key_values

    return run


def padding_in_a_continued_turn(cache_of):
    def run(model, rows, fill):
        """Three long turns, then some of single tokens."""
        cache, masks, logits, seen = cache_of(model.config), [], [[] for _ in rows], [[] for _ in rows]
        turns = [
            padded([row[at : at + 10 - 2 * i] for i, row in enumerate(rows)], side, 12, fill)
            for at, side in ((0, "right"), (10, "left"), (20, "middle"))
        ]
        for at in range(30, 41):
            turns.append(padded([row[at : at + (at - i) % 3][:1] for i, row in enumerate(rows)], "left", 1, fill))
        for ids, mask in turns:
            masks.append(mask)
            output = model(ids, attention_mask=torch.cat(masks, dim=1), past_key_values=cache)
            for i, (part, tokens) in enumerate(zip(real(output.logits, mask), real(ids, mask))):
                logits[i].append(part)
                seen[i].append(tokens)
        return [torch.cat(x) for x in seen], [torch.cat(x) for x in logits], cache

    return run


def packed(how):
    def run(model, rows, fill):
        """`fill` is a document of its own between the others."""
        rows = shortened(rows)
        documents = [x for row in rows for x in (row, torch.full((5,), fill, device=DEVICE))]
        lengths = torch.tensor([len(x) for x in documents], device=DEVICE)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        arguments = {
            "cu_seq_lens": {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds},
            "seq_idx": {"seq_idx": torch.arange(len(documents), device=DEVICE).repeat_interleave(lengths)[None]},
            "position_ids": {"position_ids": torch.cat([torch.arange(int(n), device=DEVICE) for n in lengths])[None]},
        }[how]
        logits = model(torch.cat(documents)[None], use_cache=False, **arguments).logits[0]
        return rows, list(logits.split(lengths.tolist()))[::2], None

    return run


def compiled_static(model, rows, fill):
    ids, cache = torch.stack(rows), static_cache(model.config)
    step = torch.compile(model, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "eager")
    logits = [model(ids[:, :10], past_key_values=cache).logits]
    for i in range(10, ids.shape[1]):
        masks = model.create_masks_for_generate(model.config, torch.empty(len(rows), 1, 0, device=DEVICE), None, cache)
        position = torch.full((len(rows), 1), i, device=DEVICE)
        output = step(ids[:, i : i + 1], attention_mask=masks, position_ids=position, past_key_values=cache)
        logits.append(output.logits)
    return rows, list(torch.cat(logits, dim=1)), cache


def after_reset(cache_of):
    def run(model, rows, fill):
        cache = cache_of(model.config)
        model(torch.stack(rows)[:, :20], past_key_values=cache)
        cache.reset()
        return in_pieces(17, 1, cache_of=lambda config: cache)(model, rows, fill)

    return run


def from_a_snapshot(model, rows, fill):
    ids, cache = torch.stack(rows), DynamicCache(config=model.config)
    first = model(ids[:, :12], past_key_values=cache).logits
    kept = copy.deepcopy(cache)
    model(ids[:, :9], past_key_values=cache)
    return rows, list(torch.cat([first, model(ids[:, 12:], past_key_values=kept).logits], dim=1)), kept


def from_a_restored_snapshot(cache_of):
    def run(model, rows, fill):
        ids, cache = torch.stack(rows), cache_of(model.config)
        first = model(ids[:, :12], past_key_values=cache).logits
        snapshot = CacheSnapshot(cache)
        for start in (3, 20):
            model(ids[:, start : start + 9], past_key_values=cache)
            snapshot.restore(cache)
        return rows, list(torch.cat([first, model(ids[:, 12:], past_key_values=cache).logits], dim=1)), cache

    return run


def after_crop(model, rows, fill):
    ids, cache = torch.stack(rows), DynamicCache(config=model.config)
    logits = [model(ids[:, :12], past_key_values=cache).logits]
    cache.activate_past_recording()
    logits.append(model(ids[:, 12:20], past_key_values=cache).logits[:, :4])
    model(ids[:, :3], past_key_values=cache)
    cache.crop(-7)
    logits.append(model(ids[:, 16:], past_key_values=cache).logits)
    cache.crop(0)
    return rows, list(torch.cat(logits, dim=1)), cache


def after_moving_rows(move, cache_of=dynamic_cache):
    def run(model, rows, fill):
        """`move(cache)` returns which row each row of the cache now is."""
        ids, cache = torch.stack(rows), cache_of(model.config)
        first = model(ids[:, :12], past_key_values=cache).logits
        order = move(cache, len(rows))
        second = model(ids[order, 12:], past_key_values=cache).logits
        return [rows[i] for i in order], list(torch.cat([first[order], second], dim=1)), cache

    return run


def reorder(cache, batch):
    order = torch.tensor([batch - 1, *range(batch - 1)], device=DEVICE)
    cache.reorder_cache(order)
    return order


def repeat(cache, batch):
    cache.batch_repeat_interleave(2)
    return torch.arange(batch, device=DEVICE).repeat_interleave(2)


def select(cache, batch):
    order = torch.tensor([batch - 1], device=DEVICE)
    cache.batch_select_indices(order)
    return order


FORWARD = {
    "full forward": full_forward,
    "token by token": in_pieces(1),
    "pieces of 1 and 2": in_pieces(1, 2),
    "pieces shorter than the convolution": in_pieces(5, 1, 1),
    "pieces longer than the window": in_pieces(11, 9),
    "pieces no multiple of the chunk": in_pieces(19, 3, 17),
    "left padding": with_padding("left"),
    "right padding": with_padding("right"),
    "padding in the middle": with_padding("middle"),
    "padding in a continued turn": padding_in_a_continued_turn(dynamic_cache),
    "padding in a continued turn, static": padding_in_a_continued_turn(static_cache),
    "right padding, static": with_padding("right", static_cache),
    "packed by cu_seq_lens": packed("cu_seq_lens"),
    "packed by seq_idx": packed("seq_idx"),
    "packed by position_ids": packed("position_ids"),
    "static cache": in_pieces(10, 1, cache_of=static_cache),
    "static cache, pieces": in_pieces(11, 9, cache_of=static_cache),
    "static cache, token by token": in_pieces(1, cache_of=static_cache),
    "static cache shorter than the window": in_pieces(3, 1, cache_of=short_static_cache),
    "static cache, compiled fullgraph": compiled_static,
    "reset, dynamic": after_reset(dynamic_cache),
    "reset, static": after_reset(static_cache),
    "copy.deepcopy of a cache": from_a_snapshot,
    "snapshot, dynamic": from_a_restored_snapshot(dynamic_cache),
    "snapshot, static": from_a_restored_snapshot(static_cache),
    "crop": after_crop,
    "reorder": after_moving_rows(reorder),
    "repeat": after_moving_rows(repeat),
    "select": after_moving_rows(select),
    "reorder, static": after_moving_rows(reorder, static_cache),
    "repeat, static": after_moving_rows(repeat, static_cache),
    "select, static": after_moving_rows(select, static_cache),
}
HAS_PADDING = [name for name in FORWARD if "padding" in name or "packed" in name]


# Ways that end in tokens: (model, rows) -> (the rows before them, the tokens, GenerateOutput).


def generated(model, ids, mask, **options):
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **{"do_sample": False, **options},
    )
    copies = len(output.sequences) // len(ids)
    return [row for row in real(ids, mask) for _ in range(copies)], output.sequences[:, ids.shape[1] :], output


def generating(pad=False, **options):
    def run(model, rows):
        rows = shortened(rows) if pad else rows
        return generated(model, *padded(rows, "left", len(rows[0]) + 4 * pad), **options)

    return run


def continuing(pad=False, num_beams=1):
    def run(model, rows):
        """A second turn on the cache that the first one returned. Its padding stands between the turns."""
        rows = shortened(rows) if pad else rows
        (ids, mask), (more, more_mask) = (
            padded(parts, "left", len(parts[0]) + 4 * pad) for parts in zip(*(row.tensor_split(2) for row in rows))
        )
        first = model.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
        first.past_key_values.batch_repeat_interleave(num_beams)
        ids = torch.cat([first.sequences, more], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 5), more_mask], dim=1)
        return generated(model, ids, mask, past_key_values=first.past_key_values, num_beams=num_beams)

    return run


GENERATE = {
    "greedy": generating(),
    "left padding, greedy": generating(pad=True),
    "chunked prefill": generating(prefill_chunk_size=9),
    "chunked prefill by 1, left padding": generating(pad=True, prefill_chunk_size=1),
    "chunked prefill, static cache": generating(pad=True, prefill_chunk_size=9, cache_implementation="static"),
    "num_return_sequences": generating(do_sample=True, num_return_sequences=2),
    "static cache, left padding": generating(pad=True, cache_implementation="static"),
    "continue from a returned cache": continuing(),
    "continue from a returned cache, padding": continuing(pad=True),
    "continue from a returned cache, beams": continuing(num_beams=3),
    "beams": generating(num_beams=3),
    "beams, left padding": generating(pad=True, num_beams=3),
    "beams, static cache": generating(num_beams=3, cache_implementation="static"),
}


@pytest.fixture(params=["torch", "triton"])
def backend(request, use_backend):
    if request.param == "triton" and DEVICE == "cpu":
        cell = request.node.callspec.params
        if "compiled" in cell["way"]:
            pytest.skip("Triton's interpreter cannot be compiled; runs on a GPU")
        if cell["batch"] == (3 if cell["way"] in GENERATE else 1) or cell.get("dtype") == "bf16":
            pytest.skip("Triton's interpreter takes minutes for the whole table; runs on a GPU")
        if cell["way"] in GENERATE and cell["dtype"] != "fp32":
            pytest.skip("Triton's interpreter takes minutes for the whole table; runs on a GPU")
        if cell["way"] in FORWARD and "static" in cell["way"]:
            pytest.skip("differs from a dynamic cache in the window alone, which is plain PyTorch here; runs on a GPU")
    use_backend(request.param)
    return request.param


@pytest.fixture(scope="module")
def oracle():
    return build(torch.float64)


@contextmanager
def in_plain_pytorch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
        yield


# By dtype, backend and tokens: all models of the table have the same weights, and most ways see the same rows.
ALONE = {}


def alone(model, rows):
    """Logits of each row by itself: the oracle if `model` is fp64 (in plain PyTorch), the plain forward otherwise."""
    logits = []
    for row in rows:
        key = model.dtype, os.environ["TRANSFORMERS_BASED_BACKEND"], tuple(row.tolist())
        if key not in ALONE:
            with in_plain_pytorch() if model.dtype == torch.float64 else nullcontext():
                ALONE[key] = model(row[None], use_cache=False).logits[0]
        logits.append(ALONE[key])
    return logits


def rms(differences):
    return torch.cat([x.double().flatten() for x in differences]).square().mean().sqrt().item()


def assert_logits(got, rows, model, oracle):
    exact = alone(oracle, rows)
    if model.dtype == torch.float32:
        for row, expected in zip(got, exact):
            torch.testing.assert_close(row.double(), expected, atol=1e-4, rtol=0)
    else:
        error, allowed = (rms([a - b for a, b in zip(x, exact)]) for x in (got, alone(model, rows)))
        assert error <= MARGIN * allowed, f"{error:.2e} against {allowed:.2e} of the plain forward"


def assert_states(cache, rows, model):
    for i, row in enumerate(rows):
        with in_plain_pytorch():
            expected = model(row[None], use_cache=True).past_key_values
        for layer, reference in zip(cache.layers, expected.layers):
            if isinstance(layer, TaylorCacheLayer):
                got, wanted = layer.state[i], reference.state[0]
                assert layer.state.dtype == reference.state.dtype
            else:
                keys = layer.window()[0] if isinstance(layer, WindowCacheLayer) else layer.keys
                got, wanted = keys[i, :, 1 - WINDOW :], reference.keys[0, :, 1 - WINDOW :]
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", FORWARD)
def test_forward(way, dtype, batch, backend, oracle):
    model = build(DTYPES[dtype])
    rows, logits, cache = FORWARD[way](model, rows_of(batch), PAD)
    assert_logits(logits, rows, model, oracle)
    if cache is not None and dtype == "fp32":
        assert_states(cache, rows, model)


@torch.no_grad()
@pytest.mark.skipif(DEVICE == "cuda", reason="there the whole table takes these kernels")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("way", ["static cache, pieces and steps", "padding in a continued turn, static"])
def test_every_kernel_of_a_step(way, dtype, monkeypatch, oracle):
    """In Triton's interpreter, a few steps of the model with all of its fused ops."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "triton")
    monkeypatch.setattr(backend_choice, "INTERPRETS_ALL", True)
    monkeypatch.setattr(cache_based, "NUM_PENDING", 16)
    model, lazy, parts = build(DTYPES[dtype]), [], []
    fused, add_parts = modeling_based.taylor_attention_lazy_step, backend_choice.based_kernels.rms_norm_of_parts
    monkeypatch.setattr(modeling_based, "taylor_attention_lazy_step", lambda *a, **k: lazy.append(1) or fused(*a, **k))
    monkeypatch.setattr(
        backend_choice.based_kernels, "rms_norm_of_parts", lambda *a, **k: parts.append(1) or add_parts(*a, **k)
    )
    run = {**FORWARD, "static cache, pieces and steps": in_pieces(17, 1, 1, 1, 1, cache_of=static_cache)}[way]
    rows, logits, cache = run(model, rows_of(2), PAD)
    assert_logits(logits, rows, model, oracle)
    if dtype == "fp32":
        assert_states(cache, rows, model)
    assert len(lazy) >= 7
    assert bool(parts) == (dtype == "fp16")


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", HAS_PADDING)
def test_what_does_not_exist_changes_nothing(way, batch, backend):
    model = build()
    _, some, _ = FORWARD[way](model, rows_of(batch), fill=PAD)
    _, other, _ = FORWARD[way](model, rows_of(batch), fill=VOCAB - 1)
    assert all(torch.equal(a, b) for a, b in zip(some, other))


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", GENERATE)
def test_generate(way, dtype, batch, backend, oracle):
    model = build(DTYPES[dtype])
    torch.manual_seed(0)
    rows, tokens, output = GENERATE[way](model, rows_of(batch))
    whole = [torch.cat(pair) for pair in zip(rows, tokens)]
    if "beams" in way:
        # Beam scores are mean log-probabilities, whose error is at most twice that of a logit.
        exact = [x[-NEW_TOKENS - 1 : -1] for x in alone(oracle, whole)]
        chosen = [x.log_softmax(-1).gather(1, t[:, None]).mean() for x, t in zip(exact, tokens)]
        error = (output.sequences_scores.double() - torch.stack(chosen)).abs().max().item()
        allowed = 1e-4
        if dtype != "fp32":
            plain = [x[-NEW_TOKENS - 1 : -1] for x in alone(model, whole)]
            allowed = 2 * MARGIN * max((a - b).abs().max().item() for a, b in zip(exact, plain))
        assert error <= allowed
    else:
        logits = torch.stack(output.logits, dim=1)
        prefix = [alone(model, [row])[0][:-1] for row in rows]
        got = [torch.cat([head, tail.to(head.dtype)]) for head, tail in zip(prefix, logits)]
        assert_logits(got, [row[:-1] for row in whole], model, oracle)
        if dtype == "fp32":
            assert_states(output.past_key_values, [row[:-1] for row in whole], model)
    if dtype == "fp32" and "num_return" not in way:
        beams = 3 if "beams" in way else 1
        for row, got in zip(rows, tokens):
            # Generating without a cache is a way of its own too: once on the backend.
            with nullcontext() if way == "greedy" else in_plain_pytorch():
                expected = model.generate(
                    row[None], max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=False, num_beams=beams
                )
            assert torch.equal(got, expected[0, len(row) :])


# Ways that cannot work: (model, ids, cache that has seen ids[:, :9]), and what the error says.


def used_by_another(ids, **changes):
    cache = DynamicCache(config=build(**changes).config)
    build(**changes)(ids, past_key_values=cache)
    return cache


REFUSED = {
    "padding behind tokens, static cache of flex attention": (
        lambda model, ids, cache: build(attn_implementation="flex_attention")(
            ids,
            attention_mask=padded([ids[0, :-2]], "right", ids.shape[1])[1],
            past_key_values=static_cache(model.config),
        ),
        "pad on the left",
    ),
    "packed documents on a cache": (
        lambda model, ids, cache: model(
            ids, seq_idx=(torch.arange(ids.shape[1], device=DEVICE) > 9)[None], past_key_values=cache
        ),
        "Packed documents",
    ),
    "packed bounds that do not cover the tokens": (
        lambda model, ids, cache: model(ids, cu_seq_lens_q=torch.tensor([0, 7, 30], device=DEVICE).int()),
        "cu_seq_lens_q",
    ),
    "mask of the new tokens only": (
        lambda model, ids, cache: model(ids[:, 9:], attention_mask=torch.ones_like(ids[:, 9:]), past_key_values=cache),
        "past \\+ new tokens",
    ),
    "mask with four dimensions": (
        lambda model, ids, cache: model(ids, attention_mask=torch.ones(1, 1, 41, 41, device=DEVICE)),
        "more dimensions",
    ),
    "negative mask": (lambda model, ids, cache: model(ids, attention_mask=-torch.ones_like(ids)), "nothing else"),
    "negative mask of one token": (
        lambda model, ids, cache: model(
            ids[:, 9:10], attention_mask=torch.tensor([[1] * 9 + [-1]], device=DEVICE), past_key_values=cache
        ),
        "nothing else",
    ),
    "negative positions": (
        lambda model, ids, cache: model(ids, position_ids=torch.arange(-3, 38)[None]),
        "not be negative",
    ),
    "negative position of one token": (
        lambda model, ids, cache: model(ids[:, 9:10], position_ids=torch.tensor([[-1]]), past_key_values=cache),
        "not be negative",
    ),
    "positions of another length": (
        lambda model, ids, cache: model(ids, position_ids=torch.arange(40)[None]),
        "`position_ids` must be",
    ),
    "cache of a model with other layers": (
        lambda model, ids, cache: model(ids, past_key_values=DynamicCache(config=BasedConfig(num_hidden_layers=3))),
        "another model",
    ),
    "cache of a model with other heads": (
        lambda model, ids, cache: model(ids, past_key_values=used_by_another(ids, num_key_value_heads=1)),
        "another model",
    ),
    "cache of a model with a shorter window": (
        lambda model, ids, cache: model(ids, past_key_values=used_by_another(ids, sliding_window=WINDOW - 1)),
        "fewer than the sliding_window",
    ),
    "cache of another batch size": (
        lambda model, ids, cache: model(ids.expand(2, -1), past_key_values=cache),
        "batch size",
    ),
    "prompt that the cache has seen": (
        lambda model, ids, cache: model.generate(ids[:, :9], max_new_tokens=2, past_key_values=cache),
        "whole text",
    ),
    "prompt lookup on a cache in use": (
        lambda model, ids, cache: model.generate(
            ids, max_new_tokens=2, past_key_values=cache, prompt_lookup_num_tokens=3
        ),
        "decode without a draft",
    ),
    "early exit": (
        lambda model, ids, cache: model.generate(ids, max_new_tokens=2, assistant_early_exit=2),
        "Use `assistant_model`",
    ),
    "quantized cache": (
        lambda model, ids, cache: model.generate(ids, max_new_tokens=2, cache_implementation="quantized"),
        'running sum.*"static"',
    ),
    "offloaded cache": (
        lambda model, ids, cache: model.generate(ids, max_new_tokens=2, cache_implementation="offloaded"),
        'fixed size.*"static"',
    ),
    "offloaded static cache": (
        lambda model, ids, cache: model.generate(ids, max_new_tokens=2, cache_implementation="offloaded_static"),
        'fixed size.*"static"',
    ),
    "offloading cache of one's own": (
        lambda model, ids, cache: model.generate(
            ids, max_new_tokens=2, past_key_values=DynamicCache(config=model.config, offloading=True)
        ),
        "fixed size.*without `offloading`",
    ),
    "continuous batching": (
        lambda model, ids, cache: model.generate_batch([[1, 2]], max_new_tokens=2),
        "padded batch",
    ),
    "paged cache": (
        lambda model, ids, cache: model.generate(ids, max_new_tokens=2, cache_implementation="paged"),
        "padded batch",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("way", REFUSED)
def test_refused(way):
    """With the reason and the alternative, and before it changes the model or the cache."""
    model = build()
    ids, cache = torch.stack(rows_of(1)), DynamicCache(config=model.config)
    model(ids[:, :9], past_key_values=cache)
    expected = model(ids[:, 9:], past_key_values=copy.deepcopy(cache)).logits
    run, message = REFUSED[way]
    with pytest.raises((ValueError, NotImplementedError), match=message):
        run(model, ids, cache)
    assert torch.equal(model(ids[:, 9:], past_key_values=cache).logits, expected)
    assert model.config._attn_implementation == "sdpa"
