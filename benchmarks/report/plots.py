"""Plots of the kernel suite: roofline, GB/s over columns, FLOP/s over tokens, speed over eager."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.kernels.run import grouped
from benchmarks.report import style
from benchmarks.report.style import COLOURS as COLOUR
from benchmarks.report.style import MARKERS, NAMES
from fusekit.plots import GRID, INK, _finish, _pyplot

SHOWN = ("eager", "compile", "fusekit")
FASTEST = 6.0  # times eager; a longer bar is cut and carries its number


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """SVG files, each beside its PNG, of all that the results can show; none without matplotlib."""
    if _pyplot() is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    timed = [c for c in results["cells"] if "seconds" in c]
    drawn: list[Path] = []
    for dtype in results["settings"]["dtypes"]:
        mine = [c for c in timed if c["dtype"] == dtype]
        if mine:
            drawn.append(_roofline(mine, results["ceilings"], dtype, folder / f"roofline_{dtype}.png"))
            drawn.append(_bars(mine, dtype, folder / f"times_{dtype}.png"))
    sweeps = [c for c in timed if c["sample"].startswith("sweep")]
    norms = [c for c in sweeps if c["op"].endswith("_norm")]
    if len({c["shapes"][0][-1] for c in norms}) > 1:
        drawn.append(_bandwidth(norms, results["ceilings"], folder / "columns.png"))
    attention = [c for c in sweeps if c["op"] == "attention"]
    if len({c["shapes"][0][-2] for c in attention}) > 1:
        drawn.append(_tokens(attention, folder / "tokens.png"))
    return drawn


def _roofline(cells: list[dict[str, Any]], ceilings: dict[str, Any], dtype: str, path: Path) -> Path:
    """FLOP/s over FLOPs per byte; the roof is what was measured in the same run."""
    figure, axes = _pyplot().subplots(figsize=(8.6, 5.2), dpi=120)
    rates = ceilings["flops_per_second"]
    peak, copy = max(rates.get(dtype, 0.0), rates["float32"]), ceilings["bytes_per_second"]
    intensities = [c["flops"] / c["bytes"] for c in cells]
    left, right = min(*intensities, peak / copy) / 3, max(*intensities, peak / copy) * 4
    edge = [left, peak / copy, right]
    axes.plot(edge, [left * copy / 1e9, peak / 1e9, peak / 1e9], color=INK, linewidth=1.6, zorder=1)
    axes.annotate(
        f"copy: {copy / 1e9:,.1f} GB/s · product: {peak / 1e9:,.0f} GFLOP/s",
        (1.0, 1.02), xycoords="axes fraction", color=INK, fontsize=9, ha="right",
    )  # fmt: skip
    markers = dict(zip(sorted({c["op"] for c in cells}), MARKERS, strict=False))
    for c in cells:
        if c["provider"] in SHOWN:
            filled = COLOUR[c["provider"]] if c["direction"] == "forward" else "none"
            x, y = c["flops"] / c["bytes"], c["flops_per_second"] / 1e9
            axes.plot(x, y, markers.get(c["op"], "o"), markersize=6, markerfacecolor=filled,
                      markeredgecolor=COLOUR[c["provider"]], alpha=0.85)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(axes, xlabel="FLOPs per byte moved at least", ylabel="GFLOP/s", title=f"Roofline, {dtype}")
    _legend(axes, markers)
    figure.tight_layout()
    return style.save(figure, path.parent, path.stem)


def _legend(axes: Any, markers: dict[str, str]) -> None:
    """Colours are providers, shapes are ops; to the right of the plot, where no point is."""
    from matplotlib.lines import Line2D

    def mark(colour: str, marker: str, text: str, fill: str | None = None) -> Line2D:
        return Line2D([], [], color="none", marker=marker, markeredgecolor=colour,
                      markerfacecolor=fill or colour, label=text)  # fmt: skip

    entries = [mark(COLOUR[p], "o", NAMES.get(p, p)) for p in SHOWN]
    entries += [mark(INK, marker, op, "none") for op, marker in markers.items()]
    entries += [mark(INK, "o", "forward"), mark(INK, "o", "backward, training", "none")]
    axes.legend(handles=entries, frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _bars(cells: list[dict[str, Any]], dtype: str, path: Path) -> Path:
    """Speed of each provider over eager's, a group of bars per op, shape and direction."""
    rows = {k: row for k, row in grouped(cells).items() if "eager" in row and len(row) > 1}
    others = [p for p in SHOWN if p != "eager"]
    figure, axes = _pyplot().subplots(figsize=(9.5, 1.6 + 0.46 * max(1, len(rows))), dpi=120)
    for number, row in enumerate(rows.values()):
        base = row["eager"]["seconds"]
        for offset, provider in zip((-0.19, 0.19), others, strict=True):
            if provider in row:
                speed = base / row[provider]["seconds"]
                axes.barh(number + offset, min(speed, FASTEST), height=0.36, color=COLOUR[provider])
                end = min(max(speed, 1.0), FASTEST)  # the line at 1 runs through no number
                text = f" {speed:.2f}× · {style.seconds(row[provider]['seconds'])}"
                axes.text(end, number + offset, text, va="center", color=INK, fontsize=7.5)
    axes.axvline(1.0, color=COLOUR["eager"], linewidth=1.5)
    labels = [f"{op} {direction}\n{sample} · eager {style.seconds(row['eager']['seconds'])}"
              for (op, sample, _, direction), row in rows.items()]  # fmt: skip
    axes.set_yticks(range(len(rows)), labels, fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    speeds = [
        row["eager"]["seconds"] / row[p]["seconds"] for row in rows.values() for p in others if p in row
    ]
    axes.set_xlim(0, min(max([1.2, *speeds]), FASTEST) * 1.3)
    _finish(axes, xlabel="speed over eager (1 = as fast; longer is faster)", ylabel="",
            title=f"Speed over eager PyTorch, {dtype}")  # fmt: skip
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOUR[p], label=NAMES.get(p, p)) for p in others]
    axes.legend(
        handles=handles, frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2
    )
    figure.tight_layout()
    return style.save(figure, path.parent, path.stem)


def _bandwidth(cells: list[dict[str, Any]], ceilings: dict[str, Any], path: Path) -> Path:
    """GB/s over columns: a panel per norm and direction, a line per provider and dtype."""
    panels = sorted({(c["op"], c["direction"]) for c in cells}, key=lambda p: (p[0], p[1] != "forward"))
    rows = (len(panels) + 1) // 2
    figure, grid = _pyplot().subplots(
        rows, 2, figsize=(12.5, 3.6 * rows), dpi=120, squeeze=False, sharex=True, sharey=True
    )
    for axes, (op, direction) in zip(grid.flat, panels, strict=False):
        mine = [c for c in cells if (c["op"], c["direction"]) == (op, direction)]
        _lines(axes, mine, lambda c: c["shapes"][0][-1], "bytes_per_second", 1e9)
        copy = ceilings["bytes_per_second"] / 1e9
        axes.axhline(copy, color=INK, linewidth=1, linestyle=":", label="copy, measured")
        _sizes(axes, cells, lambda c: c["shapes"][0][-1])
        axes.set_ylim(0, 1.1 * max(copy, *(c["bytes_per_second"] / 1e9 for c in cells)))
        _finish(axes, xlabel="columns", ylabel="GB/s", title=f"{op} {direction}")
        axes.tick_params(labelbottom=True, labelleft=True)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    _shared_legend(grid.flat[min(1, len(panels) - 1)])
    figure.tight_layout()
    return style.save(figure, path.parent, path.stem)


def _tokens(cells: list[dict[str, Any]], path: Path) -> Path:
    """TFLOP/s of attention over the sequence length."""
    figure, pair = _pyplot().subplots(1, 2, figsize=(12.5, 4.2), dpi=120, sharey=True)
    for axes, direction in zip(pair, ("forward", "backward"), strict=True):
        mine = [c for c in cells if c["direction"] == direction]
        _lines(axes, mine, lambda c: c["shapes"][0][-2], "flops_per_second", 1e12)
        _sizes(axes, mine, lambda c: c["shapes"][0][-2])
        axes.set_ylim(bottom=0)
        _finish(axes, xlabel="tokens", ylabel="TFLOP/s", title=f"attention {direction}")
    _shared_legend(pair[1])
    figure.tight_layout()
    return style.save(figure, path.parent, path.stem)


def _lines(axes: Any, cells: list[dict[str, Any]], size: Any, rate: str, unit: float) -> None:
    series: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for c in cells:
        points = series[c["provider"], c["dtype"]]
        points[size(c)] = max(points.get(size(c), 0.0), c[rate] / unit)
    styles = dict(zip(sorted({dtype for _, dtype in series}, reverse=True), ("-", "--", "-."), strict=False))
    for (provider, dtype), points in sorted(series.items()):
        xs, name = sorted(points), NAMES.get(provider, provider)
        axes.plot(xs, [points[x] for x in xs], styles[dtype], marker="o", markersize=4, linewidth=1.6,
                  color=style.colour(provider), label=f"{name} {dtype}")  # fmt: skip


def _shared_legend(axes: Any) -> None:
    """To the right of a panel that has all the lines."""
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1.0))


def _sizes(axes: Any, cells: list[dict[str, Any]], size: Any) -> None:
    """Powers of two, written out."""
    sizes = sorted({size(c) for c in cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
