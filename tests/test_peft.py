# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""LoRA and its kin through peft: what is adapted by default, gradients, merging, saving, the Hub, remote code."""

import pytest
import torch
from minihub import MiniHub
from programs import run_python
from torch import nn

from transformers_based import BasedForCausalLM, BasedForSequenceClassification


peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[train]'")

PROJECTIONS = {
    "conv": {"conv.in_proj", "conv.out_proj"},
    "linear_attention": {f"linear_attn.{x}_proj" for x in "qkvo"},
    "sliding_attention": {f"self_attn.{x}_proj" for x in "qkvo"},
}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def every_projection(config) -> set[str]:
    kinds = enumerate(config.layer_types)
    return {f"model.layers.{i}.{name}" for i, kind in kinds for name in PROJECTIONS[kind] | MLP}


def adapted(model) -> set[str]:
    return {name.removesuffix(".base_layer") for name, _ in model.named_modules() if name.endswith(".base_layer")}


def lora(**options):
    """Adapters that change the model from the start: peft's own begin at zero, where nothing can be compared."""
    return peft.LoraConfig(r=8, init_lora_weights=False, **options)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.fixture
def ids():
    return torch.randint(97, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_every_projection_of_every_mixer_is_adapted_and_learns(tiny_model, ids, targets):
    model = tiny_model()
    names = every_projection(model.config)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert names == linear - {"lm_head"}
    model = peft.get_peft_model(model, lora(target_modules=targets)).train()
    assert adapted(model.get_base_model()) == names
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
    assert len(gradients) == 2 * len(names)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        # Not of one row or column by chance: every rank of every adapter.
        by_rank = gradient if "lora_A" in name else gradient.T
        assert (by_rank.abs().amax(dim=1) > 0).all(), name
    assert all(x.grad is None for x in model.parameters() if not x.requires_grad)


@pytest.mark.parametrize("method", ["LoraConfig", "AdaLoraConfig", "LoHaConfig", "LoKrConfig", "VeraConfig"])
def test_other_methods_know_the_targets(tiny_model, ids, method):
    options = {"total_step": 10} if method == "AdaLoraConfig" else {}
    base = tiny_model()
    names = every_projection(base.config)
    expected = logits(base, ids)
    model = peft.get_peft_model(base, getattr(peft, method)(**options))
    assert adapted(model.get_base_model()) == names
    if method != "AdaLoraConfig":
        # The base class of a new adapter is the model itself.
        torch.testing.assert_close(logits(model.eval(), ids), expected)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert any(x.grad is not None and x.grad.any() for x in model.parameters())


def test_gradients_are_those_of_the_weights_they_stand_for(tiny_model, ids):
    """With W = W0 + s B A: dA = s B^T dW and dB = s dW A^T, dW taken from the merged model in fp64."""
    model = peft.get_peft_model(tiny_model().double(), lora(lora_alpha=4), autocast_adapter_dtype=False).train()
    model(input_ids=ids, labels=ids).loss.backward()
    layers = {name: x for name, x in model.get_base_model().named_modules() if hasattr(x, "lora_A")}
    factors = {name: (x.lora_A.default.weight, x.lora_B.default.weight) for name, x in layers.items()}
    gradients = {name: (a.grad.clone(), b.grad.clone()) for name, (a, b) in factors.items()}
    merged = model.merge_and_unload().requires_grad_(True)
    merged(input_ids=ids, labels=ids).loss.backward()
    for name, (a, b) in factors.items():
        weight = merged.get_submodule(name).weight.grad
        torch.testing.assert_close(gradients[name][0], 0.5 * b.T @ weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients[name][1], 0.5 * weight @ a.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_equals_unmerged(tiny_model, ids, dtype):
    base = tiny_model().to(dtype)
    before = logits(base, ids)
    model = peft.get_peft_model(base, lora()).eval()
    unmerged = logits(model, ids)
    merged = logits(model.merge_and_unload(), ids)
    # bf16 rounds the sum of the weights once more; the others only reorder sums.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert (merged - unmerged).norm() <= tolerance * unmerged.norm()
    assert (merged - before).norm() > 4 * tolerance * before.norm()


def test_adapter_with_cache_checkpointing_and_generate(tiny_model, ids):
    model = peft.get_peft_model(tiny_model(), lora()).eval()
    output = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for position in range(ids.shape[1], output.shape[1]):
        assert torch.equal(output[:, position], logits(model, output[:, :position])[:, -1].argmax(-1))
    gradients = []
    for use_checkpoints in (False, True):
        if use_checkpoints:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([x.grad.clone() for x in model.parameters() if x.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_save_and_load_in_every_way(tiny_model, ids, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    base = BasedForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base, ids)
    # Without a task, peft's Auto class would want to be told from which module it may import the base model.
    model = peft.get_peft_model(base, lora(task_type="CAUSAL_LM")).eval()
    expected = logits(model, ids)
    assert not torch.allclose(expected, before)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    for load in (peft.AutoPeftModelForCausalLM.from_pretrained, BasedForCausalLM.from_pretrained):
        torch.testing.assert_close(logits(load(tmp_path / "adapter"), ids), expected)
    model = BasedForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(tmp_path / "adapter", adapter_name="learned")
    torch.testing.assert_close(logits(model, ids), expected)
    model.disable_adapters()
    torch.testing.assert_close(logits(model, ids), before)
    # Through transformers alone, without a wrapper.
    model = BasedForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(r=4))
    assert adapted(model) == every_projection(model.config)


def test_adapters_of_a_base_in_the_original_layout(based_tiny_path, based_tiny, golden, tmp_path):
    """transformers alone would look for the base's weights by other names, and begin with random ones."""
    ids = golden["prompt_ids"]
    model = peft.get_peft_model(based_tiny, lora(task_type="CAUSAL_LM")).eval()
    model.peft_config["default"].base_model_name_or_path = str(based_tiny_path)
    model.save_pretrained(tmp_path)
    loaded, info = BasedForCausalLM.from_pretrained(tmp_path, adapter_name="learned", output_loading_info=True)
    assert list(loaded.peft_config) == ["learned"]
    assert not info["missing_keys"]
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    half = BasedForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    loaded = BasedForCausalLM.from_pretrained(tmp_path, config=loaded.config)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"adapter_config.json cannot be read"):
        BasedForCausalLM.from_pretrained(tmp_path)


def test_trained_head_beside_adapters(tiny_model, ids):
    options = {"task_type": "SEQ_CLS", "init_lora_weights": False}
    base = tiny_model(BasedForSequenceClassification, num_labels=3, pad_token_id=0)
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).train()
    model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
    trained = {name for name, x in model.named_parameters() if x.grad is not None and x.grad.any()}
    assert any("score.modules_to_save" in name for name in trained)
    assert sum("lora_" in name for name in trained) == 2 * len(every_projection(base.config))


def test_targets_that_do_not_exist(tiny_model):
    with pytest.raises(ValueError, match="nope_proj"):
        peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["nope_proj"]))
    # The depthwise taps have no low rank; the mixer around them is no matrix.
    with pytest.raises(ValueError, match="BasedGatedConv1d"):
        peft.get_peft_model(tiny_model(), peft.LoraConfig(r=8, target_modules=["conv.conv"]))
    with pytest.raises(ValueError, match="BasedLinearAttention"):
        peft.get_peft_model(tiny_model(), peft.LoraConfig(r=8, target_modules=["linear_attn"]))


def test_remote_code_registers_too_and_the_hub_serves_adapters(based_tiny_path, tmp_path):
    """Nobody has installed this package; peft is imported after the model is built, and Liger not at all."""
    BasedForCausalLM.from_pretrained(based_tiny_path).save_pretrained(tmp_path / "based")
    adapt = f"""
import sys
sys.modules.update(dict.fromkeys("transformers_based based_kernels triton".split()))
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "based")!r}, trust_remote_code=True)
assert not {{"peft", "liger_kernel"}} & set(sys.modules), "the model's code imports what it only registers with"
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
ids = torch.arange(20)[None]
with torch.no_grad():
    model = get_peft_model(model, LoraConfig(r=8, init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    expected = model(input_ids=ids).logits
    model.push_to_hub("me/adapter")
    again = AutoPeftModelForCausalLM.from_pretrained("me/adapter", trust_remote_code=True)
    torch.testing.assert_close(again(input_ids=ids).logits, expected)
print(sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters()), "adapters")
"""
    with MiniHub() as hub:
        variables = {**hub.environment(tmp_path / "cache"), "PYTHONPATH": peft.__path__[0] + "/.."}
        output = run_python("-c", adapt, cwd=tmp_path, **variables).stdout
        assert hub.files("me/adapter").keys() >= {"adapter_config.json", "adapter_model.safetensors"}
    config = BasedForCausalLM.from_pretrained(based_tiny_path).config
    assert f"{len(every_projection(config))} adapters" in output
