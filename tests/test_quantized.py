# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Loading with quantized projections. The oracle is a plain model that holds what the quantized weights stand for."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from transformers_based import BasedForCausalLM


GROUP = 32


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def int4():
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)))


def bnb8():
    return BitsAndBytesConfig(load_in_8bit=True)


def bnb4():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def dequantized(weight) -> torch.Tensor:
    if hasattr(weight, "dequantize") and not hasattr(weight, "quant_state"):
        return weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def largest_step(method, weight: torch.Tensor) -> torch.Tensor:
    """How far a weight may be from its original: half a step of its row or group. Less than the weights are large."""
    if method is int8:
        return 0.51 * weight.abs().amax(dim=1, keepdim=True) / 127
    size = GROUP if method is int4 else 64
    groups = weight.reshape(-1, size).abs().amax(dim=1, keepdim=True)
    # The steps of int4 are equal; the widest of NF4, at its lower end, spans 0.3 of the range.
    step = groups / 7.5 if method is int4 else 0.31 * groups
    return (0.51 * step).expand(-1, size).reshape(weight.shape)


def load(path, method, **options):
    if torch.cuda.is_available():
        options["device_map"] = "cuda"
    return BasedForCausalLM.from_pretrained(path, quantization_config=method(), dtype=torch.float32, **options)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


METHODS = [int8, int4, bnb8, bnb4]
# The activations of the 8-bit product of bitsandbytes are quantized too: what it computes has no other exact form.
WEIGHT_ONLY = [int8, int4, bnb4]


@pytest.fixture
def method(request):
    name = "torchao" if request.param in (int8, int4) else "bitsandbytes"
    pytest.importorskip(name, reason=f"{name} is not installed")
    return request.param


@pytest.fixture(scope="module")
def plain(based_tiny_path):
    model = BasedForCausalLM.from_pretrained(based_tiny_path).eval()
    return model.cuda() if torch.cuda.is_available() else model


@pytest.fixture
def ids(golden, plain):
    return golden["input_ids"][:, :70].to(plain.device)


@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_every_projection_is_quantized_and_nothing_else(based_tiny_path, plain, method):
    model = load(based_tiny_path, method)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in plain.state_dict(keep_vars=True).items():
        module, _, attribute = name.rpartition(".")
        got = getattr(model.get_submodule(module), attribute)
        is_projection = isinstance(plain.get_submodule(module), nn.Linear) and attribute == "weight"
        if is_projection and module != "lm_head":
            assert type(got) is not nn.Parameter, name
            if method in WEIGHT_ONLY:
                assert ((dequantized(got) - weight).abs() <= largest_step(method, weight)).all(), name
        else:
            assert type(got) is nn.Parameter, name
            assert torch.equal(got, weight), name


@pytest.mark.parametrize("method", WEIGHT_ONLY, indirect=True)
def test_computes_what_its_weights_say(based_tiny_path, plain, ids, method):
    model, exact = load(based_tiny_path, method), copy.deepcopy(plain)
    for name, module in exact.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data.copy_(dequantized(model.get_submodule(name).weight))
    expected = logits(exact, ids)
    # The quantized product of bitsandbytes on a CPU rounds to bf16.
    tolerance = 5e-2 if method is bnb4 else 1e-5
    assert (logits(model, ids) - expected).norm() <= tolerance * expected.norm()
    assert (logits(plain, ids) - expected).norm() > 2 * tolerance * expected.norm()
    if method is not bnb4:
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids[:, :30], **options), exact.generate(ids[:, :30], **options))


@pytest.mark.parametrize("method", [int8, bnb8], indirect=True)
def test_8_bits_stay_near(based_tiny_path, plain, ids, method):
    expected = logits(plain, ids)
    assert (logits(load(based_tiny_path, method), ids) - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_generation_is_the_argmax_of_the_forward(based_tiny_path, ids, method):
    """Through the cache; a tie or a rounding may turn a token, but most must agree."""
    model = load(based_tiny_path, method)
    output = model.generate(ids[:, :30], max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert output.shape[1] == 42
    expected = logits(model, output)[:, 29:-1, : model.config.unpadded_vocab_size].argmax(-1)
    assert (output[:, 30:] == expected).float().mean() >= 0.9
    assert output[:, 30:].unique().numel() > 4


@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_saved_and_loaded_again(based_tiny_path, ids, tmp_path, method):
    # Saved before the first forward: bitsandbytes 0.50 on a CPU repacks its 4-bit weights there and saves them so.
    load(based_tiny_path, method).save_pretrained(tmp_path)
    options = {"device_map": "cuda"} if torch.cuda.is_available() else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert again.config.quantization_config is not None
    torch.testing.assert_close(logits(again, ids), logits(load(based_tiny_path, method), ids), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_adapters_on_quantized_weights(based_tiny_path, ids, method):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[train]'")
    model = load(based_tiny_path, method)
    model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False)).train()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
    quantized = sum(isinstance(x, nn.Linear) for x in BasedForCausalLM(model.config).model.modules())
    assert len(trained) == 2 * quantized
    assert all(gradient.isfinite().all() and gradient.any() for gradient in trained.values())
