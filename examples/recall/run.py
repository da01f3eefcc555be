# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The recall-memory frontier: trains many small models on MQAR and sets their accuracy beside the bytes of their state.

    python examples/recall/run.py                                     all models, 24,000 steps at three rates, on GPUs
    python examples/recall/run.py --budget 3600 --processes 16        what can be trained in an hour
    python examples/recall/run.py --quick                             Based and sliding windows, minutes on a CPU

The whole is for GPUs: on two CPU cores one of its models would train for days. --quick is for a CPU. Models train at
the same time, one in each process, the processes shared out over the GPUs; each tells every tenth of its steps on
stderr. Every finished training is a row of the CSV, outputs/recall/frontier.csv or quick.csv in the working directory;
a run that is started again leaves out those that are there. The most telling models come first, at the learning rate
that suits most of them, then again at the others. Writes the report beside the CSV at the end (frontier_report.py).
"""

import argparse
import csv
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from frontier_report import read_columns, read_rows, write_report
from mqar import Setting
from mqar_models import KINDS, Cell, make_config
from mqar_training import Task, train


# Not beside this program: the results that are there were measured and committed.
OUTPUTS = Path("outputs", "recall")
LEARNING_RATES = (3e-3, 1e-3, 1e-2)
# Width, size and entries of a value. Based keeps features times values, whatever the width.
POINTS = {
    "mamba": [(256, 16, 0), (128, 16, 0), (256, 32, 0), (64, 16, 0)],
    "based": [
        *(
            (128, 16, 72),
            (256, 16, 72),
            (80, 16, 80),
            (64, 16, 0),
            (128, 20, 48),
            (128, 24, 32),
            (128, 16, 0),
            (64, 8, 0),
            (128, 16, 32),
        ),
        *((128, 24, 0), (128, 8, 0), (48, 16, 0), (128, 8, 64), (64, 24, 0), (48, 8, 0), (48, 24, 0), (48, 8, 40)),
    ],
    "sliding_window": [(128, window, 0) for window in (64, 256, 16, 128, 1024, 32, 512, 8)],
    "attention": [(64, 1024, 0), (128, 1024, 0)],
}
QUICK_POINTS = {"based": [(64, 8, 0), (64, 16, 0)], "sliding_window": [(64, 16, 0), (64, 64, 0), (64, 128, 0)]}
QUICK_TASK = Task(
    train=(Setting(64, 4), Setting(64, 8), Setting(64, 16)),
    test=(Setting(64, 4), Setting(64, 8), Setting(64, 16), Setting(128, 32), Setting(256, 64)),
    vocab_size=512,
    steps=800,
    batch_size=64,
    test_rows=128,
)
COMMON = ("seed", "steps", "batch_size", "parameters", "state_bytes", "state_bytes_bf16", "loss", "accuracy")
LAST = ("seconds", "device", "torch", "transformers")


def cells_in_order(points: dict[str, list], learning_rates: tuple[float, ...]) -> list[Cell]:
    """
    All points at the first learning rate, then at the next; in each, the first point of every kind comes first. What is
    given twice is there once.
    """
    rows = [(rank, kind, point) for kind, of_kind in points.items() for rank, point in enumerate(of_kind)]
    if "mamba" in points:
        rows = [(0 if kind == "mamba" else rank, kind, point) for rank, kind, point in rows]
    rows.sort(key=lambda row: (row[0], list(points).index(row[1])))
    return list(dict.fromkeys(Cell(kind, *point, rate) for rate in learning_rates for _, kind, point in rows))


def check(cell: Cell, task: Task) -> None:
    """Exits for a cell that would fail, or say something else than it seems to, when its turn comes after hours."""
    try:
        make_config(*cell[:4], task.vocab_size)
    # The checks of transformers raise errors of their own.
    except Exception as error:
        sys.exit(" ".join(f"{cell}: {error}".split()))
    if cell.kind == "attention" and cell.size != task.length:
        sys.exit(f"{cell}: attention keeps all tokens of the longest test, its SIZE is {task.length}.")


class Table:
    """The CSV of results: a row for each finished training, on the disk at once."""

    def __init__(self, path: Path, task: Task):
        self.path, self.task, self.lock = path, task, threading.Lock()
        by_pairs = [f"accuracy_{setting.pairs}" for setting in task.test]
        self.columns = [*Cell._fields, *COMMON, *by_pairs, *LAST]
        self.rows: list[dict] = []
        try:
            if path.exists():
                self.read()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerow(self.columns)
        except OSError as error:
            # "File exists" says little of a folder that cannot be made.
            reason = "a file lies where it needs a folder" if isinstance(error, FileExistsError) else error.strerror
            sys.exit(f"Cannot write {path} ({reason}): choose another --output.")

    def read(self) -> None:
        if read_columns(self.path) != self.columns:
            sys.exit(f"{self.path} has other columns than this run writes: choose another --output.")
        self.rows = read_rows(self.path)
        for name, wanted, what in (
            # Who has trained for longer, or on more rows, would win.
            ("steps", self.task.steps, "steps"),
            ("batch_size", self.task.batch_size, "rows in a batch"),
            ("seed", self.task.seed, "as its seed"),
        ):
            if others := {row[name] for row in self.rows} - {wanted}:
                others = ", ".join(map(str, sorted(others)))
                sys.exit(f"{self.path} is of {others} {what}, not {wanted}: choose another --output.")
        with self.path.open("r+b") as file:
            # An editor may have left it out: the next row would go on in the last line.
            if not file.read().endswith(b"\n"):
                file.write(b"\n")

    def __contains__(self, cell: Cell) -> bool:
        return any(cell._asdict().items() <= row.items() for row in self.rows)

    def append(self, row: dict) -> None:
        texts = {
            name: f"{x:.5g}" if isinstance(x, float) and name != "learning_rate" else str(x) for name, x in row.items()
        }
        with self.lock, self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(texts)
            self.rows.append(row)


def visible_gpus() -> list[str]:
    """Their numbers, or names, in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


@contextmanager
def seen_alone(device: str) -> Iterator[None]:
    """
    A process that starts now sees no GPU but `device`, the number of one or "cpu": Trainer would spread a batch over
    all. Some libraries look for GPUs when they are imported, after which it is too late to hide any.
    """
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def end_with_parent() -> None:
    """A parent that was killed has stopped nothing: its processes would train on for nobody."""
    multiprocessing.parent_process().join()
    os._exit(1)


def prepare_process(threads: int) -> None:
    """Before anything else in a process that trains."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    # A terminal sends Ctrl-C to all processes; this one ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    # What Trainer prints of each model would drown the progress.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def train_on(device: str, cell: Cell, task: Task) -> dict:
    row = train(cell, task, "cpu" if device == "cpu" else "cuda:0")
    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    return {**row, "device": name, "torch": torch.__version__, "transformers": transformers.__version__}


class Sweep:
    """Trains `cells`, each slot in a process of its own, until they are done or `budget` seconds are over."""

    def __init__(self, cells: list[Cell], task: Task, table: Table, slots: list[str], budget: float, threads: int):
        self.todo, self.total = list(cells), len(cells)
        self.task, self.table, self.slots, self.threads = task, table, slots, threads
        self.start, self.budget = time.perf_counter(), budget
        self.done, self.failed = 0, []
        self.longest: dict[str, float] = {}
        self.lock = threading.Lock()

    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.start)

    def next_cell(self) -> Cell | None:
        """The first that there seems to be time for; those of a kind that takes too long are left out."""
        with self.lock:
            for i, cell in enumerate(self.todo):
                if self.longest.get(cell.kind, 0.0) < self.left():
                    return self.todo.pop(i)
        return None

    def report(self, what: str) -> None:
        print(f"[{time.perf_counter() - self.start:5.0f} s] {self.done}/{self.total} {what}", flush=True)

    def run_slot(self, device: str) -> None:
        def start():
            return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process, (self.threads,))

        pool = start()
        while cell := self.next_cell():
            begin = time.perf_counter()
            try:
                # The first of a pool starts its process.
                with self.lock, seen_alone(device):
                    training = pool.submit(train_on, device, cell, self.task)
                row = training.result(timeout=min(max(0.0, self.left()), threading.TIMEOUT_MAX))
            except OutOfTime:
                self.failed.append((cell, "no time left"))
                kill(pool)
                return
            except Exception as error:
                self.failed.append((cell, f"{type(error).__name__}: {error}".splitlines()[0]))
                self.report(f"{cell}: FAILED, {self.failed[-1][1]}")
                if isinstance(error, BrokenProcessPool):
                    pool = start()
                continue
            self.table.append({**row, "batch_size": self.task.batch_size})
            with self.lock:
                self.done += 1
                self.longest[cell.kind] = max(self.longest.get(cell.kind, 0.0), time.perf_counter() - begin)
            self.report(f"{cell}: accuracy {row['accuracy']:.3f}, {row['state_bytes']:,} bytes, {row['seconds']:.0f} s")
        pool.shutdown()

    def run(self) -> None:
        threads = [threading.Thread(target=self.run_slot, args=(device,)) for device in self.slots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for cell in self.todo:
            self.failed.append((cell, "not started"))


def kill(pool: ProcessPoolExecutor) -> None:
    for process in list(pool._processes.values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def point(text: str) -> tuple[str, tuple[int, int, int]]:
    kind, *numbers = text.split(":")
    if kind not in KINDS or len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text} is not KIND:WIDTH:SIZE:VALUES, of the kinds {', '.join(KINDS)}")
    return kind, tuple(map(int, numbers))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    rates = " ".join(f"{rate:g}" for rate in LEARNING_RATES)
    parser = argparse.ArgumentParser(
        description="Accuracy of recall over bytes of state, for four kinds of models: for GPUs, --quick for a CPU."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smaller task, Based and sliding windows only: minutes on a CPU"
    )
    parser.add_argument("--output", type=Path, help="the CSV (default: outputs/recall/frontier.csv or quick.csv)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="only these (default: all)")
    parser.add_argument(
        "--points", nargs="+", type=point, metavar="KIND:WIDTH:SIZE:VALUES", help="only these, e.g. based:128:16:72"
    )
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        help=f"in this order (default: {rates}; {LEARNING_RATES[0]:g} with --quick)",
    )
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; what is not done then is left out")
    parser.add_argument("--processes", type=int, help="trainings at once (default: 8 for each GPU, else 2)")
    parser.add_argument(
        "--steps", type=int, help=f"of training (default: {Task.steps}, or {QUICK_TASK.steps} with --quick)"
    )
    parser.add_argument("--batch-size", type=int, help="rows in a batch (default: 256, or 64 with --quick)")
    parser.add_argument("--seed", type=int, help="of weights and texts (default: 0); each wants an --output of its own")
    args = parser.parse_args(argv)
    args.output = args.output or OUTPUTS / ("quick.csv" if args.quick else "frontier.csv")
    if args.output.suffix != ".csv":
        parser.error(f"argument --output: {args.output} does not end in .csv: the report beside it is .md and .png")
    for name in ("processes", "steps", "batch_size"):
        if (number := getattr(args, name)) is not None and number < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {number} is less than 1")
    if args.seed is not None and not 0 <= args.seed < 2**31:
        parser.error(f"argument --seed: {args.seed} is not from 0 to {2**31 - 1}")
    if math.isnan(args.budget):
        parser.error("argument --budget: nan is no number of seconds")
    for rate in args.learning_rates or ():
        if not 0 < rate < math.inf:
            parser.error(f"argument --learning-rates: {rate} is not a number above 0")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    points, task, rates = (
        (QUICK_POINTS, QUICK_TASK, LEARNING_RATES[:1]) if args.quick else (POINTS, Task(), LEARNING_RATES)
    )
    changes = {name: x for name in ("steps", "batch_size", "seed") if (x := getattr(args, name)) is not None}
    task = Task(**{**vars(task), **changes})
    if args.points:
        points = {kind: [numbers for other, numbers in args.points if other == kind] for kind in KINDS}
    kinds = [kind for kind, of_kind in points.items() if of_kind]
    points = {kind: points[kind] for kind in kinds if kind in (args.kinds or KINDS)}
    if not points:
        sys.exit(f"No model to train: there are points of {', '.join(kinds)}, none of --kinds {' '.join(args.kinds)}.")
    gpus = visible_gpus() or ["cpu"]
    processes = args.processes or (8 * len(gpus) if gpus != ["cpu"] else 2)
    threads = max(1, (os.cpu_count() or 1) // processes)

    cells = cells_in_order(points, tuple(args.learning_rates or rates))
    for cell in cells:
        check(cell, task)
    table = Table(args.output, task)
    todo = [cell for cell in cells if cell not in table]
    print(
        f"{len(todo)} trainings to do, {len(cells) - len(todo)} done before; {processes} at once on "
        f"{', '.join(gpu if gpu == 'cpu' else f'GPU {gpu}' for gpu in gpus)}."
    )
    slots = [gpus[i % len(gpus)] for i in range(min(processes, len(todo)))]
    sweep = Sweep(todo, task, table, slots, args.budget, threads)
    try:
        sweep.run()
    except KeyboardInterrupt:
        # So that no row is cut.
        with table.lock:
            print(f"Interrupted: the trainings that were finished are in {table.path}.", file=sys.stderr, flush=True)
            # Any other end waits for the threads, which wait for the trainings; these end with this process.
            os._exit(130)
    for cell, reason in sweep.failed:
        print(f"Left out: {cell}: {reason}")
    if table.rows:
        write_report(table.path)
    if any("time" not in reason and "start" not in reason for _, reason in sweep.failed):
        sys.exit("Some trainings failed, see above.")


if __name__ == "__main__":
    main()
