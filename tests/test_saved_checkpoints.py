# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as earlier versions saved them, in fixtures/saved-*/, load with this version and compute the same.

`python tests/test_saved_checkpoints.py NAME` saves one more, as the installed version does, to fixtures/saved-NAME; it
needs one when names or config fields change. A stored one is never made anew: it stands for files that people have.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from transformers_based import BasedConfig, BasedForCausalLM


FIXTURES = Path(__file__).parent / "fixtures"
SAVED = sorted(FIXTURES.glob("saved-*"))


def save(folder: Path) -> None:
    """A tiny model of all layer types, seeded, with its logits for some tokens and eight that it generates."""
    torch.manual_seed(0)
    config = BasedConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        layer_types=["conv", "linear_attention", "sliding_attention", "conv"],
        num_attention_heads=4,
        sliding_window=6,
        linear_num_heads=2,
        linear_feature_dim=8,
        # Large, so that every mixer shows in the logits.
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = BasedForCausalLM(config).eval()
    model.save_pretrained(folder)
    # The code that goes along is another test's matter.
    for path in folder.glob("*.py"):
        path.unlink()
    ids = torch.randint(97, (2, 24))
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    save_file({"input_ids": ids, "logits": model(ids).logits.detach(), "generated": generated}, folder / "golden.st")


def test_there_is_one():
    assert SAVED


@pytest.mark.parametrize("folder", SAVED, ids=lambda path: path.name)
@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, BasedForCausalLM.from_pretrained])
@torch.no_grad()
def test_saved_checkpoint_computes_the_stored_logits(folder, load):
    model, info = load(folder, output_loading_info=True)
    assert isinstance(model, BasedForCausalLM)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    golden = load_file(folder / "golden.st")
    assert golden["logits"].std() > 0.5
    torch.testing.assert_close(model(golden["input_ids"]).logits, golden["logits"], atol=2e-5, rtol=0)
    assert torch.equal(model.generate(golden["input_ids"], max_new_tokens=8, do_sample=False), golden["generated"])


@pytest.mark.parametrize("folder", SAVED, ids=lambda path: path.name)
def test_saved_config_keeps_every_field(folder):
    stored = json.loads((folder / "config.json").read_text())
    config = AutoConfig.from_pretrained(folder).to_dict()
    free = {"transformers_version", "auto_map", "dtype", "architectures"}
    assert {name: config.get(name) for name in stored.keys() - free} == {
        name: value for name, value in stored.items() if name not in free
    }


if __name__ == "__main__":
    save(FIXTURES / f"saved-{sys.argv[1]}")
