# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks in examples/: they refuse what is wrong, and their numbers agree. No speed is asserted."""

import json
import re
import sys
from argparse import Namespace

import pytest
import torch
from programs import load_program, run_python

import transformers_based.modeling_based as modeling_based


@pytest.fixture(scope="module")
def program():
    return load_program("examples/benchmark_generation.py")


@pytest.fixture
def settings(tmp_path):
    """Those of a run of a few seconds; keywords overrule."""

    def make(**overrides) -> Namespace:
        values = {
            "shapes": ["tiny"],
            "batches": [1, 3],
            "llama_static_batches": [2],
            "positions": [600, 256],
            "position_batch": 2,
            "prompt": 40,
            "new_tokens": 20,
            "seconds": 0.05,
            "repeats": 2,
            "largest_batch": 5,
            "prefill_tokens": 64,
            "without_best": False,
            "without_llama": False,
            "time_limit": None,
            "resume": False,
            "device": "cpu",
            "dtype": "bfloat16",
            "output": tmp_path,
        }
        return Namespace(**{**values, **overrides})

    return make


def options_of(settings: Namespace) -> list[str]:
    """As they are typed."""
    options = []
    for name, value in vars(settings).items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            options += [f"--{name.replace('_', '-')}", *map(str, values)]
    return options


def test_generation_run_is_complete_and_consistent(settings, tmp_path):
    output = run_python("examples/benchmark_generation.py", *options_of(settings())).stdout
    results = json.loads((tmp_path / "generation.json").read_text())
    # 24 tokens of 2 prompts from the original code, 64 of 3 from plain PyTorch.
    assert results["verified"] == {"tiny": {"original": 48, "plain_pytorch": 192}}
    assert results["left_out"] == []

    based, llama = results["models"]
    assert llama["parameters"] == pytest.approx(based["parameters"], rel=0.01)
    assert based["weight_bytes"] == 2 * based["parameters"]
    # By hand: 4 heads of 16 with 17 rows of 160 features in fp32, 16 tokens of keys and values, 3 pairs of conv inputs.
    state, window, conv = 4 * 17 * 160 * 4, 2 * 16 * 64 * 2, 3 * 2 * 128 * 2
    assert based["bytes_per_sequence"] == state + window + conv
    assert llama["bytes_per_sequence"] == 60 * 4 * 2 * 64 * 2

    expected = [("based", "default", batch) for batch in (1, 3, 5)]
    expected += [("llama", "default", batch) for batch in (1, 3, 5)] + [("llama", "static", batch) for batch in (2, 5)]
    assert [(cell["model"], cell["mode"], cell["batch"]) for cell in results["cells"]] == expected
    assert [cell["batch"] for cell in results["cells"] if cell.get("best")] == [5, 5, 5]
    for cell in results["cells"]:
        assert 2 <= cell["timed_tokens"] <= 20
        assert cell["ms_per_step"] > 0
        assert cell["tokens_per_second"] == pytest.approx(1e3 * cell["batch"] / cell["ms_per_step"])
        assert cell["fraction_of_limit"] == pytest.approx(cell["limit_ms"] / cell["ms_per_step"])
        assert cell["prefill_tokens_per_second"] == pytest.approx(cell["batch"] * 40 / cell["prefill_seconds"])
        moved = state * 2 + window + conv * 2
        if cell["model"] == "llama":
            moved = (40 + cell["timed_tokens"] / 2) * 4 * 2 * 64 * 2
        weights = {model["model"]: model["weight_bytes"] for model in results["models"]}[cell["model"]]
        limit = (weights + cell["batch"] * moved) / results["copy_bytes_per_second"]
        assert cell["limit_ms"] == pytest.approx(1e3 * limit)
    measured = [(cell["model"], cell["position"], cell["batch"]) for cell in results["positions"]]
    assert measured == [(model, position, 2) for model in ("based", "llama") for position in (256, 600)]

    table = (tmp_path / "generation.md").read_text()
    assert table in output
    for cell in results["cells"]:
        assert f"| {cell['tokens_per_second']:,.0f} | {cell['ms_per_step']:.2f} |" in table
    assert "of each, batch" in table
    assert (tmp_path / "generation.png").stat().st_size > 10_000


def wrong_without_the_plain_backend(monkeypatch, change):
    """The step of linear attention goes wrong, except where plain PyTorch was asked for."""
    right = modeling_based.taylor_attention_step

    def step(query, key, value, state, **options):
        output = right(query, key, value, state, **options)
        return output if modeling_based.os.environ.get("TRANSFORMERS_BASED_BACKEND") == "torch" else change(output)

    monkeypatch.setattr(modeling_based, "taylor_attention_step", step)


@pytest.mark.parametrize("change", [lambda x: 0.8 * x, lambda x: x.roll(1, dims=0)], ids=["scale", "rows"])
def test_generation_refuses_a_wrong_path(program, settings, monkeypatch, change):
    monkeypatch.delenv("TRANSFORMERS_BASED_BACKEND", raising=False)
    wrong_without_the_plain_backend(monkeypatch, change)
    run = program.GenerationRun(settings())
    with pytest.raises(SystemExit, match=r"Not timed\. .* original code"):
        run.shape("tiny")
    assert run.results["cells"] == run.results["positions"] == []


def test_generation_refuses_a_path_that_is_wrong_on_this_shape_only(program, monkeypatch):
    """The reference checkpoint has heads of 16 and 4 of them, as the tiny shape; here the batch tells them apart."""
    monkeypatch.delenv("TRANSFORMERS_BASED_BACKEND", raising=False)
    wrong_without_the_plain_backend(monkeypatch, lambda x: x if len(x) == 2 else 0.8 * x)
    with pytest.raises(program.Wrong, match="plain PyTorch in row"):
        program.verify("tiny", torch.device("cpu"))


def test_greedy_tokens_may_differ_after_a_tie_only(program):
    logits = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0))
    expected = logits.argmax(-1)
    tokens = expected.clone()
    assert program.compare_greedy(tokens, expected, logits) == 16
    second = logits[0, 6].topk(2).indices[1]
    tokens[0, 6:] = second
    with pytest.raises(program.Wrong, match="row 0 at step 6"):
        program.compare_greedy(tokens, expected, logits)
    logits[0, 6, second] = logits[0, 6].max() - 1e-5
    assert program.compare_greedy(tokens, expected, logits) == 14
    # A tie in each row right after the first token.
    for row in range(2):
        tokens[row, 1] = logits[row, 1].topk(2).indices[1]
        logits[row, 1, tokens[row, 1]] = logits[row, 1].max()
    with pytest.raises(program.Wrong, match="Only 2 of 16"):
        program.compare_greedy(tokens, expected, logits)


def test_best_batch_is_halved_where_memory_runs_out_and_a_failure_costs_one_cell(program, settings, monkeypatch):
    monkeypatch.setattr(program, "verify", lambda shape, device: {})
    run = program.GenerationRun(settings(batches=[1, 2], largest_batch=8, positions=[], without_llama=True))
    measure = program.ModelRun.measure

    def limited(self, mode, batch):
        if batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if batch == 1:
            raise ValueError("broken")
        return measure(self, mode, batch)

    monkeypatch.setattr(program.ModelRun, "measure", limited)
    run.shape("tiny")
    assert [(cell["batch"], cell.get("best")) for cell in run.results["cells"]] == [(2, None), (2, True)]
    reasons = [(cell["batch"], cell["reason"]) for cell in run.results["left_out"]]
    assert reasons == [(1, "failed: ValueError: broken"), (8, "out of memory"), (4, "out of memory")]


def test_what_does_not_fit_is_named(program, settings, monkeypatch):
    monkeypatch.setattr(program, "verify", lambda shape, device: {})
    monkeypatch.setattr(program, "free_bytes", lambda device: 1_000_000)
    run = program.GenerationRun(settings(batches=[1, 100], largest_batch=64, positions=[], without_llama=True))
    run.shape("tiny")
    (left_out,) = run.results["left_out"]
    assert left_out["batch"] == 100
    assert left_out["reason"].startswith("does not fit: ")
    best = run.results["cells"][-1]
    bench = program.ModelRun(run, "tiny", "based")
    assert best["best"]
    assert bench.bytes_for("default", best["batch"]) <= 0.92 * 1_000_000 < bench.bytes_for("default", best["batch"] + 1)


def test_what_comes_too_late_is_named_and_reported_without_matplotlib(program, settings, monkeypatch, capsys):
    monkeypatch.setattr(program, "verify", lambda shape, device: {})
    late = program.GenerationRun(settings(time_limit=1))
    late.started -= 1
    late.shape("tiny")
    assert late.results["cells"] == late.results["positions"] == []
    assert {cell["reason"] for cell in late.results["left_out"]} == {"time limit"}
    assert len(json.loads((late.args.output / "generation.json").read_text())["left_out"]) == 12
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    program.write_report(late.args.output)
    assert "No plot: matplotlib is not installed" in capsys.readouterr().out
    assert (late.args.output / "generation.md").read_text().count(": time limit") == 12


def test_a_run_is_gone_on_with(program, settings, monkeypatch, tmp_path):
    """What is there stays as it is, what was left out is measured."""
    monkeypatch.setattr(program, "verify", lambda shape, device: {})
    run = program.GenerationRun(settings(batches=[1], positions=[256], without_llama=True, without_best=True))
    run.shape("tiny")
    run.leave_out({"shape": "tiny", "model": "based", "mode": "default", "batch": 3}, "time limit")
    run.leave_out({"shape": "360m", "model": "based", "mode": "default", "batch": 3}, "time limit")
    first = json.loads((tmp_path / "generation.json").read_text())

    more = settings(batches=[1, 3], positions=[256, 600], without_llama=True, resume=True)
    run = program.GenerationRun(more)
    run.shape("tiny")
    second = json.loads((tmp_path / "generation.json").read_text())
    assert second["cells"][:1] == first["cells"]
    assert second["positions"][:1] == first["positions"]
    assert [(cell["batch"], cell.get("best")) for cell in second["cells"]] == [(1, None), (3, None), (5, True)]
    assert [cell["position"] for cell in second["positions"]] == [256, 600]
    assert [cell["shape"] for cell in second["left_out"]] == ["360m"]
    assert len(second["models"]) == 1
    assert second["copy_bytes_per_second"] == first["copy_bytes_per_second"]
    program.write_report(tmp_path)
    assert "; in 2 runs, each cell in one of them." in (tmp_path / "generation.md").read_text()


def test_what_cannot_be_gone_on_with(program, settings, tmp_path):
    with pytest.raises(SystemExit, match="--resume: there is no "):
        program.GenerationRun(settings(resume=True))
    program.GenerationRun(settings()).write()
    for change, said in (
        ({"prompt": 7}, "prompt was 40 and is 7"),
        ({"dtype": "float32"}, "dtype was bfloat16 and is"),
    ):
        with pytest.raises(SystemExit, match=f"cannot be gone on with: {said}"):
            program.GenerationRun(settings(resume=True, **change))
    (tmp_path / "generation.json").write_text("{")
    with pytest.raises(SystemExit, match="is not the result of a run"):
        program.GenerationRun(settings(resume=True))


def test_report_without_results_says_so(program, tmp_path):
    with pytest.raises(SystemExit, match="without --plot-only first"):
        program.write_report(tmp_path)


def test_shapes_have_equal_size():
    shapes = load_program("examples/model_shapes.py")
    for shape, millions in (("tiny", 0.26), ("360m", 360), ("1.3b", 1300)):
        based, *others = (shapes.count_parameters(make(shape)) for make in shapes.CONFIGS.values())
        assert based / 1e6 == pytest.approx(millions, rel=0.05)
        assert others == pytest.approx([based] * 3, rel=0.01)
        assert others[0] <= based
    based = shapes.based_config("tiny", num_hidden_layers=7)
    like = shapes.count_parameters(shapes.llama_like(based))
    assert like == pytest.approx(shapes.count_parameters(based), rel=0.02)


def test_cpu_benchmark_verifies_and_prints_a_table():
    options = ("--tokens", "256", "--heads", "2", "--prefill-tokens", "300", "--positions", "20", "300")
    output = run_python("examples/benchmark_cpu.py", *options, "--repeats", "1").stdout
    rows = [
        "quadratic",
        "chunked",
        *(f"{kind}  +{n}" for kind in ("Based", "Llama", "Llama, static") for n in (20, 300)),
    ]
    for row in rows:
        assert re.search(rf"^{row}\s+\d\.\de-\d\d\s+[\d.]+$", output, re.MULTILINE), (row, output)
    for name in ("Based", "Llama"):
        row = rf"^{name}\s+\d\.\de-\d\d\s+([\d.]+)\s+[\d.]+\s+([\d,]+)$"
        ms, speed = re.search(row, output, re.MULTILINE).groups()
        assert float(speed.replace(",", "")) == pytest.approx(300e3 / float(ms), rel=0.01)
    assert re.search(r"A prefill of Llama takes [\d.]+ of one of Based, [\d.]+ of its time of processors\.", output)
    assert re.search(r"chunked is [\d.]+ times faster", output)
    assert re.search(r"A step of Based at position 300 takes [\d.]+ of one at 20\.", output)
