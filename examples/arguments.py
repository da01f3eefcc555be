# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Checks of command-line arguments that the programs beside this one share: types for argparse, and of an output."""

import argparse
import math
import sys
from pathlib import Path


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def rate(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def check_folder(option: str, folder: Path) -> None:
    """Exits if a file stands in the way of `folder`, which may not exist yet."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            sys.exit(f"{option} {folder}: {path} is a file, choose another folder.")
