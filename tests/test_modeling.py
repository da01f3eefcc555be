# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Configuration, model and heads: what a user of transformers expects of any model, for any pattern of layers."""

import copy
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.cache_utils import DynamicCache

from transformers_based import (
    BasedConfig,
    BasedForCausalLM,
    BasedForQuestionAnswering,
    BasedForSequenceClassification,
    BasedForTokenClassification,
    BasedModel,
    based_1b,
)


ONE_OF_EACH = ["conv", "linear_attention", "sliding_attention"]
HEADS = {
    AutoModel: BasedModel,
    AutoModelForCausalLM: BasedForCausalLM,
    AutoModelForSequenceClassification: BasedForSequenceClassification,
    AutoModelForTokenClassification: BasedForTokenClassification,
    AutoModelForQuestionAnswering: BasedForQuestionAnswering,
}


def tokens(batch, length, vocab=97, seed=1):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=2e-5):
    assert b.std() > 100 * tolerance
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("values", "millions", "linear", "layers"),
    [({}, 360, [1, 6, 11, 16, 21], 27), (based_1b, 1300, [1, 6, 11, 16, 21, 27, 33], 36)],
    ids=["based-360m", "based-1b"],
)
def test_released_sizes(values, millions, linear, layers):
    config = BasedConfig(**values)
    assert config.num_hidden_layers == layers == len(config.layer_types)
    for i, layer_type in enumerate(config.layer_types):
        expected = "linear_attention" if i in linear else "sliding_attention" if i - 1 in linear else "conv"
        assert layer_type == expected
    assert (config.linear_feature_dim, config.conv_kernel_size, config.sliding_window) == (16, 3, 65)
    assert config.tie_word_embeddings
    assert config.residual_in_fp32
    with torch.device("meta"):
        model = BasedForCausalLM(config)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["conv", "mamba"]}, "layer_types.*mamba"),
        ({"layer_types": ["full_attention"]}, "layer_types.*full_attention"),
        ({"layer_types": ["conv"], "num_hidden_layers": 2}, "layer_types.*num_hidden_layers"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_size": 0, "initializer_range": None}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"linear_num_heads": 0}, "linear_num_heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 0}, "num_key_value_heads"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"linear_feature_dim": -1}, "linear_feature_dim"),
        ({"linear_scale": 0.0}, "linear_scale"),
        ({"conv_kernel_size": 0}, "conv_kernel_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
    ids=str,
)
def test_config_errors_name_the_field(tiny_config, change, message):
    with pytest.raises(Exception, match=f"(?s){message}"):
        tiny_config(**change)


def test_config_round_trip(tiny_config, tmp_path):
    config = tiny_config(num_key_value_heads=2, linear_head_dim=12, linear_scale=0.3, rms_norm_eps=1e-4, eos_token_id=5)
    config.save_pretrained(tmp_path)
    loaded = BasedConfig.from_pretrained(tmp_path)
    for found in (loaded, AutoConfig.from_pretrained(tmp_path)):
        assert {**found.to_dict(), "_name_or_path": ""} == config.to_dict()


def random_patterns(count):
    rng = random.Random(0)
    return [[rng.choice(ONE_OF_EACH) for _ in range(rng.randint(1, 5))] for _ in range(count)]


@pytest.mark.parametrize(
    "layer_types",
    [["conv"], ["linear_attention"], ["sliding_attention"], ["conv", "linear_attention"], *random_patterns(5)],
    ids="-".join,
)
def test_any_pattern(tiny_model, layer_types):
    """Forward, causality, cached steps, backward to every weight."""
    model = tiny_model(layer_types=layer_types)
    assert [layer.layer_type for layer in model.model.layers] == layer_types
    ids = tokens(2, 12)
    other = ids.clone()
    other[:, 8:] = tokens(2, 4, seed=2)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        assert torch.equal(model(other, use_cache=False).logits[:, :8], logits[:, :8])
        assert not torch.equal(model(other, use_cache=False).logits[:, 8:], logits[:, 8:])
        cache = DynamicCache(config=model.config)
        steps = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 4, 1], dim=1)]
    close(torch.cat(steps, dim=1), logits)
    model(ids, labels=ids).loss.backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    # A lone sliding layer over one key would not learn its queries; over twelve everything learns.
    assert all(g.abs().max() > 0 and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("model_class", [BasedForSequenceClassification, BasedForTokenClassification])
def test_classification_heads(tiny_model, model_class):
    model = tiny_model(model_class, num_labels=3, pad_token_id=0)
    ids = tokens(2, 9).clamp_min(1)
    labels = torch.tensor([2, 0]) if model_class is BasedForSequenceClassification else tokens(2, 9, vocab=3)
    outputs = model(ids, labels=labels)
    assert outputs.logits.shape == ((2, 3) if labels.ndim == 1 else (2, 9, 3))
    expected = torch.nn.functional.cross_entropy(outputs.logits.reshape(-1, 3), labels.reshape(-1))
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.model.layers.parameters())


def test_sequence_classification_reads_the_last_token_that_exists(tiny_model):
    model = tiny_model(BasedForSequenceClassification, num_labels=3, pad_token_id=0)
    ids = tokens(1, 9).clamp_min(1)
    padded = torch.nn.functional.pad(ids, (0, 4))
    mask = (padded != 0).long()
    with torch.no_grad():
        torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_question_answering_head(tiny_model):
    model = tiny_model(BasedForQuestionAnswering)
    outputs = model(tokens(2, 9), start_positions=torch.tensor([1, 3]), end_positions=torch.tensor([2, 8]))
    assert outputs.start_logits.shape == outputs.end_logits.shape == (2, 9)
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.model.layers.parameters())


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda x: x.__name__)
def test_auto_classes(tiny_config, tmp_path, auto_class):
    config = tiny_config(num_labels=3)
    model = auto_class.from_config(config)
    assert type(model) is HEADS[auto_class]
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is HEADS[auto_class]
    assert loaded.config.layer_types == config.layer_types
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_base_model_of_a_head(tiny_model, tmp_path):
    """The body of a saved language model loads under every head, and the other way round."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "lm")
    body = BasedModel.from_pretrained(tmp_path / "lm")
    ids = tokens(1, 7)
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        assert torch.equal(body(ids).last_hidden_state, expected)
        classifier = BasedForSequenceClassification.from_pretrained(tmp_path / "lm")
        assert torch.equal(classifier.model(ids).last_hidden_state, expected)
        body.save_pretrained(tmp_path / "body")
        lm = BasedForCausalLM.from_pretrained(tmp_path / "body")
        assert torch.equal(lm(ids).logits, model(ids).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tiny_model, reentrant):
    model = tiny_model(layer_types=[*ONE_OF_EACH, "conv"]).train()
    ids = tokens(2, 140)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    handle = model.model.layers[1].linear_attn.register_forward_hook(lambda *_: calls.append(1))
    model.enable_input_require_grads()
    loss = model(ids, attention_mask=mask, labels=ids).loss
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    handle.remove()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_checkpointing_on_a_cache(tiny_model):
    """transformers would take the cache away from the layers, in silence where there is no attention."""
    model, ids = tiny_model().train(), torch.arange(9)[None]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"[Gg]radient checkpointing.*past_key_values"):
        model(ids, past_key_values=cache)
    assert model.eval()(ids, past_key_values=cache).past_key_values.get_seq_length() == 18


def test_labels(tiny_model):
    """The usual shifted cross-entropy, -100 ignored."""
    model = tiny_model()
    ids = tokens(2, 11)
    labels = ids.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        outputs = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("shape", [(2, 8), (2, 10), (1, 9), (9, 2), (18,), (2, 9, 1)], ids=str)
@pytest.mark.parametrize("model_class", [BasedForCausalLM, BasedForTokenClassification])
def test_labels_of_another_shape(tiny_model, model_class, shape):
    """Some have as many elements, and would be compared with the wrong logits."""
    with pytest.raises(ValueError, match=r"`labels` must be \[batch, tokens\] = \(2, 9\)"):
        tiny_model(model_class)(torch.zeros(2, 9, dtype=torch.long), labels=torch.zeros(shape, dtype=torch.long))


def test_labels_for_the_logits_that_are_kept(tiny_model):
    model, ids = tiny_model(), torch.arange(18).view(2, 9)
    logits = model(ids).logits[:, -4:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, -3:].flatten())
    torch.testing.assert_close(model(ids, labels=ids[:, -4:], logits_to_keep=4).loss, expected)
    with pytest.raises(ValueError, match=r"`labels` must be \[batch, tokens\] = \(2, 4\)"):
        model(ids, labels=ids, logits_to_keep=4)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4, 5])], ids=str)
def test_logits_to_keep(tiny_model, kept):
    model = tiny_model()
    ids = tokens(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.shape == (2, 9, 97)
        some = model(ids, logits_to_keep=kept).logits
    expected = logits[:, -kept:] if isinstance(kept, int) else logits[:, kept]
    torch.testing.assert_close(some, expected, atol=1e-6, rtol=0)


def test_output_hidden_states_and_attentions(tiny_model):
    model = tiny_model(attn_implementation="eager")
    ids = tokens(2, 300)
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True, output_attentions=True)
        plain = model(ids)
    close(outputs.logits, plain.logits)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert all(x.shape == (2, 300, 32) for x in outputs.hidden_states)
    assert torch.equal(outputs.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    # One attention layer, its window of 6.
    assert len(outputs.attentions) == 1
    weights = outputs.attentions[0]
    assert weights.shape == (2, 4, 300, 300)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 300))
    distance = torch.arange(300)[:, None] - torch.arange(300)
    visible = (distance >= 0) & (distance < 6)
    assert not weights[..., ~visible].any()
    assert weights[..., visible].min() > 0
    assert plain.hidden_states is None
    assert plain.attentions is None


def test_inputs_embeds(tiny_model):
    model = tiny_model()
    ids = tokens(2, 9)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="input_ids"):
            model(**arguments)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tiny_model, tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    same = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert same == tied
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)
    loaded = BasedForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tiny_model, tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    ids = tokens(1, 9)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(105)
        after = model(ids).logits
    assert after.shape[-1] == model.config.vocab_size == model.get_output_embeddings().weight.shape[0] == 105
    torch.testing.assert_close(after[..., :97], before, atol=1e-6, rtol=0)
    assert model(torch.tensor([[104]])).logits.isfinite().all()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = BasedForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["load", "convert"])
def test_low_precision(tiny_model, tmp_path, dtype, how):
    """Close to fp32, and closer than a residual stream in low precision would be to something else."""
    model = tiny_model(layer_types=ONE_OF_EACH * 2)
    ids = tokens(2, 140)
    if how == "load":
        model.save_pretrained(tmp_path)
        low = BasedForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    else:
        low = copy.deepcopy(model).to(dtype) if dtype == torch.bfloat16 else copy.deepcopy(model).half()
    assert {p.dtype for p in low.parameters()} == {dtype}
    with torch.no_grad():
        expected = model(ids).logits
        outputs = low(ids, output_hidden_states=True)
        step = low(ids[:, :1], past_key_values=outputs.past_key_values).logits
    assert outputs.logits.dtype == step.dtype == dtype
    assert outputs.hidden_states[1].dtype == torch.float32
    error = (outputs.logits.float() - expected).abs().mean() / expected.std()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)
    low.train()
    low(ids, labels=ids).loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() and p.grad.any() for p in low.parameters())


def test_residual_in_low_precision(tiny_model):
    model = tiny_model(residual_in_fp32=False).to(torch.bfloat16)
    with torch.no_grad():
        outputs = model(tokens(1, 9), output_hidden_states=True)
    assert {x.dtype for x in outputs.hidden_states} == {torch.bfloat16}


@pytest.mark.parametrize("key_value_heads", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [9, 300])
def test_grouped_key_value_heads(tiny_model, key_value_heads, attention, length):
    """Equal to full heads that repeat them."""
    model = tiny_model(num_key_value_heads=key_value_heads, attn_implementation=attention)
    full = tiny_model(attn_implementation=attention)
    state_dict = model.state_dict()
    for name in ("k_proj", "v_proj"):
        weight = state_dict[f"model.layers.2.self_attn.{name}.weight"]
        assert weight.shape == (8 * key_value_heads, 32)
        repeated = weight.view(key_value_heads, 8, 32).repeat_interleave(4 // key_value_heads, dim=0)
        state_dict[f"model.layers.2.self_attn.{name}.weight"] = repeated.reshape(32, 32)
    full.load_state_dict(state_dict)
    with torch.no_grad():
        close(model(tokens(2, length)).logits, full(tokens(2, length)).logits)


def dense_attention(layer, hidden_states, position_ids, visible):
    """The sliding attention written out: softmax over `visible` [B, T, T]."""
    batch, length, _ = hidden_states.shape
    query, key, value = (
        proj(hidden_states).view(batch, length, -1, layer.head_dim).transpose(1, 2).double()
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    half = layer.head_dim // 2
    angle = position_ids[:, None, :, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    query, key = (
        torch.cat(
            [
                x[..., :half] * angle.cos() - x[..., half:] * angle.sin(),
                x[..., half:] * angle.cos() + x[..., :half] * angle.sin(),
            ],
            dim=-1,
        )
        for x in (query, key)
    )
    scores = (query @ key.transpose(-1, -2) * layer.head_dim**-0.5).masked_fill(~visible[:, None], -1e30)
    output = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return layer.o_proj(output.float())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", [None, "left", "right", "middle"])
@pytest.mark.parametrize(("length", "window"), [(40, 6), (300, 6), (256, 1), (513, 100), (700, 65)], ids=str)
def test_sliding_attention_equals_the_dense_form(tiny_model, attention, packed, padding, length, window):
    """In blocks for the long inputs, whole for the short ones; the window counts the tokens that exist."""
    model = tiny_model(layer_types=["sliding_attention"], sliding_window=window, attn_implementation=attention)
    layer, seen = model.model.layers[0].self_attn, {}
    layer.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output[0]))
    mask = torch.ones(2, length, dtype=torch.long)
    if padding is not None:
        mask[0, {"left": slice(0, 21), "right": slice(length - 13, None), "middle": slice(11, 28)}[padding]] = 0
    exists = mask.bool()
    document = torch.zeros(2, length, dtype=torch.long)
    if packed:
        document[:, 17:] += 1
        document[1, length // 2 :] += 1
    rank = mask.cumsum(1)
    distance = rank[:, :, None] - rank[:, None]
    visible = (distance >= 0) & (distance < window) & exists[:, None] & (document[:, :, None] == document[:, None])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible &= causal
    keywords = {"attention_mask": mask if padding else None, "seq_idx": document if packed else None}
    with torch.no_grad():
        model(tokens(2, length), use_cache=False, **keywords)
        expected = dense_attention(layer, seen["x"], (rank - 1).clamp_min(0), visible)
    close(seen["y"][exists], expected[exists], 2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_attention_gradients_in_blocks(tiny_model, attention):
    """As many documents, each too short for blocks."""
    model = tiny_model(layer_types=["sliding_attention"], sliding_window=9, attn_implementation=attention)
    ids = tokens(1, 600)
    weight = torch.randn(1, 600, 97)
    lengths = [100, 3, 197, 200, 1, 99]
    seq_idx = torch.arange(6).repeat_interleave(torch.tensor(lengths))[None]
    (model(ids, seq_idx=seq_idx, use_cache=False).logits * weight).sum().backward()
    found = gradients(model)
    for part, w in zip(ids.split(lengths, dim=1), weight.split(lengths, dim=1)):
        (model(part, use_cache=False).logits * w).sum().backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(found[name], expected, atol=2e-3, rtol=1e-4)
        assert expected.abs().max() > 1


@pytest.mark.skipif(not shutil.which("c++"), reason="flex attention needs a C++ compiler on a CPU")
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_sliding_attention_compiled_with_padding(tiny_model, side):
    """The window counts the tokens that exist."""
    model = tiny_model(layer_types=["sliding_attention"]).train()
    torch._dynamo.reset()
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, {"left": slice(0, 11), "right": slice(29, None), "middle": slice(11, 22)}[side]] = 0
    # Padding predicts nothing either.
    labels = ids.masked_fill((mask == 0) | (mask.roll(1, dims=1) == 0), -100)
    got = torch.compile(model, backend="eager")(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    short, whole = (model(x[None], use_cache=False).logits[0] for x in (ids[0][mask[0] == 1], ids[1]))
    rows = torch.zeros(2, 40, 97).masked_scatter((mask == 1)[..., None], torch.cat([short, whole]))
    expected = torch.nn.functional.cross_entropy(rows[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_flex_attention(tiny_model):
    """The window with padding and documents through flex attention, as through sdpa."""
    model = tiny_model(head_dim=16, layer_types=["sliding_attention"])
    ids = tokens(2, 140)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    seq_idx = (torch.arange(140) >= 50).long().expand(2, -1)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, seq_idx=seq_idx, use_cache=False).logits
        model.set_attn_implementation("flex_attention")
        got = model(ids, attention_mask=mask, seq_idx=seq_idx, use_cache=False).logits
    close(got[mask.bool()], expected[mask.bool()])


def test_attention_implementation_is_chosen_at_loading(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for name in ("sdpa", "eager", "flex_attention"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert model.config._attn_implementation == name
    with pytest.raises(Exception, match="nonsense"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="nonsense")


@pytest.mark.gpu
@pytest.mark.parametrize("length", [9, 300])
def test_flash_attention(tiny_model, length):
    pytest.importorskip("flash_attn", reason="flash_attn is not installed")
    model = tiny_model(head_dim=16).to("cuda", torch.bfloat16)
    ids = tokens(1, length).cuda()
    seq_idx = (torch.arange(length, device="cuda") >= 5).long()[None]
    with torch.no_grad():
        expected = model(ids, seq_idx=seq_idx, use_cache=False).logits
        model.set_attn_implementation("flash_attention_2")
        got = model(ids, seq_idx=seq_idx, use_cache=False).logits
    assert (got - expected).abs().mean() < 0.03 * expected.std()


@pytest.mark.parametrize("head", [BasedForCausalLM, BasedForTokenClassification])
def test_save_and_load_bitwise(tiny_model, tmp_path, head):
    model = tiny_model(head, layer_types=ONE_OF_EACH, num_labels=3)
    model.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    names = load_file(tmp_path / "model.safetensors").keys()
    kinds = {name.split(".")[3] for name in names if name.startswith("model.layers.")}
    assert kinds == {"conv", "linear_attn", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [head.__name__]
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_saved_files(tiny_model, tmp_path):
    """Weights as safetensors, both configs, and every module of the model's code."""
    tiny_model().save_pretrained(tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    code = {"cache_based", "configuration_based", "modeling_based", "original_format", "taylor_attention"}
    assert found >= {"config.json", "generation_config.json", "model.safetensors", *(f"{name}.py" for name in code)}
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in found)


def test_sharded_save(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters()))


def test_initialisation(tiny_model):
    """normal(sqrt(2 / (5 hidden))), what writes into the residual stream smaller with depth, biases 0, norms 1."""
    model = tiny_model(hidden_size=160, intermediate_size=320, initializer_range=None, layer_types=ONE_OF_EACH * 2)
    std = (2 / (5 * 160)) ** 0.5
    into_residual = ("out_proj.weight", "o_proj.weight", "down_proj.weight")
    seen = set()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith(into_residual):
            seen.add(name.split(".")[-2])
            assert parameter.std().item() == pytest.approx(std / 12**0.5, rel=0.05), name
        elif "conv.conv" not in name:
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
    assert seen == {"out_proj", "o_proj", "down_proj"}


LENGTHS = [5, 1, 150, 8, 1, 99]


def packing(how, lengths, batch=1):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(batch, -1)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(batch, -1)
    longest = max(lengths)
    return {
        "position_ids": {"position_ids": positions},
        "seq_idx": {"seq_idx": ids, "position_ids": positions},
        "seq_idx_alone": {"seq_idx": ids},
        "cu_seq_lens_q": {"cu_seq_lens_q": bounds, "position_ids": positions},
        "collator": {
            "position_ids": positions,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        },
    }[how]


PACKINGS = ["position_ids", "seq_idx", "seq_idx_alone", "cu_seq_lens_q", "collator"]


@pytest.mark.parametrize("how", PACKINGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_equal_separate_ones(tiny_model, how, attention):
    """Logits and gradients, long enough that sliding attention goes by blocks."""
    model = tiny_model(layer_types=[*ONE_OF_EACH, "conv", "linear_attention"], attn_implementation=attention)
    ids = tokens(1, sum(LENGTHS))
    weight = torch.randn(1, sum(LENGTHS), 97, generator=torch.Generator().manual_seed(3)) / 20
    packed = model(ids, use_cache=False, **packing(how, LENGTHS)).logits
    (packed * weight).sum().backward()
    packed_gradients = gradients(model)
    separate = []
    for part, w in zip(ids.split(LENGTHS, dim=1), weight.split(LENGTHS, dim=1)):
        separate.append(model(part, use_cache=False).logits)
        (separate[-1] * w).sum().backward()
    close(packed, torch.cat(separate, dim=1), 5e-5)
    for name, expected in gradients(model).items():
        assert expected.abs().max() > 1e-2, name
        torch.testing.assert_close(packed_gradients[name], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("how", PACKINGS)
def test_perturbing_one_document_leaves_the_others_alone(tiny_model, how):
    """Bitwise."""
    model = tiny_model(layer_types=[*ONE_OF_EACH, "conv", "linear_attention"])
    ids = tokens(1, sum(LENGTHS))
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    with torch.no_grad():
        before = model(ids, use_cache=False, **packing(how, LENGTHS)).logits
        for i in (0, 1, 2, 4):
            part = slice(bounds[i], bounds[i + 1])
            other = ids.clone()
            other[:, part] = (other[:, part] + 1) % 97
            after = model(other, use_cache=False, **packing(how, LENGTHS)).logits
            same = torch.ones(sum(LENGTHS), dtype=torch.bool)
            same[part] = False
            assert torch.equal(after[:, same], before[:, same])
            assert (after[:, part] != before[:, part]).any(-1).all()


@pytest.mark.parametrize("how", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("scale", [1, 20])
def test_packed_documents_with_padding(tiny_model, how, scale):
    """Two rows, padded left and right, their documents of different lengths, with padding between two of them."""
    model = tiny_model(layer_types=[*ONE_OF_EACH, "conv", "linear_attention"])
    rows = [[(-1, 3), (0, 4), (1, 5)], [(0, 2), (-1, 3), (1, 6), (-1, 1)]]  # (document or -1 for padding, length)
    rows = [[(document, n * scale) for document, n in row] for row in rows]
    length = 12 * scale
    ids = tokens(2, length)
    mask = torch.zeros(2, length, dtype=torch.long)
    position_ids, seq_idx = torch.zeros_like(mask), torch.zeros_like(mask)
    pieces = []
    for r, row in enumerate(rows):
        start, last = 0, 0
        for document, n in row:
            part = slice(start, start + n)
            if document >= 0:
                mask[r, part] = 1
                position_ids[r, part] = torch.arange(n)
                last = document
                pieces.append((r, part))
            seq_idx[r, part] = last
            start += n
    arguments = {"position_ids": position_ids} if how == "position_ids" else {"seq_idx": seq_idx}
    with torch.no_grad():
        packed = model(ids, attention_mask=mask, use_cache=False, **arguments).logits
        for r, part in pieces:
            close(packed[r, part], model(ids[r : r + 1, part], use_cache=False).logits[0], 5e-5)


def test_packed_rows_of_a_batch(tiny_model):
    """`position_ids` of one row for all rows of a batch."""
    model = tiny_model()
    ids = tokens(3, 10)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    with torch.no_grad():
        packed = model(ids, position_ids=position_ids, use_cache=False).logits
        close(packed, torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1))


def test_one_document_is_no_packing(tiny_model):
    """Positions that only start elsewhere, or belong to padding, keep the cache."""
    model = tiny_model()
    ids = tokens(2, 8)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    for position_ids in (
        torch.arange(5, 13)[None],
        (mask.cumsum(1) - 1).clamp_min(0),
        (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
    ):
        with torch.no_grad():
            outputs = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=True)
        assert outputs.past_key_values is not None
        assert outputs.past_key_values.get_seq_length() == 8


@pytest.mark.parametrize("how", PACKINGS)
def test_packed_documents_on_a_cache_raise(tiny_model, how):
    model = tiny_model()
    ids = tokens(1, sum(LENGTHS))
    with pytest.raises(ValueError, match=r"Packed documents.*past_key_values"):
        model(ids, past_key_values=DynamicCache(config=model.config), **packing(how, LENGTHS))
    with torch.no_grad():
        assert model(ids, use_cache=True, **packing(how, LENGTHS)).past_key_values is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_idx": torch.zeros(1, 5)}, "seq_idx"),
        ({"attention_mask": torch.ones(1, 5)}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "attention_mask"),
    ],
)
def test_forward_errors_name_the_argument(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=f"`{message}`"):
        tiny_model()(tokens(1, 6), use_cache=False, **arguments)


def test_packed_rows_with_bounds_raise(tiny_model):
    with pytest.raises(ValueError, match="`cu_seq_lens_q`"):
        tiny_model()(tokens(2, 6), cu_seq_lens_q=torch.tensor([0, 3, 6]).int(), use_cache=False)


def test_sequence_classification_goes_by_the_mask(tiny_model):
    """Whatever stands where nothing exists, embeddings too, and whether the config has a token for it."""
    model = tiny_model(BasedForSequenceClassification, num_labels=3, pad_token_id=None)
    ids = tokens(2, 9).clamp_min(1)
    mask = torch.ones_like(ids)
    mask[0, 6:], mask[1, :2] = 0, 0
    with torch.no_grad():
        alone = torch.cat([model(ids[:1, :6]).logits, model(ids[1:, 2:]).logits])
        for inputs in ({"input_ids": ids}, {"inputs_embeds": model.model.embed_tokens(ids)}):
            torch.testing.assert_close(model(**inputs, attention_mask=mask).logits, alone, atol=1e-5, rtol=0)
    labels = torch.tensor([2, 0])
    loss = model(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(alone, labels))


def test_sequence_classification_on_a_cache(tiny_model):
    model = tiny_model(BasedForSequenceClassification, num_labels=3, pad_token_id=0)
    ids = tokens(2, 9).clamp_min(1)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        first = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
        second = model(ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, whole, atol=1e-5, rtol=0)
        mask[0, 5:] = 0
        first = model(ids[:, :5], use_cache=True)
        with pytest.raises(ValueError, match="no token among the new ones"):
            model(ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)


@pytest.mark.parametrize(
    "documents", [{"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]])}, {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])}]
)
def test_sequence_classification_of_packed_documents_is_refused(tiny_model, documents):
    model = tiny_model(BasedForSequenceClassification, num_labels=3, pad_token_id=0)
    with pytest.raises(ValueError, match="gives one answer a row"):
        model(tokens(1, 6), **documents)


@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (2, 6, 6), (2, 3), (6,), (1, 6)])
def test_masks_of_other_shapes_are_refused_beside_positions(tiny_model, shape):
    model = tiny_model()
    with pytest.raises(ValueError, match="`attention_mask` must be "):
        model(tokens(2, 6), attention_mask=torch.ones(shape), position_ids=torch.arange(6)[None])


def test_positions_that_count_padding_in_the_middle(tiny_model):
    """A gap in the mask that the positions leave out as well is no other document."""
    model = tiny_model()
    ids, mask = tokens(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, 4:6] = 0
    positions = torch.arange(12)[None]
    kept = mask[0].bool()
    with torch.no_grad():
        got = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, kept]
        alone = model(ids[:, kept], position_ids=positions[:, kept], seq_idx=torch.zeros(1, 10, dtype=torch.long))
    torch.testing.assert_close(got, alone.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hint", ["seq_idx", "cu_seq_lens_q"])
def test_documents_are_not_told_of_on_a_warm_cache(tiny_model, hint):
    model = tiny_model()
    cache = model(tokens(1, 7), use_cache=True).past_key_values
    told = torch.tensor([0, 5], dtype=torch.int32) if hint == "cu_seq_lens_q" else torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="do not say whether the first document goes on"):
        model(tokens(1, 5), past_key_values=cache, **{hint: told})


def test_contradicting_documents_are_refused_under_a_mask_of_ones_too(tiny_model):
    model = tiny_model()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    with pytest.raises(ValueError, match="tell of different documents"):
        model(tokens(1, 6), attention_mask=torch.ones(1, 6), seq_idx=torch.zeros(1, 6).long(), position_ids=positions)
