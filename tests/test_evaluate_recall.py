# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""examples/evaluate_recall.py on local documents: what it counts as right is what the original code goes on with."""

import json
import re
import shutil

import pytest
from programs import ROOT, load_program
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from word_tokenizer import save_checkpoint, word_tokenizer, words


pytest.importorskip("lm_eval", reason="needs the extra `eval`")
program = load_program("examples/evaluate_recall.py")
NAMES = ["fda", "swde", "squad_completion"]
GOOD = '{"text": "a", "value": "b"}\n'


@pytest.fixture(scope="module")
def checkpoint(based_tiny_path, tmp_path_factory):
    """A checkpoint that prefers to sample and to end soon."""
    folder = save_checkpoint(based_tiny_path, tmp_path_factory.mktemp("recall"))
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 50.0, "max_new_tokens": 1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def documents(golden, tmp_path):
    """Of both rows: a value the original code comes to, in other letters, and one that it does not."""
    for name in NAMES:
        lines = []
        for row, (prompt, answer) in enumerate(zip(golden["prompt_ids"], golden["greedy_ids"])):
            answer = answer[len(prompt) :]
            values = [words(answer[4:6]).upper(), words(answer[:1]) + "9"][: 2 if name == "fda" or row else 1]
            text = words(prompt)
            lines += [{"doc_id": "a", "file_name": "b", "key": "c", "text": text, "value": value} for value in values]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_counts_what_the_original_code_recalls(checkpoint, documents, tmp_path, capsys):
    options = ["--data", documents, "--dtype", "float32", "--device", "cpu", "--batch-size", "2"]
    program.main([str(x) for x in (checkpoint, *options, "--output", tmp_path / "new" / "out.json")])
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["published"]["attn-1b"] == {"fda": 68.9, "swde": 69.0, "squad_completion": 35.9}
    found = written["results"][str(checkpoint)]
    assert found["fda"] == {"accuracy": 50.0, "documents": 4}
    for name in NAMES[1:]:
        assert found[name]["documents"] == 3
        assert found[name]["accuracy"] == pytest.approx(100 * 2 / 3)
    output = capsys.readouterr().out
    assert f"| {checkpoint} | 50.0 of 4 | 66.7 of 3 | 66.7 of 3 |" in output
    assert "| attn-1b, published | 68.9 | 69.0 | 35.9 |" in output


def test_table_of_some_tasks():
    results = {"mine": {"squad_completion": {"accuracy": 12.34, "documents": 2984}}}
    lines = program.table(results, ["squad_completion"]).splitlines()
    assert lines[0] == "| percent right | squad_completion |"
    assert lines[2] == "| mine | 12.3 of 2,984 |"
    assert "| based-360m, published | 24.2 |" in lines


def test_the_sample_has_the_schema_of_the_tasks():
    """Made by us: each answer is in the text before, which asks for it at the end."""
    for name in NAMES:
        task = program.make_task(name, ROOT / "tests" / "data" / "recall")
        documents = list(task.validation_docs())
        assert len(documents) == 3
        for document in documents:
            assert document.keys() == {"doc_id", "file_name", "key", "value", "text"}
            assert task.doc_to_target(document) in task.doc_to_text(document)
            (request,) = task.construct_requests(document, task.doc_to_text(document))
            assert request.arguments[1]["max_gen_toks"] == 48
            assert task.process_results(document, [f"It is {document['value'].lower()}."]) == {"contains": 1}
            assert task.process_results(document, ["It is something else."]) == {"contains": 0}


@pytest.mark.parametrize(
    ("model", "files", "message"),
    [
        ("{reference}/based-tiny", {}, "in its original layout: run conversion/convert_checkpoint.py"),
        ("{reference}/mamba-tiny", {}, "in its original layout: run conversion/convert_checkpoint.py"),
        ("{reference}/attn-tiny", {}, "in its original layout: run conversion/convert_checkpoint.py"),
        ("{folder}/nothing", {}, "There is no model .*nothing"),
        ("{checkpoint}", {}, "There is no file .*fda.jsonl: --data is a folder"),
        ("{folder}/file", {"file": "{}"}, "file is a file: a model is a folder or Hub id"),
        ("{checkpoint}", {"fda.jsonl": '{"text": "a"}'}, "fda.jsonl, record 1: its `value` must be a string"),
        ("{checkpoint}", {"fda.jsonl": GOOD + '{"text": "a", "value": " "}'}, "record 2: its `value` must be"),
        ("{checkpoint}", {"fda.jsonl": GOOD + '{"text": "a", "value": 5}'}, "record 2: its `value` must be"),
        ("{checkpoint}", {"fda.jsonl": GOOD + '{"text": null, "value": "a"}'}, "record 2: its `text` must be"),
        ("{checkpoint}", {"fda.jsonl": GOOD + "5"}, "record 2: its `text` must be"),
        ("{checkpoint}", {"fda.jsonl": "\n"}, "fda.jsonl is empty: it needs a document a line"),
        ("{checkpoint}", {"fda.jsonl": GOOD}, "There is no file .*swde.jsonl: --data is a folder"),
        ("{checkpoint}", {"fda.jsonl": "{not json"}, "fda.jsonl cannot be read as records"),
    ],
)
def test_refuses_in_a_line(model, files, message, checkpoint, tmp_path, based_tiny_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    source = model.format(reference=based_tiny_path.parent, folder=tmp_path, checkpoint=checkpoint)
    with pytest.raises(SystemExit) as error:
        program.main([source, "--data", str(tmp_path), "--device", "cpu"])
    assert re.search(message, error.value.code)
    assert "\n" not in error.value.code


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{folder}/nothing"], "There is no model .*nothing"),
        (["--output", "{folder}"], "--output .* is a folder: name a .json"),
        (["--output", "{folder}/fda.jsonl/new/out.json"], "--output .*new: .*fda.jsonl is a file, choose another"),
        (["--max-length", "48"], "--max-length 48 leaves no prompt: it includes the 48 tokens"),
        (["--max-length", "0"], "--max-length: 0 is not a number of at least 1"),
        (["--limit", "-1"], "--limit: -1 is not a number of at least 1"),
        (["--dtype", "float"], "--dtype: invalid choice: 'float'"),
        (["--device", "cuda"], "--device cuda: torch finds no such device here, choose from cpu."),
        (["--device", "gpu"], "--device gpu: torch finds no such device here"),
        (["--tokenizer", "{folder}/nothing"], "No tokenizer in .*nothing: .* Choose one with --tokenizer"),
        (["--tokenizer", "{folder}"], "No tokenizer in .*: .* Choose one with --tokenizer"),
    ],
)
def test_refuses_before_any_model_is_evaluated(options, message, checkpoint, documents, monkeypatch, capsys):
    monkeypatch.setattr(program, "evaluate", lambda *args: pytest.fail("evaluated"))
    monkeypatch.setattr(program.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(program.torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        program.main([str(checkpoint), *(x.format(folder=documents) for x in options), "--data", str(documents)])
    assert re.search(message, f"{error.value.code} {capsys.readouterr().err}")


def test_knows_the_devices_here(monkeypatch):
    accelerator = program.torch.accelerator
    monkeypatch.setattr(accelerator, "is_available", lambda: True)
    monkeypatch.setattr(accelerator, "current_accelerator", lambda: program.torch.device("cuda"))
    monkeypatch.setattr(accelerator, "device_count", lambda: 2)
    assert program.devices() == ["cpu", "cuda", "cuda:0", "cuda:1"]
    with pytest.raises(SystemExit, match=r"cuda:9: .* choose from cpu, cuda, cuda:0, cuda:1\."):
        program.main(["nothing", "--device", "cuda:9"])


def copy_of(checkpoint, folder, file, **changes):
    """With values of its `file` changed."""
    shutil.copytree(checkpoint, folder)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | changes))
    return folder


@pytest.fixture(scope="module")
def without_limit(checkpoint, tmp_path_factory):
    """A model whose configuration has no length; its tokenizer has that of GPT-2's."""
    folder = tmp_path_factory.mktemp("mamba")
    MambaForCausalLM(MambaConfig(vocab_size=515, hidden_size=16, state_size=4, num_hidden_layers=1)).save_pretrained(
        folder
    )
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=515, **sizes)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def prompt_lengths(model, folder, monkeypatch, *options):
    """How many tokens of a prompt of 3,000 `model` gets to see."""
    (folder / "fda.jsonl").write_text(json.dumps({"text": words([5] * 3000), "value": "none"}) + "\n")
    seen = []
    load_model = program.load_model

    def load(*args):
        loaded = load_model(*args)
        generate = loaded.model.generate

        def count(input_ids, **kwargs):
            seen.append(input_ids.shape[1])
            return generate(input_ids=input_ids, **kwargs)

        loaded.model.generate = count
        return loaded

    monkeypatch.setattr(program, "load_model", load)
    program.main([str(x) for x in (model, "--data", folder, "--tasks", "fda", "--device", "cpu", *options)])
    return seen


@pytest.mark.parametrize(
    ("name", "positions", "length"),
    [
        ("without_limit", None, 2048),
        ("llama", 4096, 2048),
        ("llama", 300, 300),
        ("checkpoint", 300, 300),
    ],
)
def test_all_models_read_as_much(name, positions, length, request, tmp_path, monkeypatch, capsys):
    """Whatever the tokenizer says; what a configuration has less is kept and told."""
    model = request.getfixturevalue(name)
    if positions is not None:
        model = copy_of(model, tmp_path / "model", "config.json", max_position_embeddings=positions)
    assert prompt_lengths(model, tmp_path, monkeypatch) == [length - 48]
    told = f"{model} takes {length:,} tokens, as its configuration says, in place of 2,048." in capsys.readouterr().out
    assert told == (length < 2048)


@pytest.fixture
def of_length(checkpoint, documents, tmp_path):
    """The command line for a model that takes so many tokens, as its configuration says."""

    def make(length):
        model = copy_of(checkpoint, tmp_path / "short", "config.json", max_position_embeddings=length)
        options = ["--data", documents, "--tasks", "fda", "--limit", "1", "--device", "cpu"]
        return [str(x) for x in (model, *options)]

    return make


def test_refuses_a_model_without_room_for_a_prompt(of_length, monkeypatch):
    monkeypatch.setattr(program, "evaluate", lambda *args: pytest.fail("evaluated"))
    with pytest.raises(SystemExit, match="short takes 48 tokens, which leaves no prompt"):
        program.main(of_length(48))


def test_takes_a_model_with_room_for_a_token(of_length):
    program.main(of_length(49))


def test_max_length_goes_before_that_of_the_model(of_length):
    program.main([*of_length(48), "--max-length", "49"])


def test_max_length_goes_before_that_of_the_program(without_limit, tmp_path, monkeypatch, capsys):
    assert prompt_lengths(without_limit, tmp_path, monkeypatch, "--max-length", "2500") == [2500 - 48]
    assert "in place of" not in capsys.readouterr().out


def test_says_that_the_hub_is_not_reached(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'hazyresearch/based-fda' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(SystemExit, match=r"of fda cannot be loaded: Couldn't reach .* on the Hub \(--data takes"):
        program.make_task("fda", None)


def test_keeps_the_numbers_of_the_models_before_one_that_fails(checkpoint, documents, tmp_path):
    twin = copy_of(checkpoint, tmp_path / "twin", "config.json")
    broken = copy_of(checkpoint, tmp_path / "broken", "config.json")
    (broken / "model.safetensors").unlink()
    output = tmp_path / "out.json"
    output.write_text("of an earlier run")
    options = ["--data", documents, "--tasks", "fda", "--limit", "1", "--device", "cpu", "--output", output]
    with pytest.raises(SystemExit, match="broken cannot be loaded"):
        program.main([str(x) for x in (checkpoint, twin, broken, *options)])
    expected = {"fda": {"accuracy": 100.0, "documents": 1}}
    assert json.loads(output.read_text())["results"] == {str(checkpoint): expected, str(twin): expected}
