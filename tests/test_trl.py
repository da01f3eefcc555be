# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""TRL's SFTTrainer with packing: a step is the one of the documents on their own, in fp64."""

import copy
import random

import pytest
import torch
from word_tokenizer import word_tokenizer, words


trl = pytest.importorskip("trl", reason="TRL is not installed: pip install '.[train]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install '.[train]'")

LEARNING_RATE = 0.5


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [words(rng.choices(range(500), k=length)) for length in (5, 9, 17, 30, 3, 21, 12, 1, 26, 8)]


def make_trainer(model, documents, folder, **options):
    settings = {
        "max_length": 48,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    }
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    peft_config = options.pop("peft_config", None)
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(folder), **{**settings, **quiet, **options}),
        train_dataset=datasets.Dataset.from_dict({"text": documents}),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
    )


def trained(model):
    return {name: x for name, x in model.named_parameters() if x.requires_grad}


def check_first_step(trainer, model, batch, rows):
    """
    The step on `batch`, whose documents are `rows`, against that of the mean over all their tokens. `model` is of the
    same kind as the trainer's, but has never been in TRL's hands, which patches its own.
    """
    model.load_state_dict(trainer.model.state_dict())
    model = model.double().train()
    before = {name: x.detach().clone() for name, x in trained(trainer.model).items()}
    count = sum(len(row) - 1 for row in rows)
    loss = sum(model(input_ids=row[None], labels=row[None]).loss * (len(row) - 1) for row in rows if len(row) > 1)
    loss = loss / count
    loss.backward()
    trainer.get_train_dataloader = lambda: [batch]
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    after = trained(trainer.model)
    for name, x in trained(model).items():
        step = (before[name].double() - after[name].detach().double()) / LEARNING_RATE
        # The step is read off weights in fp32.
        tolerance = 1e-4 * x.grad.norm() + 3e-7 * before[name].norm() / LEARNING_RATE
        assert (step - x.grad).norm() <= tolerance, name
        assert x.grad.norm() > 2 * tolerance or not x.grad.any(), name


def packed_rows(batch):
    assert "attention_mask" not in batch
    ids, positions = batch["input_ids"], batch["position_ids"]
    assert ids.shape[0] == 1
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    return list(torch.tensor_split(ids[0], starts[1:]))


@pytest.mark.parametrize("adapters", [False, True])
def test_packed_documents_do_not_see_each_other(based_tiny, documents, tmp_path, adapters):
    options, reference = {}, copy.deepcopy(based_tiny)
    if adapters:
        peft = pytest.importorskip("peft", reason="peft is not installed: pip install '.[train]'")
        options["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        reference = peft.get_peft_model(reference, copy.deepcopy(options["peft_config"]))
    trainer = make_trainer(based_tiny, documents, tmp_path, packing=True, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = packed_rows(batch)
    assert len(rows) > 2
    check_first_step(trainer, reference, batch, rows)
    if adapters:
        assert all("lora_" in name for name in trained(trainer.model))


def test_padded_and_padding_free_batches(based_tiny, documents, tmp_path):
    trainer = make_trainer(copy.deepcopy(based_tiny), documents, tmp_path, per_device_train_batch_size=3)
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all()
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    check_first_step(trainer, copy.deepcopy(based_tiny), batch, rows)
    options = {"per_device_train_batch_size": 3, "padding_free": True, "max_length": None}
    trainer = make_trainer(copy.deepcopy(based_tiny), documents, tmp_path, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    check_first_step(trainer, based_tiny, batch, packed_rows(batch))


def test_training_lowers_the_loss(based_tiny, documents, tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 3e-3, "max_steps": 12, "save_strategy": "steps"}
    trainer = make_trainer(based_tiny, documents, tmp_path, packing=True, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    again = type(based_tiny).from_pretrained(tmp_path / "checkpoint-12")
    for name, x in again.state_dict().items():
        assert torch.equal(x, trainer.model.state_dict()[name]), name
