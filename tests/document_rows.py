# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Documents of different lengths to train on, as the rows of a dataset, and as one padded batch."""

import torch
from torch.nn.utils.rnn import pad_sequence


def document_rows(lengths, seed=0):
    """Labels count from somewhere in the first half on; nothing predicts a first token."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for n in lengths:
        ids = torch.randint(97, (n,), generator=generator)
        rows.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(n) <= n // 3, -100)})
    return rows


def pad(rows, side="right"):
    rows = [{**row, "attention_mask": torch.ones_like(row["labels"])} for row in rows]
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value, padding_side=side)
        for name, value in (("input_ids", 3), ("labels", -100), ("attention_mask", 0))
    }
