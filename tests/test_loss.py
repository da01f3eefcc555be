# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The loss in pieces: that of transformers, as near to fp64, without fp32 tensors of the logits' size."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.loss.loss_utils import ForCausalLMLoss

from transformers_based import loss_based
from transformers_based.loss_based import causal_lm_loss, check_vocabulary


VOCAB = 41


def make(dtype, rows=3, tokens=17):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, tokens, VOCAB, generator=generator)).to(dtype)
    labels = torch.randint(VOCAB, (rows, tokens), generator=generator)
    labels[0, :5], labels[1] = -100, -100
    return logits, labels


def loss_and_gradient(function, logits, labels, **options):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits=logits, labels=labels, vocab_size=VOCAB, **options)
    (loss * 1.7).backward()
    return loss.detach().double(), logits.grad.double()


def exact(logits, labels, items=None):
    """By the definition, in fp64."""
    logits = logits.detach().double().requires_grad_()
    asked = [(b, t) for b in range(len(labels)) for t in range(1, labels.shape[1]) if labels[b, t] != -100]
    losses = [logits[b, t - 1].exp().sum().log() - logits[b, t - 1, labels[b, t]] for b, t in asked]
    loss = sum(losses) / (len(losses) if items is None else items)
    (loss * 1.7).backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_at_once", [1, 7, 51, 1000])
def test_as_near_to_fp64_as_that_of_transformers(monkeypatch, dtype, rows_at_once):
    monkeypatch.setattr(loss_based, "PIECE", rows_at_once * VOCAB + 3)
    logits, labels = make(dtype)
    for items in (None, 23, torch.tensor(23)):
        options = {} if items is None else {"num_items_in_batch": items}
        ours = loss_and_gradient(causal_lm_loss, logits, labels, **options)
        plain = loss_and_gradient(ForCausalLMLoss, logits, labels, **options)
        for got, theirs, wanted in zip(ours, plain, exact(logits, labels, items)):
            assert wanted.abs().max() > 1e-3
            assert (got - wanted).abs().max() <= (theirs - wanted).abs().max() + 1e-6 * wanted.abs().max()


def test_labels_shifted_by_the_caller_and_labels_that_ask_nothing():
    logits, labels = make(torch.float32)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    wanted = causal_lm_loss(logits, labels, VOCAB)
    assert torch.equal(causal_lm_loss(logits, None, VOCAB, shift_labels=shifted), wanted)
    renamed = labels.masked_fill(labels == -100, VOCAB + 5)
    assert torch.equal(causal_lm_loss(logits, renamed, VOCAB, ignore_index=VOCAB + 5), wanted)
    nothing = torch.full_like(labels, -100)
    assert causal_lm_loss(logits, nothing, VOCAB).isnan()
    loss, gradient = loss_and_gradient(causal_lm_loss, logits, nothing, num_items_in_batch=4)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("label", [VOCAB, VOCAB + 9, -1, -99])
def test_labels_outside_of_the_vocabulary(label):
    logits, labels = make(torch.float32)
    labels[2, 4] = label
    message = rf"A label is {label}, .* vocabulary of {VOCAB} nor -100"
    with pytest.raises(ValueError, match=message):
        causal_lm_loss(logits, labels, VOCAB)
    with pytest.raises(ValueError, match=message):
        causal_lm_loss(logits, None, VOCAB, shift_labels=labels)
    # The first and the last token of the vocabulary; nothing asks for what comes first in a row.
    labels[2, 4], labels[2, 5], labels[2, 0] = 0, VOCAB - 1, label
    assert causal_lm_loss(logits, labels, VOCAB).isfinite()
    # What a GPU holds is not waited for, nor what has no values.
    meta = torch.device("meta")
    check_vocabulary(torch.full((2, 3), label, device=meta), VOCAB)
    with FakeTensorMode():
        check_vocabulary(torch.full((2, 3), label), VOCAB)


def test_another_loss_may_take_other_labels(tiny_model):
    model, ids = tiny_model(), torch.arange(12).view(2, 6)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: labels.float().mean()
    assert model(ids, labels=ids.masked_fill(ids >= 0, -1)).loss == -1


def test_gradients_of_gradients():
    """Where one such as a penalty on gradients needs them; the slope of the loss itself needs none."""
    logits, labels = make(torch.float64)
    penalties = []
    for function in (causal_lm_loss, ForCausalLMLoss):
        x = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x, labels, VOCAB, num_items_in_batch=2), x, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    assert penalties[0].abs().max() > 1e-4
    torch.testing.assert_close(*penalties, rtol=1e-5, atol=1e-7)


def test_torch_func_takes_the_way_of_transformers():
    logits, labels = make(torch.float32)
    results = []
    for function in (causal_lm_loss, ForCausalLMLoss):
        of_a_row = torch.func.grad(lambda x, y, loss=function: loss(x, y, VOCAB, num_items_in_batch=1))
        results.append(torch.func.vmap(of_a_row)(logits, labels))
    assert results[0].abs().max() > 1e-3
    assert torch.equal(*results)


def test_memory(monkeypatch, tensor_log):
    """Nothing but logits and their gradient is as large as the logits, and nothing large is fp32."""
    monkeypatch.setattr(loss_based, "PIECE", 4 * VOCAB)
    logits, labels = make(torch.bfloat16)
    logits.requires_grad_()
    with tensor_log() as log:
        loss = causal_lm_loss(logits, labels, VOCAB)
    assert log.largest <= logits.numel()
    created = []

    class Created(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
                created.append(output.numel())
            return output

    with Created():
        loss.backward()
        causal_lm_loss(logits, labels, VOCAB)
    assert max(created) == 4 * VOCAB


def test_the_model_takes_it_unless_another_is_set(tiny_model):
    model = tiny_model()
    ids = torch.arange(12).view(2, 6)
    assert model.loss_function is causal_lm_loss
    wanted = ForCausalLMLoss(model(ids).logits, ids, 97)
    torch.testing.assert_close(model(ids, labels=ids).loss, wanted)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 5
    assert model(ids, labels=ids).loss == 5
