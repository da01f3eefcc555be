# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""examples/finetune.py: every kind of data, packing, LoRA, resuming, the losses it prints, and what it refuses."""

import json
import re
import shlex
import shutil
import sys

import datasets
import pytest
import torch
from programs import ROOT, held_out_losses, load_program
from safetensors.torch import load_file
from word_tokenizer import byte_tokenizer

from transformers_based import BasedForCausalLM


finetune = load_program("examples/finetune.py")
REFERENCE = ROOT / "tests" / "reference" / "based-tiny"
SHORT = ("--block-size", "48", "--batch-size", "3", "--max-steps", "6", "--eval-steps", "4")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the program into the folder `output`; gives the losses before, after and by the saved model."""

    def call(*arguments, output="output", model=REFERENCE):
        named = ["--model", str(model)] if model is not None else []
        finetune.main([*named, *map(str, arguments), "--output-dir", str(tmp_path / output)])
        printed = capsys.readouterr().out
        assert "It goes on like this:\nBased is" in printed
        assert (tmp_path / output / "loss.png").read_bytes().startswith(b"\x89PNG")
        return held_out_losses(printed)

    return call


@pytest.fixture
def records(tmp_path):
    """Texts of different lengths as a file of records and as a folder with it; the longest is cut in pieces."""
    words = (ROOT / "LICENSE").read_text().split()
    texts = [" ".join(words[start : start + n]) for start, n in zip(range(0, 200, 10), [3, 9, 1, 5, 14, 2, 7] * 3)]
    (tmp_path / "records").mkdir()
    path = tmp_path / "records" / "train.jsonl"
    path.write_text("".join(json.dumps({"number": i, "story": text}) + "\n" for i, text in enumerate([*texts, ""])))
    return path, texts


def held_out_loss(model, texts, size=48, share=0.1):
    """Per token, computed anew: each piece alone."""
    whole = [[*text.encode(), 256] for text in texts]
    pieces = [torch.tensor(x[i : i + size]) for x in whole for i in range(0, len(x), size)]
    pieces = [x for x in pieces if len(x) > 1]
    logits, labels = [], []
    with torch.no_grad():
        for piece in pieces[-max(1, round(share * len(pieces))) :]:
            logits.append(model(piece[None]).logits[0, :-1])
            labels.append(piece[1:])
    return torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels)).item()


def test_packed_and_padded_end_at_the_same_loss(run, records, tmp_path, based_tiny):
    """From a file of records and from the folder as a dataset; the losses are per token."""
    path, texts = records
    options = (*SHORT, "--text-column", "story")
    before, after, again = run("--train-file", path, *options)
    assert before == pytest.approx(held_out_loss(based_tiny, texts), abs=2e-3)
    trained = BasedForCausalLM.from_pretrained(tmp_path / "output")
    assert after == again == pytest.approx(held_out_loss(trained, texts), abs=2e-3)
    assert after < before - 1
    assert run("--dataset", path.parent, *options, "--packing", output="packed") == pytest.approx(
        [before, after, again], abs=2e-3
    )


def cut_in_pieces(*options):
    args = finetune.parse_arguments([str(x) for x in options])
    return finetune.cut_in_pieces(finetune.read_texts(args), finetune.Bytes(), args)


@pytest.mark.parametrize("text", [None, "once upon a time"])
def test_records_by_any_case_of_the_suffix_and_without_a_text(tmp_path, text):
    path = tmp_path / "text.JSONL"
    path.write_text("".join(json.dumps({"text": x}) + "\n" for x in (text, "one", None, "two")))
    pieces = cut_in_pieces("--train-file", path)
    texts = [finetune.Bytes().decode(ids) for part in ("train", "test") for ids in pieces[part]["input_ids"]]
    assert texts == [x for x in (text, "one", "two") if x]


@pytest.mark.parametrize("share", ["0.05", "0.95"])
def test_of_two_pieces_one_is_held_out(tmp_path, share):
    (tmp_path / "text.txt").write_text("x" * 90)
    pieces = cut_in_pieces("--train-file", tmp_path / "text.txt", "--block-size", "48", "--held-out", share)
    assert pieces.num_rows == {"train": 1, "test": 1}


@pytest.mark.parametrize(
    "options",
    [
        ("--packing", "--bf16", "--gradient-checkpointing", "--accumulate", "2"),
        ("--lora", "4", "--lora-dropout", "0.1", "--packing"),
    ],
    ids=["packing", "lora"],
)
def test_a_resumed_run_ends_at_the_same_weights(run, tmp_path, monkeypatch, options):
    """Bitwise, dropout included, and without the steps that were done."""
    steps, step = [], finetune.Trainer.training_step
    monkeypatch.setattr(finetune.Trainer, "training_step", lambda *args: steps.append(1) or step(*args))
    if "--lora" in options:
        pytest.importorskip("peft", reason="peft is not installed")
    options = ("--train-file", ROOT / "LICENSE", *SHORT, "--save-steps", "3", *options)
    whole, count = run(*options), len(steps)
    shutil.copytree(tmp_path / "output" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    assert run(*options, "--resume", output="again") == whole
    assert len(steps) == 1.5 * count > 0
    name = "adapter_model.safetensors" if "--lora" in options else "model.safetensors"
    one, two = (load_file(tmp_path / folder / name) for folder in ("output", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "again" / "model.safetensors").exists() == ("--lora" not in options)
    states = [tmp_path / folder / "checkpoint-6" / "trainer_state.json" for folder in ("output", "again")]
    logs = [json.loads(path.read_text())["log_history"] for path in states]
    one, two = ([entry["eval_token_loss"] for entry in log if "eval_token_loss" in entry] for log in logs)
    assert one == two
    assert len(one) >= 2


def test_lora_targets(run, tmp_path):
    """Only adapters of the layers that were named learn, and they do."""
    pytest.importorskip("peft", reason="peft is not installed")
    arguments = ("--train-file", ROOT / "LICENSE", *SHORT, "--lora", "2", "--lora-targets", "v_proj", "in_proj")
    before, after, again = run(*arguments)
    assert after == again < before
    adapters = load_file(tmp_path / "output" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapters} == {"v_proj", "in_proj"}
    assert all(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)


def test_the_small_checkpoint_by_default(run, tmp_path):
    """Its own tokenizer, and fp32 while it is trained; a text that it has never seen."""
    before, after, again = run("--train-file", ROOT / "LICENSE", *SHORT, "--max-steps", "20", model=None)
    assert after < before - 0.2
    assert again == pytest.approx(after, rel=1e-3)
    assert (tmp_path / "output" / "tokenizer.json").exists()
    assert BasedForCausalLM.from_pretrained(tmp_path / "output").dtype == torch.float32


def test_with_a_tokenizer_then_in_bf16_from_its_own_output(run, tmp_path, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    arguments = ("--train-file", ROOT / "LICENSE", *SHORT)
    first = run(*arguments, "--tokenizer", tmp_path / "tokenizer")
    second = run(*arguments, "--bf16", output="again", model=tmp_path / "output")
    assert (tmp_path / "again" / "tokenizer.json").exists()
    assert second[0] == pytest.approx(first[-1], rel=1e-2)
    assert second[-1] < second[0]


@pytest.mark.parametrize("options", [(), ("--bf16",)], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("share", "passes"), [(5e-4, True), (5e-3, False)])
def test_what_was_saved_must_have_the_loss_of_what_was_trained(run, monkeypatch, options, share, passes):
    loss = finetune.held_out_loss
    monkeypatch.setattr(finetune, "held_out_loss", lambda *args: loss(*args) * (1 + share))
    arguments = ("--train-file", ROOT / "LICENSE", *SHORT, *options)
    if passes:
        run(*arguments)
        return
    with pytest.raises(SystemExit, match="The saved model is not the trained one"):
        run(*arguments)


def test_commands_in_the_readme():
    """Those for GPUs and the Hub do not run here, but their options exist."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:python|accelerate launch .*?) examples/finetune.py (.*)$", text, re.MULTILINE)
    parsed = [finetune.parse_arguments(shlex.split(command)) for command in commands]
    assert len(parsed) == 3
    for option in ("packing", "bf16", "lora", "dataset", "save_steps", "push_to_hub"):
        assert any(getattr(args, option) for args in parsed), option


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        finetune.main([str(x) for x in arguments])
    assert isinstance(error.value.code, str)
    assert "\n" not in error.value.code
    return error.value.code


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("short", (), "Lower --block-size"),
        ("", (), "Lower --block-size"),
        ("x" * 5000, ("--tokenizer", "{folder}"), "No tokenizer in .* --tokenizer"),
        ("x" * 5000, ("--model", "{folder}/nothing"), "nothing cannot be read as a Based model, choose --model: "),
        ("x" * 5000, ("--model", "{folder}"), "cannot be read as a Based model, .*model.safetensors"),
        ("x" * 5000, ("--resume",), "No checkpoint to go on from in .*--save-steps"),
        ("x" * 5000, ("--train-file", "{folder}/nothing.txt"), "There is no file .*nothing.txt"),
        ("x" * 5000, ("--dataset", "{folder}/nothing"), "nothing cannot be read as a dataset"),
        ("x" * 5000, ("--push-to-hub", "me/tuned"), "hf auth login"),
        ("x" * 5000, ("--model", "{reference}", "--tokenizer", "{small}"), r"2048 tokens, .* --tokenizer"),
        ({"text": 3}, (), "text.jsonl: the column 'text' of record 1 holds no text: 3"),
        ('{"text": "a"}\n{"text": 3}', ("--train-file", "{folder}/text.json"), "'text' of record 2 holds no text: 3"),
        ('{"text": "a"}\n{"text": ["b"]}', ("--train-file", "{folder}/text.json"), r"record 2 holds no text: \['b'\]"),
        ("", ("--train-file", "{folder}/text.json"), "text.json is empty: choose another --train-file"),
        ("x" * 5000, ("--output-dir", "{folder}/text.txt"), "text.txt: .*text.txt is a file, choose another folder"),
        ("x" * 5000, ("--output-dir", "{folder}/text.txt/a/b"), "a/b: .*text.txt is a file, choose another folder"),
        ({"story": "once"}, (), "no column 'text': choose --text-column from .*story"),
        ("{'not json", ("--train-file", "{folder}/text.json"), "text.json cannot be read as a dataset"),
    ],
    ids=str,
)
def test_refuses_in_a_line(tmp_path, capsys, monkeypatch, content, options, message):
    monkeypatch.setattr(finetune, "get_token", lambda: None)
    name = "text.txt" if isinstance(content, str) else "text.jsonl"
    content = content if isinstance(content, str) else json.dumps(content)
    for path in (tmp_path / name, tmp_path / "text.json"):
        path.write_text(content)
    small = ROOT / "examples" / "small_checkpoint"
    options = [option.format(folder=tmp_path, small=small, reference=REFERENCE) for option in options]
    arguments = ("--train-file", tmp_path / name, "--output-dir", tmp_path / "output", *options)
    assert re.search(message, refused(capsys, *arguments))
    assert not (tmp_path / "output" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--block-size", "1"), "--block-size must be at least 2"),
        (("--block-size", "0"), "--block-size: 0 is not a number of at least 1"),
        (("--held-out", "1.5"), "--held-out: 1.5 is not between 0 and 1"),
        (("--batch-size", "0"), "--batch-size: 0 is not a number of at least 1"),
        (("--lora", "-3"), "--lora: -3 is not a number of at least 1"),
        (("--lora-targets", "q_proj"), "--lora-targets and --lora-dropout need --lora RANK"),
        (("--lora", "4", "--lora-dropout", "1.5"), "--lora-dropout: 1.5 is not at least 0 and below 1"),
        (("--learning-rate", "nan"), "--learning-rate: nan is not a number above 0"),
        (("--learning-rate", "-1"), "--learning-rate: -1 is not a number above 0"),
        (("--seed", "-1"), "--seed: -1 is not a whole number from 0 to 4294967295"),
        (("--seed", "4294967296"), "--seed: 4294967296 is not a whole number"),
        (("--dtype", "foo"), "--dtype: invalid choice: 'foo'"),
        (("--prompt", ""), "--prompt and --push-to-hub want a text"),
    ],
    ids=str,
)
def test_refuses_options_before_anything_is_read(capsys, options, message):
    with pytest.raises(SystemExit):
        finetune.main(list(options))
    assert message in capsys.readouterr().err


def test_refuses_a_layer_that_is_not_there(tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed")
    options = ("--lora", "4", "--lora-targets", "q_proj", "query_key_value", "--output-dir", tmp_path)
    message = refused(capsys, *options)
    assert "no layer query_key_value, but down_proj, gate_proj, in_proj" in message
    assert "lm_head" not in message


def test_refuses_other_adapters_than_those_of_the_checkpoint(run, tmp_path, capsys):
    """Also adapters in place of a model."""
    pytest.importorskip("peft", reason="peft is not installed")
    options = ("--train-file", ROOT / "LICENSE", *SHORT, "--max-steps", "1", "--save-steps", "1")
    targets = ("--lora-targets", "q_proj", "k_proj")
    run(*options, output="full")
    run(*options, "--lora", "2", *targets, output="lora")
    # In any order.
    run(*options, "--lora", "2", "--lora-targets", "k_proj", "q_proj", "--resume", "--max-steps", "2", output="lora")

    options = (*options, "--model", REFERENCE, "--resume", "--output-dir")
    for others in ((), ("--lora", "4", *targets), ("--lora", "2"), ("--lora", "2", "--lora-targets", "q_proj")):
        message = refused(capsys, *options, tmp_path / "lora", *others)
        assert "checkpoint-2 is of a run with --lora 2 --lora-targets k_proj q_proj: go on from it with" in message
    assert "checkpoint-1 is of a run without --lora" in refused(capsys, *options, tmp_path / "full", "--lora", "2")

    for others in ((), ("--lora", "2")):
        message = refused(capsys, "--model", tmp_path / "lora", "--output-dir", tmp_path / "new", *others)
        assert re.search(r"lora holds adapters: merge them .*merge_and_unload\(\).* or go on .* --resume", message)
    # Of both, the adapters are loaded.
    for path in (tmp_path / "full").glob("*.*"):
        shutil.copy(path, tmp_path / "lora")
    message = refused(capsys, "--model", tmp_path / "lora", "--output-dir", tmp_path / "new")
    assert "lora holds adapters: merge them" in message


def test_refuses_to_run_over_an_earlier_run(tmp_path, capsys):
    (tmp_path / "checkpoint-3").mkdir()
    assert "checkpoint-3 is of an earlier run" in refused(capsys, "--output-dir", tmp_path)


@pytest.mark.parametrize("library", ["datasets", "peft"])
def test_says_which_library_is_missing(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SystemExit, match=rf"`{library}` library: pip install"):
        load_program("examples/finetune.py").main(["--lora", "4", "--output-dir", str(tmp_path)])


def test_no_plot_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    finetune.draw([{"step": 1, "loss": 2.0}], tmp_path / "loss.png")
    assert "pip install" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
