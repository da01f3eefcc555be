# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""A run of a benchmark: its models, and its cells, which are on the disk as soon as they are measured."""

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from benchmark_tools import Wrong, machine, release_memory
from model_shapes import CONFIGS, build
from transformers import PreTrainedModel
from transformers.utils import logging


class LeftOut(Exception):
    """A cell that is not worth its time; the message says why."""


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


class Models:
    """The models that the cells ask for, by shape and kind. The last two are kept, to be measured in turns."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype, self.built = device, dtype, {}

    def get(self, shape: str, kind: str) -> PreTrainedModel:
        key = shape, kind
        if key in self.built:
            self.built[key] = self.built.pop(key)
        else:
            for old in list(self.built)[:-1]:
                del self.built[old]
            release_memory()
            self.built[key] = build(CONFIGS[kind](shape), self.device, self.dtype)
        return self.built[key]

    def drop(self, shape: str, kind: str) -> None:
        """One that has been changed."""
        self.built.pop((shape, kind), None)


class Apart:
    """
    A cell in a process of its own, prepared while others are, which takes minutes of the host and nothing of the GPU;
    measured when it is told to, one at a time.
    """

    def __init__(self, prepare: Callable[..., Callable[[], dict]], at_once: int, **arguments):
        """`prepare(**arguments)` returns what measures the cell; so many processes share the host's cores."""
        # Inductor would take all cores for each of them.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run_apart, args=(theirs, prepare, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def wait(self, seconds: float | None) -> None:
        """Until it is ready to be measured, or has failed, or there is no time left."""
        self.connection.poll(seconds)

    def measure(self, seconds: float | None) -> dict:
        """
        Raises:
            LeftOut: no time left.
            RuntimeError: what went wrong there.
        """
        for _ in range(2):
            if not self.connection.poll(seconds):
                raise LeftOut("time limit")
            cell, failure = self.connection.recv()
            if failure:
                raise RuntimeError(failure)
            if cell is None:
                self.connection.send("go")
        return cell

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def _run_apart(connection: Connection, prepare: Callable[..., Callable[[], dict]], arguments: dict) -> None:
    """Sends a pair when it is ready and one when it has measured: the cell, if there is one, and what went wrong."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        measure = prepare(**arguments)
        connection.send((None, None))
        connection.recv()
        connection.send((measure(), None))
    except Exception as error:
        traceback.print_exc()
        connection.send((None, f"{type(error).__name__}: {error}"))


class Run:
    """
    The clock, and the results, which are on the disk whenever a cell is done: a run that is cut short keeps the others,
    and what was left out is listed with the reason.
    """

    def __init__(self, args: argparse.Namespace, name: str, budget: float | None, **results):
        """`args` has the `device` and, as `output`, the folder for `name`.json; `budget` in seconds."""
        self.args, self.file_name, self.budget = args, f"{name}.json", budget
        self.started, self.lasted = time.perf_counter(), {}
        self.device = torch.device(args.device)
        self.results = {**machine(self.device), **results, "runs": 1, "left_out": []}

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def left(self) -> float | None:
        """Seconds of the budget; `None`: no end of them."""
        return max(0.0, self.budget - self.elapsed()) if self.budget else None

    def resume(self, settings: list[str], is_asked_for: Callable[[dict], bool]) -> None:
        """
        Takes over what an earlier run has measured. Of what it left out, that which `is_asked_for` is tried again.

        Raises:
            SystemExit: there is none, it cannot be read, or it was on another card, with other versions or `settings`.
        """
        path = self.args.output / self.file_name
        try:
            old = json.loads(path.read_text())
            differing = [
                f"{name} was {old[name]} and is {self.results[name]}"
                for name in ("device", "versions", *settings)
                if old[name] != self.results[name]
            ]
            left_out = [cell for cell in old["left_out"] if not is_asked_for(cell)]
        except FileNotFoundError:
            sys.exit(f"--resume: there is no {path}. Leave the option out to begin.")
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"--resume: {path} is not the result of a run ({type(error).__name__}: {error}).")
        if differing:
            sys.exit(f"--resume: {path} cannot be gone on with: {'; '.join(differing)}.")
        self.results = {**old, "runs": old.get("runs", 1) + 1, "left_out": left_out}

    def has(self, name: dict, into: str) -> bool:
        """Whether an earlier run has measured the cell: what a cell is called says what kind of cell it is, too."""
        others = {"batch", "position", "best", *name}
        return any({key: cell[key] for key in others if key in cell} == name for cell in self.results[into])

    def write(self) -> None:
        self.results["seconds"] = self.elapsed()
        self.args.output.mkdir(parents=True, exist_ok=True)
        path = self.args.output / self.file_name
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(path)

    def attempt(
        self, name: dict, measure: Callable[[], dict], into: str = "cells", kind: object = None, guess: float = 15
    ) -> bool:
        """
        Adds the cell `name | measure()`, or says why it is left out. Whether memory sufficed.

        A cell is not begun if it would outlast the budget: it is taken to last as long as the last one of its `kind`,
        or `guess` seconds.
        """
        if self.has(name, into):
            return True
        if self.budget and self.elapsed() + self.lasted.get(kind, guess) > self.budget:
            self.leave_out(name, "time limit")
            return True
        started, failure = time.perf_counter(), None
        try:
            cell = name | measure()
        except Exception as error:
            # The other cells are worth having; the run ends with an error all the same, if it is not about memory.
            if is_out_of_memory(error):
                failure = "out of memory"
            elif isinstance(error, LeftOut):
                failure = str(error)
            else:
                if not isinstance(error, Wrong):
                    traceback.print_exc()
                failure = f"failed: {type(error).__name__}: {str(error).strip()[:200]}"
        if failure:
            release_memory()
            self.leave_out(name, failure)
            return failure != "out of memory"
        self.lasted[kind] = time.perf_counter() - started
        self.results[into].append(cell)
        # What is nested is for the file.
        flat = {key: value for key, value in cell.items() if not isinstance(value, dict | list)}
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in flat.items()}
        print(f"[{self.elapsed():5.0f} s] " + ", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
        self.write()
        return True

    def leave_out(self, name: dict, reason: str) -> None:
        self.results["left_out"].append(name | {"reason": reason})
        print(f"[{self.elapsed():5.0f} s] left out, {reason}: {name}", flush=True)
        self.write()

    def failures(self) -> str | None:
        """For `sys.exit`: cells that did not end for want of time or memory."""
        failed = [cell for cell in self.results["left_out"] if cell["reason"].startswith("failed")]
        return f"{len(failed)} cells failed: see above and the list of what was left out." if failed else None


def run_cells(args: argparse.Namespace, kind: type[Run]) -> str | None:
    """All cells of a run, unless only the report of an earlier one is wanted; what failed, for the exit status."""
    if args.plot_only:
        return None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run = kind(args)
    run.all()
    run.write()
    return run.failures()
