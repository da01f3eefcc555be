# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Based language models for transformers. Importing this package registers them with the Auto classes."""

import transformers
from transformers import AutoConfig, GPT2Config

from .cache_based import CacheSnapshot, TaylorCacheLayer
from .configuration_based import BasedConfig, based_1b
from .modeling_based import (
    AUTO_CLASSES,
    BasedForCausalLM,
    BasedForQuestionAnswering,
    BasedForSequenceClassification,
    BasedForTokenClassification,
    BasedModel,
    BasedPreTrainedModel,
)
from .original_format import is_original_config
from .taylor_attention import taylor_attention, taylor_attention_step


__version__ = "0.1.0"


class _GPT2OrBasedConfig(GPT2Config):
    # What AutoConfig finds under "gpt2": original Based checkpoints carry that model type, and AutoModel would build a
    # random GPT-2 of them without a word. Everything else becomes a plain GPT2Config. The docstring is kept because
    # transformers reads it to document its GPT-2 models.
    __doc__ = GPT2Config.__doc__

    def __new__(cls, *args, **kwargs):
        return GPT2Config(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        config_class = BasedConfig if is_original_config(config_dict) else GPT2Config
        return config_class.from_dict(config_dict, **kwargs)


def _register() -> None:
    AutoConfig.register("based", BasedConfig, exist_ok=True)
    AutoConfig.register("gpt2", _GPT2OrBasedConfig, exist_ok=True)
    BasedConfig.register_for_auto_class()
    for auto_class, model_class in AUTO_CLASSES.items():
        getattr(transformers, auto_class).register(BasedConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class)


_register()

__all__ = [
    "BasedConfig",
    "BasedForCausalLM",
    "BasedForQuestionAnswering",
    "BasedForSequenceClassification",
    "BasedForTokenClassification",
    "BasedModel",
    "BasedPreTrainedModel",
    "CacheSnapshot",
    "TaylorCacheLayer",
    "based_1b",
    "taylor_attention",
    "taylor_attention_step",
]
