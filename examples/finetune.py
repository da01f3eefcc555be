# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Fine-tunes a Based model on a text file with transformers' Trainer.

    python examples/finetune.py --model hazyresearch/based-360m --tokenizer openai-community/gpt2 --train-file any.txt

Measures the perplexity of held-out text before and after, saves, loads again and generates. A model without a tokenizer
reads bytes: token i is byte i, and 256 ends a text.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from transformers_based import BasedForCausalLM


ROOT = Path(__file__).resolve().parent.parent
SMALL_MODEL = ROOT / "tests" / "reference" / "based-tiny"


class Bytes:
    """Stands in for a tokenizer where there is none. Any vocabulary of 257 or more has room for it."""

    eos_token_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode(errors="replace")


def find_tokenizer(name: str | None, model: str, vocab_size: int) -> PreTrainedTokenizerBase | Bytes:
    """The tokenizer `name`, by default the model's own, else bytes."""
    try:
        return AutoTokenizer.from_pretrained(name or model)
    except (OSError, ValueError) as error:
        if name is not None or vocab_size < 257:
            sys.exit(f"No tokenizer in {name or model}: {str(error).splitlines()[0]} Choose one with --tokenizer.")
    print(f"{model} has no tokenizer: reading bytes as tokens. Another one can be named with --tokenizer.")
    return Bytes()


def read_blocks(path: Path, tokenizer, block_size: int) -> torch.Tensor:
    """The text as `[blocks, block_size]` token ids; what does not fill a block at the end is left out."""
    ids = torch.tensor([*tokenizer.encode(path.read_text(encoding="utf-8")), tokenizer.eos_token_id])
    blocks = len(ids) // block_size
    if blocks < 2:
        sys.exit(f"{path} has {len(ids)} tokens: too few for two blocks of {block_size}. Lower --block-size.")
    return ids[: blocks * block_size].view(blocks, block_size)


def as_dataset(blocks: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": block, "labels": block} for block in blocks]


def perplexity(trainer: Trainer, when: str) -> float:
    loss = trainer.evaluate()["eval_loss"]
    print(f"Held-out text {when}: loss {loss:.3f}, perplexity {math.exp(loss):,.1f}")
    return loss


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tunes a Based model on a text file.")
    parser.add_argument("--model", default=str(SMALL_MODEL), help="folder or Hub id, in either layout")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: the model's own, else bytes)")
    parser.add_argument("--train-file", type=Path, default=ROOT / "README.md", help="any text (default: the README)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/finetuned"))
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--max-steps", type=int, default=-1, help="overrules --epochs where positive")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--block-size", type=int, default=128, help="tokens in a row")
    parser.add_argument("--batch-size", type=int, default=8, help="rows in a batch")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the text that is only evaluated on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in bf16; the weights stay as they are")
    parser.add_argument("--prompt", default="Based is", help="to generate from at the end")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    model = BasedForCausalLM.from_pretrained(args.model)
    tokenizer = find_tokenizer(args.tokenizer, args.model, model.config.vocab_size)
    blocks = read_blocks(args.train_file, tokenizer, args.block_size)
    held_out = max(1, round(args.held_out * len(blocks)))
    print(f"{args.train_file}: {len(blocks) - held_out} blocks of {args.block_size} tokens, {held_out} more held out.")

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output_dir),
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            warmup_steps=10,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            prediction_loss_only=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=args.seed,
            bf16=args.bf16,
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=as_dataset(blocks[:-held_out]),
        eval_dataset=as_dataset(blocks[-held_out:]),
    )
    before = perplexity(trainer, "before")
    trainer.train()
    after = perplexity(trainer, "after")

    trainer.save_model()
    if not isinstance(tokenizer, Bytes):
        tokenizer.save_pretrained(args.output_dir)
    model = AutoModelForCausalLM.from_pretrained(args.output_dir)
    print(f"Saved to {args.output_dir} and loaded again.")
    again = perplexity(Trainer(model, trainer.args, eval_dataset=trainer.eval_dataset), "by the saved model")
    if not math.isclose(after, again, rel_tol=1e-3):
        sys.exit("The saved model is not the trained one.")

    prompt = torch.tensor([tokenizer.encode(args.prompt)], device=model.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=80,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    print(f"\nIt goes on like this:\n{tokenizer.decode(output[0])}")
    print(f"\nLoss {before:.3f} -> {after:.3f}, perplexity {math.exp(before):,.1f} -> {math.exp(after):,.1f}")


if __name__ == "__main__":
    main()
