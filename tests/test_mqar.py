# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""examples/recall: the task, the bytes of state, the training, the runner, and the report of what it measured."""

import copy
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from programs import ROOT, environment, load_program, run_python
from transformers import AutoModelForCausalLM, EvalPrediction, TrainingArguments


run = load_program("examples/recall/run.py")
dial = load_program("examples/recall/dial_report.py")
mqar, models, training, report = (
    sys.modules[name] for name in ("mqar", "mqar_models", "mqar_training", "frontier_report")
)
Setting, Cell = mqar.Setting, models.Cell


@pytest.mark.parametrize("setting", [Setting(64, 16), Setting(43, 3), Setting(4, 1)], ids=str)
def test_every_key_is_asked_once_for_its_value(setting):
    batch = mqar.make_batch(setting, 7, 50, torch.Generator().manual_seed(1))
    pairs = setting.pairs
    assert batch["input_ids"].shape == batch["labels"].shape == (7, setting.length)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        keys, values = ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]
        assert len({*keys}) == len({*values}) == pairs
        assert all(1 <= key < 25 <= value < 50 for key, value in zip(keys, values))
        asked = [place for place, label in enumerate(labels) if label != -100]
        assert min(asked) > 2 * pairs
        # The token before the label is what it is predicted from.
        assert sorted(ids[place - 1] for place in asked) == sorted(keys)
        assert all(labels[place] == values[keys.index(ids[place - 1])] for place in asked)
    asked = (batch["labels"] != -100).nonzero()[:, 1].view(7, pairs)
    assert torch.equal(batch["places"], asked - 1)


def test_the_task_is_that_of_the_papers():
    task = training.Task()
    assert (task.vocab_size, task.length, task.steps) == (8192, 1024, 24_000)
    train = [(setting.length, setting.pairs, setting.share) for setting in task.train]
    assert train == [(64, 4, 5), (128, 8, 1), (256, 16, 1), (256, 32, 1), (256, 64, 1)]
    test = [(setting.length, setting.pairs) for setting in task.test]
    assert test == [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    assert max(setting.pairs for setting in task.train) == report.TRAINED_PAIRS


def test_what_lies_between_is_random():
    """Tokens of the whole vocabulary, each about as often as the others."""
    setting = Setting(512, 4)
    batch = mqar.make_batch(setting, 64, 50, torch.Generator().manual_seed(0))
    filler = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    filler[:, : 2 * setting.pairs] = False
    filler.scatter_(1, batch["places"], False)
    found = torch.bincount(batch["input_ids"][filler], minlength=50) / filler.sum()
    assert len(found) == 50
    # Five standard deviations of a count.
    assert ((found - 1 / 50).abs() < 5 * (0.02 * 0.98 / filler.sum()).sqrt()).all()
    assert not torch.equal(batch["input_ids"][0][filler[0]], batch["input_ids"][1][filler[1]])


def test_gaps_follow_the_power_law():
    batch = mqar.make_batch(Setting(42, 1), 40_000, 50, torch.Generator().manual_seed(0))
    slots = ((batch["labels"] != -100).nonzero()[:, 1] - 3) // 2
    weights = torch.arange(1, 21).double() ** -0.99
    found = torch.bincount(slots, minlength=20) / len(slots)
    assert len(found) == 20
    # Four standard deviations of a count.
    expected = weights / weights.sum()
    assert ((found - expected).abs() < 4 * (expected / len(slots)).sqrt()).all()


def test_a_batch_depends_on_its_number_alone():
    settings = (Setting(16, 2, share=3), Setting(32, 2))
    dataset = mqar.MQAR(settings, 400, 2, vocab_size=30, seed=5)
    again = mqar.MQAR(settings, 400, 2, vocab_size=30, seed=5)
    other = mqar.MQAR(settings, 400, 2, vocab_size=30, seed=6)
    lengths = []
    for i in range(400):
        batch = dataset[i]
        lengths.append(batch["input_ids"].shape[1])
        assert torch.equal(again[i]["input_ids"], batch["input_ids"])
    assert not torch.equal(dataset[0]["input_ids"][:, :16], dataset[1]["input_ids"][:, :16])
    assert not torch.equal(dataset[0]["input_ids"][:, :16], other[0]["input_ids"][:, :16])
    assert 260 < lengths.count(16) < 340
    in_turn = mqar.MQAR(settings, 4, 2, vocab_size=30, in_turn=True)
    assert [in_turn[i]["input_ids"].shape[1] for i in range(len(in_turn))] == [16, 32, 16, 32]


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="5 pairs and their queries need 20 tokens, not 19"):
        Setting(19, 5)
    with pytest.raises(ValueError, match="A vocabulary of 8 has 3 keys, 4 are needed"):
        mqar.make_batch(Setting(16, 4), 1, 8, torch.Generator())
    with pytest.raises(ValueError, match="Unknown model 'rwkv'"):
        models.make_config("rwkv", 32, 8, 0, 50)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (("based", 0, 8, 0), "based of width 0, size 8, values 0: they are at least 1, 1 and 0"),
        (("mamba", 32, 0, 0), "mamba of width 32, size 0, values 0: they are"),
        (("based", 32, 8, -1), "based of width 32, size 8, values -1: they are"),
        (("sliding_window", 32, 8, 24), "sliding_window with values of 24: only Based has a size for them"),
        (("attention", 63, 256, 0), "attention of width 63: its rotary positions need an even one"),
    ],
)
def test_refuses_numbers_that_make_no_model(cell, message):
    with pytest.raises(ValueError, match=message):
        models.make_config(*cell, 50)


@pytest.mark.parametrize("kind", models.KINDS)
def test_all_kinds_start_and_decay_alike(kind):
    """Matrices decay, vectors and Mamba's A_log do not; what writes into the residual stream starts half as large."""
    torch.manual_seed(0)
    model = models.make_model(models.make_config(kind, 64, 16, 0, 500))
    trainer = training.MatrixDecayTrainer(model=training.AtQueries(model), args=TrainingArguments(use_cpu=True))
    trainer.create_optimizer()
    decayed, spared = ({id(x) for x in group["params"]} for group in trainer.optimizer.param_groups)
    for name, x in model.named_parameters():
        assert id(x) in (spared if x.ndim < 2 or "A_log" in name else decayed), name
    if kind == "mamba":
        return
    written = [x for name, x in model.named_parameters() if re.search(r"(o|out|down)_proj.weight", name)]
    others = [x for name, x in model.named_parameters() if re.search(r"(q|k|v|in|up|gate)_proj.weight", name)]
    assert len(written) == 4
    ratio = torch.cat([x.flatten() for x in others]).std() / torch.cat([x.flatten() for x in written]).std()
    assert 1.9 < ratio < 2.1


# Bytes of an fp32 number times what each layer keeps, counted by hand behind 40 tokens at a width of 32.
@pytest.mark.parametrize(
    ("kind", "size", "value_dim", "state", "halves"),
    [
        ("based", 8, 0, 33 * 48, 2 * 64),
        ("based", 16, 24, 25 * 160, 2 * 64),
        ("sliding_window", 9, 0, 0, 2 * 64 + 2 * 8 * 32),
        ("attention", 40, 0, 0, 2 * 2 * 40 * 32),
        ("mamba", 8, 0, 2 * 64 * 8, 2 * 64 * 4),
    ],
)
def test_state_bytes(kind, size, value_dim, state, halves):
    config = models.make_config(kind, 32, size, value_dim, 50)
    assert config.num_hidden_layers == 2
    # Where transformers keeps the length of a cache as a tensor.
    slack = 16
    assert 0 <= models.state_bytes(config, 40) - 4 * (state + halves) <= slack
    assert 0 <= models.state_bytes(config, 40, torch.bfloat16) - (4 * state + 2 * halves) <= slack


@pytest.mark.parametrize("kind", models.KINDS)
def test_the_loss_is_that_of_the_model(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models.make_config(kind, 32, 8, 0, 50), dtype=torch.float32)
    batch = mqar.make_batch(Setting(33, 3), 2, 50, torch.Generator().manual_seed(0))
    output = model(batch["input_ids"], labels=batch["labels"])
    ours = training.AtQueries(model)(**batch)
    torch.testing.assert_close(ours["loss"], output.loss)
    is_asked = batch["labels"][:, 1:] != -100
    assert ours.keys() == {"loss"}
    answers = training.AtQueries(model).eval()(**batch)
    torch.testing.assert_close(answers["loss"], output.loss)
    assert torch.equal(answers["logits"], output.logits[:, :-1][is_asked].argmax(-1))
    assert output.loss.item() > 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", models.KINDS)
def test_gpu_recorded_training_is_training(kind):
    """Three shapes in turn, twice: loss and gradients are those of the model that is not recorded, in bf16."""
    torch.manual_seed(0)
    mamba_scan = pytest.importorskip("mamba_scan")
    model = AutoModelForCausalLM.from_config(models.make_config(kind, 32, 8, 0, 50), dtype=torch.float32).cuda()
    # Each its own: recording fails where a graph of the same weights, not recorded, is still alive.
    plain, recorded = training.AtQueries(model), training.Recorded(training.AtQueries(copy.deepcopy(model)))
    for setting in 2 * [Setting(33, 3), Setting(64, 3), Setting(64, 7)]:
        batch = mqar.make_batch(setting, 4, 50, torch.Generator("cuda").manual_seed(setting.length))
        results = []
        for each in (plain, recorded):
            each.train().zero_grad()
            scan = mamba_scan.in_transformers if kind == "mamba" and each is recorded else nullcontext
            with scan(), torch.autocast("cuda", torch.bfloat16, kind != "mamba"):
                loss = each(**batch)["loss"]
            loss.backward()
            results.append([loss.detach(), *(x.grad.clone() for x in each.parameters())])
            del loss
        for got, wanted in zip(*results):
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-3)
        assert max(x.abs().max() for x in results[0][1:]) > 1e-2
    assert len(recorded.recordings) == 3


def test_accuracy_by_pairs():
    labels = [[-100, 5, -100, -100], [-100, 6, -100, 7], [8, -100, 9, -100], [-100, -100, -100, 5]]
    predictions = torch.tensor([5, 6, 1, 8, 2, 1])
    found = training.accuracy_by_pairs(EvalPrediction(predictions.numpy(), torch.tensor(labels).numpy()))
    assert found == {"accuracy": 0.5, "accuracy_1": 0.5, "accuracy_2": 0.5}
    found = training.accuracy_by_pairs(EvalPrediction(predictions.clamp_max(5).numpy(), torch.tensor(labels).numpy()))
    assert found == {"accuracy": 0.25, "accuracy_1": 0.5, "accuracy_2": 0.0}


def test_based_learns_to_recall_and_a_window_does_not():
    """What is asked lies up to 30 tokens back, the window is of 2: it can only guess, one value in 16 as it were."""
    setting = (Setting(32, 2),)
    task = training.Task(train=setting, test=setting, vocab_size=32, steps=220, batch_size=32, test_rows=100)
    based, window = (
        training.train(Cell(kind, 32, size, 0, 1e-2), task, "cpu")
        for kind, size in (("based", 8), ("sliding_window", 2))
    )
    assert based["accuracy"] == based["accuracy_2"] > 0.9
    assert window["accuracy"] < 0.5
    assert based.keys() == window.keys()


def test_a_training_tells_each_tenth(capfd):
    setting = (Setting(8, 1),)
    task = training.Task(train=setting, test=setting, vocab_size=8, steps=20, batch_size=1, test_rows=1)
    cell = Cell("based", 8, 4, 0, 1e-2)
    training.train(cell, task, "cpu")
    told = re.findall(r"^\[(.*)\] step (\d+) of 20, loss \d+\.\d\d$", capfd.readouterr().err, re.M)
    assert told == [(str(cell), str(step)) for step in range(2, 21, 2)]


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """Runs the program with trainings that take no time: accuracy is the learning rate; these cells fail or end."""

    def call(*options, fails=(), trained=None, command=("--quick", "--output", str(tmp_path / "quick.csv"))):
        def train_on(device, cell, task):
            if trained is not None:
                trained.append(cell)
            if cell.size in fails:
                raise FloatingPointError("the loss is no number\nat all")
            names = [*run.COMMON, *(f"accuracy_{setting.pairs}" for setting in task.test)]
            row = {**dict.fromkeys(names, 1), **cell._asdict(), "state_bytes": 100 * cell.size, "steps": task.steps}
            row |= {"accuracy": cell.learning_rate, "seed": task.seed, "seconds": 0.5}
            return row | {"device": "CPU", "torch": "1", "transformers": "2"}

        monkeypatch.setattr(run, "ProcessPoolExecutor", lambda n, *others: ThreadPoolExecutor(n))
        monkeypatch.setattr(run, "train_on", train_on)
        run.main([*command, *options])

    return call


def test_a_run_goes_on_where_it_ended(sweep, tmp_path, capsys):
    first, second, third = [], [], []
    with pytest.raises(SystemExit, match="Some trainings failed"):
        sweep(fails=[16], trained=first)
    output = capsys.readouterr().out
    assert len(first) == 5
    assert "2/5 sliding_window" in output
    # One of each kind has this size.
    assert output.count("FAILED, FloatingPointError: the loss is no number\n") == 2
    assert "Left out: based width 64 size 16 lr 0.003: FloatingPointError: the loss is no number\n" in output
    sweep(trained=second)
    assert sorted(second) == sorted(cell for cell in first if cell.size == 16)
    sweep("--learning-rates", "0.003", "0.5", "--kinds", "based", trained=third)
    assert [cell.learning_rate for cell in third] == [0.5, 0.5]
    with (tmp_path / "quick.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert {row["device"] for row in rows} == {"CPU"}
    assert (tmp_path / "quick.png").read_bytes().startswith(b"\x89PNG")
    assert "0.5 of 2" in (tmp_path / "quick.md").read_text()


def test_points_of_ones_own(sweep):
    trained = []
    sweep("--points", "based:48:12:40", "mamba:32:8:0", "based:48:16:0", trained=trained)
    assert {cell[:4] for cell in trained} == {("based", 48, 12, 40), ("mamba", 32, 8, 0), ("based", 48, 16, 0)}
    with pytest.raises(SystemExit):
        sweep("--points", "based:48")


def test_a_process_starts_seeing_one_gpu(sweep, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert run.visible_gpus() == ["5", "7"]
    submit, seen = ThreadPoolExecutor.submit, []

    def start(pool, function, device, *arguments):
        seen.append((device, run.os.environ["CUDA_VISIBLE_DEVICES"]))
        return submit(pool, function, device, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", start)
    sweep()
    assert len(seen) == 5
    assert {device for device, _ in seen} <= {"5", "7"}
    assert all(device == alone for device, alone in seen)
    assert run.visible_gpus() == ["5", "7"]
    with run.seen_alone("cpu"):
        assert run.os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_without_time_nothing_is_started(sweep, capsys, tmp_path):
    trained = []
    sweep("--budget", "-1", trained=trained)
    assert trained == []
    assert capsys.readouterr().out.count("not started") == 5
    assert not (tmp_path / "quick.md").exists()


def test_refuses_a_table_of_another_task(sweep, tmp_path):
    (tmp_path / "quick.csv").write_text("kind,width\n")
    with pytest.raises(SystemExit, match=r"quick.csv has other columns .* choose another --output"):
        sweep()
    (tmp_path / "quick.csv").unlink()
    sweep()
    with pytest.raises(SystemExit, match=r"quick.csv is of 800 steps, not 900: choose another --output"):
        sweep("--steps", "900")
    with pytest.raises(SystemExit, match=r"quick.csv is of 64 rows in a batch, not 32: choose another --output"):
        sweep("--batch-size", "32")
    with pytest.raises(SystemExit, match=r"quick.csv is of 0 as its seed, not 7: choose another --output"):
        sweep("--seed", "7")
    sweep("--seed", "7", "--output", str(tmp_path / "seven.csv"))
    assert {row["seed"] for row in report.read_rows(tmp_path / "seven.csv")} == {7}


def test_refuses_a_table_that_cannot_be_written(sweep, tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    for output, reason in (
        ("folder.csv", "Is a directory"),
        ("file/quick.csv", "a file lies where it needs a folder"),
        ("file/in/quick.csv", "Not a directory"),
    ):
        with pytest.raises(SystemExit, match=rf"^Cannot write .*{output} \({reason}\): choose another --output.$"):
            sweep("--output", str(tmp_path / output))


@pytest.mark.parametrize(
    ("command", "written"), [(["--quick"], "quick"), (["--kinds", "sliding_window", "--processes", "2"], "frontier")]
)
def test_committed_results_are_left_alone(sweep, tmp_path, monkeypatch, command, written):
    monkeypatch.chdir(tmp_path)
    trained = []
    sweep(command=command, trained=trained)
    assert trained
    names = [f"outputs/recall/{written}.{ending}" for ending in ("csv", "md", "png")]
    assert sorted(str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "quick.md"], "--output: quick.md does not end in .csv"),
        (["--output", "quick"], "--output: quick does not"),
        (["--processes", "0"], "--processes: 0 is less than 1"),
        (["--steps", "0"], "--steps: 0 is"),
        (["--batch-size", "-1"], "--batch-size: -1 is"),
        (["--seed", "-1"], "--seed: -1 is not from 0 to 2147483647"),
        (["--budget", "nan"], "--budget: nan is"),
        (["--learning-rates", "0.1", "0"], "--learning-rates: 0.0 is not a number above 0"),
        (["--learning-rates", "inf"], "--learning-rates: inf is"),
        (["--learning-rates", "nan"], "--learning-rates: nan is"),
    ],
)
def test_refuses_options(sweep, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        sweep(*options)
    assert error.value.code == 2
    assert f"error: argument {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--points", "based:48:16:0", "based:0:16:0"],
            "based width 0 size 16 lr 0.003: based of width 0, .* they are",
        ),
        (["--points", "sliding_window:63:16:0"], "sliding_window width 63 size 16 lr 0.003: .* need an even one"),
        (["--points", "attention:64:1024:0"], "attention width 64 size 1024 lr 0.003: .* its SIZE is 256."),
        (["--kinds", "mamba"], "No model to train: there are points of based, sliding_window, none of --kinds mamba."),
        (["--points", "based:48:16:0", "--kinds", "mamba"], "No model to train: there are points of based, none of"),
    ],
)
def test_refuses_models_before_it_trains_any(sweep, tmp_path, options, message):
    trained = []
    with pytest.raises(SystemExit, match=f"^{message}[^\n]*$"):
        sweep(*options, trained=trained)
    assert not trained
    assert not (tmp_path / "quick.csv").exists()
    sweep("--points", "attention:32:256:0", trained=trained)
    assert len(trained) == 1


def test_what_is_given_twice_is_trained_once(sweep):
    trained = []
    points = ("based:48:16:0", "based:48:16:0", "based:48:8:0")
    sweep("--points", *points, "--learning-rates", "0.003", "3e-3", trained=trained)
    assert sorted(cell.size for cell in trained) == [8, 16]


def test_a_last_line_without_its_end_is_finished(sweep, tmp_path):
    path = tmp_path / "quick.csv"
    sweep("--kinds", "based")
    path.write_text(path.read_text().rstrip("\n"))
    sweep()
    assert len(report.read_rows(path)) == 5


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda line: line[: len(line) // 2], r"\d+ columns in place of 22"),
        (lambda line: f"{line},1", "23 columns in place of 22"),
        (lambda line: line.replace(",64,", ",6x4,", 1), "width is '6x4'"),
        (lambda line: line.replace(",0.5,", ",,"), "seconds is ''"),
        (lambda line: line.replace(",0.003,1,1,", ",nan,1,1,"), "accuracy is 'nan'"),
        (lambda line: line.replace("based", "rwkv"), "kind is 'rwkv'"),
        (lambda line: line.replace("CPU", '"CPU'), "20 columns in place of 22"),
        (lambda line: "\0" * len(line), "line contains NUL|1 columns in place of 22"),
    ],
)
def test_a_damaged_row_is_named(sweep, tmp_path, damage, reason):
    path = tmp_path / "quick.csv"
    sweep("--kinds", "based")
    first, second, *others = path.read_text().split("\n")
    path.write_text("\n".join([first, "", damage(second), *others]))
    before, trained = path.read_bytes(), []
    for read in (
        lambda: sweep(trained=trained),
        lambda: report.write_report(path),
        lambda: dial.main(["--frontier", str(path), "--output", str(tmp_path / "new")]),
    ):
        with pytest.raises(
            SystemExit, match=rf"^.*quick.csv, line 3, is damaged \(({reason})\): delete that line[^\n]*$"
        ):
            read()
    assert not trained
    assert path.read_bytes() == before
    path.write_text("\n".join([first, *others]))
    sweep("--kinds", "based", trained=trained)
    assert len(trained) == 1


def test_defaults_are_those_of_the_committed_table(capsys):
    assert run.LEARNING_RATES == (3e-3, 1e-3, 1e-2)
    with pytest.raises(SystemExit):
        run.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.003 0.001 0.01; 0.003 with --quick)" in text
    assert "(default: 24000, or 800 with --quick)" in text
    (steps,) = {row["steps"] for row in report.read_rows(ROOT / "examples" / "recall" / "results" / "frontier.csv")}
    assert steps == training.Task().steps


def test_most_telling_first():
    cells = run.cells_in_order(run.POINTS, run.LEARNING_RATES)
    assert len({*cells}) == len(cells)
    assert {cell.kind for cell in cells[:8]} == {*models.KINDS}
    assert [cell.learning_rate for cell in cells] == sorted(
        (x.learning_rate for x in cells), key=run.LEARNING_RATES.index
    )


def test_one_command_trains_in_processes_and_reports(tmp_path):
    options = ("--kinds", "based", "--steps", "2", "--batch-size", "2", "--processes", "2")
    process = run_python("examples/recall/run.py", "--quick", "--output", tmp_path / "quick.csv", *options)
    output = process.stdout
    assert "2 trainings to do, 0 done before; 2 at once on cpu." in output
    for size in (8, 16):
        told = rf"^\[based width 64 size {size} lr 0.003\] step ([12]) of 2, loss \d"
        assert re.findall(told, process.stderr, re.M) == ["1", "2"]
    assert (
        len(re.findall(r"^\[ *\d+ s\] [12]/2 based width 64 size (?:8|16) lr 0.003: accuracy 0.0", output, re.M)) == 2
    )
    assert report.read_rows(tmp_path / "quick.csv")[0]["steps"] == 2


def workers_of(parent: int) -> list[int]:
    """Processes of `parent` that are ready to train: what Trainer prints goes nowhere."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and b"spawn_main" in (folder / "cmdline").read_bytes():
                found += [int(folder.name)] * (os.readlink(folder / "fd" / "1") == os.devnull)
        except OSError:
            continue
    return found


def is_alive(process: int) -> bool:
    """Not so if it is over and nobody has asked how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds: float):
    """What `condition` gives as soon as it is true, else its last value."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return value


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", ["killed", "terminated", "interrupted"])
def test_nothing_trains_on_without_the_program(tmp_path, how):
    """A terminal interrupts all processes of the program at once."""
    options = ("--quick", "--processes", "1", "--steps", "1000000", "--output", str(tmp_path / "quick.csv"))
    parent = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "recall" / "run.py", *options],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell starts in the background ignores Ctrl-C, and so does what that starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    workers = []
    try:
        workers = wait_for(lambda: workers_of(parent.pid), 120)
        assert len(workers) == 1
        # So that it has begun to train.
        time.sleep(1)
        if how == "interrupted":
            os.killpg(parent.pid, signal.SIGINT)
        else:
            parent.send_signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
        parent.wait(20)
        assert wait_for(lambda: not is_alive(workers[0]), 20)
        output, errors = parent.communicate(timeout=20)
    finally:
        parent.kill()
        for worker in filter(is_alive, workers):
            os.kill(worker, signal.SIGKILL)
    if how == "interrupted":
        assert parent.returncode == 130
        assert "FAILED" not in output
        assert "Traceback" not in errors
        assert f"Interrupted: the trainings that were finished are in {tmp_path / 'quick.csv'}.\n" in errors


def rows_of(*points):
    names = ("kind", "state_bytes", "accuracy", "learning_rate")
    same = {"width": 64, "value_dim": 0, "parameters": 10, "state_bytes_bf16": 5, "steps": 3, "batch_size": 4}
    same |= {"device": "a GPU", "torch": "1", "transformers": "2"}
    rows = [{**same, **dict(zip(names, point))} for point in points]
    return [{**row, "size": row["state_bytes"], "accuracy_4": row["accuracy"]} for row in rows]


def learned(rows):
    """With all right on the easiest test."""
    return [{**row, "accuracy_4": 1.0} for row in rows]


def test_report_says_who_is_above(tmp_path):
    rows = learned(
        rows_of(
            ("based", 1000, 0.5, 1e-3),
            ("based", 1000, 0.8, 1e-2),
            ("based", 4000, 0.98, 1e-2),
            ("based", 5000, 0.7, 1e-2),
        )
    ) + rows_of(
        ("mamba", 500, 0.1, 1e-2),
        ("mamba", 1500, 0.6, 1e-2),
        ("mamba", 4500, 0.99, 1e-2),
        ("sliding_window", 3999, 0.7, 1e-2),
    )
    text = report.document(tmp_path / "some.csv", rows)
    assert "\n8 trainings of 7 models, 3 steps of 4 rows; " in text
    assert "Based with 4,000 bytes (0.980) is below Mamba with 4,500 (0.990" in text
    assert "Based with 1,000 bytes (0.800) is above sliding window with 3,999 (0.700" in text
    assert "Mamba of width 64 has not learned the task in 3 steps (0.600 with 4 pairs)" in text
    # Nothing is as small.
    assert "with 500 (" not in text
    assert "Based reaches 0.97 with 4,000 bytes, 2^12.0" in text
    assert "| 0.01 of 2 | **0.800** |" in text
    assert "**0.500**" not in text
    best = report.best_rows(rows)
    assert [row["accuracy"] for row in report.frontier(best, "based")] == [0.8, 0.98]
    none = report.document(tmp_path / "some.csv", rows_of(("based", 1000, 0.5, 1e-3)))
    assert "No Based model here reaches 0.97; the best has 0.500" in none


def test_report_gives_no_verdict_on_a_based_that_has_not_learned(tmp_path):
    rows = rows_of(("based", 1000, 0.3, 1e-2), ("sliding_window", 1500, 0.4, 1e-2))
    text = report.document(tmp_path / "some.csv", rows)
    assert (
        "Based with 1,000 bytes has not learned the task yet in 3 steps (0.300 with 4 pairs): no verdict on sliding "
        "window with 1,500 (0.400; width 64, window 1500)." in text
    )
    assert not re.search("is (above|below|level)", text)
    assert "is below sliding window" in report.document(tmp_path / "some.csv", learned(rows))


def test_report_says_what_was_lost_beyond_the_lengths_of_the_training(tmp_path):
    def text_of(*accuracies):
        rows = learned(rows_of(("based", 1000, 0.8, 1e-2), ("attention", 1500, 0.7, 1e-2)))
        for row, (trained, longer, longest) in zip(rows, ((1.0, 0.75, 0.5), accuracies)):
            row |= {"accuracy_64": trained, "accuracy_128": longer, "accuracy_256": longest}
        return report.document(tmp_path / "some.csv", rows)

    start, end = (
        "is above attention (Llama) with 1,500 (0.700; width 64, tokens 1500)",
        "where Based has 0.750 and 0.500.",
    )
    said = "up to 64 pairs, the lengths trained on, and 0.953 and 0.102 beyond"
    assert f"{start}: it has 1.000 {said}, {end}" in text_of(1.0, 0.953, 0.102)
    assert f"{start}: it has 0.977 or more {said}, {end}" in text_of(0.977, 0.953, 0.102)
    # Not learned there either, or lost nowhere.
    for accuracies in ((0.5, 0.4, 0.1), (1.0, 0.98, 0.95)):
        assert f"{start}.\n" in text_of(*accuracies)


def test_dials_agree_with_the_benchmark(tmp_path):
    """The state that is computed for the released settings is what benchmark_generation.py measured, its limit too."""
    rows = rows_of(("based", 1000, 0.8, 1e-2), ("sliding_window", 3999, 0.7, 1e-2))
    generation = json.loads((ROOT / "examples" / "results" / "generation.json").read_text())
    text = dial.document(rows, generation)
    assert "| `linear_feature_dim` | 64 | 1000 | 1,000 | 0.800 | 0.800 | 0.800 |" in text
    for cell in generation["cells"]:
        if cell["model"] == "based":
            measured = [x for x in generation["models"] if (x["shape"], x["model"]) == (cell["shape"], "based")]
            pattern = rf"^\| 16 \| 65 \| {measured[0]['bytes_per_sequence']:,} \|.* {cell['limit_ms']:.2f} \|"
            assert re.search(pattern, text, re.M), cell
            measured_ms = f"{1e3 * cell['batch'] / cell['tokens_per_second']:.2f}"
            least = f"{cell['limit_ms']:.2f}"
            line = f"| {cell['batch']:,} | {cell['tokens_per_second']:,.0f} | {measured_ms} | {least} |"
            assert line in text
    for model in (x for x in generation["models"] if x["model"] == "based"):
        of_shape = [x for x in generation["cells"] if (x["shape"], x["model"]) == (model["shape"], "based")]
        first, *_, last = sorted(of_shape, key=lambda x: x["batch"])
        times = (f"{1 / x['fraction_of_limit']:.1f} (batch {x['batch']:,})" for x in (first, last))
        assert f"A step takes {' and '.join(times)} times the least." in text
        # Behind 16 rows: what the benchmark counts less the weights.
        weights = 1e3 * model["weight_bytes"] / generation["copy_bytes_per_second"]
        (cell,) = [x for x in of_shape if x["batch"] == 16]
        assert f"| {cell['limit_ms']:.2f} | {1 - weights / cell['limit_ms']:.0%} |" in text
    # 25 * 26 / 2 features in place of 17 * 18 / 2, each rounded up to a multiple of 8.
    sizes = [dial.state_parts(dial.BasedConfig(linear_feature_dim=size)) for size in (16, 24)]
    assert sizes[1]["linear_attention"] / sizes[0]["linear_attention"] == 328 / 160
    generation["models"][0]["bytes_per_sequence"] += 1
    with pytest.raises(SystemExit, match="not the released setting"):
        dial.document(rows, generation)


def test_dials_say_what_the_feature_dim_brings():
    generation = json.loads((ROOT / "examples" / "results" / "generation.json").read_text())
    rows = rows_of(("based", 1000, 0.5, 1e-2), ("based", 3000, 0.75, 1e-2), ("based", 6000, 0.76, 1e-2))
    rows = [{**row, "width": 128, "size": size} for row, size in zip(rows, (8, 16, 24))]
    said = (
        "At width 128, with values of the width, accuracy is 0.500 with D = 8, 0.750 with D = 16, 0.760 with D = 24: "
        "+0.250 for 3.0 times the bytes and +0.010 for 2.0 times the bytes.\n"
    )
    assert said in dial.document(rows, generation)
    for others in (rows[:2], [*rows[:2], {**rows[2], "value_dim": 72}], [*rows[:2], {**rows[2], "width": 64}]):
        assert "At width 128" not in dial.document(others, generation)
    assert "(D + 1)(D + 2) / 2, rounded up to a multiple of 8" in dial.document(rows, generation)


def write_rows(path):
    """A table of one model."""
    (row,) = rows_of(("based", 1000, 0.8, 1e-2))
    row |= {"seed": 0, "loss": 1.0, "seconds": 1.0}
    with path.open("w") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)


def test_dials_are_written_by_one_command(tmp_path, capsys):
    frontier = tmp_path / "frontier.csv"
    with pytest.raises(SystemExit, match=r"There is no .*frontier.csv: run.py writes it"):
        dial.main(["--frontier", str(frontier)])
    write_rows(frontier)
    dial.main(["--frontier", str(frontier), "--output", str(tmp_path / "new")])
    assert (tmp_path / "new" / "dial.md").exists()
    assert (tmp_path / "new" / "dial.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_benchmark_is_named(tmp_path):
    frontier, generation = tmp_path / "frontier.csv", tmp_path / "generation.json"
    write_rows(frontier)
    text = (ROOT / "examples" / "results" / "generation.json").read_text()
    whole = json.loads(text)
    without_based = [model for model in whole["models"] if model["model"] != "based"]
    for damaged in (
        text[: len(text) // 2],
        "[]",
        "{}",
        json.dumps({**whole, "copy_bytes_per_second": None}),
        json.dumps({**whole, "models": []}),
        json.dumps({**whole, "models": without_based}),
        json.dumps({**whole, "cells": [{"shape": "1.3b"}]}),
    ):
        generation.write_text(damaged)
        with pytest.raises(
            SystemExit, match=r"^[^\n]*generation.json is damaged .*: [^\n]*benchmark_generation.py writes it"
        ):
            dial.main(["--frontier", str(frontier), "--generation", str(generation), "--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
    generation.write_text(text)
    dial.main(["--frontier", str(frontier), "--generation", str(generation), "--output", str(tmp_path / "new")])
    (tmp_path / "other.csv").write_text("name,x\na,b\n")
    with pytest.raises(SystemExit, match=r"other.csv has no column kind: it is not a table that run.py writes"):
        dial.main(["--frontier", str(tmp_path / "other.csv")])
