# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Recall on real documents: lm-eval's fda, swde and squad_completion, beside the numbers that were published.

    python examples/evaluate_recall.py outputs/based-360m-hf --tokenizer openai-community/gpt2
    python examples/evaluate_recall.py outputs/mamba-360m-hf outputs/attn-360m-hf --batch-size 8
    python examples/evaluate_recall.py examples/small_checkpoint --data tests/data/recall

A model is a folder or Hub id that transformers loads: what conversion/convert_checkpoint.py wrote of one of the
released checkpoints (Based, attention, Mamba), or any other. A document is read and continued greedily; an answer is
right if it contains the value, in whatever case. The documents come from the Hub (hazyresearch/based-fda,
based-swde-v2, based-squad), or with `--data` from `fda.jsonl`, `swde.jsonl`, `squad_completion.jsonl` in a folder: a
document a line, with a `text` to go on from and the `value` to be found.

Needs `pip install ".[eval]"`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig

import transformers_based  # noqa: F401 (tells the Auto classes about Based)
from transformers_based.original_format import is_original_config


try:
    import lm_eval
    from datasets import DatasetDict, load_dataset
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.fda.task import FDA
    from lm_eval.tasks.squad_completion.task import SQUADCompletion
    from lm_eval.tasks.swde.task import SWDE
except ImportError as error:
    sys.exit(f'examples/evaluate_recall.py needs the `lm_eval` library ({error}): pip install ".[eval]"')

TASKS = {"fda": FDA, "swde": SWDE, "squad_completion": SQUADCompletion}
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
    task = task_class()
    task._config.task = name
    # As in the paper. Of lm-eval's own, squad_completion takes the library's defaults, 256 tokens past a line's end.
    task._config.generation_kwargs = {"until": ["\n"], "max_gen_toks": 48}
    return task


def read_documents(path: Path):
    if not path.is_file():
        sys.exit(f"There is no file {path}: --data is a folder with a .jsonl for each of the --tasks.")
    try:
        documents = load_dataset("json", data_files=str(path), split="train")
    except Exception as error:
        sys.exit(f"{path} cannot be read as records: {error}".splitlines()[0])
    if missing := {"text", "value"} - set(documents.column_names):
        sys.exit(f"{path} has no column {', '.join(sorted(missing))}: its columns are {documents.column_names}.")
    return documents


def load_model(source: str, args: argparse.Namespace) -> HFLM:
    try:
        config, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        sys.exit(f"There is no model {source}: {str(error).splitlines()[0]}")
    if is_original_config(config) or "model_type" not in config or {"alt_mixer", "mixer"} & config.keys():
        sys.exit(f"{source} is in its original layout: run conversion/convert_checkpoint.py {source} OUTPUT first.")
    try:
        model = HFLM(
            pretrained=source,
            tokenizer=args.tokenizer or source,
            dtype=args.dtype,
            device=args.device,
            batch_size=args.batch_size,
            max_length=args.max_length,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"{source} cannot be loaded: {str(error).splitlines()[0]} (--tokenizer names one from elsewhere)")
    # Greedily, and as far as the task says, whatever the checkpoint prefers.
    own = model.model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")}
    model.model.generation_config = GenerationConfig(**ids)
    return model


def evaluate(source: str, args: argparse.Namespace) -> dict:
    """`{task: {"accuracy": percent, "documents": how many}}` for the model `source`."""
    results = lm_eval.simple_evaluate(
        model=load_model(source, args),
        tasks=[make_task(name, args.data) for name in args.tasks],
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


def table(results: dict[str, dict], tasks: list[str]) -> str:
    lines = ["| percent right | " + " | ".join(tasks) + " |", "|---" + "|---:" * len(tasks) + "|"]
    for source, by_task in results.items():
        cells = (f"{by_task[name]['accuracy']:.1f} of {by_task[name]['documents']:,}" for name in tasks)
        lines.append(f"| {source} | " + " | ".join(cells) + " |")
    for name, numbers in PUBLISHED.items():
        by_task = dict(zip(TASKS, numbers))
        lines.append(f"| {name}, published | " + " | ".join(f"{by_task[task]:.1f}" for task in tasks) + " |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recall on real documents, beside the published numbers.")
    parser.add_argument("models", nargs="+", help="folders or Hub ids that transformers loads")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: the model's own)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--data", type=Path, help="folder with fda.jsonl and so on (default: the Hub)")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--max-length", type=int, help="tokens of a prompt; longer ones lose their beginning")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: float32, bfloat16 (default: as they were saved)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="also write the numbers to this .json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    results = {source: evaluate(source, args) for source in args.models}
    print(f"\n{table(results, args.tasks)}")
    if args.output is not None:
        versions = {name: module.__version__ for name, module in (("torch", torch), ("transformers", transformers))}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"versions": versions, "dtype": args.dtype, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
