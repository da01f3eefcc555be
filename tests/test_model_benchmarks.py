# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks of the whole model, prefill, training step and profile: run on the tiny shape, their numbers agree,
and they refuse what is wrong. No speed is asserted."""

import importlib
import json
import os
import sys
import time

import pytest
import torch
from programs import load_program, run_python
from torch.utils.flop_counter import FlopCounterMode

import transformers_based.modeling_based as modeling_based


tools = load_program("examples/benchmark_tools.py")
shapes = load_program("examples/model_shapes.py")
# As other processes find it by its name.
runs = importlib.import_module("benchmark_run")


@pytest.fixture
def run_program(monkeypatch, tmp_path):
    """Runs examples/`name`.py on the tiny shape as from a command line; what it has written as JSON and as a table."""

    def run(name: str, *options: str) -> tuple[dict, str]:
        program = load_program(f"examples/{name}.py")
        arguments = [name, "--shapes", "tiny", "--device", "cpu", "--output", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            program.main()
        assert stop.value.code is None
        file = tmp_path / name.removeprefix("benchmark_").removesuffix("_model")
        return json.loads(file.with_suffix(".json").read_text()), file.with_suffix(".md").read_text()

    return run


def weights_of_products(config) -> int:
    """Of all matrices but the embedding, by the shapes of the parameters."""
    parameters = shapes.build(config, "meta").named_parameters()
    return sum(x.numel() for name, x in parameters if x.ndim == 2 and "embed" not in name)


def test_prefill_run_is_complete_and_consistent(run_program, monkeypatch, tmp_path):
    compiled = []
    # What it compiles is not the concern here, and takes a minute.
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(type(model).__name__) or model)
    options = ("--lengths", "300", "60", "--tokens", "130", "--compile-length", "60", "--seconds", "0.01")
    options += ("--row-lengths", "150", "60")
    results, table = run_program("benchmark_prefill", *options, "--cell-limit", "60")
    assert results["left_out"] == []
    assert 0 < results["verified"]["tiny"]["plain_pytorch_error"] < 0.05
    expected = [(kind, "", length) for length in (300, 60) for kind in ("based", "llama")]
    expected += [("based", "without cache", 60)]
    expected += [(kind, "one row", length) for kind in ("based", "mamba2", "mamba") for length in (60, 150)]
    expected += [("based", "compiled", 60)]
    assert [(cell["model"], cell["mode"], cell["length"]) for cell in results["cells"]] == expected
    assert compiled == ["BasedForCausalLM"]
    for cell in results["cells"]:
        tokens = cell["batch"] * cell["length"]
        assert cell["batch"] == (2 if cell["length"] == 60 and cell["mode"] != "one row" else 1)
        assert cell["tokens_per_second"] == pytest.approx(1e3 * tokens / cell["ms"])
        assert cell["us_per_token"] == pytest.approx(1e6 / cell["tokens_per_second"])
        limit = cell["flops"] / results["product_flops_per_second"]
        assert cell["share_of_limit"] == pytest.approx(1e3 * limit / cell["ms"])
        assert f"| {cell['tokens_per_second']:,.0f} |" in table
        if cell["mode"] in ("", "one row"):
            kept = {
                # By hand: the state, the window of 16 tokens that a next one sees, the inputs of 3 convolutions.
                "based": 4 * 17 * 160 * 4 + 2 * 16 * 64 * 2 + 3 * 2 * 128 * 2,
                # Keys and values of 4 layers.
                "llama": 4 * 2 * 64 * 2 * cell["length"],
            }.get(cell["model"])
            assert cell["cache_bytes"] >= cell["batch"] * (kept or 1)
            if cell["model"] == "llama":
                assert cell["cache_bytes"] == cell["batch"] * kept
    assert "Based over Llama, tokens/s: " in table
    assert "Based over Mamba 2, one row, tokens/s: " in table
    assert "not compiled over compiled" in table
    assert (tmp_path / "prefill.png").stat().st_size > 10_000


def test_training_run_is_complete_and_consistent(run_program, tmp_path):
    options = ("--lengths", "50", "80", "--tokens", "130", "--compile-lengths", "--seconds", "0.01", "--liger")
    results, table = run_program("benchmark_training", *options)
    # On a CPU there is no Liger, installed or not.
    assert [(cell["model"], cell["mode"]) for cell in results["left_out"]] == [
        ("based", "Liger"),
        ("llama", "Liger"),
    ] * 2
    for error in results["verified"]["tiny"].values():
        assert 0 < error["plain_pytorch_error"] < 0.05
    cells = [(cell["model"], cell["mode"], cell["length"]) for cell in results["cells"]]
    assert cells == [(k, mode, n) for mode in ("", "checkpointing") for n in (50, 80) for k in ("based", "llama")]
    for cell in results["cells"]:
        tokens = cell["batch"] * cell["length"]
        assert cell["batch"] == {50: 2, 80: 1}[cell["length"]]
        assert cell["tokens_per_second"] == pytest.approx(1e3 * tokens / cell["ms"])
        config = shapes.CONFIGS[cell["model"]]("tiny")
        products = 6 * tokens * (weights_of_products(config) + 512 * 64)
        assert cell["flops"] == products + 3 * cell["batch"] * tools.attention_flops(config, cell["length"])
        assert f"| {cell['tokens_per_second']:,.0f} |" in table
    assert len([line for line in table.splitlines() if "times the speed of Llama" in line]) == 4
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_long_rows_are_timed_with_checkpointing_first(monkeypatch):
    program = load_program("examples/benchmark_training.py")
    monkeypatch.setattr(sys, "argv", ["benchmark_training", "--shapes", "tiny", "--device", "cpu"])
    monkeypatch.setattr(program, "verify", lambda *args: {})
    run = program.TrainingRun(program.parse_arguments())
    order = []
    monkeypatch.setattr(run, "cells", lambda shape, length, mode: order.append((length, mode)))
    monkeypatch.setattr(run, "compiled", lambda: order.append("compiled"))
    run.all()
    assert order[:3] == [(2048, ""), (8192, ""), (32768, "checkpointing")]
    assert sorted(order[3:-1]) == [(2048, "checkpointing"), (8192, "checkpointing"), (32768, "")]
    assert order[-1] == "compiled"


def test_compiled_models_are_timed_in_turns(tmp_path):
    """Each in its process; what the compiler does is not the concern here, and takes a minute."""
    options = ("--shapes", "tiny", "--device", "cpu", "--lengths", "30", "--tokens", "60", "--seconds", "0.01")
    options += ("--compile-lengths", "40", "30", "--output", tmp_path)
    run_python("examples/benchmark_training.py", *options, TORCHDYNAMO_DISABLE="1")
    results = json.loads((tmp_path / "training.json").read_text())
    assert results["left_out"] == []
    cells = [(cell["model"], cell["length"], cell["batch"]) for cell in results["cells"] if cell["mode"] == "compiled"]
    assert cells == [("based", 40, 1), ("llama", 40, 1), ("based", 30, 2), ("llama", 30, 2)]
    for cell in results["cells"]:
        assert cell["tokens_per_second"] == pytest.approx(1e3 * cell["batch"] * cell["length"] / cell["ms"])
    assert "- 30 tokens, compiled: " in (tmp_path / "training.md").read_text()


def fail_to_prepare(message):
    raise ValueError(message)


def prepare_to_fail(message):
    return lambda: fail_to_prepare(message)


def die(message):
    os._exit(3)


@pytest.mark.parametrize(
    ("prepare", "error"), [(fail_to_prepare, RuntimeError), (prepare_to_fail, RuntimeError), (die, EOFError)]
)
def test_a_cell_apart_that_fails_says_so(prepare, error, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    apart = runs.Apart(prepare, 2, message="a bad day")
    apart.wait(60)
    with pytest.raises(error, match=None if error is EOFError else "^ValueError: a bad day$"):
        apart.measure(60)
    apart.kill()
    assert not apart.process.is_alive()


def test_a_cell_apart_that_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    apart = runs.Apart(time.sleep, 1, seconds=60)
    apart.wait(0.0)
    with pytest.raises(runs.LeftOut, match="time limit"):
        apart.measure(0.0)
    apart.kill()
    assert not apart.process.is_alive()


def test_profile_counts_every_operator_once(run_program):
    options = ("--length", "90", "--prefill-batch", "2", "--training-batch", "1", "--optimizer")
    results, table = run_program("profile_model", *options, "--seconds", "0.01", "--dtype", "float32")
    assert results["left_out"] == []
    passes = [(cell["backend"], cell["pass"]) for cell in results["cells"]]
    assert passes == [(name, kind) for name in ("auto", "torch") for kind in ("prefill", "training")]
    for cell in results["cells"]:
        families, training = cell["families"], cell["pass"] == "training"
        assert cell["launches"] == sum(found["launches"] for found in families.values())
        assert cell["kernel_ms"] == pytest.approx(sum(found["ms"] for found in families.values()))
        assert {"cross entropy", "optimizer"} <= families.keys() if training else "cross entropy" not in families
        for name in ("matrix products", "Taylor attention", "window attention", "gated convolution", "norms", "SwiGLU"):
            assert families[name]["ms"] > 0
            assert f"| {name} | " in table
    forward, backward = (cell["families"] for cell in results["cells"][:2])
    for name in ("gated convolution", "norms", "SwiGLU"):
        assert backward[name]["launches"] > 2 * forward[name]["launches"]


def test_profile_finds_the_products_of_a_step():
    program = load_program("examples/profile_model.py")
    model = shapes.build(shapes.based_config("tiny"))
    counts = []
    for kind in ("prefill", "training"):
        with program.scopes():
            events = tools.trace(program.Step(model, kind, 1, 70, False), torch.device("cpu"))
        kernels = program.kernels_of(events)
        counts.append(sum(kernel.name in program.PRODUCT_OPS for kernel in kernels))
        families = {kernel.family for kernel in kernels if kernel.name == "aten::bmm"}
        # The products of plain PyTorch's Taylor attention have a batch and no weights.
        assert "Taylor attention" in families
        assert "matrix products" not in families
    # 3 convolutions of 2 projections, 2 attentions of 4, 5 MLPs of 3, and the head; the backward of one is two.
    assert counts == [30, 90]


def event(category: str, name: str, start: float, duration: float, thread: int = 1, **args) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread, "args": args}


def test_profile_finds_the_family_of_each_kernel():
    """A trace by hand, as of a GPU: kernels run after their launch, the backward is launched by a thread of its own."""
    program = load_program("examples/profile_model.py")
    mark, node = "family: norms", "autograd::engine::evaluate_function: MulBackward0"
    spans = [
        event("user_annotation", "family: SwiGLU", 0, 100),
        event("cpu_op", "aten::linear", 5, 20),
        event("cpu_op", "aten::mm", 6, 18, **{"Sequence number": 1}),
        event("user_annotation", mark, 30, 30),
        event("cpu_op", "aten::mul", 31, 9, **{"Sequence number": 7}),
        event("cpu_op", "aten::mm", 41, 9),
        event("cpu_op", node, 200, 30, thread=2, **{"Sequence number": 7}),
        # In the backward the number says nothing about what is recorded.
        event("cpu_op", "aten::mul", 201, 20, thread=2, **{"Sequence number": 7}),
        event("cpu_op", "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 240, 20, thread=2),
        event("user_annotation", "Optimizer.step#AdamW.step", 300, 20),
    ]
    launches = [
        ("gemm", 10, 1, "matrix products"),
        ("elementwise_kernel", 32, 1, "norms"),
        ("splitk", 45, 1, "matrix products"),
        ("elementwise_kernel", 70, 1, "SwiGLU"),
        ("_gated_short_conv_bwd_kernel", 80, 1, "gated convolution"),
        ("elementwise_kernel", 205, 2, "norms"),
        ("Memcpy DtoD", 250, 2, "sums and copies"),
        ("multi_tensor_apply", 310, 1, "optimizer"),
        ("elementwise_kernel", 400, 1, "other"),
    ]
    events = list(spans)
    for i, (name, start, thread, _) in enumerate(launches):
        category = "cuda_driver" if "conv" in name else "cuda_runtime"
        events.append(event(category, "launch", start, 1, thread=thread, correlation=i))
        # The first two overlap by 5.
        is_copy = name.startswith("Memcpy")
        of_gpu = event("gpu_memcpy" if is_copy else "kernel", name, 1000 + 10 * i, 15 if i == 0 else 10, correlation=i)
        events.append(of_gpu | {"tid": 7})
    events.append(event("cuda_runtime", "cudaDeviceSynchronize", 500, 900, correlation=99))
    events.append(event("kernel", "of nobody", 1200, 10, correlation=100))
    wanted = [(name, family) for name, _, _, family in launches] + [("of nobody", "other")]
    for in_some_order in (events, events[::-1]):
        kernels = program.kernels_of(in_some_order)
        assert sorted((kernel.name, kernel.family) for kernel in kernels) == sorted(wanted)
        assert tools.busy_seconds((kernel.start, kernel.duration) for kernel in kernels) == pytest.approx(100e-6)


@pytest.mark.parametrize("kind", ["based", "llama", "mamba", "mamba2"])
def test_arithmetic_of_products_is_what_pytorch_counts(kind):
    """With one token there is next to no attention, and PyTorch counts every product."""
    model = shapes.build(shapes.CONFIGS[kind]("tiny"))
    ids = tools.random_ids(model, 3, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    counted = counter.get_flop_counts()["Global"]
    products = sum(counted.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    attention = 3 * tools.attention_flops(model.config, 1)
    assert tools.forward_flops(model, 3, 1, kept=1) - attention == products


def test_arithmetic_of_attention_by_hand():
    based, llama = shapes.based_config("tiny"), shapes.llama_config("tiny")
    # Scores and values, 2 operations each, of 4 heads of 16; one layer sees 17 keys, 4 see all before them.
    window = 4 * 64 * sum(min(i + 1, 17) for i in range(50))
    # 153 features of 4 heads, with values of 16 and the normaliser: into the state and out of it.
    taylor = 4 * 153 * 17 * 4 * 50
    assert tools.attention_flops(based, 50) == window + taylor
    assert tools.attention_flops(llama, 50) == 4 * 4 * 64 * sum(i + 1 for i in range(50))


@pytest.mark.parametrize("name", ["benchmark_prefill", "benchmark_training"])
def test_a_wrong_kernel_is_not_timed(name, monkeypatch, tmp_path):
    """The linear attention goes wrong, except where plain PyTorch was asked for."""
    program = load_program(f"examples/{name}.py")
    right = modeling_based.taylor_attention

    def wrong(query, key, value, **options):
        output, state = right(query, key, value, **options)
        return (output if tools.os.environ.get(tools.BACKEND_VARIABLE) == "torch" else 0.8 * output), state

    monkeypatch.delenv(tools.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(modeling_based, "taylor_attention", wrong)
    monkeypatch.setattr(sys, "argv", [name, "--shapes", "tiny", "--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"Not timed\. .* of tiny: off by "):
        program.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [(0.02, 0.01), (float("nan"), 0.01), (0.01, float("nan")), (1.0, 1.0)])
def test_errors_that_are_not_rounding_are_refused(error):
    with pytest.raises(tools.Wrong, match="logits: off by"):
        tools.check_error("logits", *error)
    assert tools.check_error("logits", 0.012, 0.01) == {"error": 0.012, "plain_pytorch_error": 0.01}


def test_slow_and_late_cells_are_named(run_program):
    options = ("--lengths", "400", "--tokens", "400", "--models", "based", "--compile-length", "0")
    results, table = run_program("benchmark_prefill", *options, "--cell-limit", "0.0001")
    (left_out,) = results["left_out"]
    assert left_out["reason"].startswith("too slow: about ")
    assert "- tiny, Based, 400 tokens, batch 1: too slow" in table
    results, table = run_program("benchmark_training", "--lengths", "40", "--budget", "0.001")
    assert results["cells"] == []
    assert table.count(": time limit") == len(results["left_out"]) == 6


def test_a_profiled_step_that_does_not_fit_is_made_smaller(run_program, monkeypatch):
    load = load_program

    def limited(path):
        program = load(path)
        step = program.Step.__call__

        def call(self):
            if self.kind == "training" and len(self.ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            step(self)

        program.Step.__call__ = call
        return program

    monkeypatch.setitem(globals(), "load_program", limited)
    options = ("--length", "40", "--prefill-batch", "2", "--training-batch", "4", "--backends", "torch")
    results, table = run_program("profile_model", *options, "--seconds", "0.01")
    assert [(cell["pass"], cell["batch"]) for cell in results["cells"]] == [("prefill", 2), ("training", 1)]
    assert [(cell["batch"], cell["reason"]) for cell in results["left_out"]] == [
        (4, "out of memory"),
        (2, "out of memory"),
    ]
    assert "- tiny, training, plain PyTorch, batch 4: out of memory" in table


@pytest.mark.parametrize("name", ["benchmark_prefill", "benchmark_training"])
def test_report_names_memory_and_what_waits_for_the_host(name):
    program = load_program(f"examples/{name}.py")
    numbers = {"tokens_per_second": 2e3, "us_per_token": 5e2, "noise": 0.02, "runs": 1, "share_of_limit": 0.5}
    cell = {"shape": "tiny", "mode": "", "length": 8192, "batch": 1, "ms": 9.0, "peak_bytes": 3e9, "cache_bytes": 1e6}
    ours = cell | numbers | {"model": "based", "kernel_ms": 4.0}
    theirs = cell | numbers | {"model": "llama", "tokens_per_second": 1e3, "peak_bytes": 4e9, "runs": 5}
    error = {"error": 1e-3, "plain_pytorch_error": 2e-3}
    results = {"device": "a card", "versions": {"torch": "2"}, "dtype": "bfloat16", "product_flops_per_second": 5e14}
    results |= {"verified": {"tiny": error}, "models": [], "cells": [ours, theirs], "left_out": []}
    if name == "benchmark_training":
        results["verified"]["tiny"] = {"loss": error}
    table = program.table(results)
    assert "2,000 (kernels 4" in table
    assert "of 9" in table
    assert "one run" in table
    assert "| 1.0% |" in table
    assert "500 TFLOP/s" in table
    if name == "benchmark_training":
        assert "- 8,192 tokens: 2.00 times the speed of Llama, 0.75 times its memory" in table
    else:
        assert "- Based over Llama, tokens/s: 2.00 at 8,192" in table
    (panels,) = program.panels(results)
    assert [list(panel.lines) for panel in panels] == [["Based", "Llama"]] * 2
