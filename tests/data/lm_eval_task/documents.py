# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Documents of random words of word_tokenizer.py, of very different lengths, so that batches are padded."""

import random

from datasets import Dataset, DatasetDict


def load(order: int = 0, **kwargs) -> DatasetDict:
    """The same 24 documents for every `order`, in another sequence."""
    rng = random.Random(0)

    def words(count):
        return " ".join(f"w{rng.randrange(512)}" for _ in range(count))

    documents = [
        {
            "name": index,
            "question": words(rng.randint(1, 60)),
            "choices": [words(rng.randint(1, 5)) for _ in range(4)],
            "answer": rng.randrange(4),
        }
        for index in range(24)
    ]
    random.Random(order).shuffle(documents)
    return DatasetDict(test=Dataset.from_list(documents))
