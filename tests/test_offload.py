# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Weights on several devices or on disk: the logits and the tokens stay those of the whole model."""

import copy

import pytest
import torch
from accelerate import cpu_offload

from transformers_based import BasedForCausalLM, backend


def split_map(model, first, second):
    """The first half of the layers on one device, the rest on the other."""
    half = model.config.num_hidden_layers // 2
    names = {f"model.layers.{i}": first if i < half else second for i in range(model.config.num_hidden_layers)}
    return {"model.embed_tokens": first, "lm_head": first, "model.norm": second, "model.rotary_emb": first, **names}


def assert_same_as_whole(whole, split):
    ids = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(0)).to(whole.device)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    seq_idx = (torch.arange(40, device=ids.device) // 9).expand(2, -1)
    with torch.no_grad():
        padded, packed = (
            [model(ids, use_cache=False, **arguments).logits.to(ids.device) for model in (whole, split)]
            for arguments in ({"attention_mask": mask}, {"seq_idx": seq_idx})
        )
    torch.testing.assert_close(*(logits[mask.bool()] for logits in padded), atol=1e-4, rtol=0)
    torch.testing.assert_close(*packed, atol=1e-4, rtol=0)
    tokens = [m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in (whole, split)]
    assert torch.equal(*tokens)


@pytest.fixture
def saved(tmp_path, based_tiny_path):
    BasedForCausalLM.from_pretrained(based_tiny_path).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_disk(saved, tmp_path):
    whole = BasedForCausalLM.from_pretrained(saved)
    device_map = split_map(whole, "cpu", "disk")
    split = BasedForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path / "offload")
    assert split.hf_device_map["model.layers.7"] == "disk"
    assert_same_as_whole(whole, split)


def test_cpu(based_tiny):
    """accelerate brings the weights of each layer to the device when their turn comes, here from the CPU to the CPU."""
    split = cpu_offload(copy.deepcopy(based_tiny), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in split.parameters()} == {"meta"}
    assert_same_as_whole(based_tiny, split)


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there is no interpreter")
def test_every_kernel_of_a_step_finds_its_weights(based_tiny, monkeypatch):
    """In Triton's interpreter: a kernel is launched where accelerate has brought its weights."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "triton")
    monkeypatch.setattr(backend, "INTERPRETS_ALL", True)
    split = cpu_offload(copy.deepcopy(based_tiny), execution_device=torch.device("cpu"))
    ids, logits = torch.tensor([[5, 7, 11, 13]]), []
    for model in (based_tiny, split):
        cache = model(ids[:, :3], use_cache=True).past_key_values
        logits.append(model(ids[:, 3:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, `auto` means that")
@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_whole_on_a_machine_without_gpu(saved, device_map):
    whole = BasedForCausalLM.from_pretrained(saved)
    assert_same_as_whole(whole, BasedForCausalLM.from_pretrained(saved, device_map=device_map))


@pytest.mark.gpu
@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_gpu_and_the_rest_elsewhere(saved, tmp_path, rest):
    """The layers whose weights lie elsewhere run on the GPU too."""
    whole = BasedForCausalLM.from_pretrained(saved).to(0)
    device_map = split_map(whole, 0, rest)
    split = BasedForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path / "offload")
    assert split.hf_device_map["model.layers.7"] == rest
    assert_same_as_whole(whole, split)
