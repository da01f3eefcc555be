# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Runs the programs of this repository as a user does, from whichever source tree the tests run from."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def environment(**variables: str | None) -> dict[str, str]:
    """
    The variables for a subprocess: the packages can be imported, nothing reaches out to a network, one CPU thread.
    `variables` come on top; None removes one.
    """
    paths = [str(ROOT / "src"), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH", "")]
    values = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # So that `python` in a command line is this one.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }
    return {name: value for name, value in values.items() if value is not None}


def run(*command: str | Path, cwd: Path = ROOT, check: bool = True, **variables: str | None):
    """The finished process of `command`, its output as text in `stdout` and `stderr`; a failure shows both."""
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=600,
    )
    if check and process.returncode:
        raise AssertionError(f"exit code {process.returncode}\n{process.stdout}\n{process.stderr}")
    return process


def run_python(*arguments: str | Path, **options):
    """`run` with this interpreter."""
    return run(sys.executable, *arguments, **options)


def load_program(path: str):
    """A program of this repository as a module; as when it is run, it can import the modules beside it."""
    folder = str((ROOT / path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held_out_losses(output: str) -> list[float]:
    """What examples/finetune.py prints: before, after, and by the saved model."""
    return [float(x) for x in re.findall(r"^Held-out text .*: loss ([\d.]+), perplexity", output, re.MULTILINE)]
