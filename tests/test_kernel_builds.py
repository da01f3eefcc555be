# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Kernels built side by side before the first `generate`: those that it launches, once, and at nobody's cost."""

import importlib.util
import threading

import pytest
import torch
from programs import run_python

from transformers_based import kernel_builds, modeling_based
from transformers_based.kernel_builds import build_kernels


def test_what_generate_launches_has_been_built():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    program = "tests/launches_without_gpu.py"
    done = run_python(program, "90", "8", "16", "bfloat16", TRITON_INTERPRET=None, TRANSFORMERS_BASED_BACKEND="triton")
    # prefill and step of the three mixers and the gate, two norms and two of products in parts, and the table of rolls;
    # without and with padding
    assert done.stdout.split() == ["13", "13"]


def test_ops_run_once_each_in_threads_that_end_whatever_fails(monkeypatch, tiny_config):
    ran, paddings = [], []

    def op(number):
        ran.append((number, threading.current_thread(), torch.is_grad_enabled()))
        if number % 2:
            raise RuntimeError("no room for this kernel")

    def ops(config, dtype, device, batch, is_padded):
        paddings.append(is_padded)
        return [lambda number=number: op(number) for number in range(5)]

    monkeypatch.setattr(kernel_builds, "ops_of", ops)
    monkeypatch.setattr(kernel_builds, "choose_backend", lambda *arguments: "triton")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    mask, device = torch.ones(2, 3, dtype=torch.long), torch.device("cuda")
    build_kernels(tiny_config(), torch.bfloat16, device, 2, mask)
    assert sorted(number for number, *_ in ran) == list(range(5))
    assert ran[0][:2] == (0, threading.current_thread())
    assert not any(is_grad_enabled for *_, is_grad_enabled in ran)
    assert not any(thread.is_alive() for _, thread, _ in ran[1:])
    mask[0, 0] = 0
    build_kernels(tiny_config(), torch.bfloat16, device, 2, mask)
    build_kernels(tiny_config(), torch.bfloat16, device, 2, None)
    assert paddings == [False, True, False]


def test_nothing_is_built_where_nothing_is_fused(monkeypatch, tiny_config):
    monkeypatch.setattr(kernel_builds, "ops_of", lambda *arguments: pytest.fail("an op was called"))
    build_kernels(tiny_config(), torch.float32, torch.device("cpu"), 2, None)
    monkeypatch.setenv("TRANSFORMERS_BASED_BACKEND", "torch")
    build_kernels(tiny_config(), torch.float32, torch.device("cuda"), 2, None)


def test_only_the_first_generate_with_a_static_cache_builds(monkeypatch, tiny_model):
    calls = []
    monkeypatch.setattr(modeling_based, "build_kernels", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(modeling_based, "obstacle_to_graphs", lambda model: None)
    model, ids = tiny_model(pad_token_id=0), torch.ones(1, 3, dtype=torch.long)
    options = {"attention_mask": torch.tensor([[0, 1, 1]]), "max_new_tokens": 2, "do_sample": False}
    model.generate(ids, disable_compile=True, **options)
    assert not calls
    model.generate(ids, **options)
    model.generate(ids, **options)
    ((config, dtype, device, batch, mask),) = calls
    assert (config, dtype, device.type, batch) == (model.config, torch.float32, "cpu", 1)
    assert torch.equal(mask, options["attention_mask"])
