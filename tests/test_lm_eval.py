# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness scores Based the same at every batch size and in every order: tasks in data/lm_eval_task."""

import json
from pathlib import Path

import pytest
from programs import run_python
from word_tokenizer import save_checkpoint


lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `eval`")

TASKS = Path(__file__).parent / "data" / "lm_eval_task"
NAMES = ["word_choice", "word_continuation"]


@pytest.fixture(scope="module")
def checkpoint(based_tiny_path, tmp_path_factory) -> str:
    return str(save_checkpoint(based_tiny_path, tmp_path_factory.mktemp("lm_eval")))


@pytest.fixture(scope="module")
def evaluate(checkpoint):
    """Runs both tasks; gives the scores, and for each document what the model said."""

    def run(batch_size, order=0):
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"order": order})
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": checkpoint, "dtype": "float32"},
            tasks=NAMES,
            batch_size=batch_size,
            device="cpu",
            task_manager=manager,
            bootstrap_iters=0,
        )
        answers = {
            name: {sample["doc"]["name"]: sample["filtered_resps"] for sample in results["samples"][name]}
            for name in NAMES
        }
        return scores(results), answers, [sample["doc"]["name"] for sample in results["samples"][NAMES[0]]]

    return run


def scores(results) -> dict[str, float]:
    return {
        f"{name} {metric}": value
        for name in NAMES
        for metric, value in results["results"][name].items()
        if metric.endswith(",none") and "stderr" not in metric
    }


@pytest.fixture(scope="module")
def one_by_one(evaluate):
    return evaluate(batch_size=1)


@pytest.mark.parametrize(("batch_size", "order"), [(16, 0), (16, 1), (1, 1)])
def test_scores_do_not_depend_on_the_batch(evaluate, one_by_one, batch_size, order):
    expected_scores, expected, sequence = one_by_one
    got_scores, got, got_sequence = evaluate(batch_size, order)
    assert (got_sequence == sequence) == (order == 0)
    assert sorted(got_sequence) == sorted(sequence)
    assert got["word_continuation"] == expected["word_continuation"]
    for name, choices in expected["word_choice"].items():
        for (value, is_greedy), (got_value, got_is_greedy) in zip(choices, got["word_choice"][name], strict=True):
            assert got_value == pytest.approx(value, rel=0, abs=1e-3)
            assert got_is_greedy == is_greedy
    assert got_scores == expected_scores


def test_the_tasks_tell_documents_apart(one_by_one):
    """What the comparison above rests on: scores that are neither all right nor all wrong, texts that differ."""
    found, answers, _ = one_by_one
    assert 0 < found["word_choice acc,none"] < 1
    texts = [str(text) for text in answers["word_continuation"].values()]
    assert len(set(texts)) > 20


def test_command_line(checkpoint, one_by_one, tmp_path):
    """As people run it: nothing imports this package, the checkpoint brings its code."""
    options = ["--model", "hf", "--device", "cpu", "--batch_size", "16"]
    options += ["--model_args", f"pretrained={checkpoint},dtype=float32,trust_remote_code=True"]
    options += ["--include_path", TASKS, "--tasks", ",".join(NAMES), "--output_path", tmp_path / "out.json"]
    run_python("-m", "lm_eval", *options, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    (written,) = tmp_path.rglob("out*.json")
    assert scores(json.loads(written.read_text())) == one_by_one[0]
