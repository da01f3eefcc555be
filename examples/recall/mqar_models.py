# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The two-layer models that run.py compares, and the bytes of state that each keeps for a sequence.

based            a short convolution, then Taylor linear attention       size: `linear_feature_dim`; values of
                                                                         `value_dim` entries (0: of the width)
sliding_window   a short convolution, then attention in a window         size: `sliding_window`
attention        Llama                                                   size: the tokens it has read
mamba            Mamba, as transformers has it                           size: `state_size`
"""

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, PreTrainedConfig, PreTrainedModel

from transformers_based import BasedConfig


KINDS = ("based", "sliding_window", "attention", "mamba")


class Cell(NamedTuple):
    """One model to train: what the frontier has a point for, and a learning rate."""

    kind: str
    width: int
    size: int
    value_dim: int
    learning_rate: float

    def __str__(self):
        values = f" values {self.value_dim}" if self.value_dim else ""
        return f"{self.kind} width {self.width} size {self.size}{values} lr {self.learning_rate:g}"


def make_config(kind: str, width: int, size: int, value_dim: int, vocab_size: int) -> PreTrainedConfig:
    """Raises `ValueError` for an unknown `kind` and for numbers that make no model of it."""
    if kind not in KINDS:
        raise ValueError(f"Unknown model {kind!r}: it is one of {list(KINDS)}.")
    if width < 1 or size < 1 or value_dim < 0:
        raise ValueError(f"{kind} of width {width}, size {size}, values {value_dim}: they are at least 1, 1 and 0.")
    if width % 2 and kind in ("sliding_window", "attention"):
        raise ValueError(f"{kind} of width {width}: its rotary positions need an even one.")
    if value_dim and kind != "based":
        raise ValueError(f"{kind} with values of {value_dim}: only Based has a size for them, give 0.")
    common = {"vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": 2, "tie_word_embeddings": True}
    common |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if kind in ("based", "sliding_window"):
        mixer = {
            "based": {"linear_num_heads": 1, "linear_feature_dim": size, "linear_head_dim": value_dim or width},
            "sliding_window": {"sliding_window": size},
        }[kind]
        second = {"based": "linear_attention", "sliding_window": "sliding_attention"}[kind]
        common |= {"layer_types": ["conv", second], "intermediate_size": 2 * width, "num_attention_heads": 1}
        return BasedConfig(**common, **mixer)
    if kind == "attention":
        return LlamaConfig(
            **common,
            intermediate_size=2 * width,
            num_attention_heads=1,
            max_position_embeddings=size,
            # As Based starts: with 0.02, as is usual in large models, nothing was learned in 800 steps.
            initializer_range=(2 / (5 * width)) ** 0.5,
        )
    # The scan of plain PyTorch goes token by token; mambapy's takes log2(T) rounds.
    return MambaConfig(**common, state_size=size, use_mambapy=find_spec("mambapy") is not None)


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    """In fp32, with new weights."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if config.model_type == "llama":
        # Based starts what writes into the residual stream smaller with depth, as GPT-2 does; Llama has no such rule.
        with torch.no_grad():
            for layer in model.model.layers:
                for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    projection.weight /= (2 * config.num_hidden_layers) ** 0.5
    return model


def tensors_in(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


@torch.no_grad()
def state_bytes(config: PreTrainedConfig, length: int, dtype: torch.dtype = torch.float32) -> int:
    """
    What the cache of a model in `dtype` holds for one sequence of `length` tokens, the last of them read in a step of
    its own. A recurrent state is fp32 in any case.
    """
    if config.model_type == "mamba":
        # mambapy's scan takes fp32 only.
        config = copy.copy(config)
        config.use_mambapy = False
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.zeros(1, length, dtype=torch.long)
    name = "cache_params" if config.model_type == "mamba" else "past_key_values"
    cache = model(ids[:, :-1], use_cache=True)[name]
    model(ids[:, -1:], use_cache=True, **{name: cache})
    tensors = {id(x): x for layer in cache.layers for x in tensors_in(vars(layer))}
    return sum(x.numel() * x.element_size() for x in tensors.values())
