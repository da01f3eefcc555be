# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Several questions about one long document, which is read once: its state is kept and restored for each question.

    python examples/shared_prefix.py [--model FOLDER_OR_HUB_ID] [--document FILE] [--question TEXT ...]

Without a tokenizer in the checkpoint, text becomes its bytes.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, DynamicCache

from transformers_based import BasedForCausalLM, CacheSnapshot


ROOT = Path(__file__).resolve().parents[1]


def encoder(model_name):
    """Text to ids `[1, T]`, and back."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError):
        print("No tokenizer beside the checkpoint: text becomes its bytes.")
        return lambda text: torch.tensor([list(text.encode())]), lambda ids: repr(bytes(i % 256 for i in ids.tolist()))
    return lambda text: tokenizer(text, return_tensors="pt").input_ids, tokenizer.decode


def answer(model, prefix, question, cache, new_tokens):
    output = model.generate(
        torch.cat([prefix, question], dim=1), past_key_values=cache, max_new_tokens=new_tokens, do_sample=False
    )
    return output[0, prefix.shape[1] + question.shape[1] :]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "tests" / "reference" / "based-tiny"))
    parser.add_argument("--document", default=str(ROOT / "LICENSE"), help="a text file")
    parser.add_argument("--question", nargs="+", default=["Who is the licensor?", "What is a work?", "May I sell it?"])
    parser.add_argument("--new-tokens", type=int, default=16)
    arguments = parser.parse_args()

    model = BasedForCausalLM.from_pretrained(arguments.model).eval()
    encode, decode = encoder(arguments.model)
    document = encode(Path(arguments.document).read_text(encoding="utf-8"))
    questions = [encode("\n" + question) for question in arguments.question]
    print(f"The document has {document.shape[1]} tokens.")

    start = time.perf_counter()
    with torch.no_grad():
        cache = model(document, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).past_key_values
    snapshot = CacheSnapshot(cache)
    reading, answers = time.perf_counter() - start, []
    for question in questions:
        snapshot.restore(cache)
        answers.append(answer(model, document, question, cache, arguments.new_tokens))
    shared = time.perf_counter() - start

    start = time.perf_counter()
    for question, kept in zip(questions, answers):
        again = answer(model, document, question, DynamicCache(config=model.config), arguments.new_tokens)
        if not torch.equal(again, kept):
            raise RuntimeError("Reading the document anew gave another answer.")
    anew = time.perf_counter() - start

    for text, ids in zip(arguments.question, answers):
        print(f"{text}  ->  {decode(ids)}")
    print(
        f"Reading the document once: {shared:.2f} s ({reading:.2f} s of it reading); for each question: {anew:.2f} s."
    )
    print(f"Time saved: {anew - shared:.2f} s, {100 * (1 - shared / anew):.0f} percent.")


if __name__ == "__main__":
    main()
