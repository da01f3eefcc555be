# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""A tokenizer for the reference checkpoint, which has none: id 17 is the word `w17`, so text and ids say the same."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_based import BasedForCausalLM


# What the checkpoint was made with; its embedding is padded beyond.
VOCAB_SIZE = 515
PAD, EOS, UNK = "w512", "w513", "w514"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def words(ids) -> str:
    return " ".join(f"w{int(i)}" for i in ids)


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, chat_template=CHAT_TEMPLATE
    )


def save_checkpoint(source: Path, folder: Path) -> Path:
    """The original checkpoint `source` as people serve it: converted, its tokenizer beside it."""
    BasedForCausalLM.from_pretrained(source).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
