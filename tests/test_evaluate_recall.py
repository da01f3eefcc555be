# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""examples/evaluate_recall.py on local documents: what it counts as right is what the original code goes on with."""

import json
import re

import pytest
from programs import ROOT, load_program
from word_tokenizer import save_checkpoint, words


pytest.importorskip("lm_eval", reason="needs the extra `eval`")
program = load_program("examples/evaluate_recall.py")
NAMES = ["fda", "swde", "squad_completion"]


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
    found = json.loads((tmp_path / "new" / "out.json").read_text())["results"][str(checkpoint)]
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
        ("{checkpoint}", {"fda.jsonl": '{"text": "a"}'}, "fda.jsonl has no column value: its columns are"),
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
