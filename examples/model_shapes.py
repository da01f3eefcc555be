# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The models that the benchmarks compare: Based as released, and a Llama of the same vocabulary and size.

    python examples/model_shapes.py

prints their parameter counts, which differ by less than 1 percent. Each Llama has the usual proportions (MLP of 8/3 of
the width, rounded up to a multiple of 256; keys and values for every head); it is the smaller of the two. Weights are
random.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

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
SHAPES = tuple(BASED)


def based_config(shape: str, **overrides) -> BasedConfig:
    return BasedConfig(**{**BASED[shape], **overrides})


def llama_config(shape: str, **overrides) -> LlamaConfig:
    """For any length: the positions of the rotary embedding are not limited."""
    based = based_config(shape)
    shared = {name: getattr(based, name) for name in ("vocab_size", "bos_token_id", "eos_token_id", "rms_norm_eps")}
    shared |= {"tie_word_embeddings": True, "max_position_embeddings": 2**20}
    return LlamaConfig(**{**LLAMA[shape], **shared, **overrides})


CONFIGS = {"based": based_config, "llama": llama_config}


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
    print(f"{'':8}{'Based':>16}{'Llama':>16}{'difference':>14}")
    for shape in SHAPES:
        based, llama = (count_parameters(config(shape)) for config in (based_config, llama_config))
        print(f"{shape:8}{based:>16,}{llama:>16,}{llama / based - 1:>14.2%}")


if __name__ == "__main__":
    main()
