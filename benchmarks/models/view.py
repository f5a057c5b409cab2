"""The model suite's results for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.models.providers import REFERENCE

RATES = ("ms/step", "quartiles", "speed", "per second", "MFU")
HEADINGS = ("provider", *RATES, "peak MB", "start s", "warm s", "loss", "sites")


def grouped(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Cells by model, then by provider in the order of the settings."""
    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in results["settings"]["models"]}
    order = results["settings"]["providers"]
    for cell in sorted(results["cells"], key=lambda c: order.index(c["provider"])):
        rows[cell["model"]][cell["provider"]] = cell
    return rows


def table(results: dict[str, Any]) -> Table:
    """A row per model and provider; models are sections."""
    view = Table(title=title(results), title_justify="left")
    for heading in HEADINGS:
        view.add_column(heading, justify="left" if heading == "provider" else "right", no_wrap=True)
    for model, cells in grouped(results).items():
        if not cells:
            continue
        facts = results["models"][model]
        view.add_row(f"[bold]{model}[/bold], {facts['unit']}")
        for name, cell in cells.items():
            view.add_row(f"  {name}", *values(cell, cells.get(REFERENCE, {})))
        view.add_section()
    return view


def title(results: dict[str, Any]) -> str:
    machine = results["environment"]
    if machine["device"] == "cuda":
        return f"Training step, {machine.get('gpu')}, median wall time"
    return f"Training step, {machine.get('cpu')}, one thread, median process time"


def values(cell: dict[str, Any], reference: dict[str, Any]) -> tuple[str, ...]:
    """A cell in the order of HEADINGS after the provider."""
    if "seconds" not in cell:
        word = next((k.replace("_", " ") for k in ("failed", "skipped", "left_out") if k in cell), "")
        return (word,)
    (low, high), rate = cell["quartiles"], cell["units_per_second"]
    speed = f"{reference['seconds'] / cell['seconds']:.2f}×" if "seconds" in reference else ""
    warm, error = cell.get("warm_start_seconds"), cell["loss_error"]
    return (
        _milliseconds(cell["seconds"]),
        f"{_milliseconds(low)}–{_milliseconds(high)}",
        speed,
        f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}",
        f"{cell['mfu']:.0%}",
        f"{cell['peak_bytes'] / 2**20:,.0f}",
        f"{cell['start_seconds']:.1f}",
        "" if warm is None else f"{warm:.1f}",
        "?" if error is None else "reference" if cell["provider"] == REFERENCE else f"{error:.0e}",
        str(cell.get("sites", "")),
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def line(cell: dict[str, Any]) -> str:
    """A cell in one line."""
    name = f"{cell['model']} {cell['provider']}"
    for kind in ("failed", "skipped", "left_out"):
        if kind in cell:
            return f"{name}: {kind.replace('_', ' ')}: {cell[kind]}"
    note = f" ({cell['note']})" if "note" in cell else ""
    return f"{name}: {_milliseconds(cell['seconds'])} ms{note}"


def failures(results: dict[str, Any]) -> list[str]:
    """One sentence per cell that failed."""
    return [f"{c['model']} {c['provider']}: {c['failed']}" for c in results["cells"] if "failed" in c]


def remarks(results: dict[str, Any]) -> list[str]:
    """One sentence per cell that is no plain figure, other than failures."""
    return [line(c) for c in results["cells"] if {"skipped", "left_out", "note"} & c.keys()]
