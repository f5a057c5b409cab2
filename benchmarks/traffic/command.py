"""Bytes and kernel launches per op and per training step, eager against fusekit, counted without a GPU.

`python -m benchmarks.traffic` counts and compares with benchmarks/results/traffic.json: fusekit may move no
more bytes, start no more kernels and save no more for the backward pass than is recorded. `--record` writes
the file; `--norms` counts the norm kernels' bytes exactly, which takes a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results_file import RESULTS as FOLDER
from benchmarks.results_file import TRAFFIC_SCHEMA, environment, read_results, write_results
from benchmarks.traffic import models, norms
from benchmarks.traffic.counting import launches, moved
from benchmarks.traffic.ops import count_ops

RESULTS = FOLDER / "traffic.json"
OURS = ("fusekit", "fusekit bf16")
Row = dict[str, Any]


def count() -> Row:
    """Every op and every model."""
    return {
        "kind": "traffic",
        "schema": TRAFFIC_SCHEMA,
        "environment": environment(),
        "ops": list(count_ops()),
        "models": list(models.count_models()),
    }


def name_of(row: Row) -> str:
    """What a row is about; the same in every file."""
    if "model" in row:
        return str(row["model"])
    return f"{row['op']} {row['sample']} {row['dtype']}"


def figures(row: Row, contender: str) -> Iterator[tuple[str, int]]:
    """What is counted of one contender, each with its name."""
    found = row[contender]
    for direction in ("forward", "backward"):
        for what in ("bytes", "launches"):
            yield f"{direction} {what}", found[direction][what]
    yield "bytes saved for backward", found["saved_bytes"]


def compare(old: Row, new: Row) -> tuple[list[str], list[str]]:
    """Sentences about what is more in the new file than in the old, and about what is less."""
    before = {name_of(row): row for part in ("ops", "models") for row in old[part]}
    more: list[str] = []
    less: list[str] = []
    for row in (row for part in ("ops", "models") for row in new[part]):
        for contender in filter(row.get, OURS):
            recorded = before.get(name_of(row), {})
            if contender not in recorded:
                continue
            was = dict(figures(recorded, contender))
            for what, now in figures(row, contender):
                if now != was[what]:
                    found = f"{name_of(row)}: {what} {now:,}, {was[what]:,} before"
                    (more if now > was[what] else less).append(found)
    return more, less


def compare_traffic(old: Row, new: Row, console: Console) -> int:
    """Print what moved; 1: something is more."""
    more, less = compare(old, new)
    for sentence in less:
        console.print(f"less: {sentence}", style="green", highlight=False, soft_wrap=True)
    for sentence in more:
        console.print(f"more: {sentence}", style="red", highlight=False, soft_wrap=True)
    console.print(f"traffic: {len(more)} figures are more, {len(less)} less", highlight=False)
    return 1 if more else 0


def table(title: str, rows: list[Row]) -> Table:
    """MB and launches of every contender, forward + backward, and MB saved in between."""
    view = Table(title=title, title_justify="left")
    for heading in ("", " ", "MB forward", "MB backward", "moved", "launches", "MB saved"):
        view.add_column(heading, justify="right" if heading.strip() else "left", no_wrap=True)
    for row in rows:
        contenders = [key for key in row if isinstance(row[key], dict)]
        base = moved(row[contenders[0]])
        for number, contender in enumerate(contenders):
            found = row[contender]
            view.add_row(
                name_of(row) if not number else "",
                contender,
                *(f"{found[d]['bytes'] / 1e6:.1f}" for d in ("forward", "backward")),
                f"{moved(found) / base:.2f}×",
                str(launches(found)),
                f"{found['saved_bytes'] / 1e6:.1f}",
                end_section=number == len(contenders) - 1,
            )
    return view


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic",
                                     description=(__doc__ or "").split("\n")[0])  # fmt: skip
    parser.add_argument("--record", action="store_true", help="write the results file")
    parser.add_argument("--norms", action="store_true", help="count the norm kernels' bytes exactly, too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="results file (default %(default)s)")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        recorded = read_results(options.out, "traffic") if options.out.exists() else None
        with console.status("counting"):
            exact = norms.measure() if options.norms else (recorded or {}).get("norms", {})
            found = count() | {"norms": exact}
    except ValueError as error:
        print(f"traffic: {error}", file=sys.stderr)
        return 2
    for title, part in (("ops", "ops"), ("training step without optimizer", "models")):
        console.print(table(title, found[part]))
    over = [f"{name}: {r['ratio']:.3f} times the least bytes, at most {norms.LIMIT} are allowed"
            for name, r in found["norms"].items() if r["ratio"] > norms.LIMIT]  # fmt: skip
    more, less = compare(recorded, found) if recorded else ([], [])
    for sentence in less:
        console.print(f"less: {sentence}", highlight=False, soft_wrap=True)
    for sentence in [*more, *over]:
        console.print(f"more: {sentence}", style="red", highlight=False, soft_wrap=True)
    if options.record:
        write_results(options.out, found)
        console.print(f"written to {options.out}", highlight=False, soft_wrap=True)
        return 1 if over else 0
    rows = len(found["ops"]) + len(found["models"])
    console.print(
        f"traffic: {rows} rows, {len(more) + len(over)} with more than is recorded", highlight=False
    )
    return 1 if more or over else 0
