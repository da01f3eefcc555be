# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""One regression test for each trap that has cost other implementations of linear models wrong numbers."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DynamicCache, StaticCache

from transformers_based import (
    BasedConfig,
    BasedForCausalLM,
    BasedForSequenceClassification,
    BasedModel,
    TaylorCacheLayer,
    taylor_attention,
    taylor_attention_step,
)


PATTERNS = [["conv"], ["linear_attention"], ["sliding_attention"], ["conv", "linear_attention", "sliding_attention"]]


def tokens(batch, length, vocab=97, seed=1):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_trap_01_padding_adds_nothing_to_the_normaliser():
    """phi(0) is not 0: a pad whose hidden state is zeroed still adds 1 to the normaliser. Mask phi(k)."""
    query, key = torch.randn(2, 1, 20, 2, 8)
    value = torch.randn(1, 20, 2, 16)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, :7] = 0
    alone, state = taylor_attention(query[:, 7:], key[:, 7:], value[:, 7:], output_final_state=True)
    for garbage in (0.0, 3.0, float("nan")):
        for tensor in (query, key, value):
            tensor[:, :7] = garbage
        padded, padded_state = taylor_attention(query, key, value, mask=mask, output_final_state=True)
        assert not padded[:, :7].any()
        torch.testing.assert_close(padded[:, 7:], alone, atol=1e-6, rtol=0)
        torch.testing.assert_close(padded_state, state, atol=1e-5, rtol=0)
        before = state.clone()
        masked = taylor_attention_step(query[:, :1], key[:, :1], value[:, :1], state, mask=mask[:, :1])
        assert not masked.any()
        assert torch.equal(state, before)


@pytest.mark.parametrize("layer_types", PATTERNS)
@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_trap_01_padded_model_equals_unpadded(tiny_model, layer_types, where):
    """The conv too: its input after in_proj is the bias, not 0, where the hidden state is zeroed."""
    model = tiny_model(layer_types=layer_types)
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            bias.data.normal_(std=0.5)
    mask = torch.ones(1, 17, dtype=torch.long)
    mask[:, {"left": slice(5), "right": slice(12, None), "middle": slice(4, 9)}[where]] = 0
    padded, exists = tokens(1, 17), mask[0].bool()
    with torch.no_grad():
        expected = model(padded[:, exists]).logits
        got = model(padded, attention_mask=mask).logits[:, exists]
        without_mask = model(padded).logits[:, exists]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    if where != "right":
        assert (without_mask - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [None, "dynamic", "static"])
@pytest.mark.parametrize("where", ["left", "right", "middle"])
@pytest.mark.parametrize(("attention", "length"), [("sdpa", 17), ("sdpa", 300), ("eager", 17)])
@pytest.mark.parametrize("layer_types", PATTERNS)
def test_trap_01_nan_under_padding_stays_there(tiny_model, monkeypatch, layer_types, attention, where, kind, length):
    """A weight of 0 does not hide NaN: 0 * NaN is NaN."""
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
    model = tiny_model(layer_types=layer_types, attn_implementation=attention)
    ids, mask = tokens(1, length + 4), torch.ones(1, length + 4, dtype=torch.long)
    mask[:, {"left": slice(5), "right": slice(length - 5, length), "middle": slice(4, 9)}[where]] = 0
    cache = {
        None: lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=64),
    }[kind]()
    with torch.no_grad():
        expected = model(ids[mask.bool()][None], use_cache=False).logits[0]
        for garbage in (float("nan"), float("inf")):
            embeds = model.get_input_embeddings()(ids).masked_fill(mask[..., None] == 0, garbage)
            parts, seen = [], 0
            for part in embeds.split([length, 1, 3] if cache is not None else [length + 4], dim=1):
                seen += part.shape[1]
                output = model(
                    inputs_embeds=part,
                    attention_mask=mask[:, :seen],
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
                parts.append(output.logits)
            got = torch.cat(parts, dim=1)[mask.bool()]
            torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
            if cache is not None:
                cache.reset()


@pytest.mark.parametrize("kind", ["half", "bfloat16", "autocast", "reorder", "prefill"])
def test_trap_02_state_counts_beyond_half_precision(tiny_model, kind):
    """The state never decays: a counter stops at 256 in bf16 and at 2048 in fp16. It is fp32 whatever happens."""
    model = tiny_model(layer_types=["conv", "linear_attention"])
    if kind in ("half", "reorder"):
        model = model.half()
    elif kind == "bfloat16":
        model = model.to(torch.bfloat16)
    cache = DynamicCache(config=model.config)
    total, steps = (2500, 0) if kind == "prefill" else (2050, 5)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind in ("autocast", "prefill"))
    ids = tokens(2, total + steps)
    with torch.no_grad(), autocast:
        model(ids[:, :total], past_key_values=cache)
        for i in range(total, total + steps):
            if kind == "reorder":
                cache.reorder_cache(torch.tensor([1, 0]))
            model(ids[:, i : i + 1], past_key_values=cache)
    state = cache.layers[1].state
    assert state.dtype == torch.float32
    # The normaliser's row, at the feature of the constant pair, counts the tokens.
    constant = (8 + 1) * (8 + 2) // 2 - 1
    assert torch.equal(state[:, :, -1, constant], torch.full((2, 2), float(total + steps)))


def test_trap_02_loading_in_half_keeps_the_state_in_fp32(tiny_model, tmp_path):
    """`dtype=` at loading."""
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        cache = model(tokens(1, 300), use_cache=True).past_key_values
    state = cache.layers[1].state
    assert state.dtype == torch.float32
    assert state[0, 0, -1, 44] == 300


@pytest.mark.parametrize("kind", ["own", "dynamic", "dynamic_without_config", "static"])
def test_trap_03_stock_cache_layers_are_replaced(tiny_model, kind):
    """A stock LinearAttentionLayer without conv state has no device, no previous state, and lacks most operations."""
    model = tiny_model()
    cache = {
        "own": lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "dynamic_without_config": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }[kind]()
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        outputs = model(ids[:, :8], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        recurrent = [layer for i, layer in enumerate(cache.layers) if i != 2]
        assert all(isinstance(layer, TaylorCacheLayer) for layer in recurrent)
        assert cache.has_previous_state(1)
        assert all(layer.device == ids.device for layer in recurrent)
        assert cache.get_seq_length() == 8
        if kind != "static":
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0]))
            ids, expected = ids.flip(0), expected.flip(0)
        cache.reorder_cache(torch.tensor([1, 0]))
        step = model(ids[:, 8:].flip(0), past_key_values=cache).logits
    torch.testing.assert_close(step[:, 0], expected[:, -1].flip(0), atol=2e-5, rtol=0)


def test_trap_03_crop_is_exact(tiny_model):
    """A state is a sum, so what was kept since a snapshot takes tokens back exactly."""
    model = tiny_model()
    assert not model._is_stateful
    ids, wrong = tokens(1, 14), tokens(1, 4, seed=3)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model(ids[:, :8], past_key_values=cache)
        cache.activate_past_recording()
        model(torch.cat([ids[:, 8:10], wrong], dim=1), past_key_values=cache)
        cache.crop(-4)
        rest = model(ids[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(rest, expected[:, 10:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("layer_types", [["conv"], ["linear_attention"], ["linear_attention", "conv"]])
@pytest.mark.parametrize("implementation", [None, "static"])
def test_trap_04_attention_free_model_generates(tiny_model, layer_types, implementation):
    """`get_seq_length` raises when no layer is attention."""
    model = tiny_model(layer_types=layer_types)
    ids = tokens(2, 7)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, cache_implementation=implementation)
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


def test_trap_05_layer_types_survive(tiny_config, tiny_model, tmp_path):
    """transformers 5.17 rewrites "conv" to "linear_attention" in configs that are not its own."""
    layer_types = ["conv", "linear_attention", "sliding_attention", "conv"]
    config = tiny_config(layer_types=layer_types)
    assert config.layer_types == layer_types
    config.validate()
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == layer_types
    assert AutoConfig.from_pretrained(tmp_path).layer_types == layer_types
    model = tiny_model(layer_types=layer_types)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == layer_types
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.layer_types == layer_types
    # transformers itself would let these pass.
    with pytest.raises(Exception, match="Unknown `layer_types`"):
        tiny_config(layer_types=["full_attention", "conv"])


def test_trap_06_buffers_after_from_pretrained(tiny_model, tmp_path):
    """Non-persistent buffers come back as garbage from the meta device."""
    model = tiny_model(layer_types=["sliding_attention"], rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    model.save_pretrained(tmp_path)
    loaded = BasedForCausalLM.from_pretrained(tmp_path)
    buffers, expected = dict(loaded.named_buffers()), dict(model.named_buffers())
    assert "model.rotary_emb.inv_freq" in expected
    assert buffers.keys() == expected.keys()
    for name, buffer in expected.items():
        assert torch.equal(buffers[name], buffer), name
    torch.testing.assert_close(buffers["model.rotary_emb.inv_freq"], 500.0 ** (-torch.arange(0, 8, 2) / 8))
    # A second load must not depend on what the allocator finds: poison what it may reuse.
    poison = [torch.full((4,), float("nan")) for _ in range(100)]
    del poison
    ids = tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(BasedForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("source", ["scratch", "original"])
def test_trap_07_only_transformers_names_are_saved(tiny_model, based_tiny, tmp_path, source):
    """A registered checkpoint mapping makes `save_pretrained` write the original names back."""
    model = tiny_model() if source == "scratch" else based_tiny
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys() - {"lm_head.weight"}
    assert not any("mixer" in name or "transformer." in name for name in saved)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "based"
    assert not {"alt_mixer", "n_embd", "n_layer"} & config.keys()


@pytest.mark.parametrize("model_type", ["gpt2", None])
def test_trap_08_original_folder_is_never_a_random_gpt2(based_tiny_path, based_tiny, golden, tmp_path, model_type):
    """With `model_type: gpt2` AutoModel builds a random GPT-2 without a word."""
    config = json.loads((based_tiny_path / "config.json").read_text())
    config.pop("model_type", None)
    if model_type is not None:
        config["model_type"] = model_type
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").symlink_to(based_tiny_path / "pytorch_model.bin")
    model = BasedForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(golden["input_ids"]).logits
    width = golden["logits"].shape[-1]
    torch.testing.assert_close(logits[..., :width], golden["logits"], atol=2e-4, rtol=0)

    if model_type is None:
        with pytest.raises(ValueError, match="model_type"):
            AutoConfig.from_pretrained(tmp_path)
        return
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BasedConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, BasedForCausalLM)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), based_tiny.parameters()))
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, BasedModel)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), based_tiny.model.parameters()))


def test_trap_08_a_real_gpt2_stays_one(tmp_path):
    """What catches original checkpoints lets every other `model_type: gpt2` through."""
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GPT2Config
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is GPT2LMHeadModel
    with pytest.raises(ValueError, match="not the config of a Based model"):
        BasedForCausalLM.from_pretrained(tmp_path)


REMOTE_CODE = """
import sys, torch, transformers
assert "transformers_based" not in sys.modules
folder = sys.argv[1]
ids = torch.arange(9)[None]
results = {}
for name in transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map:
    if name == "AutoConfig":
        continue
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert "transformers_based" not in sys.modules
    if name == "AutoModelForCausalLM":
        results["logits"] = model.eval()(ids).logits.detach()
    results[name] = type(model).__name__
torch.save(results, sys.argv[2])
"""
HEADS = {
    "AutoModel": "BasedModel",
    "AutoModelForCausalLM": "BasedForCausalLM",
    "AutoModelForSequenceClassification": "BasedForSequenceClassification",
    "AutoModelForTokenClassification": "BasedForTokenClassification",
    "AutoModelForQuestionAnswering": "BasedForQuestionAnswering",
}


@pytest.mark.parametrize("saved_class", [BasedForCausalLM, BasedForSequenceClassification])
def test_trap_09_auto_map_names_all_heads_and_their_files(tiny_model, tmp_path, saved_class):
    """Only the saved class enters `auto_map`, and a model loaded from installed code is saved without the files."""
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_model(saved_class).save_pretrained(first)
    saved_class.from_pretrained(first).save_pretrained(second)
    for folder in (first, second):
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map == {
            "AutoConfig": "configuration_based.BasedConfig",
            **{auto_class: f"modeling_based.{name}" for auto_class, name in HEADS.items()},
        }
        modules = {"cache_based", "configuration_based", "modeling_based", "original_format", "taylor_attention"}
        assert modules <= {path.stem for path in folder.glob("*.py")}


def test_trap_09_saved_code_runs_without_the_package(tiny_model, tmp_path):
    """Every head loads from the code that was saved, in a process that does not import the package."""
    model = tiny_model()
    BasedForCausalLM.from_pretrained(_saved(model, tmp_path / "first")).save_pretrained(tmp_path / "second")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", REMOTE_CODE, str(tmp_path / "second"), str(tmp_path / "results.pt")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert process.returncode == 0, process.stderr
    results = torch.load(tmp_path / "results.pt")
    with torch.no_grad():
        torch.testing.assert_close(results.pop("logits"), model(torch.arange(9)[None]).logits, atol=1e-5, rtol=0)
    assert results == HEADS


def _saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", ["position_ids", "seq_idx", "cu_seq_lens_q"])
@pytest.mark.parametrize("layer_types", PATTERNS)
def test_trap_10_packed_documents_do_not_see_each_other(tiny_model, layer_types, how):
    """`position_ids` that restart are seen by stock attention only; all three mixers must know the documents."""
    model = tiny_model(layer_types=layer_types)
    lengths = [5, 1, 9, 3]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    documents = tokens(1, 18).split(lengths, dim=1)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packing = {
        "position_ids": {},
        "seq_idx": {"seq_idx": torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]},
        "cu_seq_lens_q": {"cu_seq_lens_q": bounds.int(), "cu_seq_lens_k": bounds.int()},
    }[how]
    with torch.no_grad():
        expected = torch.cat([model(ids).logits for ids in documents], dim=1)
        packed = model(torch.cat(documents, dim=1), position_ids=position_ids, use_cache=False, **packing).logits
    torch.testing.assert_close(packed, expected, atol=2e-5, rtol=0)


def test_trap_10_what_is_not_supported_raises(tiny_model):
    """Packed documents on a cache have no one state to go on from."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="Packed documents"):
        model(tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), past_key_values=cache)


@pytest.mark.parametrize("layer_types", PATTERNS)
@pytest.mark.parametrize("static", [False, True])
def test_trap_11_many_tokens_on_a_warm_cache(tiny_model, layer_types, static):
    """A second chat turn and chunked prefill, longer and shorter than the window, with padding in between."""
    model = tiny_model(layer_types=layer_types)
    lengths = [7, 2, 1, 300, 3, 1, 9]
    ids = tokens(2, sum(lengths))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    if not static:  # a static cache takes padding on the left only where there is attention
        mask[1, 11:14] = 0
    cache = (
        StaticCache(config=model.config, max_cache_len=ids.shape[1]) if static else DynamicCache(config=model.config)
    )
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        parts, seen = [], 0
        for part in ids.split(lengths, dim=1):
            seen += part.shape[1]
            parts.append(model(part, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    exists = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[exists], expected[exists], atol=5e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trap_15_sliding_attention_is_linear(tiny_model, tensor_log, attention):
    """SDPA with a dense window mask is quadratic in time and memory."""
    model = tiny_model(layer_types=["sliding_attention"], attn_implementation=attention)
    largest, touched = {}, {}
    for length in (1024, 2048, 4096):
        # A query for each token: 4 heads of 8 keys to each block of 64 tokens.
        with torch.no_grad(), tensor_log() as log:
            model.model(tokens(1, length), use_cache=False)
        largest[length], touched[length] = log.largest, log.touched
        assert log.largest <= length * 1024
    assert largest[2048] <= 2.05 * largest[1024]
    assert largest[4096] <= 2.05 * largest[2048]
    assert touched[4096] <= 2.1 * touched[2048]
