"""Plots of the static lane: occupancy and registers, cycles beside their bound, predicted times."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.report import style
from benchmarks.static.build import Figures
from benchmarks.static.occupancy import ARCHITECTURES, WARPS
from benchmarks.static.report import short
from benchmarks.static.roofline import Prediction
from fusekit.plots import INK

Builds = list[tuple[str, str, int, Figures]]
ARCH_COLOURS = {80: "#d9822b", 90: "#1f9d6b", 100: "#2f6fb5"}
DEVICE_COLOURS = {
    "A100": "#d9822b", "H100": "#8fd6b4", "H200": "#1f9d6b", "H200, measured": "#0b5c3b", "B200": "#2f6fb5",
}  # fmt: skip


def occupancy(builds: Builds, folder: Path) -> Path:
    """Warps per SM and registers a thread: a point a build, a row a kernel, a band an architecture."""
    names = sorted({short(key) for key, *_ in builds}, reverse=True)
    figure, axes = style.figure(11, 1.4 + 0.42 * len(names), 1, 2, sharey=True)
    columns = (("warps", f"warps resident on an SM (of {WARPS})"), ("registers", "registers a thread"))
    for panel, (name, label) in zip(axes[0], columns, strict=True):
        for index, (arch, colour) in enumerate(ARCH_COLOURS.items()):
            mine = [(short(key), f[name]) for key, _, a, f in builds if a == arch]
            places = [names.index(kernel) + 0.22 * (1 - index) for kernel, _ in mine]
            panel.scatter(
                [value for _, value in mine], places, s=22, color=colour, alpha=0.75, linewidths=0,
                marker=style.MARKERS[index], label=f"sm_{arch}",
            )  # fmt: skip
        style.finish(panel, xlabel=label, ylabel="", title="", grid="both")
        panel.set_xlim(0)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=9)
    style.legend_below(figure, axes[0][0].get_legend_handles_labels()[0])
    return style.save(figure, folder, "occupancy")


def cycles(builds: Builds, folder: Path) -> Path | None:
    """Cycles of the hot loop's schedule over those of its bound; below the line there is room."""
    points = [(key, version, arch, f) for key, version, arch, f in builds if f.get("ratio")]
    if not points:
        return None
    figure, axes = style.figure(11, 5.6)
    panel = axes[0][0]
    kinds = sorted({f["loop"]["limit"] for *_, f in points})
    names = {"half": "16-bit tensor cores", "tf32": "tf32 tensor cores", "fp8": "8-bit tensor cores",
             "fp32": "float32 lanes", "memory": "memory bandwidth"}  # fmt: skip
    for index, kind in enumerate(kinds):
        for arch, colour in ARCH_COLOURS.items():
            mine = [f for _, _, a, f in points if a == arch and f["loop"]["limit"] == kind]
            if mine:
                panel.scatter(
                    [f["bound"] for f in mine], [f["cycles"] for f in mine], s=34, color=colour, alpha=0.75,
                    marker=style.MARKERS[index], linewidths=0, label=f"sm_{arch}, {names[kind]}",
                )  # fmt: skip
    values = [v for *_, f in points for v in (f["bound"], f["cycles"])]
    ends = [min(values) / 1.5, max(values) * 1.5]
    panel.plot(ends, ends, color=INK, linewidth=1)
    panel.annotate("schedule = bound", (ends[1], ends[1]), ha="right", va="top", fontsize=9, color=INK,
                   xytext=(-46, -6), textcoords="offset points")  # fmt: skip
    panel.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    style.finish(
        panel, xlabel="bound: cycles of the named unit for one iteration of a block",
        ylabel="schedule: least cycles an SM needs to issue it", title="", grid="both",
    )  # fmt: skip
    style.legend_below(figure, panel.get_legend_handles_labels()[0], columns=3)
    return style.save(figure, folder, "cycles")


def predicted(found: list[Prediction], folder: Path) -> Path:
    """Predicted least times in bfloat16: hollow where memory bounds them, filled where arithmetic does."""
    rows: dict[tuple[str, str, str], list[Prediction]] = defaultdict(list)
    for p in found:
        if p.dtype == "bfloat16":
            rows[p.op, p.sample, p.direction].append(p)
    labels = [f"{op} {sample}, {direction}" for op, sample, direction in rows]
    figure, axes = style.figure(11, 1.4 + 0.24 * len(rows))
    panel = axes[0][0]
    for height, group in enumerate(rows.values()):
        for p in group:
            colour = DEVICE_COLOURS.get(p.device) or style.colour(p.device)
            filled: Any = colour if p.bound == "compute" else "white"
            size = 80 if p.device == "H100" else 30  # where arithmetic bounds them, H100 and H200 coincide
            panel.scatter(1e6 * p.seconds, height, s=size, facecolors=filled, edgecolors=colour, zorder=2)
    panel.set_yticks(range(len(labels)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.set_xscale("log")
    style.finish(
        panel, ylabel="", title="", grid="both",
        xlabel="predicted least time, µs (not measured); filled: bound by arithmetic, hollow: by memory",
    )  # fmt: skip
    for device in dict.fromkeys(p.device for p in found):
        colour = DEVICE_COLOURS.get(device) or style.colour(device)
        panel.scatter([], [], s=30, color=colour, label=device)
    style.legend_below(figure, panel.get_legend_handles_labels()[0], columns=5)
    return style.save(figure, folder, "predicted")


def draw(builds: Builds, found: list[Prediction], folder: Path) -> list[tuple[Path, str]]:
    """SVG files (PNG beside them) with their captions; none without matplotlib."""
    if not style.can_draw() or not builds:
        return []
    shown = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES)
    drawn = [
        (occupancy(builds, folder), f"Occupancy and registers of every build, {shown}, both Tritons."),
        (cycles(builds, folder), "Hot loops: the schedule that ptxas fixed, beside the unit that bounds it."),
        (predicted(found, folder), "Predicted from published peaks and measured ceilings; not measured."),
    ]
    return [(path, caption) for path, caption in drawn if path is not None]
