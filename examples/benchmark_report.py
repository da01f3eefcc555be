# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""What the reports of the benchmarks share: reading the JSON of a run, and parts of its table and its plot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


NAMES = {"based": "Based", "llama": "Llama", "mamba": "Mamba", "mamba2": "Mamba 2"}


def find(results: dict, **what) -> list[dict]:
    return [cell for cell in results["cells"] if what.items() <= cell.items()]


def machine_line(results: dict) -> str:
    return f"{results['device']}; " + ", ".join(f"{name} {version}" for name, version in results["versions"].items())


def markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The first column is text, the others are numbers."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def noise(cell: dict) -> str:
    """Half the interquartile range of the runs, of which there must be some."""
    return f"{cell['noise'] / 2:.1%}" if cell["runs"] > 1 else "one run"


def left_out_list(results: dict, describe: Callable[[dict], str]) -> list[str]:
    """A heading and a line for each cell that was left out; nothing if none was."""
    if not results["left_out"]:
        return []
    return ["", "## Left out", "", *(f"- {describe(cell)}: {cell['reason']}" for cell in results["left_out"])]


class Panel(NamedTuple):
    """Named lines over a logarithmic x; `x` and `y` are what is written on the axes."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]
    log_y: bool = False


def save_plot(path: Path, rows: list[list[Panel]]) -> None:
    """All rows have as many panels. Without matplotlib, only says so."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print(f"No plot: matplotlib is not installed. --plot-only draws it elsewhere, from what is in {path.parent}.")
        return
    columns = max(map(len, rows), default=1)
    figure, axes = pyplot.subplots(
        max(len(rows), 1), columns, figsize=(5.5 * columns, 4 * max(len(rows), 1)), squeeze=False
    )
    for axis, panel in zip(axes.flat, (panel for row in rows for panel in row)):
        for name, points in panel.lines.items():
            axis.plot(*zip(*sorted(points)), marker="o", label=name)
        axis.set_title(panel.title)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(panel.x)
        axis.set_ylabel(panel.y)
        if panel.log_y:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if panel.lines:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_report(
    folder: Path,
    name: str,
    table: Callable[[dict], str],
    panels: Callable[[dict], list[list[Panel]]] | None = None,
) -> dict:
    """Writes `name`.md, and with `panels` `name`.png, beside the `name`.json in `folder`; returns its content."""
    try:
        results = json.loads((folder / f"{name}.json").read_text())
    except FileNotFoundError:
        raise SystemExit(f"No {name}.json in {folder}: run the program without --plot-only first.") from None
    (folder / f"{name}.md").write_text(table(results))
    print(f"\n{table(results)}")
    if panels is not None:
        save_plot(folder / f"{name}.png", panels(results))
    return results
