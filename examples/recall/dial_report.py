# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""How `linear_feature_dim` and `sliding_window` trade state, speed and recall: results/dial.md and dial.png.

    python examples/recall/dial_report.py

All measured numbers come from results/frontier.csv (run.py) and examples/results/generation.json
(benchmark_generation.py). What follows from them is computed here and says so: bytes of other settings, counted as the
cache holds them, and the limit of a step, the bytes that it moves over the bandwidth that the benchmark measured.
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

from frontier_report import best_rows, read_rows

from transformers_based import BasedConfig, based_1b
from transformers_based.cache_based import NUM_PENDING


HERE = Path(__file__).resolve().parent
# What is read from generation.json.
NUMBER = (int, float)
OF_MODEL = {"shape": str, "model": str, "weight_bytes": NUMBER, "bytes_per_sequence": NUMBER}
OF_CELL = {"shape": str, "model": str, "batch": int, "tokens_per_second": NUMBER}
OF_ALL = {"device": str, "dtype": str, "copy_bytes_per_second": NUMBER, "models": list, "cells": list}
FEATURE_DIMS, WINDOWS = (8, 16, 24), (17, 65, 129, 257, 1025)
SHAPES = {"360m": {}, "1.3b": based_1b}


def has(value, types: dict[str, type | tuple]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), of) for name, of in types.items())


def is_generation(value) -> bool:
    """Whether `value` has what is read from it here, one Based for each shape among it."""
    if not has(value, OF_ALL) or not value["copy_bytes_per_second"] > 0 or not value["models"]:
        return False
    if not all(has(x, OF_MODEL) for x in value["models"]) or not all(has(x, OF_CELL) for x in value["cells"]):
        return False
    based = [model["shape"] for model in value["models"] if model["model"] == "based"]
    drawn, tabled = value["models"][0]["shape"], {cell["shape"] for cell in value["cells"]} & SHAPES.keys()
    return drawn in SHAPES and all(based.count(shape) == 1 for shape in {drawn, *tabled})


def read_generation(path: Path) -> dict:
    if not path.is_file():
        sys.exit(f"There is no {path}: benchmark_generation.py writes it.")
    try:
        generation = json.loads(path.read_text())
    except ValueError:
        generation = None
    if not is_generation(generation):
        sys.exit(f"{path} is damaged or something else: examples/benchmark_generation.py writes it.")
    return generation


def state_parts(config: BasedConfig, value_bytes: int = 2) -> dict[str, int]:
    """
    Bytes for one sequence behind a full window: fp32 for the sums of linear layers, `value_bytes` for the rest. Beside
    each sum a GPU keeps the last tokens and their number, which spares it writing the sum.
    """
    layers = {kind: config.layer_types.count(kind) for kind in ("linear_attention", "sliding_attention", "conv")}
    features = -(-(config.linear_feature_dim + 1) * (config.linear_feature_dim + 2) // 2 // 8) * 8
    linear = config.linear_num_heads * (config.linear_head_dim + 1) * features * 4
    window = 2 * (config.sliding_window - 1) * config.num_key_value_heads * config.head_dim * value_bytes
    conv = (config.conv_kernel_size - 1) * config.conv_intermediate_size * value_bytes
    parts = {name: layers[name] * size for name, size in zip(layers, (linear, window, conv))}
    waiting = NUM_PENDING * (config.linear_feature_dim + config.linear_head_dim) * value_bytes + 4
    return parts | {"waiting": layers["linear_attention"] * config.linear_num_heads * waiting}


def moved(parts: dict[str, int]) -> int:
    """Of a step: sums and inputs of convolutions are read and written, keys and values are read."""
    return 2 * parts["linear_attention"] + 2 * parts["conv"] + parts["sliding_attention"]


def recall_part(rows: list[dict]) -> list[str]:
    points = [row for row in best_rows(rows) if row["kind"] in ("based", "sliding_window")]
    pairs = sorted(int(name.removeprefix("accuracy_")) for name in rows[0] if name.startswith("accuracy_"))
    few, many = pairs[len(pairs) // 2], pairs[-1]
    lines = [
        f"| knob | width | setting | state, bytes | accuracy | with {few} pairs | with {many} pairs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(points, key=lambda row: (row["kind"], row["width"], row["size"], row["value_dim"])):
        knob = {"based": "linear_feature_dim", "sliding_window": "sliding_window"}[row["kind"]]
        values = f", values {row['value_dim']}" if row["value_dim"] else ""
        lines.append(
            f"| `{knob}` | {row['width']} | {row['size']}{values} | {row['state_bytes']:,} | {row['accuracy']:.3f} | "
            f"{row[f'accuracy_{few}']:.3f} | {row[f'accuracy_{many}']:.3f} |"
        )
    return lines


def finding(rows: list[dict]) -> list[str]:
    """What the feature dim brings at width 128 with values of the width, where all of `FEATURE_DIMS` were trained."""
    of_dim = {
        row["size"]: row
        for row in best_rows(rows)
        if (row["kind"], row["width"], row["value_dim"]) == ("based", 128, 0) and row["size"] in FEATURE_DIMS
    }
    if len(of_dim) < len(FEATURE_DIMS):
        return []
    points = [of_dim[size] for size in FEATURE_DIMS]
    text = ", ".join(f"{row['accuracy']:.3f} with D = {row['size']}" for row in points)
    steps = " and ".join(
        f"{after['accuracy'] - before['accuracy']:+.3f} for {after['state_bytes'] / before['state_bytes']:.1f} times "
        "the bytes"
        for before, after in pairwise(points)
    )
    return ["", f"At width 128, with values of the width, accuracy is {text}: {steps}."]


def speed_part(generation: dict, shape: str) -> list[str]:
    """The released setting as measured beside its limit, and the limits of others."""
    cells = [cell for cell in generation["cells"] if cell["shape"] == shape and cell["model"] == "based"]
    (model,) = [x for x in generation["models"] if x["shape"] == shape and x["model"] == "based"]
    released = BasedConfig(**SHAPES[shape])
    released_parts = state_parts(released)
    if sum(released_parts.values()) != model["bytes_per_sequence"]:
        sys.exit(f"generation.json has {model['bytes_per_sequence']:,} bytes for {shape}: not the released setting.")
    cells = sorted(cells, key=lambda cell: cell["batch"])

    def least_ms(parts: dict[str, int], batch: int) -> float:
        return 1e3 * (model["weight_bytes"] + batch * moved(parts)) / generation["copy_bytes_per_second"]

    def measured_ms(cell: dict) -> float:
        return 1e3 * cell["batch"] / cell["tokens_per_second"]

    def of_state(batch: int) -> float:
        state = batch * moved(released_parts)
        return state / (model["weight_bytes"] + state)

    columns = " | ".join(f"least ms a step, batch {cell['batch']:,}" for cell in cells)
    ends = [cells[0], cells[-1]] if len(cells) > 1 else cells
    times = [f"{measured_ms(x) / least_ms(released_parts, x['batch']):.1f} (batch {x['batch']:,})" for x in ends]
    lines = [
        f"### {shape}",
        "",
        f"Feature dim {released.linear_feature_dim} and window {released.sliding_window}, the released setting, "
        "as measured:",
        "",
        "| batch | tokens/s | ms a step, measured | least ms a step | states, of its bytes |",
        "|---:|---:|---:|---:|---:|",
        *(
            f"| {cell['batch']:,} | {cell['tokens_per_second']:,.0f} | {measured_ms(cell):.2f} | "
            f"{least_ms(released_parts, cell['batch']):.2f} | {of_state(cell['batch']):.0%} |"
            for cell in cells
        ),
        "",
        f"A step takes {' and '.join(times)} times the least. Of the least, the dials move the part that is states; "
        "what a step takes beyond it was measured for this setting alone.",
        "",
        "The least of other settings, computed:",
        "",
        f"| feature dim | window | state, bytes | of it linear | {columns} |",
        "|---:|---:|---:|---:" + "|---:" * len(cells) + "|",
    ]
    settings = [(size, released.sliding_window) for size in FEATURE_DIMS]
    settings += [(released.linear_feature_dim, window) for window in WINDOWS if window != released.sliding_window]
    for size, window in settings:
        parts = state_parts(BasedConfig(**SHAPES[shape], linear_feature_dim=size, sliding_window=window))
        total = sum(parts.values())
        lines.append(
            f"| {size} | {window:,} | {total:,} | {parts['linear_attention'] / total:.0%} | "
            + " | ".join(f"{least_ms(parts, cell['batch']):.2f}" for cell in cells)
            + " |"
        )
    return lines


def document(rows: list[dict], generation: dict) -> str:
    shapes = [shape for shape in SHAPES if any(cell["shape"] == shape for cell in generation["cells"])]
    machines = ", ".join(sorted({row["device"] for row in rows}))
    lines = [
        "# Dialling the state",
        "",
        "A Based model has two dials. `linear_feature_dim` D sets how many keys the linear layers can tell apart: "
        "their state grows with (D + 1)(D + 2) / 2, rounded up to a multiple of 8, for each entry of a value. "
        "`sliding_window` W sets how far back the attention sees exactly: its keys and values grow with W. Neither "
        "grows with the text. Both are set in `BasedConfig` before training.",
        "",
        "![recall and least time of a step over the state](dial.png)",
        "",
        "## Recall",
        "",
        f"Two-layer models on MQAR ({machines}; [frontier.md](frontier.md)): a short convolution, then the one mixer.",
        "",
        *recall_part(rows),
        *finding(rows),
        "",
        "## Speed",
        "",
        f"Decoding of the released shapes ({generation['device']}, {generation['dtype']}, "
        "[generation.md](../../results/generation.md)). The least time of a step is computed: weights, and what a step "
        "moves of the states of the batch, over the measured bandwidth of "
        f"{generation['copy_bytes_per_second'] / 1e9:,.0f} GB/s. The state is counted with the {NUM_PENDING} tokens "
        "that wait beside each sum on a GPU.",
    ]
    for shape in shapes:
        lines += ["", *speed_part(generation, shape)]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], generation: dict, path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print('No plot without matplotlib: pip install ".[plot]"')
        return
    figure, (recall, speed) = pyplot.subplots(1, 2, figsize=(11, 4))
    points = best_rows(rows)
    for kind, knob in (("based", "feature dim"), ("sliding_window", "window")):
        of_kind = [row for row in points if row["kind"] == kind]
        recall.scatter([row["state_bytes"] for row in of_kind], [row["accuracy"] for row in of_kind], label=knob)
        for row in of_kind:
            recall.annotate(str(row["size"]), (row["state_bytes"], row["accuracy"]), fontsize=7)
    recall.set_xscale("log", base=2)
    recall.set(xlabel="bytes of state, two-layer models", ylabel="accuracy of recall", ylim=(0, 1.05))
    shape = generation["models"][0]["shape"]
    (model,) = [x for x in generation["models"] if x["shape"] == shape and x["model"] == "based"]
    batch = 128
    for knob, settings in (
        ("feature dim", [{"linear_feature_dim": size} for size in FEATURE_DIMS]),
        ("window", [{"sliding_window": window} for window in WINDOWS]),
    ):
        parts = [state_parts(BasedConfig(**SHAPES[shape], **setting)) for setting in settings]
        times = [1e3 * (model["weight_bytes"] + batch * moved(x)) / generation["copy_bytes_per_second"] for x in parts]
        sizes = [sum(x.values()) for x in parts]
        speed.plot(sizes, times, marker="o", label=knob)
        for size, ms, setting in zip(sizes, times, settings):
            speed.annotate(str(*setting.values()), (size, ms), fontsize=7)
    speed.set_xscale("log", base=2)
    speed.set(xlabel=f"bytes of state, {shape}", ylabel=f"least ms a step, batch {batch}", ylim=(0, None))
    for axis in (recall, speed):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes dial.md and dial.png from what was measured.")
    parser.add_argument("--frontier", type=Path, default=HERE / "results" / "frontier.csv")
    parser.add_argument("--generation", type=Path, default=HERE.parent / "results" / "generation.json")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    rows = read_rows(args.frontier)
    if not rows:
        sys.exit(f"{args.frontier} has no rows yet.")
    generation = read_generation(args.generation)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "dial.md").write_text(document(rows, generation))
    plot(rows, generation, args.output / "dial.png")
    print(f"Written to {args.output}: dial.md, dial.png.")


if __name__ == "__main__":
    main()
