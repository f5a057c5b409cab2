"""Plots of the model suite: for each model, step time and peak memory of every provider, as bars."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.models.providers import REFERENCE
from benchmarks.models.view import grouped
from benchmarks.report.style import can_draw, colour, figure, finish, save, shown_name
from fusekit.plots import INK

Cells = dict[str, dict[str, Any]]  # by provider
LONGEST = 2.5  # times eager float32's bar; a longer one is cut and carries its number


def draw(results: dict[str, Any], folder: Path) -> dict[str, Path]:
    """A PNG and an SVG file per model with figures; the SVG ones by model. None without matplotlib."""
    if not can_draw():
        return {}
    drawn = {}
    for model, cells in grouped(results).items():
        timed = {name: cell for name, cell in cells.items() if "seconds" in cell}
        if timed:
            drawn[model] = _step(model, timed, results, folder)
    return drawn


def _step(model: str, cells: Cells, results: dict[str, Any], folder: Path) -> Path:
    drawn, panels = figure(12.5, 1.5 + 0.4 * len(cells), 1, 2, sharey=True)
    times, memory = panels.flat
    clock = "wall time" if results["environment"]["device"] == "cuda" else "process time, one thread"
    facts = results["models"][model]
    _bars(times, cells, "seconds", 1e3, "ms")
    finish(
        times, ylabel="", grid="x", title=f"{model}: training step",
        xlabel=f"ms, {clock}, median and quartiles; ×: speed over eager float32",
    )  # fmt: skip
    _bars(memory, cells, "peak_bytes", 2**-20, "MB")
    size = (
        f"{facts['parameters'] / 1e6:,.1f} M parameters, {facts['units_per_step']:,} {facts['unit']} a step"
    )
    finish(memory, xlabel="MB at the peak of a step", ylabel="", grid="x", title=size)
    times.set_yticks(range(len(cells)), [shown_name(name) for name in cells], fontsize=9)
    times.set_ylim(len(cells) - 0.4, -0.6)
    return save(drawn, folder, f"step_{re.sub(r'[^a-z0-9]+', '_', model.lower())}")


def _bars(axes: Any, cells: Cells, key: str, unit: float, name: str) -> None:
    values = [cell[key] * unit for cell in cells.values()]
    base = cells[REFERENCE][key] * unit if REFERENCE in cells else max(values)
    most = min(max(values), LONGEST * base) or 1.0
    for row, (provider, cell) in enumerate(cells.items()):
        value = cell[key] * unit
        end = min(value, most)
        axes.barh(row, end, height=0.66, color=colour(provider))
        text = f"{value:,.0f} {name}" if value >= 100 else f"{value:.3g} {name}"
        if key == "seconds":
            low, high = (min(q * unit, most) for q in cell["quartiles"])
            axes.plot([low, high], [row, row], color=INK, linewidth=1.4, solid_capstyle="butt")
            end = max(end, high)
            text += f" · {base / value:.2f}×" if REFERENCE in cells else ""
        text += " · bar cut" if value > most else ""
        axes.text(end, row, f"  {text}", va="center", color=INK, fontsize=8.5)
    axes.set_xlim(0, most * 1.5)
