# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""transformers' own model tests on Based, and on Llama for comparison. The skips they may take are in hf_listed.py."""

import os
import unittest

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

import transformers_based as tb


if "HF_SDIST" not in os.environ:
    pytest.skip("needs HF_SDIST, the unpacked sdist of the installed transformers", allow_module_level=True)

from hf_harness import DecoderTester, checks_skips, distributed_mixins, mixins


class BasedTester(DecoderTester):
    config_class, base_model_class, causal_lm_class = tb.BasedConfig, tb.BasedModel, tb.BasedForCausalLM
    sequence_classification_class = tb.BasedForSequenceClassification
    token_classification_class = tb.BasedForTokenClassification
    question_answering_class = tb.BasedForQuestionAnswering
    num_hidden_layers = 3
    config_values = {
        "intermediate_size": 48,
        "sliding_window": 4,
        "linear_num_heads": 2,
        "linear_feature_dim": 4,
        "layer_types": ["conv", "linear_attention", "sliding_attention"],
    }


class LlamaTester(DecoderTester):
    config_class, base_model_class, causal_lm_class = LlamaConfig, LlamaModel, LlamaForCausalLM
    sequence_classification_class = LlamaForSequenceClassification
    token_classification_class = LlamaForTokenClassification
    question_answering_class = LlamaForQuestionAnswering
    config_values = {"intermediate_size": 37, "num_key_value_heads": 2, "max_position_embeddings": 512}


BasedTester.register()


@checks_skips
class BasedSuite(*mixins(), *distributed_mixins(), unittest.TestCase):
    all_model_classes = BasedTester.model_classes()

    def setUp(self):
        self.model_tester = BasedTester(self)

    def test_attention_outputs(self):
        """Overridden: only the sliding layers return attention maps."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class._from_config(config, attn_implementation="eager").eval()
            maps = model(**inputs, output_attentions=True).attentions
            assert len(maps) == config.layer_types.count("sliding_attention")
            batch, length = inputs["input_ids"].shape
            assert maps[0].shape == (batch, config.num_attention_heads, length, length)

    def test_num_layers_is_small(self):
        """Overridden: one layer for each of the three mixers."""
        assert self.model_tester.num_hidden_layers <= 3


@checks_skips
class LlamaSuite(*mixins(), unittest.TestCase):
    all_model_classes = LlamaTester.model_classes()

    def setUp(self):
        self.model_tester = LlamaTester(self)


def test_based_passes_what_llama_passes():
    """Both skip what is listed and nothing else, so it is enough that Llama has no test that Based has not."""
    based, llama = (set(unittest.defaultTestLoader.getTestCaseNames(suite)) for suite in (BasedSuite, LlamaSuite))
    assert len(llama) > 100
    assert llama <= based
