"""One run of the kernel suite: progress, results on disk after every case, resuming, the terminal table."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.kernels.plan import count, label, plan
from benchmarks.kernels.providers import survey
from benchmarks.kernels.suite import Settings, dtype_name, measure, obstacle
from benchmarks.results_file import KERNEL_SCHEMA, continued, environment, read_kernels, write_results
from fusekit.ceilings import Ceilings, measure_ceilings
from fusekit.kernels.trial import failure

COORDINATES = ("op", "sample", "dtype", "direction")


class DeviceLost(RuntimeError):
    """A kernel left the GPU's context unusable; another process continues after the case that did it."""


def run(settings: Settings, path: Path, console: Console, *, fresh: bool = False) -> dict[str, Any]:
    """Measure everything that fits the time, or what an interrupted run has left over.

    Results are in `path` with the suffix .partial until the run is through, then in `path`.

    Raises:
        ValueError: an interrupted run with other settings, versions or code is in the way.
        DeviceLost: from here on every call on this GPU would fail in this process.
    """
    partial = path.with_name(path.name + ".partial")
    results = _start(settings)
    if partial.exists() and not fresh:
        results = continued(partial, results)
        console.print(f"continuing {partial}: {len(results['done'])} cases are there", highlight=False)
    for name, found in results["providers"].items():
        if found["obstacle"]:
            console.print(f"{name}: skipped, {found['obstacle']}", highlight=False)
    ceilings = measure_ceilings(settings.device, settings.dtypes)
    results["ceilings"] = asdict(ceilings)
    write_results(partial, results)
    _measure_all(_able(settings, results), results, ceilings, partial, console)
    write_results(path, results)
    partial.unlink()
    return results


def _start(settings: Settings) -> dict[str, Any]:
    chosen = {
        "ops": list(settings.ops),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in settings.dtypes],
        "providers": list(settings.providers),
        "seconds_per_cell": settings.seconds,
        "small": settings.small,
    }
    return {
        "kind": "kernels",
        "schema": KERNEL_SCHEMA,
        "environment": environment() | {"device": settings.device.type},
        "settings": chosen,
        "providers": survey(settings.providers, settings.device),
        "ceilings": {},
        "done": [],
        "left_out": {},
        "cells": [],
    }


def _able(settings: Settings, results: dict[str, Any]) -> Settings:
    """The settings with those providers that can be measured here."""
    able = tuple(name for name in settings.providers if not results["providers"][name]["obstacle"])
    return Settings(**{**vars(settings), "providers": able})


def _measure_all(
    settings: Settings, results: dict[str, Any], ceilings: Ceilings, partial: Path, console: Console
) -> None:
    end = time.monotonic() + 60 * settings.minutes
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("kernels", total=count(settings))
        for case in plan(settings):
            name = label(case)
            bar.update(task, description=name)
            if name not in results["done"]:
                reason = obstacle(case, settings, ceilings, end - time.monotonic())
                if reason is not None:
                    results["left_out"][name] = reason
                else:
                    results["running"] = _key(case) | {"label": name}
                    write_results(partial, results)
                    results["cells"] += _cells(case, settings, ceilings)
                    results["done"].append(name)
                    del results["running"]
                if bar.disable:
                    console.print(
                        f"{name}: {reason or _line(results['cells'], case)}", highlight=False, soft_wrap=True
                    )
                write_results(partial, results)
                _check(settings.device, name)
            bar.advance(task)


def _check(device: torch.device, name: str) -> None:
    """An illegal memory access breaks every later call too: better to end than to blame the other kernels."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(
            f"the GPU cannot be used after {name}: {failure(error)}; the same command continues after it"
        ) from None


def blame(path: Path, reason: str) -> str | None:
    """Record that the case under way ended the process; its label, or None where no case was under way."""
    partial = path.with_name(path.name + ".partial")
    results = read_kernels(partial) if partial.exists() else {}
    running = results.pop("running", None)
    if running is None:
        return None
    name = running.pop("label")
    results["cells"] += _failed(running, results["settings"]["providers"], reason)
    results["done"].append(name)
    write_results(partial, results)
    return name


def _cells(case: Any, settings: Settings, ceilings: Ceilings) -> list[dict[str, Any]]:
    try:
        return measure(case, settings, ceilings)
    except Exception as error:  # the reference itself failed, or memory ran out between providers
        return _failed(_key(case), settings.providers, failure(error))


def _key(case: Any) -> dict[str, Any]:
    name = case.sample.name or str(case.index)
    return {"op": case.name, "sample": name, "dtype": dtype_name(case), "shapes": [], "direction": "forward"}


def _failed(key: dict[str, Any], providers: Iterable[str], reason: str) -> list[dict[str, Any]]:
    return [key | {"provider": provider, "failed": reason} for provider in providers]


def _line(cells: list[dict[str, Any]], case: Any) -> str:
    name = (case.name, case.sample.name or str(case.index), str(case.dtype).removeprefix("torch."))
    mine = [c for c in cells if (c["op"], c["sample"], c["dtype"]) == name]
    return ", ".join(f"{c['direction']} {c['provider']} {shown(c)}" for c in mine)


def shown(cell: dict[str, Any]) -> str:
    """A cell in one word or two."""
    if "failed" in cell:
        return "failed"
    return f"{1e6 * cell['seconds']:.0f} µs" if "seconds" in cell else "–"


def grouped(
    cells: list[dict[str, Any]], coordinates: tuple[str, ...] = COORDINATES
) -> dict[tuple[str, ...], dict[str, dict[str, Any]]]:
    """Cells by (op, sample, dtype, direction), then by provider."""
    rows: dict[tuple[str, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for cell in cells:
        rows[tuple(cell[k] for k in coordinates)][cell["provider"]] = cell
    return rows


def table(results: dict[str, Any]) -> Table:
    """Median microseconds of every provider; fusekit's rates, share of the ceiling and error."""
    providers = [p for p in results["settings"]["providers"] if not results["providers"][p]["obstacle"]]
    view = Table(
        title="median µs; fusekit's rates, share of the measured ceiling, error", title_justify="left"
    )
    for heading in ("op", "sample", "dtype", ""):
        view.add_column(heading)
    for heading in (*providers, "gain", "GFLOP/s", "GB/s", "ceiling", "error"):
        view.add_column(heading, justify="right", no_wrap=True)
    for (op, sample, dtype, direction), row in grouped(results["cells"]).items():
        times = [shown(row[p]).removesuffix(" µs") if p in row else "" for p in providers]
        view.add_row(op, sample, dtype, direction, *times, *_rates(row))
    return view


def _rates(row: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    ours, eager = row.get("fusekit", {}), row.get("eager", {})
    error = f"{ours['error']:.1e}" if ours.get("error") is not None else ""
    if "seconds" not in ours:
        return "", "", "", "", error
    gain = f"{eager['seconds'] / ours['seconds']:.2f}×" if "seconds" in eager else ""
    rates = f"{ours['flops_per_second'] / 1e9:.1f}", f"{ours['bytes_per_second'] / 1e9:.1f}"
    return gain, *rates, f"{ours['share']:.0%}", error


def failures(results: dict[str, Any]) -> list[str]:
    """One sentence per cell that failed."""
    return [
        f"{c['op']} {c['sample']} {c['dtype']} {c['direction']} {c['provider']}: {c['failed']}"
        for c in results["cells"]
        if "failed" in c
    ]
