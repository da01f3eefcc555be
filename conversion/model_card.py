# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The README.md that goes with a converted checkpoint: what is known about it, and nothing else."""

import re

from huggingface_hub import ModelCard


# Accuracy of the released checkpoints as their authors published it (lm-eval): FDA, SWDE, SQuAD completion.
PUBLISHED = {
    ("based", "360m"): (14.3, 25.7, 24.2),
    ("mamba", "360m"): (5.9, 17.3, 24.8),
    ("attn", "360m"): (57.9, 56.3, 27.9),
    ("based", "1b"): (19.1, 37.7, 29.5),
    ("mamba", "1b"): (11.1, 28.4, 29.4),
    ("attn", "1b"): (68.9, 69.0, 35.9),
}
# Parameters of the released sizes, in millions; the families differ somewhat.
_SIZES = {"360m": range(330, 430), "1b": range(1200, 1500)}

_CARD = """\
---
{metadata}
---

# {title}

{article} {kind} ([arXiv 2402.18668](https://arxiv.org/abs/2402.18668)), converted to `{architecture}` of transformers.

| | |
|---|---|
| Origin | {origin} |
| Parameters | {parameters:,} |
| Weights | {dtype}{rounded} |
| Licence | {license} |
| Training data | the Pile; for the number of tokens see the card of the original |
| Tokenizer | {tokenizer} |

## Intended use

Research on language models with a small recurrent state, and their comparison with attention. A pretrained base model
of English text: it follows no instructions, was not made safe, and repeats the biases of its training data.

## Evaluation of the original

{evaluation}

## Conversion

Written by this command, which loaded the result again and compared every tensor with the original to the bit:

```bash
{command}
```
"""


def size_class(parameters: int) -> str | None:
    """Which released size has so many parameters."""
    return next((name for name, millions in _SIZES.items() if parameters // 10**6 in millions), None)


def licence_of(card: str | None) -> str | None:
    """The licence that the card of a repository declares."""
    try:
        licence = ModelCard(card or "", ignore_metadata_errors=True).data.license
    except Exception:
        # A stranger's file, read for one word: whatever is wrong with it, the word is not known.
        return None
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w.-]{1,64}", licence) else None


def model_card(
    *,
    family: str,
    kind: str,
    architecture: str,
    source: str,
    is_hub_id: bool,
    parameters: int,
    dtype: str,
    rounded: bool,
    licence: str | None,
    tokenizer: str,
    command: str,
) -> str:
    """The text of the card. `licence` is the one of the original's card, if that declares one."""
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "datasets:", "- EleutherAI/pile"]
    metadata += [f"license: {licence}"] if licence else []
    metadata += [f"base_model: {source}"] if is_hub_id else []
    metadata += ["tags:", "- arxiv:2402.18668"]
    name = source.rstrip("/").rsplit("/", 1)[-1]
    return _CARD.format(
        metadata="\n".join(metadata),
        title=name,
        article="An" if kind[0] in "aeiou" else "A",
        kind=kind,
        architecture=architecture,
        origin=f"`{source}`",
        parameters=parameters,
        dtype=dtype,
        rounded=", rounded" if rounded else ", as stored",
        license=licence or "see the original repository",
        tokenizer=tokenizer,
        evaluation=_evaluation(family, size_class(parameters)),
        command=command,
    )


def _evaluation(family: str, size: str | None) -> str:
    numbers = PUBLISHED.get((family, size))
    if numbers is None:
        return "None: no released checkpoint of this kind has this size."
    row = " | ".join(f"{number:.1f}" for number in numbers)
    return (
        "Accuracy in percent as published by the authors (lm-eval); not measured again on these files. The weights do\n"
        "not tell how long they were trained: the row is of the checkpoint without `50b` in its name.\n\n"
        f"| checkpoint | FDA | SWDE | SQuAD |\n|---|---|---|---|\n| {family}-{size} | {row} |"
    )
