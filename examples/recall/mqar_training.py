# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Trains one model on MQAR with transformers' Trainer and measures its accuracy by the number of pairs."""

import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from mqar import MQAR, TEST, TRAIN, VOCAB_SIZE, Setting, collate
from mqar_models import Cell, make_config, make_model, state_bytes
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments, set_seed


@dataclass(frozen=True)
class Task:
    """What all models of a comparison are trained and tested on."""

    train: tuple[Setting, ...] = TRAIN
    test: tuple[Setting, ...] = TEST
    vocab_size: int = VOCAB_SIZE
    steps: int = 24_000
    batch_size: int = 256
    test_rows: int = 256
    seed: int = 0

    @property
    def length(self) -> int:
        """Of the longest test, where the state is measured."""
        return max(setting.length for setting in self.test)


class AtQueries(nn.Module):
    """A causal language model that makes logits only where there is a label: all of them would be most of the work."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The loss and, in evaluation, as "logits" the likeliest token of each query, in the order of the labels;
        arguments as of `make_batch`. To hand out logits in training would cost a gradient of their size for each.
        """
        hidden_states = self.model.base_model(input_ids, use_cache=False)[0]
        hidden_states = hidden_states.gather(1, places[:, :, None].expand(-1, -1, hidden_states.shape[-1]))
        logits = self.model.get_output_embeddings()(hidden_states.flatten(0, 1)).float()
        output = {"loss": nn.functional.cross_entropy(logits, labels.gather(1, places + 1).flatten())}
        return output if self.training else {**output, "logits": logits.argmax(dim=-1)}


class Recorded(nn.Module):
    """
    `AtQueries`, of which forward and backward of a training step are recorded as CUDA graphs, one pair for each shape
    of a batch: the work of these small models is nothing beside the time that its launches take.
    """

    def __init__(self, model: AtQueries):
        super().__init__()
        self.at_queries = model
        self.recordings: dict[tuple, nn.Module] = {}
        # One for all, as no two run at once: each alone would keep room for all that lies between its kernels.
        self.pool = torch.cuda.graph_pool_handle()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = input_ids, labels, places
        if not self.training:
            return self.at_queries(*batch)
        key = *input_ids.shape, places.shape[1]
        # Graphs read the weights themselves, not copies that autocast keeps.
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), False):
            if key not in self.recordings:
                of_shape = AtQueries(self.at_queries.model)
                sample = tuple(x.clone() for x in batch)
                self.recordings[key] = torch.cuda.make_graphed_callables(of_shape, sample, pool=self.pool)
                # Recording runs the model on a stream of its own, which nothing else takes memory from.
                torch.cuda.empty_cache()
            return self.recordings[key](*batch)


class MatrixDecayTrainer(Trainer):
    """Spares vectors and Mamba's `A_log` the decay of weights, as Mamba's authors do; Trainer knows only norms."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, x in model.named_parameters() if x.ndim > 1 and not name.endswith(".A_log")]


class Progress(TrainerCallback):
    """A line for what Trainer logs of the training of `cell`."""

    def __init__(self, cell: Cell):
        self.cell = cell

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            # In one piece, as other processes write there too; to stderr, since run.py closes what Trainer prints to.
            sys.stderr.write(f"[{self.cell}] step {state.global_step} of {state.max_steps}, loss {logs['loss']:.2f}\n")
            sys.stderr.flush()


def accuracy_by_pairs(prediction: EvalPrediction) -> dict[str, float]:
    """The share of right answers among the rows with as many queries; their mean counts each number alike."""
    is_asked = prediction.label_ids != -100
    pairs = is_asked.sum(axis=1).repeat(is_asked.sum(axis=1))
    is_right = prediction.predictions == prediction.label_ids[is_asked]
    shares = {int(n): float(is_right[pairs == n].mean()) for n in np.unique(pairs)}
    return {"accuracy": sum(shares.values()) / len(shares), **{f"accuracy_{n}": x for n, x in shares.items()}}


def train(cell: Cell, task: Task, device: str) -> dict:
    """A row of the results for `cell`. Raises `FloatingPointError` where the loss is no number at the end."""
    set_seed(task.seed)
    config = make_config(cell.kind, cell.width, cell.size, cell.value_dim, task.vocab_size)
    causal_lm = make_model(config)
    model, on_gpu = AtQueries(causal_lm), device != "cpu"
    scan = nullcontext()
    if on_gpu:
        model = Recorded(model)
        if cell.kind == "mamba":
            from mamba_scan import in_transformers

            scan = in_transformers()
    test_batch = max(1, min(32, task.test_rows))
    with scan, tempfile.TemporaryDirectory() as folder:
        trainer = MatrixDecayTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=task.steps,
                learning_rate=cell.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                weight_decay=0.1,
                per_device_train_batch_size=1,
                per_device_eval_batch_size=1,
                # The states of Mamba are fp32 in any case.
                bf16=on_gpu and cell.kind != "mamba",
                tf32=True if on_gpu else None,
                use_cpu=not on_gpu,
                dataloader_pin_memory=False,
                train_sampling_strategy="sequential",
                eval_strategy="no",
                save_strategy="no",
                logging_steps=max(1, task.steps // 10),
                # It would wait for each step; the loss at the end is looked at below.
                logging_nan_inf_filter=False,
                disable_tqdm=True,
                report_to="none",
                seed=task.seed,
            ),
            data_collator=collate,
            train_dataset=MQAR(task.train, task.steps, task.batch_size, task.vocab_size, task.seed + 1, device=device),
            eval_dataset=MQAR(
                task.test,
                -(-task.test_rows // test_batch) * len(task.test),
                test_batch,
                task.vocab_size,
                task.seed,
                in_turn=True,
            ),
            compute_metrics=accuracy_by_pairs,
            callbacks=[Progress(cell)],
        )
        start = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - start
        measured = trainer.evaluate()
    if not np.isfinite(result.training_loss):
        raise FloatingPointError(f"the loss of {cell} is {result.training_loss}")
    return {
        **cell._asdict(),
        "seed": task.seed,
        "steps": task.steps,
        "parameters": causal_lm.num_parameters(),
        "state_bytes": state_bytes(config, task.length),
        "state_bytes_bf16": state_bytes(config, task.length, torch.bfloat16),
        "loss": measured["eval_loss"],
        **{name.removeprefix("eval_"): x for name, x in measured.items() if name.startswith("eval_accuracy")},
        "seconds": seconds,
    }
