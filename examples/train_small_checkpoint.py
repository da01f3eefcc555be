# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Trains examples/small_checkpoint, a Based model of 3.6 million parameters that writes English, and a Llama beside it.

    apt-get install bible-kjv
    mkdir -p outputs
    bible -f gen1:1-rev22:21 > outputs/kjv.txt
    python examples/train_small_checkpoint.py --text outputs/kjv.txt --output examples/small_checkpoint

The text is the King James Bible (1611, public domain) as Debian's package bible-kjv prints it: a verse a line, behind
its reference. A chapter is a document. Of every twenty chapters one picks the epoch that is kept and one is held out
for the perplexity that is reported; the others train the tokenizer (byte-level BPE) and both models, on the same
batches in the same order, from weights as large. Saves Based in bf16 with its tokenizer and a model card; the numbers
are of what was saved.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from arguments import check_folder, positive, rate
from model_shapes import llama_like
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from transformers_based import BasedConfig


VERSE = re.compile(r"(\S+?)(\d+):(\d+) (.+)")
END_OF_TEXT = "<|endoftext|>"
EVERY, PICKS, HELD_OUT = 20, 9, 19  # of the chapters, by their number
PROMPTS = ("And it came to pass", "In the beginning", "Blessed is the man")
NAMES = {"based": "Based", "llama": "Llama"}
CARD = """---
language: en
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# Based, {millions:.1f} million parameters, of the King James Bible

A toy that writes recognisable English, for the demo, the examples and the tests of this repository. It knows the King
James Bible and nothing else, and its statements mean nothing.

- **Text**: the King James Version of 1611, whose copyright has expired; {documents:,} chapters, {verses:,} verses, from
  Debian's packages bible-kjv and bible-kjv-text (version 4.38 was used), by `bible -f gen1:1-rev22:21`, the references
  in front of the verses left out. SHA-256 of that output:
  `{digest}`.
- **Licence**: the weights and the tokenizer are ours, Apache 2.0 as this repository.
- **Model**: {layers};
  hidden size {hidden}, feature dim {feature_dim}, window {window}. Weights in bf16. The code is in this repository:
  `import transformers_based`, then `AutoModelForCausalLM.from_pretrained`.
- **Tokenizer**: byte-level BPE, {vocab:,} entries, trained on the training chapters.
- **Training**: {epochs:g} epochs of {tokens:,} tokens in blocks of {block} (AdamW, learning rate {lr:g}, cosine), on
  {device}; torch {torch}, transformers {transformers}. Of every {every} chapters one picks the epoch that is kept and
  one is held out.

```text
{command}
```

| {held_out:,} tokens held out | parameters | epoch kept | loss per token | perplexity | bits per byte | trained in |
|---|---:|---:|---:|---:|---:|---:|
{rows}

The Llama has the same width, depth and tokenizer, and nearly as many parameters ({counts[llama]:,} to
{counts[based]:,}); it saw the same batches in the same order. Both losses are of weights rounded to bf16, computed in
fp32.

Sampled with the settings in generation_config.json, seeds 0, 1, 2:

```text
{sample}
```
"""


def read_chapters(path: Path) -> list[str]:
    """The verses of each chapter, a line each, without their references."""
    if not path.is_file():
        sys.exit(f"There is no file {path}: the top of {Path(__file__).name} says how to make it.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        sys.exit(f"{path} is not UTF-8 ({error}): convert it first, with iconv for example.")
    chapters: dict[tuple[str, str], list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not (match := VERSE.fullmatch(line.strip())):
            sys.exit(f"{path}, line {number}: no verse behind a reference such as Ge1:1, but {line[:40]!r}.")
        book, chapter, _, text = match.groups()
        chapters.setdefault((book, chapter), []).append(text)
    if len(chapters) < EVERY:
        sys.exit(f"{path} has {len(chapters)} chapters, and {EVERY} or more are needed to hold one out.")
    return ["\n".join(verses) + "\n" for verses in chapters.values()]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def cut_in_blocks(texts: list[str], tokenizer, size: int) -> list[dict[str, list[int]]]:
    """The texts behind one another, each with its end marked, in blocks of `size` tokens; a rest is left out."""
    ids = [i for row in tokenizer(texts)["input_ids"] for i in [*row, tokenizer.eos_token_id]]
    blocks = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    if not blocks:
        sys.exit(f"{len(ids):,} tokens are too few for a block of {size}: lower --block-size or take more text.")
    return [{"input_ids": block, "labels": block} for block in blocks]


def based_config(vocab_size: int, args: argparse.Namespace) -> BasedConfig:
    """Three million parameters and the embedding, with the default `--hidden-size`."""
    heads = args.hidden_size // 32
    return BasedConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=8,
        layer_types=["conv", "linear_attention", "sliding_attention", "conv"] * 2,
        num_attention_heads=heads,
        linear_num_heads=heads,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def llama_config(based: BasedConfig) -> LlamaConfig:
    config = llama_like(based)
    config.initializer_range = based.initializer_range
    return config


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """With new weights; a Llama starts as Based does, smaller where it writes into the residual stream."""
    model = AutoModelForCausalLM.from_config(config)
    if isinstance(config, LlamaConfig):
        with torch.no_grad():
            for layer in model.model.layers:
                for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    projection.weight /= math.sqrt(2 * config.num_hidden_layers)
    return model


def train(config, blocks: dict, args: argparse.Namespace):
    """The trained model at its best epoch, that epoch, and the seconds it took."""
    set_seed(args.seed)
    model = build(config)
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=args.epochs,
                learning_rate=args.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                weight_decay=0.1,
                adam_beta2=0.95,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.batch_size,
                bf16=on_gpu,
                use_cpu=not on_gpu,
                dataloader_pin_memory=on_gpu,
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                save_only_model=True,
                load_best_model_at_end=True,
                metric_for_best_model="loss",
                prediction_loss_only=True,
                logging_steps=20,
                report_to="none",
                seed=args.seed,
            ),
            train_dataset=blocks["train"],
            eval_dataset=blocks["picks"],
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        losses = [(entry["eval_loss"], entry["epoch"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    return trainer.model.to(torch.bfloat16).eval(), round(min(losses)[1]), seconds


@torch.no_grad()
def loss_per_token(model, blocks: list[dict], batch_size: int) -> float:
    total = count = 0
    for start in range(0, len(blocks), batch_size):
        ids = torch.tensor([block["input_ids"] for block in blocks[start : start + batch_size]], device=model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total, count = total + losses.sum(dtype=torch.float64).item(), count + losses.numel()
    return total / count


def sample(model, tokenizer) -> str:
    texts = []
    for seed, prompt in enumerate(PROMPTS):
        set_seed(seed)
        inputs = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False).to(model.device)
        texts.append(tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0]).strip())
    return "\n\n".join(texts)


def save(model, tokenizer, folder: Path) -> None:
    # Trainer turned it off.
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.9, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The code is in this repository already.
    for path in folder.glob("*.py"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def width(text: str) -> int:
    if not text.isdecimal() or int(text) < 1 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 32 such as 192")
    return int(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains the small checkpoint of the examples, and a Llama beside it.")
    parser.add_argument("--text", type=Path, required=True, help="the output of `bible -f gen1:1-rev22:21`")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and its model card")
    parser.add_argument("--epochs", type=rate, default=8)
    parser.add_argument("--batch-size", type=positive, default=32, help="blocks in a batch")
    parser.add_argument("--block-size", type=positive, default=256, help="tokens in a block")
    parser.add_argument("--learning-rate", type=rate, default=2e-3)
    parser.add_argument("--vocab-size", type=positive, default=2048)
    parser.add_argument("--hidden-size", type=width, default=192, help="a multiple of 32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.block_size < 2:
        parser.error("--block-size must be at least 2: of a token alone nothing is predicted.")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_folder("--output", args.output)
    chapters = read_chapters(args.text)
    parts = {"train": [], "picks": [], "held_out": []}
    for i, text in enumerate(chapters):
        parts[{PICKS: "picks", HELD_OUT: "held_out"}.get(i % EVERY, "train")].append(text)
    tokenizer = train_tokenizer(parts["train"], args.vocab_size)
    blocks = {name: cut_in_blocks(texts, tokenizer, args.block_size) for name, texts in parts.items()}
    tokens = {name: len(part) * args.block_size for name, part in blocks.items()}
    print(", ".join(f"{name} {count:,} tokens" for name, count in tokens.items()))

    based = based_config(len(tokenizer), args)
    counts, rows, bytes_per_token = (
        {},
        [],
        sum(len(text.encode()) for text in parts["held_out"])
        / sum(len(row) for row in tokenizer(parts["held_out"])["input_ids"]),
    )
    for name, config in (("based", based), ("llama", llama_config(based))):
        model, epoch, seconds = train(config, blocks, args)
        counts[name] = model.num_parameters()
        if name == "based":
            save(model, tokenizer, args.output)
            text = sample(model, tokenizer)
            print(text, flush=True)
        # Rounded to bf16 by now; fp32 makes nothing better but the arithmetic.
        model = model.float()
        loss = loss_per_token(model, blocks["held_out"], args.batch_size)
        bits = loss / math.log(2) / bytes_per_token
        row = f"{NAMES[name]} | {counts[name]:,} | {epoch} | {loss:.3f} | {math.exp(loss):.2f} | {bits:.3f}"
        rows.append(f"| {row} | {seconds:,.0f} s |")
        print(f"Held out, {NAMES[name]}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}", flush=True)

    options = (
        f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name not in ("text", "output")
    )
    card = CARD.format(
        millions=counts["based"] / 1e6,
        counts=counts,
        documents=len(chapters),
        verses=sum(chapter.count("\n") for chapter in chapters),
        digest=hashlib.sha256(args.text.read_bytes()).hexdigest(),
        layers=", ".join(based.layer_types),
        hidden=based.hidden_size,
        feature_dim=based.linear_feature_dim,
        window=based.sliding_window,
        vocab=len(tokenizer),
        epochs=args.epochs,
        tokens=tokens["train"],
        block=args.block_size,
        lr=args.learning_rate,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU",
        torch=torch.__version__,
        transformers=transformers.__version__,
        every=EVERY,
        command="python examples/train_small_checkpoint.py --text kjv.txt --output examples/small_checkpoint \\\n    "
        + " ".join(options),
        held_out=tokens["held_out"],
        rows="\n".join(rows),
        sample=text,
    )
    (args.output / "README.md").write_text(card)
    print(f"Saved to {args.output}.")


if __name__ == "__main__":
    main()
