# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""
Tokenizers for the reference checkpoint, which has none. Of words: id 17 is `w17`, so text and ids say the same. Of
bytes: for plain text.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens and an end of text."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def save_checkpoint(source: Path, folder: Path) -> Path:
    """The original checkpoint `source` as people serve it: converted, its tokenizer beside it."""
    BasedForCausalLM.from_pretrained(source).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
