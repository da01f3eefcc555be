# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What all tests share: the reference checkpoint with its golden tensors, tiny models, and a log of created tensors."""

import copy
import importlib.util
import os
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


# Before triton is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transformers_based import BasedConfig, BasedForCausalLM, modeling_based


# Two workers with a pool of threads each slow one another down.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def _spare_the_interpreter():
    """
    Two things take more than half of the time of Triton's interpreter, for nothing. It computes whether an int32
    overflows, and asserts it in debug mode only. And it patches `triton.language` for a kernel and again at every call
    of a device function, `tl.sum` among them: all of it stays until the kernel ends, once for each module is enough.
    """
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        scope = patch(function)
        restore = scope.restore
        scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    _spare_the_interpreter()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def based_tiny_path() -> Path:
    """A small checkpoint in the original layout, weights and all."""
    return Path(__file__).parent / "reference" / "based-tiny"


@pytest.fixture(scope="session")
def _loaded_based_tiny(based_tiny_path):
    return BasedForCausalLM.from_pretrained(based_tiny_path).eval()


@pytest.fixture
def based_tiny(_loaded_based_tiny):
    """That checkpoint as a model, a fresh copy for each test."""
    return copy.deepcopy(_loaded_based_tiny)


@pytest.fixture(scope="session")
def golden(based_tiny_path) -> dict[str, torch.Tensor]:
    """What the original code computes for it in fp32: input_ids, logits, prompt_ids, greedy_ids, greedy_logits."""
    return load_file(based_tiny_path / "golden.safetensors")


@pytest.fixture
def tiny_config():
    """Makes a config of a model small enough for any test; by default one layer of each type and one more conv."""

    def make(**overrides) -> BasedConfig:
        values = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "layer_types": ["conv", "linear_attention", "sliding_attention", "conv"],
            "num_attention_heads": 4,
            "sliding_window": 6,
            "linear_num_heads": 2,
            "linear_feature_dim": 8,
            # Large, so that every mixer shows in the logits.
            "initializer_range": 0.25,
            "bos_token_id": None,
            "eos_token_id": None,
            **overrides,
        }
        return BasedConfig(**{"num_hidden_layers": len(values["layer_types"]), **values})

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """Makes a seeded tiny model, for evaluation; keywords go to the config."""

    def make(model_class=BasedForCausalLM, seed=0, **overrides):
        torch.manual_seed(seed)
        return model_class(tiny_config(**overrides)).eval()

    return make


@pytest.fixture
def use_backend(monkeypatch):
    """Runs the model's operations on "torch" or "triton" (or skips), in pieces so small that short rows cross them."""

    def use(name: str) -> None:
        interprets = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
        if name == "triton" and not torch.cuda.is_available() and not interprets:
            pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1 and triton installed")
        monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", name)
        monkeypatch.setattr(sys.modules["transformers_based.taylor_attention"], "CHUNK_SIZE", 16)
        monkeypatch.setattr(modeling_based, "_MIN_BLOCK", 4)

    return use


@pytest.fixture
def fails(request, tmp_path, capfd):
    """Runs the module's `converter`, checks that it fails with one line and leaves nothing behind; gives that line."""

    def run(source, *options):
        before = sorted(tmp_path.rglob("*"))
        assert request.module.converter.main([str(source), str(tmp_path / "new" / "output"), *options]) == 1
        assert sorted(tmp_path.rglob("*")) == before
        *_, last = capfd.readouterr().err.strip().splitlines()
        assert last.startswith(f"cannot convert {source}: ")
        return last

    return run


class TensorLog(TorchDispatchMode):
    """
    Sees every tensor operation in its block: `largest` is the number of elements in the largest storage that came out,
    `touched` the elements of all tensors that went in or came out.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.touched = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        self.touched += sum(x.numel() for x in inputs + outputs)
        for x in outputs:
            self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return output


@pytest.fixture
def tensor_log() -> type[TensorLog]:
    return TensorLog
