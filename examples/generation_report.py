# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The table and the plot of what benchmark_generation.py measured, from its JSON alone."""

import json
import sys
from pathlib import Path


NAMES = {"based": "Based", "llama": "Llama"}


def label(cell: dict) -> str:
    return NAMES[cell["model"]] + (", static cache" if cell["mode"] == "static" else "")


def find(results: dict, **what) -> list[dict]:
    return [cell for cell in results["cells"] if what.items() <= cell.items()]


def speed_table(results: dict, shape: str) -> list[str]:
    lines = [
        "| model | batch | tokens/s | ms a step | of the limit | cache per row | prefill | tokens/s | timed tokens |",
        "|---" + "|---:" * 8 + "|",
    ]
    for cell in find(results, shape=shape):
        best = " (best)" if cell.get("best") else ""
        row = [
            label(cell),
            f"{cell['batch']:,}{best}",
            f"{cell['tokens_per_second']:,.0f}",
            f"{cell['ms_per_step']:.2f}",
            f"{cell['fraction_of_limit']:.0%}",
            f"{cell['bytes_per_sequence'] / 1e6:,.1f} MB",
            f"{cell['prefill_seconds']:.2f} s",
            f"{cell['prefill_tokens_per_second']:,.0f}",
            f"{cell['timed_tokens']:,}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def ratios(results: dict, shape: str) -> list[str]:
    """Based over Llama: batch by batch, and the fastest over the fastest."""

    def line(what: str, ours: dict, theirs: dict) -> str:
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        return f"- {what}: {ratio:.1f} times {label(theirs)}"

    lines = []
    llamas = find(results, shape=shape, model="llama")
    for ours in find(results, shape=shape, model="based"):
        for theirs in llamas:
            if theirs["batch"] == ours["batch"]:
                lines.append(line(f"batch {ours['batch']:,}", ours, theirs))
    ours = max(find(results, shape=shape, model="based"), key=lambda cell: cell["tokens_per_second"], default=None)
    theirs = max(llamas, key=lambda cell: cell["tokens_per_second"], default=None)
    if ours and theirs:
        lines.append(line(f"the best of each, batch {ours['batch']:,} and {theirs['batch']:,}", ours, theirs))
    return lines


def position_table(results: dict, shape: str) -> list[str]:
    cells = [cell for cell in results["positions"] if cell["shape"] == shape]
    if not cells:
        return []
    left_out = [cell for cell in results["left_out"] if cell["shape"] == shape and "position" in cell]
    positions = sorted({cell["position"] for cell in cells + left_out})
    lines = [
        f"Milliseconds of a step by the tokens already read, batch {cells[0]['batch']}:",
        "",
        "| model | " + " | ".join(f"{position:,}" for position in positions) + " |",
        "|---" + "|---:" * len(positions) + "|",
    ]
    for model in dict.fromkeys(cell["model"] for cell in cells):
        times = {cell["position"]: f"{cell['ms_per_step']:.2f}" for cell in cells if cell["model"] == model}
        reasons = {cell["position"]: cell["reason"].partition(":")[0] for cell in left_out if cell["model"] == model}
        row = [times.get(position, reasons.get(position, "-")) for position in positions]
        lines.append(f"| {NAMES[model]} | " + " | ".join(row) + " |")
    return lines


def table(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Speed of generate()",
        "",
        f"{results['device']}; {versions}; {results['dtype']}, random weights; prompt of {results['prompt']:,} tokens "
        f"and {results['new_tokens']:,} new ones, greedy. Limit: weights, states and windows of a step over the "
        f"bandwidth of a copy, {results['copy_bytes_per_second'] / 1e9:,.0f} GB/s. Written by "
        "`examples/benchmark_generation.py`, which says how each number comes about.",
    ]
    for shape in results["verified"]:
        models = [model for model in results["models"] if model["shape"] == shape]
        sizes = ", ".join(f"{NAMES[model['model']]} {model['parameters']:,} parameters" for model in models)
        lines += ["", f"## {shape}", "", sizes + ".", "", *speed_table(results, shape)]
        for part in (ratios(results, shape), position_table(results, shape)):
            lines += ["", *part] if part else []
    if results["left_out"]:
        lines += ["", "## Left out", ""]
        for cell in results["left_out"]:
            where = f"position {cell['position']:,}" if "position" in cell else f"batch {cell['batch']:,}"
            where += " (best)" if cell.get("best") else ""
            lines.append(f"- {cell['shape']}, {label(cell)}, {where}: {cell['reason']}")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Tokens per second over the batch, and the cost of a step over the position; one row for each shape."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print(f"No plot: matplotlib is not installed. --plot-only draws it elsewhere, from what is in {path.parent}.")
        return
    shapes = list(results["verified"])
    figure, axes = pyplot.subplots(len(shapes), 2, figsize=(11, 4 * len(shapes)), squeeze=False)
    for (speed, cost), shape in zip(axes, shapes):
        curves, by_position = {}, {}
        for cell in find(results, shape=shape):
            curves.setdefault(label(cell), []).append((cell["batch"], cell["tokens_per_second"]))
        for cell in results["positions"]:
            if cell["shape"] == shape:
                by_position.setdefault(label(cell), []).append((cell["position"], cell["ms_per_step"]))
        for axis, lines, x, y in (
            (speed, curves, "sequences in a batch", "tokens per second"),
            (cost, by_position, "tokens already read", "ms per step"),
        ):
            for name, points in lines.items():
                axis.plot(*zip(*sorted(points)), marker="o", label=name)
            axis.set_xscale("log", base=2)
            axis.set_xlabel(x)
            axis.set_ylabel(y)
            axis.grid(alpha=0.3)
            if lines:
                axis.legend()
        speed.set_yscale("log")
        cost.set_ylim(bottom=0)
        speed.set_title(f"{shape}, {results['device']}, {results['dtype']}")
        cost.set_title(f"{shape}: cost of a step over the position")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_report(folder: Path) -> dict:
    """Writes generation.md and generation.png beside the generation.json in `folder`, and returns its content."""
    try:
        results = json.loads((folder / "generation.json").read_text())
    except FileNotFoundError:
        sys.exit(f"No generation.json in {folder}: run benchmark_generation.py without --plot-only first.")
    (folder / "generation.md").write_text(table(results))
    print(f"\n{table(results)}")
    plot(results, folder / "generation.png")
    return results
