# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Based in two minutes: takes a checkpoint, generates with it, and weighs its state.

    python examples/quickstart.py

Takes hazyresearch/based-360m when the Hub answers, and converts it; else examples/small_checkpoint, which is of 3.6
million parameters and knows the King James Bible.
"""

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, TextStreamer
from transformers.utils import logging

import transformers_based  # noqa: F401 (tells the Auto classes about Based)


ROOT = Path(__file__).resolve().parent.parent
HUB_MODEL, HUB_TOKENIZER = "hazyresearch/based-360m", "openai-community/gpt2"
SMALL_MODEL = ROOT / "examples" / "small_checkpoint"
PATIENCE = 4  # seconds for the Hub to answer
PROMPTS = ["The capital of France is", "Linear attention reads a long text and", "Once upon a time, in a small house"]
SMALL_PROMPTS = ["And it came to pass", "In the beginning God", "And Moses said unto the people of Israel"]
NEW_TOKENS = 40
LENGTHS = (100, 2_000)


class FirstRowStreamer(TextStreamer):
    """Prints the first row of a batch while it is generated; `TextStreamer` takes one row only."""

    def put(self, value: torch.Tensor) -> None:
        super().put(value[:1])


def hub_answers() -> bool:
    """Whether the Hub says within a few seconds that the model is there."""
    answers = []

    def ask():
        # Any reason not to answer will do: no network, offline mode, a proxy's page.
        with contextlib.suppress(Exception):
            answers.append(HfApi().model_info(HUB_MODEL, timeout=PATIENCE))

    # In a thread, since the timeout does not cover the name resolution.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answers)


def random_ids(model, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(model.config.unpadded_vocab_size, shape, generator=torch.Generator().manual_seed(0))


def generate(model, tokenizer, prompts: list[str]) -> float:
    """Generates for a batch, the first row as a visible stream, prints all of it, and returns tokens per second."""
    tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    length = inputs["input_ids"].shape[1]
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    print("Row 1, as it comes:\n")
    start = time.perf_counter()
    output = model.generate(**inputs, **options, streamer=FirstRowStreamer(tokenizer, skip_special_tokens=True))
    seconds = time.perf_counter() - start
    print("\nThe whole batch:\n")
    for i, (row, exists) in enumerate(zip(output, inputs["attention_mask"].bool()), 1):
        prompt, answer = tokenizer.decode(row[:length][exists]), tokenizer.decode(row[length:])
        print(f"  {i}. {prompt.strip()} | {' '.join(answer.split())}")
    return len(output) * NEW_TOKENS / seconds


def tensors_in(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def cache_bytes(cache: Cache) -> int:
    """Memory behind the tensors of a cache: whole storages, whatever part of them a tensor shows."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in tensors_in(vars(layer)))


@torch.inference_mode()
def state_bytes(model, length: int) -> int:
    """What the cache of the model holds after reading `length` tokens, the last of them in a step of its own."""
    ids = random_ids(model, (1, length))
    cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    model(ids[:, -1:], past_key_values=cache)
    return cache_bytes(cache)


def kv_cache_bytes(config, dtype: torch.dtype, length: int) -> int:
    """What transformers' DynamicCache holds for a softmax attention in every layer, of the model's width and depth."""
    cache = DynamicCache()
    heads = config.num_attention_heads
    # Without memory of their own ("meta"), but of the true size.
    key = torch.empty(1, heads, length, config.hidden_size // heads, dtype=dtype, device="meta")
    for i in range(config.num_hidden_layers):
        cache.update(key, key.clone(), i)
    return cache_bytes(cache)


def print_table(model, tokens_per_second: float) -> None:
    rows = {
        "state of this model": [state_bytes(model, length) for length in LENGTHS],
        "KV cache of equal width and depth": [kv_cache_bytes(model.config, model.dtype, length) for length in LENGTHS],
    }
    print(f"\n{'bytes for one sequence of':36}" + "".join(f"{f'{length:,} tokens':>18}" for length in LENGTHS))
    for name, sizes in rows.items():
        print(f"{name:36}" + "".join(f"{size:>18,}" for size in sizes))
    print(
        f"\nGenerated {tokens_per_second:,.0f} tokens per second (batch of {len(PROMPTS)}, prompt included, on a CPU)."
    )
    print("Both rows count the tensors of transformers' own cache objects.")


def main() -> None:
    logging.disable_progress_bar()
    print(f"Asking the Hub for {HUB_MODEL} ...", flush=True)
    if hub_answers():
        prompts, tokenizer = PROMPTS, AutoTokenizer.from_pretrained(HUB_TOKENIZER)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "based"
            command = [sys.executable, "conversion/convert_checkpoint.py", HUB_MODEL, str(output)]
            print(f"\n$ python {' '.join(command[1:])}", flush=True)
            if subprocess.run(command, cwd=ROOT).returncode:
                sys.exit("The conversion failed, see above.")
            model = AutoModelForCausalLM.from_pretrained(output).eval()
    else:
        source = SMALL_MODEL.relative_to(ROOT)
        print(f"  No answer: taking {source}, which was trained on the King James Bible alone.")
        prompts, tokenizer = SMALL_PROMPTS, AutoTokenizer.from_pretrained(SMALL_MODEL)
        model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL).eval()
    print(f"\nLoaded a {type(model).__name__} of {model.num_parameters():,} parameters, {model.dtype}.\n")
    print_table(model, generate(model, tokenizer, prompts))


if __name__ == "__main__":
    main()
