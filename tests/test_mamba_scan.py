# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""examples/recall/mamba_scan.py: against fp64 token by token, and in transformers' Mamba."""

import pytest
import torch
from kernel_checks import gradients, poison_outputs
from programs import load_program
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM


pytest.importorskip("triton")

scan = load_program("examples/recall/mamba_scan.py")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "bias")


def draw(batch, T, D, N):
    """The arguments, each laid out as the model has it: tokens before channels in u, B and C, the gate a half."""
    torch.manual_seed(T)
    u = torch.randn(batch, T, D, device=DEVICE).transpose(1, 2)
    delta = torch.randn(batch, D, T, device=DEVICE)
    A = -torch.arange(1.0, N + 1, device=DEVICE).expand(D, -1) * (0.5 + torch.rand(D, 1, device=DEVICE))
    B, C = torch.randn(batch, T, 2 * N, device=DEVICE).transpose(1, 2).chunk(2, dim=1)
    z = torch.randn(batch, 2 * D, T, device=DEVICE)[:, D:]
    return u, delta, A, B, C, torch.randn(D, device=DEVICE), z, torch.randn(D, device=DEVICE) - 2


def by_token(u, delta, A, B, C, D, z, bias):
    delta = F.softplus(delta + bias[:, None])
    state, outputs = torch.zeros_like(delta[:, :, 0, None] * A), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * u[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(outputs, dim=2) * F.silu(z)


@pytest.mark.parametrize("size", [(1, 1, 8, 16), (2, 7, 40, 16), (3, 33, 32, 4), (1, 5, 65, 32)], ids=str)
def test_scan(monkeypatch, size):
    inputs = draw(*size)
    exact = [x.double() for x in inputs]
    with torch.no_grad():
        want = by_token(*exact)
    d_output = torch.randn_like(inputs[1])
    gradients_wanted = gradients(by_token, exact, d_output.double())
    of_plain = gradients(by_token, inputs, d_output)
    poison_outputs(monkeypatch)

    def op(*arguments):
        return scan.selective_scan(*arguments, delta_softplus=True, use_mambapy=False)

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = op(*(x.detach().requires_grad_(grad) for x in inputs))
        assert (got - want).abs().max() <= 1e-6 * want.abs().max() + (by_token(*inputs) - want).abs().max()
    for name, x, goal, plain in zip(NAMES, gradients(op, inputs, d_output), gradients_wanted, of_plain):
        assert (x - goal).abs().max() <= 1e-6 * goal.abs().max() + 2 * (plain - goal).abs().max(), name


def test_transformers_mamba_takes_it(monkeypatch):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=50, hidden_size=24, state_size=16, num_hidden_layers=2)
    model = MambaForCausalLM(config).to(DEVICE).train()
    ids = torch.randint(50, (2, 9), device=DEVICE)
    found, calls = [], []
    launch = scan._Scan.apply
    monkeypatch.setattr(scan._Scan, "apply", lambda *args: calls.append(1) or launch(*args))
    before = scan.modeling_mamba.mamba_selective_scan
    for way in (None, scan.in_transformers()):
        model.zero_grad()
        if way is None:
            output = model(ids, labels=ids, use_cache=False)
        else:
            with way:
                output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        found.append([output.logits.detach(), *(x.grad for x in model.parameters())])
    assert len(calls) == 2
    assert scan.modeling_mamba.mamba_selective_scan is before
    for plain, ours in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("options", [(False,), (True, True)])
def test_is_for_training(options):
    with pytest.raises(ValueError, match="for training"):
        scan.selective_scan(*draw(1, 3, 8, 4), *options)
