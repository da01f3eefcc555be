# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Multi-query associative recall (MQAR), the synthetic task of Zoology (arXiv 2312.04927) and Based (2402.18668).

    k1 v1 k2 v2 ... | x x k2 _ x x x x k1 _ x ...        behind each repeated key the model must say its value

Keys and values are distinct tokens of the lower and the upper half of the vocabulary. The keys come again in random
order; the slot of each is drawn without replacement with a weight of `GAP_POWER * g ** (GAP_POWER - 1)`, so that most
gaps are short and a few are very long. All other places hold random tokens, also behind the repeated keys: answers are
in the labels only. A row of the dataset is a whole batch of one setting, made when it is asked for from the seed and
its number alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset


GAP_POWER = 0.01


@dataclass(frozen=True)
class Setting:
    """`length` tokens with `pairs` keys and values; `share` of the batches are of this setting."""

    length: int
    pairs: int
    share: int = 1

    def __post_init__(self):
        if not 0 < 4 * self.pairs <= self.length:
            raise ValueError(f"{self.pairs} pairs and their queries need {4 * self.pairs} tokens, not {self.length}.")


# As in the papers; the test goes to four times the length and the pairs of the training.
TRAIN = (Setting(64, 4, share=5), Setting(128, 8), Setting(256, 16), Setting(256, 32), Setting(256, 64))
TEST = tuple(
    Setting(length, pairs)
    for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
)
VOCAB_SIZE = 8192


def make_batch(
    setting: Setting, batch_size: int, vocab_size: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """
    `input_ids` and `labels`, `[B, T]`, and `places`, `[B, pairs]`, on the generator's device. A label is the value that
    belongs at its place and is predicted from the token before it, as everywhere in transformers; -100 where nothing is
    asked. `places` are those tokens before a label, in order.

    Raises:
        ValueError: the vocabulary has too few keys.
    """
    half, pairs, length = vocab_size // 2, setting.pairs, setting.length
    if half <= pairs:
        raise ValueError(f"A vocabulary of {vocab_size} has {half - 1} keys, {pairs} are needed: raise `vocab_size`.")
    options = {"generator": generator, "device": generator.device}

    def distinct(weights: torch.Tensor) -> torch.Tensor:
        """`[B, pairs]` draws without replacement, in random order: the Gumbel-top-k trick."""
        uniform = torch.rand(batch_size, len(weights), **options).clamp_min(1e-20)
        return (weights.log() - (-uniform.log()).log()).topk(pairs, dim=1).indices

    alike = torch.ones(half - 1, device=generator.device)
    keys, values = 1 + distinct(alike), half + distinct(alike)
    # Slots of two tokens: a key and the place of its answer.
    gaps = torch.arange(1, (length - 2 * pairs) // 2 + 1, device=generator.device)
    places = 2 * pairs + 2 * distinct(GAP_POWER * gaps.double() ** (GAP_POWER - 1)).long()
    input_ids = torch.randint(vocab_size, (batch_size, length), **options)
    input_ids[:, 0 : 2 * pairs : 2] = keys
    input_ids[:, 1 : 2 * pairs : 2] = values
    input_ids.scatter_(1, places, keys)
    labels = torch.full_like(input_ids, -100).scatter_(1, places + 1, values)
    return {"input_ids": input_ids, "labels": labels, "places": places.sort(dim=1).values}


class MQAR(Dataset):
    """
    `num_batches` batches of `batch_size` rows. With `in_turn` the settings follow one another, else each batch draws
    its own by `share`.
    """

    def __init__(
        self,
        settings: tuple[Setting, ...],
        num_batches: int,
        batch_size: int,
        vocab_size: int = VOCAB_SIZE,
        seed: int = 0,
        in_turn: bool = False,
        device: str = "cpu",
    ):
        self.settings, self.num_batches, self.batch_size, self.vocab_size = (
            settings,
            num_batches,
            batch_size,
            vocab_size,
        )
        self.seed, self.in_turn, self.device = seed, in_turn, device
        self.shares = torch.tensor([float(setting.share) for setting in settings])

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # Of a seed the generator of a CPU takes the lower half only.
        seed = int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])
        number = index % len(self.settings)
        if not self.in_turn:
            number = int(torch.multinomial(self.shares, 1, generator=torch.Generator().manual_seed(seed)))
        generator = torch.Generator(self.device).manual_seed(seed)
        return make_batch(self.settings[number], self.batch_size, self.vocab_size, generator)


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A row of `MQAR` is a batch already."""
    (batch,) = rows
    return batch
