# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The reference checkpoint computes what the original code computes: logits, and 24 greedy tokens."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache


TOLERANCE = 2e-4


@pytest.fixture(params=["sdpa", "eager"])
def model(request, based_tiny):
    based_tiny.set_attn_implementation(request.param)
    assert based_tiny.config._attn_implementation == request.param
    return based_tiny


def make_cache(model, kind, length):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config)


def assert_reference(logits, expected):
    """The original cuts its greedy logits to the vocabulary, without the rows that pad the embedding."""
    assert expected.std() > 1
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, atol=TOLERANCE, rtol=0)


def test_golden_tensors_are_there(golden):
    """Numbers that nothing else could reproduce by chance."""
    assert golden["greedy_ids"].shape[1] - golden["prompt_ids"].shape[1] == 24
    assert golden["greedy_logits"].shape[:2] == (len(golden["prompt_ids"]), 24)
    assert 3 < golden["logits"].std() < 8


@torch.no_grad()
def test_logits(model, golden):
    assert_reference(model(golden["input_ids"], use_cache=False).logits, golden["logits"])
    assert_reference(model(golden["input_ids"], use_cache=True).logits, golden["logits"])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("seed", range(4))
def test_logits_of_random_splits(model, golden, cache, seed):
    """Seed 0 goes token by token."""
    ids = golden["input_ids"]
    length = ids.shape[1]
    lengths = [1] * length
    if seed:
        generator = torch.Generator().manual_seed(seed)
        cuts = torch.randperm(length - 1, generator=generator)[: 2 + 3 * seed].sort().values + 1
        lengths = torch.tensor([0, *cuts, length]).diff().tolist()
    past = make_cache(model, cache, length)
    logits = [model(part, past_key_values=past).logits for part in ids.split(lengths, dim=1)]
    assert_reference(torch.cat(logits, dim=1), golden["logits"])


@torch.no_grad()
def test_greedy_tokens_by_full_forward(model, golden):
    ids, logits = golden["prompt_ids"], []
    for _ in range(24):
        logits.append(model(ids, use_cache=False).logits[:, -1, : golden["greedy_logits"].shape[-1]])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ids, golden["greedy_ids"])
    assert_reference(torch.stack(logits, dim=1), golden["greedy_logits"])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("first", [1, 3, None])
def test_greedy_tokens_by_cached_steps(model, golden, cache, first):
    """The prompt whole, or in two parts."""
    prompt = golden["prompt_ids"]
    past = make_cache(model, cache, golden["greedy_ids"].shape[1])
    if first is not None:
        model(prompt[:, :first], past_key_values=past)
    ids, logits, new = prompt, [], prompt[:, first or 0 :]
    for _ in range(24):
        logits.append(model(new, past_key_values=past).logits[:, -1, : golden["greedy_logits"].shape[-1]])
        new = logits[-1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, new], dim=1)
    assert torch.equal(ids, golden["greedy_ids"])
    assert_reference(torch.stack(logits, dim=1), golden["greedy_logits"])


@pytest.mark.parametrize(("cache_implementation", "use_cache"), [(None, True), ("static", True), (None, False)])
def test_greedy_tokens_by_generate(model, golden, cache_implementation, use_cache):
    generated = model.generate(
        golden["prompt_ids"],
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        use_cache=use_cache,
        cache_implementation=cache_implementation,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(generated.sequences, golden["greedy_ids"])
    assert_reference(torch.stack(generated.logits, dim=1), golden["greedy_logits"])
