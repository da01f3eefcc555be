# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The table and the plot of what benchmark_generation.py measured, from its JSON alone."""

from pathlib import Path

import benchmark_report
from benchmark_report import NAMES, Panel, find, left_out_list, machine_line, markdown_table


def label(cell: dict) -> str:
    return NAMES[cell["model"]] + (", static cache" if cell["mode"] == "static" else "")


def speed_table(results: dict, shape: str) -> list[str]:
    columns = ["model", "batch", "tokens/s", "ms a step", "of the limit", "cache per row", "prefill", "tokens/s"]
    rows = []
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
        rows.append(row)
    return markdown_table([*columns, "timed tokens"], rows)


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
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        times = {cell["position"]: f"{cell['ms_per_step']:.2f}" for cell in cells if cell["model"] == model}
        reasons = {cell["position"]: cell["reason"].partition(":")[0] for cell in left_out if cell["model"] == model}
        rows.append([NAMES[model], *(times.get(position, reasons.get(position, "-")) for position in positions)])
    return [
        f"Milliseconds of a step by the tokens already read, batch {cells[0]['batch']}:",
        "",
        *markdown_table(["model", *(f"{position:,}" for position in positions)], rows),
    ]


def describe(cell: dict) -> str:
    where = f"position {cell['position']:,}" if "position" in cell else f"batch {cell['batch']:,}"
    return f"{cell['shape']}, {label(cell)}, {where}" + (" (best)" if cell.get("best") else "")


def table(results: dict) -> str:
    lines = [
        "# Speed of generate()",
        "",
        f"{machine_line(results)}; {results['dtype']}, random weights; prompt of {results['prompt']:,} tokens "
        f"and room for {results['new_tokens']:,} new ones, of which the first are timed, greedy. Limit: weights, "
        "states and windows of a step, each state read and written once (the lazy step writes it less often), over "
        f"the bandwidth of a copy, {results['copy_bytes_per_second'] / 1e9:,.0f} GB/s. Written by "
        "`examples/benchmark_generation.py`, which says how each number comes about"
        + (f"; in {results['runs']} runs, each cell in one of them." if results.get("runs", 1) > 1 else "."),
    ]
    for shape in results["verified"]:
        models = [model for model in results["models"] if model["shape"] == shape]
        sizes = ", ".join(f"{NAMES[model['model']]} {model['parameters']:,} parameters" for model in models)
        lines += ["", f"## {shape}", "", sizes + ".", "", *speed_table(results, shape)]
        for part in (ratios(results, shape), position_table(results, shape)):
            lines += ["", *part] if part else []
    return "\n".join(lines + left_out_list(results, describe)) + "\n"


def panels(results: dict) -> list[list[Panel]]:
    """Tokens per second over the batch, and the cost of a step over the position; one row for each shape."""
    rows = []
    for shape in results["verified"]:
        curves, by_position = {}, {}
        for cell in find(results, shape=shape):
            curves.setdefault(label(cell), []).append((cell["batch"], cell["tokens_per_second"]))
        for cell in results["positions"]:
            if cell["shape"] == shape:
                by_position.setdefault(label(cell), []).append((cell["position"], cell["ms_per_step"]))
        speed = Panel(
            f"{shape}, {results['device']}, {results['dtype']}",
            "sequences in a batch",
            "tokens per second",
            curves,
            log_y=True,
        )
        cost = Panel(f"{shape}: cost of a step over the position", "tokens already read", "ms per step", by_position)
        rows.append([speed, cost])
    return rows


def write_report(folder: Path) -> dict:
    """Writes generation.md and generation.png beside the generation.json in `folder`, and returns its content."""
    return benchmark_report.write_report(folder, "generation", table, panels)
