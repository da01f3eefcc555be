# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The programs in examples/, run as a user runs them, on small settings."""

import re

import pytest
from minihub import MiniHub
from programs import ROOT, run_python
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """The folder of a tokenizer with 256 tokens and an end of text."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def sizes(output: str, row: str) -> list[int]:
    (line,) = [line for line in output.splitlines() if line.startswith(row)]
    return [int(number.replace(",", "")) for number in line.removeprefix(row).split()]


def check_quickstart(output: str) -> None:
    at_100, at_2000 = sizes(output, "state of this model")
    assert at_100 == at_2000 > 0
    # Keys and values, 8 layers, fp32, width 64: counted here by hand.
    assert sizes(output, "KV cache of equal width and depth") == [length * 2 * 8 * 64 * 4 for length in (100, 2000)]
    assert re.search(r"Generated [\d,]+ tokens per second", output)
    streamed = output.partition("as it comes:")[2].partition("The whole batch:")[0].strip()
    whole = re.search(r"^  1\. (.*)", output, re.MULTILINE)[1]
    assert streamed.split() == whole.replace(" | ", " ").split()
    assert len(re.findall(r"^  \d\. .+ \| .+", output, re.MULTILINE)) == 3


def test_quickstart_without_a_hub():
    output = run_python("examples/quickstart.py").stdout
    check_quickstart(output)
    assert "No answer: taking the small checkpoint" in output
    assert "token ids without meaning" in output
    # The README shows a part of this.
    (table,) = re.findall(r"^```text\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert table in output


def test_quickstart_with_a_hub_that_has_the_model(based_tiny_path, byte_tokenizer, tmp_path):
    with MiniHub() as hub:
        hub.add("hazyresearch/based-360m", based_tiny_path)
        hub.add("openai-community/gpt2", byte_tokenizer)
        output = run_python("examples/quickstart.py", **hub.environment(tmp_path / "cache")).stdout
    assert "No answer" not in output
    assert "convert_checkpoint.py hazyresearch/based-360m" in output
    assert "The capital of France is | " in output
    assert sizes(output, "state of this model")[0] == sizes(output, "state of this model")[1]


def losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"^Held-out text .*: loss ([\d.]+), perplexity", output, re.MULTILINE)]


def test_finetune_lowers_the_loss(tmp_path):
    arguments = ("--output-dir", tmp_path / "model", "--max-steps", "60", "--block-size", "64")
    output = run_python("examples/finetune.py", "--train-file", ROOT / "LICENSE", *arguments).stdout
    before, after, again = losses(output)
    assert after < before / 2
    assert again == pytest.approx(after, rel=1e-2)
    assert "has no tokenizer: reading bytes" in output
    assert "It goes on like this:\nBased is" in output
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_finetune_with_a_tokenizer_then_in_bf16_from_its_own_output(tmp_path, byte_tokenizer):
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and the mat lay on the floor.\n" * 40)
    arguments = ("--train-file", tmp_path / "text.txt", "--max-steps", "20", "--block-size", "32")
    first = run_python(
        *("examples/finetune.py", "--tokenizer", byte_tokenizer, "--output-dir", tmp_path / "one"), *arguments
    ).stdout
    second = run_python(
        *("examples/finetune.py", "--model", tmp_path / "one", "--output-dir", tmp_path / "two", "--bf16"), *arguments
    ).stdout
    assert "reading bytes" not in first + second
    assert losses(second)[0] == pytest.approx(losses(first)[-1], rel=2e-2)
    assert losses(second)[-1] < losses(second)[0]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [("short", (), "Lower --block-size"), ("x" * 5000, ("--tokenizer", "{folder}"), "No tokenizer in")],
)
def test_finetune_refuses_in_a_line(tmp_path, text, options, message):
    (tmp_path / "text.txt").write_text(text)
    options = [option.format(folder=tmp_path) for option in options]
    process = run_python("examples/finetune.py", "--train-file", tmp_path / "text.txt", *options, check=False)
    assert process.returncode == 1
    assert message in process.stderr
    assert "Traceback" not in process.stderr


def test_shared_prefix_prints_the_time_saved(tmp_path):
    (tmp_path / "document.txt").write_text("All work and no play. " * 200)
    options = ("--document", tmp_path / "document.txt", "--new-tokens", "4", "--question", "Who?", "What?", "Why?")
    output = run_python("examples/shared_prefix.py", *options).stdout
    assert "The document has 4400 tokens" in output
    # The program itself compares each answer with one from reading the document anew.
    assert re.findall(r"^(\w+\?)  ->  b", output, re.MULTILINE) == ["Who?", "What?", "Why?"]
    assert re.search(r"^Time saved: -?[\d.]+ s, -?\d+ percent", output, re.MULTILINE)
