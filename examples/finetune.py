# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Fine-tunes a Based model with transformers' Trainer on a text file, a file of records, or a dataset of the Hub.

    python examples/finetune.py --model hazyresearch/based-360m --tokenizer openai-community/gpt2 \\
        --dataset roneneldan/TinyStories --max-steps 1000 --packing --bf16 --save-steps 200

Every text is cut in pieces of at most `--block-size` tokens, its end marked by the end-of-text token; each piece is a
document of its own. Measures the loss per token of held-out pieces before, during and after, draws the curves, saves,
loads again and generates. With `--save-steps` an interrupted run goes on with `--resume`, to the same weights.
A model without a tokenizer reads bytes: token i is byte i, and 256 ends a text.

Needs `pip install ".[train,plot]"`; several GPUs take `accelerate launch` in place of `python`.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from arguments import check_folder, positive, rate
from huggingface_hub import get_token
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    DataCollatorWithFlattening,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint

from transformers_based import BasedForCausalLM


try:
    from datasets import Dataset, DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError
except ImportError:
    sys.exit('examples/finetune.py needs the `datasets` library: pip install ".[train]"')

ROOT = Path(__file__).resolve().parent.parent
SMALL_MODEL = ROOT / "examples" / "small_checkpoint"
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class Bytes:
    """Stands in for a tokenizer where there is none. Any vocabulary of 257 or more has room for it."""

    eos_token_id = 256

    def __call__(self, texts: list[str], **_) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode(errors="replace")


def find_tokenizer(name: str | None, model: str, vocab_size: int) -> PreTrainedTokenizerBase | Bytes:
    """The tokenizer `name`, by default the model's own, else bytes."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name or model)
        if len(tokenizer) > vocab_size:
            sys.exit(
                f"{name or model} has {len(tokenizer)} tokens, the model {vocab_size}: choose another --tokenizer."
            )
        if tokenizer.eos_token_id is None:
            sys.exit(f"{name or model} has no token for the end of a text: choose another --tokenizer.")
        return tokenizer
    except (OSError, ValueError) as error:
        if name is not None or vocab_size < 257:
            sys.exit(f"No tokenizer in {name or model}: {str(error).splitlines()[0]} Choose one with --tokenizer.")
    return Bytes()


def read_texts(args: argparse.Namespace) -> Dataset:
    """A row for every text, in the column `args.text_column`."""
    source = args.dataset or args.train_file
    if args.dataset is None and not args.train_file.is_file():
        sys.exit(f"There is no file {source}: choose one with --train-file, or a dataset of the Hub with --dataset.")
    try:
        if args.dataset is not None:
            texts = load_dataset(args.dataset, args.dataset_config, split=args.split)
        elif format := FORMATS.get(source.suffix.lower()):
            texts = load_dataset(format, data_files=str(source), split="train")
        else:
            texts = load_dataset("text", data_files=str(source), sample_by="document", split="train")
            args.text_column = "text"
    except (DatasetsError, OSError, ValueError) as error:
        sys.exit(f"{source} cannot be read as a dataset: {error}".splitlines()[0])
    except StopIteration:
        sys.exit(f"{source} is empty: choose another --train-file or --dataset.")
    if args.text_column not in texts.column_names:
        sys.exit(f"{source} has no column {args.text_column!r}: choose --text-column from {texts.column_names}.")
    return texts


def cut_in_pieces(texts: Dataset, tokenizer, args: argparse.Namespace) -> DatasetDict:
    """`input_ids` of at most `args.block_size` tokens; those at the end of the texts are held out, as "test"."""
    source = args.dataset or args.train_file

    def cut(batch, indices):
        for i, text in zip(indices, batch[args.text_column]):
            if not isinstance(text, str | None):
                sys.exit(f"{source}: the column {args.text_column!r} of record {i + 1} holds no text: {text!r:.60}")
        texts = [text or "" for text in batch[args.text_column]]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        size = args.block_size
        whole = [[*row, tokenizer.eos_token_id] for row in ids]
        pieces = [row[start : start + size] for row in whole for start in range(0, len(row), size)]
        # Of a token alone nothing is predicted.
        return {"input_ids": [piece for piece in pieces if len(piece) > 1]}

    pieces = texts.map(cut, with_indices=True, batched=True, remove_columns=texts.column_names, desc="Tokenizing")
    if len(pieces) < 2:
        sys.exit(f"{source} has too few tokens for two pieces. Lower --block-size.")
    held_out = min(max(1, round(args.held_out * len(pieces))), len(pieces) - 1)
    return pieces.train_test_split(held_out, shuffle=False)


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """`[B, T]` each, padded on the right."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    columns = {"input_ids": (ids, 0), "labels": (ids, -100), "attention_mask": ([torch.ones_like(x) for x in ids], 0)}
    return {
        name: pad_sequence(tensors, batch_first=True, padding_value=fill) for name, (tensors, fill) in columns.items()
    }


class PackingTrainer(Trainer):
    """Trains on batches without padding, all pieces in one row; evaluates on padded ones, a row for each piece."""

    def get_train_dataloader(self):
        padding, self.data_collator = self.data_collator, DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = padding


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`[B, T - 1]`: what evaluation keeps of the logits."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")


def mean_over_tokens(prediction: EvalPrediction) -> dict[str, float]:
    """Trainer's own `eval_loss` is a mean over batches, however many tokens they have."""
    losses = prediction.predictions[prediction.label_ids[:, 1:] != -100]
    return {"token_loss": float(losses.mean(dtype=float))}


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def load_model(args: argparse.Namespace) -> BasedForCausalLM:
    adapters = (
        f"{args.model} holds adapters: merge them into the base first, by `PeftModel.from_pretrained(base, "
        f"{args.model!r}).merge_and_unload().save_pretrained(folder)`, or go on with their run by --resume, with the "
        "base as --model."
    )
    folder = Path(args.model)
    # Without peft, or where the base has moved, they cannot be loaded.
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        sys.exit(adapters)
    try:
        model = BasedForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    except (OSError, ValueError) as error:
        sys.exit(f"{args.model} cannot be read as a Based model, choose --model: {str(error).splitlines()[0]}")
    if model._hf_peft_config_loaded:
        sys.exit(adapters)
    return model


def add_lora(model: BasedForCausalLM, args: argparse.Namespace):
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        sys.exit('--lora needs the `peft` library: pip install ".[train]"')
    head = model.get_output_embeddings()
    linear = [name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear) and x is not head]
    known = {name.rpartition(".")[2] for name in linear}
    if unknown := sorted(set(args.lora_targets or ()) - known):
        sys.exit(f"--lora-targets: the model has no layer {', '.join(unknown)}, but {', '.join(sorted(known))}.")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora,
        lora_alpha=2 * args.lora,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets or "all-linear",
    )
    return get_peft_model(model, config)


def compare_adapters(model, checkpoint: Path, args: argparse.Namespace) -> None:
    """Refuses to go on from a checkpoint with other adapters than the model's."""
    config = checkpoint / "adapter_config.json"
    if config.is_file():
        saved = json.loads(config.read_text())
        rank, targets = saved["r"], set(saved["target_modules"])
        if args.lora != rank or set(model.peft_config["default"].target_modules) != targets:
            run = f"a run with --lora {rank} --lora-targets {' '.join(sorted(targets))}"
            sys.exit(f"{checkpoint} is of {run}: go on from it with these, or choose another --output-dir.")
    # FSDP's sharded checkpoints have neither file.
    elif args.lora and (checkpoint / "config.json").is_file():
        sys.exit(f"{checkpoint} is of a run without --lora: go on from it without, or choose another --output-dir.")


def load_again(args: argparse.Namespace):
    """What was saved, as a user loads it: whole in one process, also where training has shared it out over several."""
    # While DeepSpeed's ZeRO-3 is switched on, `from_pretrained` is work for all processes together.
    unset_hf_deepspeed_config()
    if not args.lora:
        return BasedForCausalLM.from_pretrained(args.output_dir)
    from peft import PeftModel

    return PeftModel.from_pretrained(BasedForCausalLM.from_pretrained(args.model, dtype=args.dtype), args.output_dir)


@torch.no_grad()
def held_out_loss(model, pieces: Dataset, args: argparse.Namespace) -> float:
    """Per token, as in training, by this process alone."""
    losses = []
    for batch in tqdm(DataLoader(pieces, args.batch_size, collate_fn=pad), desc="Evaluating what was saved"):
        batch = {name: x.to(model.device) for name, x in batch.items()}
        labels = batch.pop("labels")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            logits = model(**batch, use_cache=False).logits
        losses.append(token_losses(logits, labels)[labels[:, 1:] != -100])
    return float(torch.cat(losses).mean(dtype=torch.float64))


def generate(model, tokenizer, prompt: str) -> str:
    ids = torch.tensor(tokenizer([prompt])["input_ids"], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=80,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0])


def draw(history: list[dict[str, float]], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print('No plot of the losses without matplotlib: pip install ".[plot]"')
        return
    figure, axes = pyplot.subplots()
    for name, label in (("loss", "training"), ("eval_token_loss", "held out")):
        entries = [entry for entry in history if name in entry]
        axes.plot([x["step"] for x in entries], [x[name] for x in entries], marker=".", label=label)
    axes.set(xlabel="step", ylabel="loss per token")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"Losses drawn to {path}.")


def share(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def dropout(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return float(text)


def seed(text: str) -> int:
    # NumPy's has 32 bits.
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tunes a Based model.")
    parser.add_argument("--model", default=str(SMALL_MODEL), help="folder or Hub id, in either layout")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "auto"],
        default="float32",
        help="of the weights; bfloat16 loses small steps (auto: as saved)",
    )
    parser.add_argument("--tokenizer", help="folder or Hub id (default: the model's own, else bytes)")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("outputs/finetuned"), help="for the result and checkpoints"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the order of the pieces, dropout and new adapters")
    parser.add_argument("--prompt", default="Based is", help="to generate from at the end")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result, as you/name")

    data = parser.add_argument_group("data")
    help = "text, or records in .json, .jsonl, .csv or .parquet (default: the README)"
    data.add_argument("--train-file", type=Path, default=ROOT / "README.md", help=help)
    data.add_argument("--dataset", help="folder or Hub id of a dataset, in place of --train-file")
    data.add_argument("--dataset-config", help="which of several it holds")
    data.add_argument("--split", default="train", help='of the dataset; "train[:1%%]" is a part of it')
    data.add_argument("--text-column", default="text", help="where the texts are in records")
    data.add_argument("--block-size", type=positive, default=128, help="most tokens in a piece")
    data.add_argument("--held-out", type=share, default=0.1, help="share of the pieces that is only evaluated on")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=rate, default=10.0, help="times through the text (default: 10)")
    training.add_argument("--max-steps", type=int, default=-1, help="overrules --epochs where positive")
    training.add_argument(
        "--learning-rate", type=rate, default=1e-3, help="after 10 steps, then falling to 0 (default: 1e-3)"
    )
    training.add_argument("--batch-size", type=positive, default=8, help="pieces in a batch, on each device")
    training.add_argument("--accumulate", type=positive, default=1, help="batches in a step")
    training.add_argument("--packing", action="store_true", help="no padding: the pieces of a batch share a row")
    training.add_argument("--lora", type=positive, metavar="RANK", help="train adapters of this rank only")
    training.add_argument("--lora-targets", nargs="+", metavar="LAYER", help="such as q_proj (default: all linear)")
    training.add_argument("--lora-dropout", type=dropout, default=0.0, help="of what goes into an adapter")
    training.add_argument("--bf16", action="store_true", help="compute in bf16; the weights stay as they are")
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    training.add_argument("--eval-steps", type=positive, default=100, help="steps from one evaluation to the next")
    training.add_argument("--save-steps", type=positive, help="steps from one checkpoint to the next (default: none)")
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    args = parser.parse_args(argv)
    if args.block_size < 2:
        parser.error("--block-size must be at least 2: of a token alone nothing is predicted.")
    if not args.lora and (args.lora_targets or args.lora_dropout):
        parser.error("--lora-targets and --lora-dropout need --lora RANK: without it all weights are trained.")
    if not args.prompt or args.push_to_hub == "":
        parser.error("--prompt and --push-to-hub want a text that is not empty.")
    return args


def training_arguments(args: argparse.Namespace) -> TrainingArguments:
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(args.output_dir),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        learning_rate=args.learning_rate,
        warmup_steps=10,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        bf16=args.bf16,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        eval_on_start=not args.resume,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        save_total_limit=2,
        push_to_hub=args.push_to_hub is not None,
        hub_model_id=args.push_to_hub,
        hub_strategy="end",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=args.seed,
        use_cpu=not torch.accelerator.is_available(),
        **(checkpointing if args.gradient_checkpointing else {}),
    )


def find_checkpoint(args: argparse.Namespace) -> str | None:
    check_folder("--output-dir", args.output_dir)
    found = get_last_checkpoint(str(args.output_dir)) if args.output_dir.is_dir() else None
    if args.resume and found is None:
        sys.exit(f"No checkpoint to go on from in {args.output_dir}: start without --resume, with --save-steps.")
    if found is not None and not args.resume:
        sys.exit(f"{found} is of an earlier run: go on from it with --resume, or choose another --output-dir.")
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    checkpoint = find_checkpoint(args)
    if args.push_to_hub and get_token() is None:
        sys.exit("--push-to-hub needs a login: run `hf auth login` first.")
    set_seed(args.seed)
    options = training_arguments(args)
    if args.packing and options.n_gpu > 1:
        sys.exit("Packed batches cannot be split over GPUs: start with `accelerate launch` in place of `python`.")
    model = load_model(args)
    tokenizer = find_tokenizer(args.tokenizer, args.model, model.config.vocab_size)
    if args.lora:
        model = add_lora(model, args)
    if checkpoint is not None:
        compare_adapters(model, Path(checkpoint), args)
    with options.main_process_first(desc="reading the texts"):
        pieces = cut_in_pieces(read_texts(args), tokenizer, args)
    is_main = options.process_index == 0
    if is_main:
        if isinstance(tokenizer, Bytes):
            print(f"{args.model} has no tokenizer: reading bytes as tokens. Another one can be named with --tokenizer.")
        lengths = [len(ids) for ids in pieces["train"].with_format("numpy")["input_ids"]]
        mean = sum(lengths) / len(lengths)
        print(f"{len(lengths):,} pieces of {mean:.0f} tokens on average, {len(pieces['test']):,} more held out.")
        # ZeRO-3 leaves empty tensors in their place, which know how many they were.
        counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        trained = sum(n for n, is_trained in counts if is_trained)
        print(f"{trained:,} of {sum(n for n, _ in counts):,} weights are trained.")

    trainer = (PackingTrainer if args.packing else Trainer)(
        model=model,
        args=options,
        data_collator=pad,
        train_dataset=pieces["train"],
        eval_dataset=pieces["test"],
        processing_class=None if isinstance(tokenizer, Bytes) else tokenizer,
        compute_metrics=mean_over_tokens,
        preprocess_logits_for_metrics=token_losses,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()["eval_token_loss"]
    before = next(entry["eval_token_loss"] for entry in trainer.state.log_history if "eval_token_loss" in entry)
    # Uploads as well where that was asked for, the plot with it.
    if is_main:
        draw(trainer.state.log_history, args.output_dir / "loss.png")
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if not is_main:
        return

    # Room for what is loaded.
    del trainer, model
    model = load_again(args).to(options.device).eval()
    again = held_out_loss(model, pieces["test"], args)
    if not math.isclose(after, again, rel_tol=1e-3):
        sys.exit(f"The saved model is not the trained one: loss {again:.4f}, not {after:.4f}.")
    print(f"Saved to {args.output_dir} and loaded again.")
    for when, loss in (("before", before), ("after", after), ("by the saved model", again)):
        print(f"Held-out text {when}: loss {loss:.3f}, perplexity {perplexity(loss):,.1f}")
    print(f"\nIt goes on like this:\n{generate(model, tokenizer, args.prompt)}")
    print(f"\nLoss {before:.3f} -> {after:.3f}, perplexity {perplexity(before):,.1f} -> {perplexity(after):,.1f}")


if __name__ == "__main__":
    main()
