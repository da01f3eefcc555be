# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The released models as formulas on their original tensors, in fp32: slow, and on purpose like nothing else here.

Each function takes the original `config.json`, the original tensors by name (without the `model.` prefix) and token
ids [B, T], and returns logits [B, T, rows of the embedding]. B batch, T time, H heads, D channels of a head, N state.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import conv1d, linear, pad, silu, softplus


Config = Mapping[str, Any]
Weights = Mapping[str, torch.Tensor]


@torch.no_grad()
def based_logits(config: Config, weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Short convolutions, linear attention with a Taylor feature map, and attention in a window."""

    def mixer(i: int, x: torch.Tensor) -> torch.Tensor:
        name = f"transformer.layers.{i}.mixer."
        if i in (config.get("alt_mixer_2_layers") or ()):
            options = config["alt_mixer_2"]
            qkv = linear(x, _fp32(weights, name + "Wqkv.weight"))
            heads, left = options.get("num_heads", config["n_head"]), options.get("window_size", 128) // 2
            return _project(weights, name, _softmax_attention(qkv, heads, config, 1.0, left))
        if i in (config.get("alt_mixer_layers") or ()):
            options = config["alt_mixer"]
            heads = options.get("num_heads", config["n_head"])
            q, k, v = (_heads(linear(x, _fp32(weights, f"{name}proj_{p}.weight")), heads) for p in "qkv")
            size = (options.get("feature_map") or {}).get("input_dim", options.get("feature_dim", 16))
            s = q @ k.mT * size**-0.5
            seen = (1 + s + s * s / 2).tril()
            return _project(weights, name, _merge(seen @ v / seen.sum(-1, keepdim=True)))
        bias = weights.get(name + "in_proj.bias")
        u, gate = linear(x, _fp32(weights, name + "in_proj.weight"), bias if bias is None else bias.float()).chunk(
            2, -1
        )
        return _project(weights, name, silu(_causal_conv(u, _fp32(weights, name + "conv.conv.weight"))) * gate)

    return _transformer(config, weights, ids, mixer)


@torch.no_grad()
def attention_logits(config: Config, weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention with rotary over a part of each head."""

    def mixer(i: int, x: torch.Tensor) -> torch.Tensor:
        name = f"transformer.layers.{i}.mixer."
        qkv = linear(x, _fp32(weights, name + "Wqkv.weight"))
        fraction = config["rotary_emb_fraction"]
        return _project(weights, name, _softmax_attention(qkv, config["n_head"], config, fraction, left=None))

    return _transformer(config, weights, ids, mixer)


@torch.no_grad()
def mamba_logits(config: Config, weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Selective state spaces, one token after the other: h = exp(dt A) h + dt B u, y = C h + D u."""
    epsilon = config.get("norm_epsilon", 1e-5)
    x = _fp32(weights, "backbone.embedding.weight")[ids]
    for i in range(config["n_layer"]):
        w = {
            name: _fp32(weights, f"backbone.layers.{i}.mixer.{name}")
            for name in (
                *("A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias"),
                *("x_proj.weight", "dt_proj.weight", "dt_proj.bias", "out_proj.weight"),
            )
        }
        hidden = _norm(x, _fp32(weights, f"backbone.layers.{i}.norm.weight"), epsilon)
        u, gate = linear(hidden, w["in_proj.weight"]).chunk(2, dim=-1)
        u = silu(_causal_conv(u, w["conv1d.weight"], w["conv1d.bias"]))
        rank, size = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
        dt, b, c = linear(u, w["x_proj.weight"]).split([rank, size, size], dim=-1)
        dt = softplus(linear(dt, w["dt_proj.weight"], w["dt_proj.bias"]))
        state, outputs = u.new_zeros(u.shape[0], u.shape[2], size), []
        for t in range(u.shape[1]):
            decay = torch.exp(dt[:, t, :, None] * -w["A_log"].exp())
            state = decay * state + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
            outputs.append((state @ c[:, t, :, None])[..., 0])
        y = torch.stack(outputs, dim=1) + u * w["D"]
        x = x + linear(y * silu(gate), w["out_proj.weight"])
    x = _norm(x, _fp32(weights, "backbone.norm_f.weight"), epsilon)
    return linear(x, _head(weights, "backbone.embedding.weight"))


def _transformer(
    config: Config, weights: Weights, ids: torch.Tensor, mixer: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    embedding = "transformer.embeddings.word_embeddings.weight"
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    x = _fp32(weights, embedding)[ids]
    for i in range(config["n_layer"]):
        layer = f"transformer.layers.{i}."
        x = x + mixer(i, _norm(x, _fp32(weights, layer + "norm1.weight"), epsilon))
        hidden = _norm(x, _fp32(weights, layer + "norm2.weight"), epsilon)
        # The gate is the second half.
        up, gate = linear(hidden, _fp32(weights, layer + "mlp.fc1.weight")).chunk(2, dim=-1)
        x = x + linear(up * silu(gate), _fp32(weights, layer + "mlp.fc2.weight"))
    return linear(_norm(x, _fp32(weights, "transformer.ln_f.weight"), epsilon), _head(weights, embedding))


def _softmax_attention(
    qkv: torch.Tensor, heads: int, config: Config, rotary_fraction: float, left: int | None
) -> torch.Tensor:
    """`left`: how many keys before its own a query sees; None for all."""
    q, k, v = (_heads(x, heads) for x in qkv.chunk(3, dim=-1))
    q, k = (_rotate(x, rotary_fraction, config.get("rotary_emb_base", 10000.0)) for x in (q, k))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    visible = torch.ones_like(scores, dtype=torch.bool).tril()
    if left is not None:
        visible = visible.triu(-left)
    return _merge(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v)


def _rotate(x: torch.Tensor, fraction: float, base: float) -> torch.Tensor:
    """Turns channel j of the first `fraction` with channel j + half of it, by an angle that grows with time."""
    size = int(x.shape[-1] * fraction)
    angles = torch.arange(x.shape[-2])[:, None] * base ** -(torch.arange(0, size, 2) / size)
    a, b, rest = x.split([size // 2, size // 2, x.shape[-1] - size], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)


def _causal_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """One filter a channel. x [B, T, C], weight [C, 1, K]."""
    padded = pad(x.mT, (weight.shape[-1] - 1, 0))
    return conv1d(padded, weight, bias, groups=weight.shape[0]).mT


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, H * D] to [B, H, T, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] to [B, T, H * D]."""
    return x.transpose(1, 2).flatten(-2)


def _project(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    bias = weights.get(name + "out_proj.bias")
    return linear(x, _fp32(weights, name + "out_proj.weight"), bias if bias is None else bias.float())


def _head(weights: Weights, embedding: str) -> torch.Tensor:
    return _fp32(weights, "lm_head.weight" if "lm_head.weight" in weights else embedding)


def _fp32(weights: Weights, name: str) -> torch.Tensor:
    return weights[name].float()
