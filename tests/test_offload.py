# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Weights on several devices or on disk: the logits and the tokens stay those of the whole model."""

import pytest
import torch

from transformers_based import BasedForCausalLM


def split_map(model, first, second):
    """The first half of the layers on one device, the rest on the other."""
    half = model.config.num_hidden_layers // 2
    names = {f"model.layers.{i}": first if i < half else second for i in range(model.config.num_hidden_layers)}
    return {"model.embed_tokens": first, "lm_head": first, "model.norm": second, "model.rotary_emb": first, **names}


def assert_same_as_whole(saved, whole, split):
    ids = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        expected = whole(ids, attention_mask=mask).logits
        got = split(ids, attention_mask=mask).logits.to(expected.device)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)
    tokens = [m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).cpu() for m in (whole, split)]
    assert torch.equal(*tokens)
    with torch.no_grad():
        packed = [
            m(ids, seq_idx=(torch.arange(40) // 9).expand(2, -1), use_cache=False).logits.to(expected.device)
            for m in (whole, split)
        ]
    torch.testing.assert_close(*packed, atol=1e-4, rtol=0)


@pytest.fixture
def saved(tmp_path, based_tiny_path):
    BasedForCausalLM.from_pretrained(based_tiny_path).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_disk(saved, tmp_path):
    whole = BasedForCausalLM.from_pretrained(saved)
    device_map = split_map(whole, "cpu", "disk")
    split = BasedForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path / "offload")
    assert split.hf_device_map["model.layers.7"] == "disk"
    assert_same_as_whole(saved, whole, split)


def test_auto_on_a_machine_without_gpu(saved):
    whole = BasedForCausalLM.from_pretrained(saved)
    assert_same_as_whole(saved, whole, BasedForCausalLM.from_pretrained(saved, device_map="cpu"))


@pytest.mark.gpu
def test_cpu_and_gpu(saved):
    whole = BasedForCausalLM.from_pretrained(saved)
    split = BasedForCausalLM.from_pretrained(saved, device_map=split_map(whole, 0, "cpu"))
    assert_same_as_whole(saved, whole, split)
