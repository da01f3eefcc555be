# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Recall on real documents: lm-eval's fda, swde and squad_completion, beside the numbers that were published.

    python examples/evaluate_recall.py outputs/based-360m-hf --tokenizer openai-community/gpt2 --batch-size 8
    python examples/evaluate_recall.py outputs/mamba-360m-hf outputs/attn-360m-hf --tokenizer openai-community/gpt2
    python examples/evaluate_recall.py examples/small_checkpoint --data tests/data/recall

A model is a folder or Hub id that transformers loads: what conversion/convert_checkpoint.py wrote of one of the
released checkpoints (Based, attention, Mamba), or any other. A document is read and continued greedily; an answer is
right if it contains the value, in whatever case. The tasks are as in lm-eval, except that squad_completion's answers
have 48 tokens at most, as in the paper. Every model takes 2,048 tokens of prompt and answer, whatever its tokenizer
says, or fewer if its configuration says so; longer prompts lose their beginning.

The documents come from the Hub (hazyresearch/based-fda, based-swde-v2, based-squad), or with `--data` from `fda.jsonl`,
`swde.jsonl`, `squad_completion.jsonl` in a folder: a document a line, with a `text` to go on from and the `value` to be
found.

Needs `pip install ".[eval]"`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from arguments import check_folder, positive
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

import transformers_based  # noqa: F401 (tells the Auto classes about Based)
from transformers_based.original_format import is_original_config


try:
    import lm_eval
    from datasets import Dataset, DatasetDict
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.fda.task import FDA
    from lm_eval.tasks.squad_completion.task import SQUADCompletion
    from lm_eval.tasks.swde.task import SWDE
except ImportError as error:
    sys.exit(f'examples/evaluate_recall.py needs the `lm_eval` library ({error}): pip install ".[eval]"')

TASKS = {"fda": FDA, "swde": SWDE, "squad_completion": SQUADCompletion}
NEW_TOKENS = 48  # as in the paper
LENGTH = 2048  # that the released checkpoints were trained with
# Percent, as reported for the released checkpoints by their authors (arXiv 2402.18668).
PUBLISHED = {
    "based-360m": (14.3, 25.7, 24.2),
    "mamba-360m": (5.9, 17.3, 24.8),
    "attn-360m": (57.9, 56.3, 27.9),
    "based-1b": (19.1, 37.7, 29.5),
    "mamba-1b": (11.1, 28.4, 29.4),
    "attn-1b": (68.9, 69.0, 35.9),
}


def make_task(name: str, folder: Path | None):
    """lm-eval's task `name`; with a folder, on the documents of its file there."""
    task_class = TASKS[name]
    if folder is not None:
        path = folder / f"{name}.jsonl"
        documents = read_documents(path)

        class LocalTask(task_class):
            def download(self, *args, **kwargs):
                self.dataset = DatasetDict(validation=documents)

        task_class = LocalTask
    try:
        task = task_class()
    except (OSError, ValueError) as error:
        sys.exit(f"The documents of {name} cannot be loaded: {str(error).splitlines()[0]} (--data takes a folder)")
    task._config.task = name
    # Of lm-eval's own, squad_completion takes the library's defaults, 256 tokens past a line's end.
    task._config.generation_kwargs = {"until": ["\n"], "max_gen_toks": NEW_TOKENS}
    return task


def read_documents(path: Path) -> Dataset:
    if not path.is_file():
        sys.exit(f"There is no file {path}: --data is a folder with a .jsonl for each of the --tasks.")
    try:
        with path.open(encoding="utf-8") as lines:
            documents = [json.loads(line) for line in lines if line.strip()]
        if not documents:
            sys.exit(f"{path} is empty: it needs a document a line, each with a `text` and a `value`.")
        for number, document in enumerate(documents, 1):
            check_document(document, f"{path}, record {number}")
        return Dataset.from_list(documents)
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"{path} cannot be read as records: {error}".splitlines()[0])


def check_document(document, where: str) -> None:
    for name in ("text", "value"):
        found = document.get(name) if isinstance(document, dict) else None
        # An empty value would be in every answer.
        if not isinstance(found, str) or not found.strip():
            sys.exit(f"{where}: its `{name}` must be a string with something in it.")


def devices() -> list[str]:
    """By the names that lm-eval knows: for any other it would quietly choose one itself."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator().type
    names = [kind] if kind in ("cuda", "mps") else []
    return ["cpu", *names, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]


def length_of(config: PreTrainedConfig) -> int:
    """The tokens of prompt and answer without `--max-length`: `LENGTH`, or fewer if the configuration says so."""
    # Not as lm-eval does: of a Mamba, whose configuration has no length, it takes that of the tokenizer, and GPT-2's
    # would cut Mamba's prompts to half of what the others read.
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(config, name, None)) is not None:
            return min(length, LENGTH)
    return LENGTH


def check_model(source: str) -> None:
    if Path(source).is_file():
        sys.exit(f"{source} is a file: a model is a folder or Hub id.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        sys.exit(f"There is no model {source}: {str(error).splitlines()[0]}")
    if is_original_config(config) or "model_type" not in config or {"alt_mixer", "mixer"} & config.keys():
        sys.exit(f"{source} is in its original layout: run conversion/convert_checkpoint.py {source} OUTPUT first.")


def choose_length(source: str, args: argparse.Namespace) -> int:
    """The tokens that `source` takes, which must leave room for a prompt; loads what tells it, without the weights."""
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        sys.exit(f"{source} cannot be loaded: {str(error).splitlines()[0]}")
    name = args.tokenizer or source
    try:
        AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        sys.exit(f"No tokenizer in {name}: {str(error).splitlines()[0]} Choose one with --tokenizer.")
    if args.max_length is not None:
        return args.max_length
    length = length_of(config)
    if length <= NEW_TOKENS:
        sys.exit(
            f"{source} takes {length} tokens, which leaves no prompt: an answer alone has {NEW_TOKENS}. Where it can "
            "take more, say so with --max-length."
        )
    if length < LENGTH:
        print(f"{source} takes {length:,} tokens, as its configuration says, in place of {LENGTH:,}.", flush=True)
    return length


def check_arguments(args: argparse.Namespace) -> dict[str, int]:
    """
    Refuses what would otherwise stop the program late, with the numbers of other models lost. Returns how many tokens
    each model takes.
    """
    if args.device not in (known := devices()):
        sys.exit(f"--device {args.device}: torch finds no such device here, choose from {', '.join(known)}.")
    if args.max_length is not None and args.max_length <= NEW_TOKENS:
        sys.exit(f"--max-length {args.max_length} leaves no prompt: it includes the {NEW_TOKENS} tokens of an answer.")
    if args.output is not None:
        if args.output.is_dir():
            sys.exit(f"--output {args.output} is a folder: name a .json, such as {args.output / 'recall.json'}.")
        check_folder("--output", args.output.parent)
    lengths = {}
    for source in args.models:
        check_model(source)
        lengths[source] = choose_length(source, args)
    return lengths


def load_model(source: str, length: int, args: argparse.Namespace) -> HFLM:
    try:
        model = HFLM(
            pretrained=source,
            tokenizer=args.tokenizer or source,
            dtype=args.dtype,
            device=args.device,
            batch_size=args.batch_size,
            max_length=length,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"{source} cannot be loaded: {str(error).splitlines()[0]}")
    # Greedily, and as far as the task says, whatever the checkpoint prefers.
    own = model.model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")}
    model.model.generation_config = GenerationConfig(**ids)
    return model


def evaluate(source: str, length: int, tasks: list, args: argparse.Namespace) -> dict:
    """`{task: {"accuracy": percent, "documents": how many}}` for the model `source`."""
    results = lm_eval.simple_evaluate(
        model=load_model(source, length, args),
        tasks=tasks,
        limit=args.limit,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {
        name: {
            "accuracy": 100 * float(results["results"][name]["contains,none"]),
            "documents": results["n-samples"][name]["effective"],
        }
        for name in args.tasks
    }


def published(tasks: list[str]) -> dict[str, dict[str, float]]:
    return {name: {task: dict(zip(TASKS, numbers))[task] for task in tasks} for name, numbers in PUBLISHED.items()}


def table(results: dict[str, dict], tasks: list[str]) -> str:
    lines = ["| percent right | " + " | ".join(tasks) + " |", "|---" + "|---:" * len(tasks) + "|"]
    for source, by_task in results.items():
        cells = (f"{by_task[name]['accuracy']:.1f} of {by_task[name]['documents']:,}" for name in tasks)
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    for name, by_task in published(tasks).items():
        lines.append(f"| {name}, published | " + " | ".join(f"{by_task[task]:.1f}" for task in tasks) + " |")
    return "\n".join(lines)


def write(results: dict[str, dict], args: argparse.Namespace) -> None:
    versions = {name: module.__version__ for name, module in (("torch", torch), ("transformers", transformers))}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found = {"versions": versions, "dtype": args.dtype, "results": results, "published": published(args.tasks)}
    args.output.write_text(json.dumps(found, indent=2) + "\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recall on real documents, beside the published numbers.")
    parser.add_argument("models", nargs="+", help="folders or Hub ids that transformers loads")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: the model's own)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--data", type=Path, help="folder with fda.jsonl and so on (default: the Hub)")
    parser.add_argument("--limit", type=positive, help="documents of each task (default: all)")
    parser.add_argument("--batch-size", type=positive, default=1)
    parser.add_argument(
        "--max-length",
        type=positive,
        help=f"tokens of prompt and answer; longer prompts lose their beginning (default: {LENGTH}, or fewer if the "
        "model's configuration says so)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: as they were saved)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the numbers to this .json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    lengths = check_arguments(args)
    tasks = [make_task(name, args.data) for name in args.tasks]
    results = {}
    for source in args.models:
        results[source] = evaluate(source, lengths[source], tasks, args)
        # After each, for a later model may fail.
        if args.output is not None:
            write(results, args)
    print(f"\n{table(results, args.tasks)}")


if __name__ == "__main__":
    main()
