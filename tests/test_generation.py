# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""`generate` on the recurrent state: caches, decoding modes, constant memory and cost."""

import pytest
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from transformers_based.cache_based import CountingTaylorCacheLayer


PATTERNS = [
    ["conv", "linear_attention", "sliding_attention", "conv"],
    ["conv", "linear_attention"],
    ["linear_attention"],
    ["sliding_attention"],
]
ATTENTION_FREE = ["linear_attention", "conv"]


def tokens(batch, length, vocab=97, seed=1):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_cache(model, kind, length=64):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


@torch.no_grad()
def greedy(model, ids, new):
    """By full forwards, without any cache."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("layer_types", PATTERNS, ids="-".join)
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("prompt_length", [1, 13])
def test_greedy(tiny_model, layer_types, cache, prompt_length):
    model = tiny_model(layer_types=layer_types)
    ids = tokens(3, prompt_length)
    expected = greedy(model, ids, 12)
    assert len(set(expected[:, prompt_length:].flatten().tolist())) > 4
    got = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation=cache)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("layer_types", PATTERNS[:2], ids="-".join)
@pytest.mark.parametrize("cache", [None, "static"])
def test_sampling(tiny_model, layer_types, cache):
    """The same seed draws the same tokens with and without a cache; another seed does not."""
    model = tiny_model(layer_types=layer_types)
    ids = tokens(2, 9)
    drawn = []
    for seed, arguments in ((1, {"use_cache": False}), (1, {"cache_implementation": cache}), (2, {"use_cache": True})):
        set_seed(seed)
        drawn.append(model.generate(ids, max_new_tokens=12, do_sample=True, top_k=20, **arguments))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize("layer_types", PATTERNS, ids="-".join)
@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padding(tiny_model, layer_types, cache):
    """The tokens of a padded batch are those of each prompt alone."""
    model = tiny_model(layer_types=layer_types)
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.data.normal_(std=0.5)
    lengths = [11, 4, 8, 1]
    prompts = [tokens(1, n, seed=n) for n in lengths]
    ids = torch.stack([torch.nn.functional.pad(p[0], (11 - n, 0), value=3) for p, n in zip(prompts, lengths)])
    mask = torch.stack([torch.arange(11) >= 11 - n for n in lengths]).long()
    got = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=3, cache_implementation=cache
    )
    for row, prompt, n in zip(got, prompts, lengths):
        assert torch.equal(row[11 - n :], greedy(model, prompt, 12)[0])


def test_generate_from_inputs_embeds(tiny_model):
    model = tiny_model()
    ids = tokens(2, 9)
    got = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=8, do_sample=False)
    assert torch.equal(got, greedy(model, ids, 8)[:, 9:])


@pytest.mark.parametrize("beams", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("layer_types", PATTERNS[:2], ids="-".join)
def test_beam_search(tiny_model, layer_types, beams):
    """Reorders the cache at every token."""
    model = tiny_model(layer_types=layer_types)
    ids = tokens(2, 9)
    expected = model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False, **beams), expected)
    assert not torch.equal(expected[: len(ids)], greedy(model, ids, 10))


def cache_bytes(cache):
    total = 0
    for layer in cache.layers:
        for x in vars(layer).values():
            for tensor in x.values() if isinstance(x, dict) else [x]:
                if isinstance(tensor, torch.Tensor):
                    # Of the storage: a view would keep all of a longer tensor alive.
                    total += tensor.untyped_storage().nbytes()
    return total


@pytest.mark.parametrize("layer_types", PATTERNS, ids="-".join)
@pytest.mark.parametrize("prefill", [64, 96])
def test_memory_is_constant(tiny_model, layer_types, prefill):
    """Bytes held after 100 tokens and after 1,000, some of them single steps."""
    model = tiny_model(layer_types=layer_types)
    cache = DynamicCache(config=model.config)
    ids, held = tokens(2, 1000), {}
    seen = 0
    with torch.no_grad():
        while seen < 1000:
            new = prefill if seen == 0 else 300 if seen == 400 else 1
            model(ids[:, seen : seen + new], past_key_values=cache)
            seen += new
            if seen in (100, 1000):
                held[seen] = cache_bytes(cache)
    assert held[100] == held[1000] > 0


@pytest.mark.parametrize("layer_types", PATTERNS, ids="-".join)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cost_of_a_step_is_constant(tiny_model, tensor_log, layer_types, kind):
    """A cached step touches as many numbers at position 10,000 as at 100."""
    model = tiny_model(layer_types=layer_types)
    touched, largest = {}, {}
    for position in (100, 10_000):
        cache = make_cache(model, kind, position + 8)
        with torch.no_grad():
            model.model(tokens(1, position), past_key_values=cache)
            model.model(tokens(1, 1), past_key_values=cache)
            with tensor_log() as log:
                model.model(tokens(1, 1), past_key_values=cache)
        touched[position], largest[position] = log.touched, log.largest
        assert cache.get_seq_length() == position + 2
    assert touched[100] == touched[10_000] > 0
    assert largest[100] == largest[10_000]


@pytest.mark.parametrize("layer_types", PATTERNS, ids="-".join)
@pytest.mark.parametrize("kind", ["dynamic", "static", "dynamic_without_config"])
def test_second_turn_on_a_returned_cache(tiny_model, layer_types, kind):
    model = tiny_model(layer_types=layer_types)
    arguments = {"max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(tokens(2, 9), past_key_values=make_cache(model, kind), **arguments)
    prompt = torch.cat([first.sequences, tokens(2, 5, seed=4)], dim=1)
    second = model.generate(prompt, past_key_values=first.past_key_values, **arguments)
    assert torch.equal(second.sequences, greedy(model, prompt, 7))
    assert second.past_key_values is first.past_key_values
    assert second.past_key_values.get_seq_length() == prompt.shape[1] + 6


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("layer_types", [PATTERNS[0], ATTENTION_FREE], ids="-".join)
def test_reset_starts_over(tiny_model, layer_types, kind):
    model = tiny_model(layer_types=layer_types)
    cache = make_cache(model, kind)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model(tokens(2, 15, seed=5), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        parts = [model(part, past_key_values=cache).logits for part in ids.split([1, 7, 1], dim=1)]
    assert cache.get_seq_length() == 9
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-5, rtol=0)


OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
}


@pytest.mark.parametrize("layer_types", [PATTERNS[0], ATTENTION_FREE], ids="-".join)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("recording", [False, True])
def test_batch_operations(tiny_model, layer_types, operation, recording):
    """Each row goes on as the row it came from; what `crop` recorded goes along."""
    model = tiny_model(layer_types=layer_types)
    apply, rows = OPERATIONS[operation]
    ids, more = tokens(3, 9), tokens(len(rows), 4, seed=6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if recording:
            model(ids[:, :6], past_key_values=cache)
            cache.activate_past_recording()
            model(ids[:, 6:], past_key_values=cache)
            model(tokens(3, 2, seed=7), past_key_values=cache)
        else:
            model(ids, past_key_values=cache)
        apply(cache)
        if recording:
            cache.crop(-2)
        got = model(more, past_key_values=cache).logits
        expected = model(torch.cat([ids[rows], more], dim=1), use_cache=False).logits[:, 9:]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_operations_on_an_empty_cache(tiny_model):
    """Before the first token they change nothing."""
    model = tiny_model(layer_types=ATTENTION_FREE)
    cache = DynamicCache(config=model.config)
    ids = tokens(2, 5)
    model(ids, past_key_values=cache)  # adopts
    cache.reset()
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(0)
    with torch.no_grad():
        got = model(ids, past_key_values=cache).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer_types", [*PATTERNS, ATTENTION_FREE], ids="-".join)
@pytest.mark.parametrize("start", [0, 3, 20])
@pytest.mark.parametrize(
    ("remove", "split"), [(1, [2, 1]), (5, [2, 1]), (9, [2, 1]), (5, []), (3, [1] * 6), (40, [2, 1]), (40, [1] * 43)]
)
def test_crop_is_exact(tiny_model, layer_types, start, remove, split):
    """Tokens recorded over several forwards, single steps among them, taken back over and over."""
    model = tiny_model(layer_types=layer_types)
    ids = tokens(2, start + 30)
    mask = torch.ones(2, start + 90, dtype=torch.long)
    mask[1, : min(start, 2)] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask[:, : start + 30], use_cache=False).logits
        if start:
            model(ids[:, :start], attention_mask=mask[:, :start], past_key_values=cache)
        cache.activate_past_recording()
        position = start
        for round_ in range(3):
            wrong = tokens(2, remove, seed=8 + round_)
            draft = torch.cat([ids[:, position : position + 4], wrong], dim=1)
            seen = position
            for part in draft.split([*split, draft.shape[1] - sum(split)], dim=1):
                seen += part.shape[1]
                model(part, attention_mask=mask[:, :seen], past_key_values=cache)
            cache.crop(-remove)
            position += 4
            assert cache.get_seq_length() == position
        got = model(ids[:, position:], attention_mask=mask[:, : start + 30], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[:, position:], atol=5e-5, rtol=0)
    first = cache.layers[0]
    assert isinstance(first, CountingTaylorCacheLayer) == ("sliding_attention" not in layer_types)


def test_crop_takes_back_what_waits_beside_the_state(tiny_model):
    """The state is not written, and no copy of it made, as long as the tokens fit."""
    model = tiny_model(layer_types=PATTERNS[0])
    layers = [i for i, kind in enumerate(model.config.layer_types) if kind == "linear_attention"]
    assert layers
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(2, 9), past_key_values=cache)
        before = [cache.layers[i].recurrent_states[0].clone() for i in layers]
        cache.activate_past_recording()
        for length in (7, 1, 1):
            model(tokens(2, length), past_key_values=cache)
        for i, state in zip(layers, before):
            assert cache.layers[i].held == 9
            assert cache.layers[i].snapshot is None
            assert torch.equal(cache.layers[i].recurrent_states[0], state)
        with pytest.raises(RuntimeError, match="Cannot remove 10 tokens: only 9 recorded"):
            cache.crop(-10)


def test_a_look_at_the_state_leaves_what_a_crop_may_take_back(tiny_model):
    model = tiny_model(layer_types=PATTERNS[0])
    ids, wrong = tokens(2, 16), tokens(2, 4, seed=8)
    index = model.config.layer_types.index("linear_attention")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 9:]
        model(ids[:, :9], past_key_values=cache)
        before = cache.layers[index].state.clone()
        cache.activate_past_recording()
        model(wrong, past_key_values=cache)
        assert not torch.equal(cache.layers[index].state, before)
        cache.crop(-4)
        torch.testing.assert_close(cache.layers[index].state, before)
        got = model(ids[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("adopted", [False, True])
def test_a_static_cache_gives_no_token_back(tiny_model, adopted):
    """And says so before a layer has given back what another cannot."""
    model = tiny_model(layer_types=PATTERNS[0])
    assert "sliding_attention" in PATTERNS[0]
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        if adopted:
            model(tokens(2, 9), past_key_values=cache)
            with pytest.raises(RuntimeError, match="so none can be taken back"):
                cache.activate_past_recording()
        else:
            cache.activate_past_recording()
        with pytest.raises(ValueError, match="so none can be taken back"):
            model(tokens(2, 9), past_key_values=cache)


def test_crop_with_masks_in_some_forwards_only(tiny_model):
    model = tiny_model(layer_types=PATTERNS[0])
    ids, cache = tokens(2, 20), DynamicCache(config=model.config)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 12:14] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 16:]
        model(ids[:, :8], past_key_values=cache)
        cache.activate_past_recording()
        for start, end in ((8, 11), (11, 15), (15, 19)):
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        cache.crop(-3)
        got = model(ids[:, 16:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("layer_types", PATTERNS, ids="-".join)
@pytest.mark.parametrize("start", [0, 3, 20])
@pytest.mark.parametrize("remove", [1, 2, 6, 10])
def test_crop_over_padding_behind_tokens(tiny_model, layer_types, start, remove):
    """Each row gives back the tokens it was given, over several forwards and after its rows have moved."""
    model = tiny_model(layer_types=layer_types).double()
    turns, order = [start, 7, 1, 3], torch.tensor([2, 0, 1])
    ids, mask = tokens(3, sum(turns)), torch.ones(3, sum(turns), dtype=torch.long)
    mask[0, start + 5 : start + 7] = 0
    mask[1, start : start + 2] = 0
    mask[2, -2:] = 0
    new = tokens(3, 5, seed=9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        seen = 0
        for turn in turns:
            if seen == start:
                cache.activate_past_recording()
            seen += turn
            if turn:
                model(ids[:, seen - turn : seen], attention_mask=mask[:, :seen], past_key_values=cache)
        cache.reorder_cache(order)
        cache.crop(-remove)
        ids = torch.cat([ids[order, :-remove], new], dim=1)
        mask = torch.cat([mask[order, :-remove], torch.ones_like(new)], dim=1)
        parts = [model(new[:, :2], attention_mask=mask[:, :-3], past_key_values=cache).logits]
        parts.append(model(new[:, 2:], attention_mask=mask, past_key_values=cache).logits)
        for row, kept, got in zip(ids, mask.bool(), torch.cat(parts, dim=1)):
            expected = model(row[kept][None], use_cache=False).logits[0, -5:]
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_crop_errors(tiny_model):
    """Never silently wrong: unrecorded tokens, too many tokens, a length instead of a number to remove."""
    model = tiny_model(layer_types=ATTENTION_FREE)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 5), past_key_values=cache)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-1)
        cache.activate_past_recording()
        model(tokens(1, 3), past_key_values=cache)
        with pytest.raises(RuntimeError, match="Cannot remove 4 tokens"):
            cache.crop(-4)
        with pytest.raises(ValueError, match="crop"):
            cache.crop(6)
        assert cache.get_seq_length() == 8


@pytest.mark.parametrize("layer_types", [*PATTERNS, ATTENTION_FREE], ids="-".join)
@pytest.mark.parametrize("how", ["prompt_lookup", "assisted"])
def test_speculative_decoding_equals_greedy(tiny_model, layer_types, how):
    """Wrong drafts are rolled back; right ones are taken: fewer forwards than tokens."""
    model = tiny_model(layer_types=layer_types)
    assistant = tiny_model(layer_types=layer_types)
    for parameter in assistant.parameters():  # right now and then
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    ids = tokens(1, 4).repeat(1, 5)
    if how == "assisted":
        arguments = {"assistant_model": assistant}
        assistant.generation_config.num_assistant_tokens = 5
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
    else:
        arguments = {"prompt_lookup_num_tokens": 4}
    widths = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, args, output: widths.append(output.shape[1]))
    got = model.generate(ids, max_new_tokens=40, do_sample=False, **arguments)
    handle.remove()
    assert torch.equal(got, greedy(model, ids, 40))
    assert max(widths[1:]) > 1  # drafts were verified
    if how == "assisted":
        assert 1 < len(widths) < 40


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    special = {"bos_token_id": None, "eos_token_id": None}
    config = LlamaConfig(**sizes, **special, num_attention_heads=4, initializer_range=0.25)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pair", ["smaller draft", "Llama as draft", "draft of Llama"])
def test_drafts_of_another_kind(tiny_model, pair, padded):
    """Their tokens are mostly wrong, so that target and draft roll back all the time."""
    target, draft = {
        "smaller draft": lambda: (tiny_model(), tiny_model(layer_types=["linear_attention"], seed=1)),
        "Llama as draft": lambda: (tiny_model(), tiny_llama()),
        "draft of Llama": lambda: (tiny_llama(), tiny_model()),
    }[pair]()
    ids, pads = tokens(1, 9), torch.zeros(1, 3 * padded, dtype=torch.long)
    mask = torch.cat([pads, torch.ones_like(ids)], dim=1)
    got = target.generate(
        torch.cat([pads, ids], dim=1),
        attention_mask=mask,
        max_new_tokens=30,
        do_sample=False,
        assistant_model=draft,
        return_dict_in_generate=True,
    )
    expected = greedy(target, ids, 30)
    assert torch.equal(got.sequences[:, pads.shape[1] :], expected)
    # The cache that comes back has seen these tokens and no others.
    expected = torch.cat([expected, tokens(1, 4, seed=4)], dim=1)
    prompt, mask = torch.cat([pads, expected], dim=1), torch.cat([mask, torch.ones(1, 34, dtype=torch.long)], dim=1)
    again = target.generate(
        prompt, attention_mask=mask, past_key_values=got.past_key_values, max_new_tokens=9, do_sample=False
    )
    assert torch.equal(again[:, pads.shape[1] :], greedy(target, expected, 9))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_of_another_model(tiny_model, kind):
    """Refused by name, by layers, types, sizes and batch, and left as it was."""
    model = tiny_model()
    ids = tokens(2, 5)
    others = {
        "2 layers": {"layer_types": ["conv", "sliding_attention"]},
        "Layer 2": {"layer_types": ["conv", "linear_attention", "conv", "sliding_attention"]},
    }
    for message, overrides in others.items():
        cache = make_cache(tiny_model(**overrides), kind)
        layers = list(cache.layers)
        with pytest.raises(ValueError, match=f"{message}.*another model"):
            model(ids, past_key_values=cache)
        assert all(layer is before for layer, before in zip(cache.layers, layers, strict=True))
    cache = make_cache(model, kind)
    with torch.no_grad():
        tiny_model(linear_feature_dim=16)(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"This cache.*another model"):
            model(ids, past_key_values=cache)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("layer_types", [["conv"], ["linear_attention"], PATTERNS[0]], ids="-".join)
def test_cache_of_another_batch_size(tiny_model, layer_types, length):
    """Fewer and more rows, one of them a batch that would broadcast."""
    model = tiny_model(layer_types=layer_types)
    for before, after in ((3, 2), (1, 3), (3, 1)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens(before, 5), past_key_values=cache)
            with pytest.raises(ValueError, match=r"cache.*batch"):
                model(tokens(after, length), past_key_values=cache)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("layer_types", PATTERNS, ids="-".join)
def test_beams_on_a_cache_of_one_row_each(tiny_model, layer_types, kind):
    model = tiny_model(layer_types=layer_types)
    ids, cache = tokens(2, 12), make_cache(model, kind)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
    arguments = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    with pytest.raises(
        ValueError, match=r"holds a batch of 2, the input has a batch size of 6.*batch_repeat_interleave"
    ):
        model.generate(ids, past_key_values=cache, **arguments)
    cache.batch_repeat_interleave(3)
    expected = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), expected)


@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("before", "after"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float64"), ("float64", "float32")],
)
def test_cache_of_another_dtype(tiny_model, before, after, kind, length):
    """It goes on in the dtype of the model, no further from fp64 than the model of the lesser dtype would be."""
    first, second = (tiny_model().to(getattr(torch, name)) for name in (before, after))
    cache, ids = make_cache(first, kind), tokens(2, 11 + length)
    with torch.no_grad():
        exact = tiny_model().double()(ids, use_cache=False).logits[:, 9:]
        plain = [model(ids, use_cache=False).logits[:, 9:] for model in (first, second)]
        first(ids[:, :9], past_key_values=cache)
        parts = [second(part, past_key_values=cache).logits for part in ids[:, 9:].split([length, 1, 1], dim=1)]
    error = (torch.cat(parts, dim=1) - exact).abs().max()
    assert error <= 2 * max((x - exact).abs().max() for x in plain)
    assert not {layer.keys.dtype for layer in cache.layers if hasattr(layer, "keys")} - {second.dtype}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("layer_types", PATTERNS, ids="-".join)
def test_a_mask_left_out_after_padding(tiny_model, layer_types, kind, side):
    """New tokens all exist, and the past is what it was; a window that cannot tell asks for the mask."""
    model = tiny_model(layer_types=layer_types).double()
    ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, slice(3) if side == "left" else slice(6, 9)] = 0
    cache = make_cache(model, kind)
    with torch.no_grad():
        model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
        if "sliding_attention" in layer_types and kind == "dynamic":
            for step in (1, 7):
                with pytest.raises(ValueError, match="`past_key_values` has seen padding: pass its `attention_mask`"):
                    model(ids[:, 9 : 9 + step], past_key_values=cache)
            cache.reset()
            torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)
            return
        parts = [model(part, past_key_values=cache).logits for part in ids[:, 9:].split([1, 5, 1], dim=1)]
        for row, exists, got in zip(ids, mask.bool(), torch.cat(parts, dim=1)):
            expected = model(row[exists][None], use_cache=False).logits[0, -7:]
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("was_padded", [False, True])
@pytest.mark.parametrize("length", [1, 5])
def test_a_mask_of_another_past(tiny_model, was_padded, length):
    """A ring knows how many tokens of each row it has seen."""
    model = tiny_model()
    ids, mask, cache = tokens(2, 9 + length), torch.ones(2, 9 + length, dtype=torch.long), make_cache(model, "static")
    mask[0, :3] = 0
    masks = (mask, torch.ones_like(mask)) if was_padded else (torch.ones_like(mask), mask)
    with torch.no_grad():
        model(ids[:, :9], attention_mask=masks[0][:, :9], past_key_values=cache)
        with pytest.raises(ValueError, match="the mask of that time"):
            model(ids[:, 9:], attention_mask=masks[1], past_key_values=cache)


@pytest.mark.parametrize("cache", ["tuple", "encoder_decoder"])
def test_what_is_no_decoder_cache(tiny_model, cache):
    cache = ((torch.zeros(1),),) if cache == "tuple" else EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(TypeError, match="past_key_values"):
        tiny_model()(tokens(1, 5), past_key_values=cache)


def test_training_through_a_cache(tiny_model):
    """Gradients flow through the recurrent state of an earlier forward."""
    model = tiny_model(layer_types=["conv", "linear_attention"])
    ids = tokens(2, 12)
    weight = torch.randn(2, 4, 97)
    found = []
    for lengths in ([12], [8, 4], [11, 1], [3, 5, 1, 1, 2]):
        cache = DynamicCache(config=model.config)
        logits = torch.cat([model(p, past_key_values=cache).logits for p in ids.split(lengths, dim=1)], dim=1)
        (logits[:, 8:] * weight).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert gradient.abs().max() > 0.1
            torch.testing.assert_close(other[name], gradient, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layer_types", [PATTERNS[0], ATTENTION_FREE], ids="-".join)
def test_compiled_static_cache(tiny_model, layer_types):
    """One graph for the step, without a break; a second one when the position turns from a number into a symbol."""
    model = tiny_model(layer_types=layer_types)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    arguments = {"max_new_tokens": 10, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    eager = model.generate(ids, **arguments)
    compiled = model.generate(ids, cache_implementation="static", compile_config=compile_config, **arguments)
    assert torch.equal(compiled, eager)
    assert 1 <= len(graphs) <= 2

    # The prompt in pieces: not compiled.
    graphs.clear()
    arguments |= {"cache_implementation": "static", "compile_config": compile_config, "prefill_chunk_size": 4}
    assert torch.equal(model.generate(ids, **arguments), eager)
    assert not graphs


def test_compiled_forward(tiny_model):
    """A whole forward, and its backward, in one graph."""
    model = tiny_model(layer_types=["linear_attention"])
    torch._dynamo.reset()
    compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    ids = tokens(2, 20)
    expected = model.model(ids, use_cache=False).last_hidden_state
    got = compiled(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    weight = model.model.layers[0].linear_attn.q_proj.weight
    (a,) = torch.autograd.grad(expected.square().sum(), weight, retain_graph=False)
    (b,) = torch.autograd.grad(got.square().sum(), weight)
    torch.testing.assert_close(b, a, atol=1e-3, rtol=1e-3)
