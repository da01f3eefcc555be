# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The models that the benchmarks compare: Based as released, and others of the same vocabulary and size.

    python examples/model_shapes.py

prints their parameter counts, which differ by less than 1 percent. Each Llama has the usual proportions (MLP of 8/3 of
the width, rounded up to a multiple of 256; keys and values for every head); it is smaller than Based. Each Mamba and
Mamba 2 has the width, the state and the heads of the released ones, and as many layers as the count allows. Weights are
random.
"""

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from transformers_based import BasedConfig, based_1b


# "tiny" is there to try a program out; its Llama has whatever width of MLP meets the count.
BASED = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "linear_num_heads": 4,
        "sliding_window": 17,
        "bos_token_id": 511,
        "eos_token_id": 511,
    },
    "360m": {},
    "1.3b": based_1b,
}
LLAMA = {
    "tiny": {"hidden_size": 64, "intermediate_size": 216, "num_hidden_layers": 4, "num_attention_heads": 4},
    "360m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1.3b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16},
}
MAMBA = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 6, "state_size": 32},
    "360m": {"hidden_size": 1024, "num_hidden_layers": 47},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 47},
}
MAMBA2 = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 8, "num_heads": 8, "head_dim": 16, "state_size": 24},
    "360m": {"hidden_size": 1024, "num_hidden_layers": 47, "num_heads": 32},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 48, "num_heads": 64},
}
SHAPES = tuple(BASED)


def based_config(shape: str, **overrides) -> BasedConfig:
    return BasedConfig(**{**BASED[shape], **overrides})


def _like_based(shape: str, *names: str) -> dict:
    based = based_config(shape)
    return {name: getattr(based, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", *names)} | {
        "tie_word_embeddings": True
    }


def llama_config(shape: str, **overrides) -> LlamaConfig:
    """For any length: the positions of the rotary embedding are not limited."""
    shared = _like_based(shape, "rms_norm_eps") | {"max_position_embeddings": 2**20}
    return LlamaConfig(**{**LLAMA[shape], **shared, **overrides})


def mamba_config(shape: str, **overrides) -> MambaConfig:
    return MambaConfig(**{**MAMBA[shape], **_like_based(shape), "pad_token_id": 0, **overrides})


def mamba2_config(shape: str, **overrides) -> Mamba2Config:
    """One group of matrices B and C, as in the released ones."""
    return Mamba2Config(**{"n_groups": 1, **MAMBA2[shape], **_like_based(shape), "pad_token_id": 0, **overrides})


CONFIGS = {"based": based_config, "llama": llama_config, "mamba": mamba_config, "mamba2": mamba2_config}


def build(config: PreTrainedConfig, device: str | torch.device = "cpu", dtype=torch.float32, seed=0) -> PreTrainedModel:
    """A model with random weights, made on `device`, in evaluation mode."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def llama_like(config: BasedConfig) -> LlamaConfig:
    """A Llama of the width, depth and vocabulary of `config`, its MLP as wide as the same parameter count wants it."""

    def of_width(intermediate_size: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            tie_word_embeddings=config.tie_word_embeddings,
            max_position_embeddings=2**20,
        )

    step = 8
    narrow, wider = (count_parameters(of_width(width)) for width in (step, 2 * step))
    return of_width(step * max(1, 1 + round((count_parameters(config) - narrow) / (wider - narrow))))


def count_parameters(config: PreTrainedConfig) -> int:
    """Shared weights once; takes no memory."""
    return build(config, "meta").num_parameters()


def main() -> None:
    print("".join(["        ", *(f"{name:>24}" for name in CONFIGS)]))
    for shape in SHAPES:
        counts = [count_parameters(config(shape)) for config in CONFIGS.values()]
        print(f"{shape:8}" + "".join(f"{f'{count:,} ({count / counts[0] - 1:+.2%})':>24}" for count in counts))


if __name__ == "__main__":
    main()
