# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""The frontier as a table and a plot, from the CSV of run.py alone.

    python examples/recall/frontier_report.py [results/frontier.csv]

Writes a .md and a .png beside it. A model counts with the learning rate that served it best.
"""

import csv
import math
import sys
from pathlib import Path


NAMES = {
    "based": ("Based", "feature dim"),
    "sliding_window": ("sliding window", "window"),
    "attention": ("attention (Llama)", "tokens"),
    "mamba": ("Mamba", "state size"),
}
MODEL = ("kind", "width", "size", "value_dim")
TEXTS = ("kind", "device", "torch", "transformers")
INTEGERS = (
    "width",
    "size",
    "value_dim",
    "seed",
    "steps",
    "batch_size",
    "parameters",
    "state_bytes",
    "state_bytes_bf16",
)
# Bytes (log 2) and accuracy, read off the figure in the paper.
PAPER = {
    "based": [(14.5, 0.82), (15.3, 0.89), (16.3, 0.97), (17.3, 0.99)],
    "sliding_window": [(16, 0.51), (18, 0.80)],
    "attention": [(19, 1.0)],
    "mamba": [(16, 0.80), (17, 0.89)],
}
TARGET_ACCURACY, TARGET_BYTES = 0.97, 15.7
# Attention holds every token of the easiest test and Mamba could: who answers it worse has not been trained enough.
LEARNED = 0.9
# The most in a training on the whole task (mqar.TRAIN); tests with more are longer than any text of the training.
TRAINED_PAIRS = 64


def read_value(name: str, text: str) -> str | int | float:
    """Raises `ValueError` for what cannot stand in the column `name`."""
    if name in TEXTS:
        if not text or (name == "kind" and text not in NAMES):
            raise ValueError
        return text
    if name in INTEGERS:
        return int(text)
    # A loss may be no number while the accuracy is one.
    if name != "loss" and not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def read_row(names: list[str], texts: list[str]) -> dict:
    """Raises `ValueError`, which says why, for a row that was not written to its end or is damaged."""
    if len(texts) != len(names):
        raise ValueError(f"{len(texts)} columns in place of {len(names)}")
    row = {}
    for name, text in zip(names, texts):
        try:
            row[name] = read_value(name, text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}") from None
    return row


def read_columns(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return next(csv.reader(file), [])


def read_rows(path: Path) -> list[dict]:
    """The rows of the CSV, numbers as numbers. Exits where it is none of run.py or a row is damaged."""
    if not path.is_file():
        sys.exit(f"There is no {path}: run.py writes it.")
    names = read_columns(path)
    for name in (*TEXTS, *INTEGERS, "learning_rate", "accuracy"):
        if name not in names:
            sys.exit(f"{path} has no column {name}: it is not a table that run.py writes.")
    rows = []
    # Line by line, since a quote that nothing closes would take all that follows into its row.
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if number == 1 or not line.strip():
            continue
        try:
            rows.append(read_row(names, next(csv.reader([line]))))
        except (ValueError, csv.Error) as error:
            sys.exit(f"{path}, line {number}, is damaged ({error}): delete that line, run.py trains its model again.")
    return rows


def best_rows(rows: list[dict]) -> list[dict]:
    """Of each model the row with the highest accuracy, by kind and bytes."""
    best = {}
    for row in rows:
        key = tuple(row[name] for name in MODEL)
        if key not in best or row["accuracy"] > best[key]["accuracy"]:
            best[key] = row
    order = list(NAMES)
    return sorted(best.values(), key=lambda row: (order.index(row["kind"]), row["state_bytes"], row["width"]))


def frontier(points: list[dict], kind: str) -> list[dict]:
    """Those that no other model of their kind beats with as few bytes, by bytes."""
    found = []
    for row in sorted(
        (row for row in points if row["kind"] == kind), key=lambda row: (row["state_bytes"], -row["accuracy"])
    ):
        if not found or row["accuracy"] > found[-1]["accuracy"]:
            found.append(row)
    return found


def describe(row: dict) -> str:
    values = f", values {row['value_dim']}" if row["value_dim"] else ""
    return f"{NAMES[row['kind']][1]} {row['size']}{values}"


def _pairs(row: dict) -> list[int]:
    """How many there are in the tests, fewest first."""
    return sorted(int(name.removeprefix("accuracy_")) for name in row if name.startswith("accuracy_"))


def table(points: list[dict], rows: list[dict]) -> list[str]:
    pairs = _pairs(points[0])
    lines = [
        "| model | width | size | parameters | state, bytes | log2 | with weights in bf16 | steps | learning rate "
        "| accuracy | " + " | ".join(f"{n} pairs" for n in pairs) + " |",
        "|---" + "|---:" * (9 + len(pairs)) + "|",
    ]
    for row in points:
        name = NAMES[row["kind"]][0]
        tried = len({other["learning_rate"] for other in rows if all(other[x] == row[x] for x in MODEL)})
        cells = [
            name,
            str(row["width"]),
            describe(row),
            f"{row['parameters']:,}",
            f"{row['state_bytes']:,}",
            f"{math.log2(row['state_bytes']):.1f}",
            f"{row['state_bytes_bf16']:,}",
            f"{row['steps']:,}",
            f"{row['learning_rate']:g} of {tried}",
            f"**{row['accuracy']:.3f}**",
            *(f"{row[f'accuracy_{n}']:.3f}" for n in pairs),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _beyond(row: dict, ours: dict) -> str:
    """Says so where `row` has learned the lengths it was trained on and loses those beyond; `ours` beside it."""
    trained = [row[f"accuracy_{n}"] for n in _pairs(row) if n <= TRAINED_PAIRS]
    beyond = [f"accuracy_{n}" for n in _pairs(row) if n > TRAINED_PAIRS]
    if not beyond or min(trained) < LEARNED or min(row[name] for name in beyond) >= LEARNED:
        return ""
    least = f"{min(trained):.3f}"
    or_more = "" if least == f"{max(trained):.3f}" else " or more"
    theirs, based = (" and ".join(f"{x[name]:.3f}" for name in beyond) for x in (row, ours))
    return (
        f": it has {least}{or_more} up to {TRAINED_PAIRS} pairs, the lengths trained on, and {theirs} beyond, where "
        f"Based has {based}"
    )


def comparisons(points: list[dict]) -> list[str]:
    """Every model beside the best Based that keeps as few bytes or fewer."""
    based = frontier(points, "based")
    lines = []
    for row in points:
        smaller = [other for other in based if other["state_bytes"] <= row["state_bytes"]]
        name, easiest = NAMES[row["kind"]][0], _pairs(row)[0]
        if row["kind"] == "based":
            continue
        if not smaller:
            lines.append(f"- No Based model here is as small as {name} with {row['state_bytes']:,} bytes.")
            continue
        if row["kind"] in ("attention", "mamba") and row[f"accuracy_{easiest}"] < LEARNED:
            lines.append(
                f"- {name} of width {row['width']} has not learned the task in {row['steps']:,} steps "
                f"({row[f'accuracy_{easiest}']:.3f} with {easiest} pairs): it says nothing about its kind."
            )
            continue
        ours = smaller[-1]
        if ours[f"accuracy_{easiest}"] < LEARNED:
            lines.append(
                f"- Based with {ours['state_bytes']:,} bytes has not learned the task yet in {ours['steps']:,} steps "
                f"({ours[f'accuracy_{easiest}']:.3f} with {easiest} pairs): no verdict on {name} with "
                f"{row['state_bytes']:,} ({row['accuracy']:.3f}; width {row['width']}, {describe(row)})."
            )
            continue
        difference = ours["accuracy"] - row["accuracy"]
        verdict = "above" if difference > 0 else "below" if difference else "level with"
        lines.append(
            f"- Based with {ours['state_bytes']:,} bytes ({ours['accuracy']:.3f}) is {verdict} {name} with "
            f"{row['state_bytes']:,} ({row['accuracy']:.3f}; width {row['width']}, {describe(row)})"
            f"{_beyond(row, ours)}."
        )
    reached = [row for row in based if row["accuracy"] >= TARGET_ACCURACY]
    if reached:
        lines.append(
            f"- Based reaches {TARGET_ACCURACY} with {reached[0]['state_bytes']:,} bytes, "
            f"2^{math.log2(reached[0]['state_bytes']):.1f}; the aim was 2^{TARGET_BYTES}."
        )
    elif based:
        lines.append(f"- No Based model here reaches {TARGET_ACCURACY}; the best has {based[-1]['accuracy']:.3f}.")
    return lines


def count(things: list, noun: str) -> str:
    return f"{len(things)} {noun}{'s' if len(things) != 1 else ''}"


def document(path: Path, rows: list[dict]) -> str:
    points = best_rows(rows)
    machines = sorted({f"{row['device']}, torch {row['torch']}, transformers {row['transformers']}" for row in rows})
    trainings = sorted({f"{row['steps']:,} steps of {row['batch_size']} rows" for row in rows})
    lines = [
        f"# Recall over memory: {path.stem}",
        "",
        f"{count(rows, 'training')} of {count(points, 'model')}, {'; '.join(trainings)}; {'; '.join(machines)}. "
        "Written by `examples/recall/frontier_report.py` from the CSV beside it.",
        "",
        f"![accuracy over bytes of state]({path.stem}.png)",
        "",
        "Accuracy: the mean over the tests, each counting alike. State: what the cache of the model holds for one "
        "sequence, behind the longest test, in fp32 as it was trained and measured; and with weights in bf16, where "
        "keys, values and inputs of convolutions take half, and the recurrent states stay fp32.",
        "",
        *table(points, rows),
        "",
        "## Beside Based",
        "",
        *comparisons(points),
    ]
    return "\n".join(lines) + "\n"


def plot(points: list[dict], path: Path, with_paper: bool) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print('No plot without matplotlib: pip install ".[plot]"')
        return
    figure, axis = pyplot.subplots(figsize=(8, 5))
    for number, (kind, (name, _)) in enumerate(NAMES.items()):
        color, of_kind = f"C{number}", [row for row in points if row["kind"] == kind]
        best = frontier(points, kind)
        axis.plot([row["state_bytes"] for row in best], [row["accuracy"] for row in best], color=color)
        if of_kind:
            axis.scatter(
                [row["state_bytes"] for row in of_kind], [row["accuracy"] for row in of_kind], color=color, label=name
            )
        if with_paper:
            axis.plot(
                [2**x for x, _ in PAPER[kind]],
                [y for _, y in PAPER[kind]],
                color=color,
                marker="x",
                linestyle=":",
                alpha=0.5,
                label=f"{name}, paper",
            )
    axis.set_xscale("log", base=2)
    axis.set(xlabel="bytes of state for a sequence", ylabel="accuracy of recall", ylim=(0, 1.03))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_report(path: Path) -> None:
    """Writes the .md and the .png beside the CSV `path`."""
    rows = read_rows(path)
    if not rows:
        sys.exit(f"{path} has no rows yet.")
    text = document(path, rows)
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}")
    # The paper's numbers are of the whole task.
    plot(best_rows(rows), path.with_suffix(".png"), with_paper="accuracy_256" in rows[0])


if __name__ == "__main__":
    write_report(
        Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "results" / "frontier.csv"
    )
