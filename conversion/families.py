# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The families of released checkpoints and what each becomes in transformers. A new family is one entry of `FAMILIES`.

A table says, for each original tensor, which transformers ones are stacked in it along dim 0; `Half` is a half of one.
The table of Based is the one in `transformers_based.original_format`, which the model itself and `--reverse` use too.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from original_forward import attention_logits, based_logits, mamba_logits
from transformers import MambaConfig, Phi3Config, PreTrainedConfig

from transformers_based import BasedConfig
from transformers_based.original_format import config_from_original, is_original_config, name_table


Config = Mapping[str, Any]
Shapes = Mapping[str, torch.Size]


class Half(NamedTuple):
    """The first (0) or second (1) half of the rows of a transformers tensor."""

    name: str
    which: int


Table = dict[str, tuple[str | Half, ...]]


@dataclass(frozen=True)
class Family:
    """One kind of original checkpoint. Names of original tensors are without the `model.` prefix of the files."""

    kind: str
    """What messages and model cards call it."""
    name: str
    """How the names of its released checkpoints start."""
    matches: Callable[[Config], bool]
    """Whether a `config.json` is of this family."""
    config: Callable[[Config, Shapes], PreTrainedConfig]
    """The transformers config for a `config.json` and the shapes of the original tensors."""
    table: Callable[[PreTrainedConfig], Table]
    embedding: str
    """The original tensor that `lm_head.weight` is tied to."""
    logits: Callable[[Config, Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]
    """The original formula, see original_forward.py."""


def family_of(config: Config) -> Family | None:
    """The family that a `config.json` belongs to."""
    return next((family for family in FAMILIES if family.matches(config)), None)


def _is_attention_config(config: Config) -> bool:
    return config.get("model_type") in (None, "gpt2") and {"n_embd", "rotary_emb_fraction"} <= config.keys()


def _is_mamba_config(config: Config) -> bool:
    return config.get("model_type") is None and {"d_model", "ssm_cfg"} <= config.keys()


def _based_config(config: Config, shapes: Shapes) -> BasedConfig:
    return BasedConfig(**config_from_original(config, shapes))


# What the attention baselines say and Phi3 takes for granted.
_ATTENTION_FIELDS = {
    "activation_function": "swiglu",
    "rms_norm": True,
    "rotary_emb_interleaved": False,
    "scale_attn_by_inverse_layer_idx": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "qkv_proj_bias": False,
    "out_proj_bias": False,
}
_ATTENTION_MODEL = {
    "transformer.embeddings.word_embeddings.weight": ("model.embed_tokens.weight",),
    "transformer.ln_f.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
_ATTENTION_LAYER = {
    "norm1.weight": ("input_layernorm.weight",),
    "norm2.weight": ("post_attention_layernorm.weight",),
    "mixer.Wqkv.weight": ("self_attn.qkv_proj.weight",),
    "mixer.out_proj.weight": ("self_attn.o_proj.weight",),
    # The gate comes second in the original and first in Phi3.
    "mlp.fc1.weight": (Half("mlp.gate_up_proj.weight", 1), Half("mlp.gate_up_proj.weight", 0)),
    "mlp.fc2.weight": ("mlp.down_proj.weight",),
}


def _attention_config(config: Config, shapes: Shapes) -> Phi3Config:
    _check_fields(config, ("n_embd", "n_layer", "n_head", "vocab_size"), _ATTENTION_FIELDS)
    hidden_size, heads, fraction = config["n_embd"], config["n_head"], config["rotary_emb_fraction"]
    if not 0 < fraction <= 1 or hidden_size % heads:
        raise ValueError(
            f"Original config: {heads} heads of {hidden_size} channels with rotary over a fraction of {fraction}."
        )
    width = math.ceil((config.get("n_inner") or 4 * hidden_size) / 256) * 256
    positions = config.get("n_positions", 2048)
    return Phi3Config(
        vocab_size=_rows(shapes, "transformer.embeddings.word_embeddings.weight", config),
        hidden_size=hidden_size,
        intermediate_size=_size(shapes, "transformer.layers.0.mlp.fc2.weight", 1, width),
        num_hidden_layers=config["n_layer"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(config.get("rotary_emb_base", 10000.0)),
            "partial_rotary_factor": float(fraction),
        },
        rms_norm_eps=config.get("layer_norm_epsilon", 1e-5),
        max_position_embeddings=positions,
        original_max_position_embeddings=positions,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        sliding_window=None,
        **_special_tokens(config),
    )


def _attention_table(config: Phi3Config) -> Table:
    return _table(_ATTENTION_MODEL, _ATTENTION_LAYER, "transformer.layers", "model.layers", config.num_hidden_layers)


_MAMBA_MODEL = {
    "backbone.embedding.weight": ("backbone.embeddings.weight",),
    "backbone.norm_f.weight": ("backbone.norm_f.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
_MAMBA_LAYER = {
    "norm.weight": ("norm.weight",),
    "mixer.A_log": ("mixer.A_log",),
    "mixer.D": ("mixer.D",),
    "mixer.in_proj.weight": ("mixer.in_proj.weight",),
    "mixer.conv1d.weight": ("mixer.conv1d.weight",),
    "mixer.conv1d.bias": ("mixer.conv1d.bias",),
    "mixer.x_proj.weight": ("mixer.x_proj.weight",),
    "mixer.dt_proj.weight": ("mixer.dt_proj.weight",),
    "mixer.dt_proj.bias": ("mixer.dt_proj.bias",),
    "mixer.out_proj.weight": ("mixer.out_proj.weight",),
}


def _mamba_config(config: Config, shapes: Shapes) -> MambaConfig:
    _check_fields(config, ("d_model", "n_layer", "vocab_size"), {"rms_norm": True})
    hidden_size, options = config["d_model"], config["ssm_cfg"] or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"Original config: `ssm_cfg` must hold the options of the mixer, not {options!r}.")
    rank = options.get("dt_rank", "auto")
    mixer = "backbone.layers.0.mixer."
    return MambaConfig(
        vocab_size=_rows(shapes, "backbone.embedding.weight", config),
        hidden_size=hidden_size,
        num_hidden_layers=config["n_layer"],
        state_size=_size(shapes, mixer + "A_log", 1, options.get("d_state", 16)),
        expand=_size(shapes, mixer + "A_log", 0, options.get("expand", 2) * hidden_size) // hidden_size,
        conv_kernel=_size(shapes, mixer + "conv1d.weight", 2, options.get("d_conv", 4)),
        time_step_rank=_size(shapes, mixer + "dt_proj.weight", 1, -(-hidden_size // 16) if rank == "auto" else rank),
        use_bias=False,
        use_conv_bias=True,
        layer_norm_epsilon=config.get("norm_epsilon", 1e-5),
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        **_special_tokens(config),
    )


def _mamba_table(config: MambaConfig) -> Table:
    return _table(_MAMBA_MODEL, _MAMBA_LAYER, "backbone.layers", "backbone.layers", config.num_hidden_layers)


def _table(model: Table, layer: Table, original: str, new: str, num_layers: int) -> Table:
    table = dict(model)
    for i in range(num_layers):
        for name, targets in layer.items():
            table[f"{original}.{i}.{name}"] = tuple(
                Half(f"{new}.{i}.{target.name}", target.which) if isinstance(target, Half) else f"{new}.{i}.{target}"
                for target in targets
            )
    return table


def _check_fields(config: Config, needed: tuple[str, ...], taken_for_granted: Config) -> None:
    if missing := [name for name in needed if name not in config]:
        raise ValueError(f"Original config: lacks {', '.join(f'`{name}`' for name in missing)}.")
    for name, expected in taken_for_granted.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"Original config: `{name}` is {config[name]!r}, only {expected!r} is supported.")


def _size(shapes: Shapes, name: str, dim: int, otherwise: int) -> int:
    """Shapes overrule the config, which rounds sizes up only when the original model is built."""
    shape = shapes.get(name, ())
    return shape[dim] if dim < len(shape) else otherwise


def _rows(shapes: Shapes, name: str, config: Config) -> int:
    multiple = config.get("pad_vocab_size_multiple", 1)
    return _size(shapes, name, 0, math.ceil(config["vocab_size"] / multiple) * multiple)


def _special_tokens(config: Config) -> dict[str, int | None]:
    """The end of text of GPT-2 for both ends, unless the vocabulary is too small; neither class's own default."""
    tokens = {name: config.get(name, 50256) for name in ("bos_token_id", "eos_token_id")}
    known = {name: token if token < config["vocab_size"] else None for name, token in tokens.items()}
    return {**known, "pad_token_id": None}


FAMILIES = (
    Family(
        kind="Based checkpoint",
        name="based",
        matches=is_original_config,
        config=_based_config,
        table=name_table,
        embedding="transformer.embeddings.word_embeddings.weight",
        logits=based_logits,
    ),
    Family(
        kind="attention baseline of the Based paper",
        name="attn",
        matches=_is_attention_config,
        config=_attention_config,
        table=_attention_table,
        embedding="transformer.embeddings.word_embeddings.weight",
        logits=attention_logits,
    ),
    Family(
        kind="Mamba baseline of the Based paper",
        name="mamba",
        matches=_is_mamba_config,
        config=_mamba_config,
        table=_mamba_table,
        embedding="backbone.embedding.weight",
        logits=mamba_logits,
    ),
)
