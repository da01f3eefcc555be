# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Liger's fused linear cross-entropy on a Based model: the same loss and gradients, no logits in training."""

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel

from transformers_based import BasedForCausalLM
from transformers_based.integrations_based import apply_liger_kernel_to_based


pytest.importorskip("liger_kernel", reason="Liger is not installed: pip install '.[train]'")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def with_liger(model):
    apply_liger_kernel(model, None)
    return model.train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(97, (3, 21), generator=generator)
    labels = ids.clone()
    labels[0, :7] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    gradients = {name: x.grad.double() for name, x in model.named_parameters() if x.grad is not None}
    return output, {"loss": output.loss.detach().double(), **gradients}


def as_close_as_plain(model, batch, tolerance=1e-6):
    """Each figure of the patched `model` is as near to that of fp64 as the unpatched one is. Returns its output."""
    plain = type(model)(model.config).to(model.device, model.dtype).train()
    plain.load_state_dict(model.state_dict())
    exact = type(model)(model.config).to(model.device, torch.float64).train()
    exact.load_state_dict(model.state_dict())
    (_, expected), (_, reference) = loss_and_gradients(exact, batch), loss_and_gradients(plain, batch)
    output, got = loss_and_gradients(model, batch)
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        error, usual = (got[name] - wanted).norm(), (reference[name] - wanted).norm()
        assert error <= 2 * usual + tolerance * wanted.norm(), name
    return output


def make_trainer(model, rows, folder, use_liger, **options):
    options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_liger_kernel": use_liger}
    options["use_cpu"] = not torch.cuda.is_available()
    return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **options), train_dataset=rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients(tiny_model, batch, tied, device):
    model = with_liger(tiny_model(tie_word_embeddings=tied).to(device))
    batch = {name: x.to(device) for name, x in batch.items()}
    output = as_close_as_plain(model, batch)
    assert output.logits is None
    # A Trainer that accumulates gradients divides by the tokens of all its batches.
    as_close_as_plain(model, {**batch, "num_items_in_batch": torch.tensor(200, device=device)})
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None].expand(3, -1).to(device)
    as_close_as_plain(model, {**batch, "position_ids": positions})


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(tiny_model, batch, device):
    model = with_liger(tiny_model().to(device, torch.bfloat16))
    as_close_as_plain(model, {name: x.to(device) for name, x in batch.items()}, tolerance=4e-3)


def test_documents_of_a_dataset_reach_the_model(tiny_model, batch, tmp_path):
    """The column `seq_idx` is kept by Trainer, and the documents are apart: as without Liger."""
    seq_idx = torch.tensor([0] * 8 + [1] * 13).expand(3, -1)
    as_close_as_plain(with_liger(tiny_model()), {**batch, "seq_idx": seq_idx})
    rows = [dict(zip(("input_ids", "labels", "seq_idx"), row)) for row in zip(*batch.values(), seq_idx)]
    losses = []
    for use_liger, with_documents in ((False, True), (True, True), (True, False)):
        kept = [{k: x for k, x in row.items() if with_documents or k != "seq_idx"} for row in rows]
        trainer = make_trainer(tiny_model(), kept, tmp_path, use_liger, max_steps=1, per_device_train_batch_size=3)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-3


@pytest.mark.parametrize("liger", [True, False])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("shape", [(3, 22), (3, 20), (7, 9)])
def test_refuses_labels_of_another_shape(tiny_model, batch, liger, name, shape):
    model = with_liger(tiny_model()) if liger else tiny_model().train()
    labels = {"labels": batch["labels"], name: torch.ones(shape, dtype=torch.long)}
    with pytest.raises(ValueError, match=rf"`{name}` must be \[batch, tokens\] = \(3, 21\)"):
        model(batch["input_ids"], **labels)


@pytest.mark.parametrize("liger", [True, False])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("label", [97, -1])
def test_refuses_labels_outside_of_the_vocabulary(tiny_model, batch, liger, name, label):
    """Liger would read whatever is there."""
    model = with_liger(tiny_model()) if liger else tiny_model().train()
    labels = batch["labels"].clone()
    labels[1, 5] = label
    with pytest.raises(ValueError, match=f"A label is {label}, .* vocabulary of 97"):
        model(batch["input_ids"], **{name: labels})
    # Unless it is the one that asks for nothing.
    expected = model(batch["input_ids"], **{name: labels.masked_fill(labels == label, -100)}).loss
    renamed = labels.masked_fill(labels == -100, label)
    torch.testing.assert_close(model(batch["input_ids"], **{name: renamed}, ignore_index=label).loss, expected)
    labels[1, 5], labels[1, 0] = 96, label if name == "labels" else 0
    assert model(batch["input_ids"], **{name: labels}).loss.isfinite()


def test_labels_shifted_by_the_caller(tiny_model, batch):
    model = with_liger(tiny_model())
    expected = model(**batch).loss
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(batch["input_ids"], shift_labels=shifted).loss, expected)
    torch.testing.assert_close(model(batch["input_ids"], shift_labels=shifted, skip_logits=False).loss, expected)
    torch.testing.assert_close(tiny_model()(batch["input_ids"], shift_labels=shifted).loss, expected)


def test_evaluation_and_generation_have_logits(tiny_model, batch):
    plain, model = tiny_model(), with_liger(tiny_model()).eval()
    with torch.no_grad():
        expected, got = plain(**batch), model(**batch)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.loss, expected.loss)
        without = model(**batch, skip_logits=True)
        assert without.logits is None
        torch.testing.assert_close(without.loss, expected.loss)
        loss, *_ = model(**batch, skip_logits=True, return_dict=False)
        assert torch.equal(loss, without.loss)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        ids = batch["input_ids"]
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    with pytest.raises(ValueError, match="skip_logits"):
        model(ids, skip_logits=True)


def test_adapters(tiny_model, batch):
    """One on the head is no part of the head's weight, which is all that Liger would read."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[train]'")
    for targets, is_fused in (("all-linear", True), (["q_proj", "lm_head"], False)):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(), peft.LoraConfig(init_lora_weights=False, target_modules=targets))
        model.train()
        _, expected = loss_and_gradients(model, batch)
        apply_liger_kernel(model, None)
        output, got = loss_and_gradients(model, batch)
        assert (output.logits is None) == is_fused
        for name, wanted in expected.items():
            torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-6)


def test_trainer_takes_the_same_steps(tiny_model, batch, tmp_path):
    weights, losses = [], []
    for use_liger in (False, True):
        options = {"max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
        rows = [{"input_ids": x, "labels": y} for x, y in zip(batch["input_ids"], batch["labels"])]
        trainer = make_trainer(tiny_model(), rows, tmp_path, use_liger, learning_rate=0.01, **options)
        losses.append(trainer.train().training_loss)
        weights.append(trainer.model.state_dict())
        assert (trainer.model.forward.__func__ is BasedForCausalLM.forward) == (not use_liger)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, wanted in weights[0].items():
        # Adam's steps have the size of the learning rate where a gradient is small, whatever its rounding.
        torch.testing.assert_close(weights[1][name], wanted, rtol=0, atol=1e-3)


def test_a_cpu_is_refused(tiny_model, batch, monkeypatch):
    model = with_liger(tiny_model())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="without `use_liger_kernel`"):
        model(**batch)


def test_can_be_left_out_and_wants_a_model(tiny_model):
    model = tiny_model()
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
    assert model.forward.__func__ is BasedForCausalLM.forward
    apply_liger_kernel(model.model, None)
    assert "forward" not in vars(model.model)
    with pytest.raises(ValueError, match="pass `model`"):
        apply_liger_kernel_to_based()
