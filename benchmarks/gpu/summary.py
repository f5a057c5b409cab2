"""What a run found, in one screen: tests, gains per op, models, failures, what is missing, the files."""

from __future__ import annotations

import importlib
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.kernels.run import grouped
from benchmarks.results_file import read_kernels

MOST_LINES = 12  # printed of failures and of what was left out; the files have all
COLOURS = {
    "complete": "green",
    "failed": "red",
    "incomplete": "yellow",
    "skipped": "yellow",
    "left out": "yellow",
}
DIRECTIONS = ("forward", "backward", "training")
AGAINST = ("eager", "compile")


def show(results: dict[str, Any], console: Console) -> None:
    console.print()
    console.print(parts(results))
    cells = _cells(Path(results["parts"].get("kernels", {}).get("file", "")))
    if cells:
        console.print(gains(cells))
    models = _models(Path(results["parts"].get("models", {}).get("file", "")))
    if models is not None:
        console.print(models)
    _lines(console, "failed", [f for part in results["parts"].values() for f in part.get("failures", [])])
    missing = [item for part in results["parts"].values() for item in part.get("left_out", {}).items()]
    _lines(console, "left out", [f"{name}: {reason}" for name, reason in missing])


def parts(results: dict[str, Any]) -> Table:
    machine = results["environment"]
    where = f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}, triton {machine['triton']}"
    where += f", {results['minutes']:g} minutes" + (
        "; dry, no figure means anything" if results["dry"] else ""
    )
    view = Table(title=where, title_justify="left")
    for heading in ("part", "", "found", "file"):
        view.add_column(heading, overflow="fold")
    view.add_column("s", justify="right", no_wrap=True)
    for name, part in results["parts"].items():
        status = part["status"]
        file = Path(part["file"])
        written = file if file.exists() else file.with_name(file.name + ".partial")
        shown = written.name if written.exists() else ""
        seconds = f"{part['seconds']:.0f}" if "seconds" in part else ""
        view.add_row(name, f"[{COLOURS.get(status, 'red')}]{status}[/]", _found(part), shown, seconds)
    return view


def _found(part: dict[str, Any]) -> str:
    counts = ", ".join(f"{number} {what}" for what, number in part.get("counts", {}).items())
    failures = f"{len(part['failures'])} failed" if part.get("failures") and "failed" not in counts else ""
    return escape("; ".join(text for text in (counts, failures, part.get("reason")) if text))


def gains(cells: list[dict[str, Any]]) -> Table:
    """Per op and dtype the median over its samples of eager's and torch.compile's time over fusekit's."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    samples: dict[tuple[str, str], set[str]] = defaultdict(set)
    for (op, sample, dtype, direction), row in grouped(cells).items():
        ours = row.get("fusekit", {}).get("seconds")
        for other in AGAINST:
            theirs = row.get(other, {}).get("seconds")
            if ours and theirs:
                found[op, dtype][direction, other].append(theirs / ours)
                samples[op, dtype].add(sample)
    view = Table(title="median gain of fusekit: over eager, over torch.compile", title_justify="left")
    for heading in ("op", "dtype"):
        view.add_column(heading)
    for heading in ("samples", *(f"{d} {o}" for d in DIRECTIONS for o in AGAINST)):
        view.add_column(heading, justify="right")
    for (op, dtype), ratios_by in found.items():
        columns = [ratios_by.get((d, o)) for d in DIRECTIONS for o in AGAINST]
        texts = [f"{statistics.median(ratios):.2f}×" if ratios else "–" for ratios in columns]
        view.add_row(op, dtype, str(len(samples[op, dtype])), *texts)
    return view


def _cells(path: Path) -> list[dict[str, Any]]:
    """Of the finished file, or of the one that a cut-off run left."""
    for candidate in (Path(f"{path}.partial"), path):
        if candidate.is_file():
            try:
                return read_kernels(candidate)["cells"]
            except ValueError:
                continue
    return []


def _models(path: Path) -> Table | None:
    """None where there is no file, or one that this checkout cannot read."""
    for candidate in (Path(f"{path}.partial"), path):
        if candidate.is_file():
            try:
                results = json.loads(candidate.read_text(encoding="utf-8"))
                return importlib.import_module("benchmarks.models.run").table(results)
            except (ImportError, ValueError, KeyError):
                continue
    return None


def _lines(console: Console, what: str, lines: list[str]) -> None:
    for line in lines[:MOST_LINES]:
        console.print(f"{what}: {line}", highlight=False, soft_wrap=True, markup=False)
    if len(lines) > MOST_LINES:
        console.print(f"{what}: {len(lines) - MOST_LINES} more; the results files name all", highlight=False)
