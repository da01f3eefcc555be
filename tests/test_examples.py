# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The programs in examples/, run as a user runs them, on small settings."""

import re

import pytest
from minihub import MiniHub
from programs import ROOT, held_out_losses, run_python
from word_tokenizer import byte_tokenizer


def sizes(output: str, row: str) -> list[int]:
    (line,) = [line for line in output.splitlines() if line.startswith(row)]
    return [int(number.replace(",", "")) for number in line.removeprefix(row).split()]


def check_quickstart(output: str, token_bytes: int) -> None:
    """`token_bytes`: what softmax attention of this width and depth keeps of a token, counted by hand."""
    at_100, at_2000 = sizes(output, "state of this model")
    assert at_100 == at_2000 > 0
    assert sizes(output, "KV cache of equal width and depth") == [length * token_bytes for length in (100, 2000)]
    assert re.search(r"Generated [\d,]+ tokens per second", output)
    streamed = output.partition("as it comes:")[2].partition("The whole batch:")[0].strip()
    whole = re.search(r"^  1\. (.*)", output, re.MULTILINE)[1]
    assert "".join(streamed.split()) == "".join(whole.replace(" | ", "", 1).split())
    assert len(re.findall(r"^  \d\. .+ \| .+", output, re.MULTILINE)) == 3


def test_quickstart_without_a_hub():
    output = run_python("examples/quickstart.py").stdout
    # Keys and values, 8 layers, bf16, width 192.
    check_quickstart(output, 2 * 8 * 192 * 2)
    assert "No answer: taking examples/small_checkpoint" in output
    # The README shows a part of this.
    blocks = re.findall(r"^```text\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (table,) = [block for block in blocks if "KV cache" in block]
    assert table in output


def test_quickstart_with_a_hub_that_has_the_model(based_tiny_path, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with MiniHub() as hub:
        hub.add("hazyresearch/based-360m", based_tiny_path)
        hub.add("openai-community/gpt2", tmp_path / "tokenizer")
        output = run_python("examples/quickstart.py", **hub.environment(tmp_path / "cache")).stdout
    assert "No answer" not in output
    assert "convert_checkpoint.py hazyresearch/based-360m" in output
    assert "The capital of France is | " in output
    assert sizes(output, "state of this model")[0] == sizes(output, "state of this model")[1]


def test_finetune_lowers_the_loss_and_pushes_the_result(tmp_path, based_tiny_path):
    """What else it does is in test_finetune.py."""
    arguments = ("--output-dir", tmp_path / "model", "--max-steps", "60", "--block-size", "64")
    with MiniHub() as hub:
        variables = hub.environment(tmp_path / "cache")
        process = run_python(
            *("examples/finetune.py", "--train-file", ROOT / "LICENSE", *arguments, "--push-to-hub", "me/tuned"),
            *("--model", based_tiny_path),
            **variables,
        )
        pushed = hub.files("me/tuned")
    before, after, again = held_out_losses(process.stdout)
    assert after < before / 2
    assert again == pytest.approx(after, rel=1e-2)
    assert "has no tokenizer: reading bytes" in process.stdout
    assert "It goes on like this:\nBased is" in process.stdout
    # A bar for every stage.
    assert {"Tokenizing", "60/60"} <= {word.strip(":") for word in process.stderr.split()}
    assert pushed.keys() >= {"config.json", "modeling_based.py", "README.md", "loss.png"}
    assert pushed["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()


def test_shared_prefix_prints_the_time_saved(tmp_path):
    (tmp_path / "document.txt").write_text("All work and no play. " * 200)
    options = ("--document", tmp_path / "document.txt", "--new-tokens", "4", "--question", "Who?", "What?", "Why?")
    output = run_python("examples/shared_prefix.py", *options).stdout
    assert "The document has 4400 tokens" in output
    # The program itself compares each answer with one from reading the document anew.
    assert re.findall(r"^(\w+\?)  ->  b", output, re.MULTILINE) == ["Who?", "What?", "Why?"]
    assert re.search(r"^Time saved: -?[\d.]+ s, -?\d+ percent", output, re.MULTILINE)
