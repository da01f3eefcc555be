# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Long streams, token by token: the state never decays, so it must not lose what it has summed (DESIGN trap 2)."""

import pytest
import torch
from transformers import DynamicCache

from transformers_based import BasedConfig, BasedForCausalLM, taylor_attention, taylor_attention_step


LENGTH = 32_768


def exact_state(key, value, scale):
    """[B, T, H, D], [B, T, H, V] in fp64 -> the state, from the definition: one feature for each pair a <= b."""
    features = key.shape[-1]
    extended = torch.cat([key * scale**0.5, torch.ones_like(key[..., :1])], dim=-1)
    value = torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)
    pairs = [(a, b) for a in range(features + 1) for b in range(a, features + 1)]
    columns = [torch.einsum("bthv,bth->bhv", value, extended[..., a] * extended[..., b]) for a, b in pairs]
    return torch.stack(columns, dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_on_a_stream(dtype):
    torch.manual_seed(0)
    config = BasedConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_heads=2,
        linear_feature_dim=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = BasedForCausalLM(config).eval().to(dtype)
    mixer, seen = model.model.layers[0].linear_attn, {"k_proj": [], "v_proj": []}
    for name, outputs in seen.items():
        getattr(mixer, name).register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
    ids, cache = torch.randint(31, (1, LENGTH)), DynamicCache(config=config)
    for i in range(LENGTH):
        logits = model.model(ids[:, i : i + 1], past_key_values=cache).last_hidden_state
    state = cache.layers[0].state
    assert state.dtype == torch.float32
    assert logits.isfinite().all()
    key, value = (torch.cat(x, dim=1).double().view(1, LENGTH, 2, -1) for x in seen.values())
    expected = exact_state(key, value, config.linear_scale)
    got = state[..., : expected.shape[-1]].double()
    assert (got - expected).norm() <= 1e-3 * expected.norm()
    normaliser, wanted = got[:, :, -1], expected[:, :, -1]
    assert (normaliser - wanted).norm() <= 1e-3 * wanted.norm()
    # The constant pair counts the tokens.
    assert normaliser[..., -1].unique().item() == LENGTH


@pytest.mark.parametrize("size", [1.0, 30.0, 60_000.0])
def test_half_precision_never_overflows(size):
    """fp16 queries and keys of realistic and of extreme size."""
    torch.manual_seed(0)
    query, key = (torch.randn(1, 200, 2, 16).clamp(-1, 1).mul(size).half() for _ in range(2))
    value = torch.randn(1, 200, 2, 8).half()
    output, state = taylor_attention(query, key, value, output_final_state=True)
    step = taylor_attention_step(query[:, :1], key[:, :1], value[:, :1], state)
    assert output.isfinite().all()
    assert step.isfinite().all()
    assert state.isfinite().all()
    # A weighted mean stays among its values, up to rounding.
    assert output.abs().max() <= 1.01 * value.abs().max() or size > 1000
