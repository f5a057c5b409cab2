"""Pictures of runs. Without matplotlib nothing is drawn, and the numbers are still in the JSON files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusekit.precision_report import error_shares

INK, GRID = "#33383f", "#d9dde3"
# Grey, blue, orange, green: told apart by the colour-blind too.
COLOURS = ("#8a929c", "#2f6fb5", "#d9822b", "#1f9d6b")


def plot_losses(records: Sequence[dict[str, Any]], path: Path) -> bool:
    """Losses over steps, as PNG. False where there is nothing to draw, or nothing to draw with."""
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    pyplot = _pyplot()
    if pyplot is None or not train:
        return False
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(*zip(*train, strict=True), color=COLOURS[1], linewidth=1.4, label="train")
    if validation:
        axes.plot(
            *zip(*validation, strict=True), color=COLOURS[2], marker="o", markersize=4, label="validation"
        )
    _finish(axes, xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.legend(frameon=False)
    return _write(figure, path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _finish(axes: Any, *, xlabel: str, ylabel: str, title: str) -> None:
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.set_title(title, color=INK, loc="left", fontsize=11, fontweight="bold")
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _write(figure: Any, path: Path) -> bool:
    import matplotlib.pyplot

    try:
        figure.tight_layout()
        figure.savefig(path)
    except OSError:  # a full disk; the run's error is the one to report
        return False
    finally:
        matplotlib.pyplot.close(figure)
    return True


def plot_comparison(runs: Sequence[dict[str, Any]], path: Path) -> bool:
    """Loss curves, step times and peak memory of the runs of a comparison, side by side, as PNG."""
    finished = [(run, colour) for run, colour in zip(runs, COLOURS, strict=False) if "losses" in run]
    pyplot = _pyplot()
    if pyplot is None or not finished:
        return False
    figure, (curves, times, memory) = pyplot.subplots(
        1, 3, figsize=(14, 4.6), dpi=120, gridspec_kw={"width_ratios": (2, 1.1, 1.1)}
    )
    styles = ("-", "--", "-.", ":")  # the curves lie on each other, which is the point
    for (run, colour), style in zip(finished, styles, strict=False):
        steps = range(1, len(run["losses"]) + 1)
        curves.plot(steps, run["losses"], color=colour, linestyle=style, linewidth=1.8, label=run["name"])
        curves.plot(steps[-1], run["validation_loss"], color=colour, marker="D", markersize=5, clip_on=False)
    _finish(
        curves,
        xlabel="step",
        ylabel="nats per token",
        title="Training loss (diamond: validation, at the end)",
    )
    curves.legend(frameon=False)
    _bars(times, finished, "step_seconds", 1e3, "{:.0f} ms", "Median step time")
    _bars(memory, finished, "peak_bytes", 2**-20, "{:.0f} MB", "Peak memory in training")
    return _write(figure, path)


def _bars(
    axes: Any, finished: list[tuple[dict[str, Any], str]], key: str, unit: float, form: str, title: str
) -> None:
    values = [run[key] * unit for run, _ in finished]
    positions = range(len(values))
    axes.barh(positions, values, color=[colour for _, colour in finished], height=0.62)
    for position, value in zip(positions, values, strict=True):
        axes.text(value, position, " " + form.format(value), va="center", color=INK, fontsize=9)
    axes.set_yticks(positions, [run["name"].replace(" bf16", "\nbf16") for run, _ in finished], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.3)
    _finish(axes, xlabel="", ylabel="", title=title)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


LEVEL_COLOURS = {"tensor": COLOURS[3], "row": COLOURS[1], "block": COLOURS[1], "bf16": COLOURS[2]}
LEVEL_NAMES = {
    "tensor": "FP8, a scale a tensor",
    "row": "FP8, a scale a row",
    "block": "FP8, a scale a block",
    "bf16": "bf16",
}


def plot_precision(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """The levels of `PrecisionPlan.rows()`, a cell a product, and how far FP8 is from its margins, as PNG."""
    pyplot = _pyplot()
    if pyplot is None or not rows:
        return False
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    products = list(dict.fromkeys(row["product"] for row in rows))
    height = max(3.2, 1.5 + 0.24 * len(layers))
    figure, (grid, margins) = pyplot.subplots(
        1, 2, figsize=(13, height), dpi=120, sharey=True, gridspec_kw={"width_ratios": (1, 1.25)}
    )
    _level_grid(grid, rows, layers, products)
    _error_margins(margins, rows, layers, products)
    grid.set_yticks(range(len(layers)), layers, fontsize=8)
    grid.set_ylim(len(layers) - 0.5, -0.5)
    return _write(figure, path)


def _level_grid(axes: Any, rows: Sequence[dict[str, Any]], layers: list[str], products: list[str]) -> None:
    for row in rows:
        x, y = products.index(row["product"]), layers.index(row["layer"])
        axes.barh(y, 0.94, left=x - 0.47, height=0.86, color=LEVEL_COLOURS[row["runs"]])
        flips = f" · {row['flips']} flips" if row["flips"] else ""
        axes.text(x, y, row["runs"] + flips, ha="center", va="center", color="white", fontsize=8)
    _finish(axes, xlabel="", ylabel="", title="What runs")
    axes.grid(visible=False)
    axes.set_xticks(range(len(products)), products)
    axes.set_xlim(-0.5, len(products) - 0.5)
    axes.tick_params(length=0)


def _error_margins(axes: Any, rows: Sequence[dict[str, Any]], layers: list[str], products: list[str]) -> None:
    """Errors in multiples of what FP8 loses of Gaussian values, the latest sample of each FP8 level."""
    shown: set[str] = set()
    for row in rows:
        y = layers.index(row["layer"]) + 0.26 * (products.index(row["product"]) - (len(products) - 1) / 2)
        for level, share in sorted(error_shares(row).items(), key=lambda item: item[0] == row["runs"]):
            style = {"color": LEVEL_COLOURS[level], "marker": "os^"[products.index(row["product"]) % 3]}
            filled = {"markerfacecolor": style["color"] if level == row["runs"] else "white"}
            axes.plot(max(share, 0.1), y, linestyle="", markersize=5, **style, **filled)
            shown.add(level)
    for limit, line in ((2, "--"), (4, "-")):
        axes.axvline(limit, color=INK, linewidth=0.9, linestyle=line)
    axes.set_xscale("log")
    axes.set_xlim(0.5, max(8.0, *axes.get_xlim()))
    axes.set_xticks((0.5, 1, 2, 4, 8), ("0.5×", "1×", "2×", "4×", "8×"))
    axes.minorticks_off()
    limits = "dashed: leaves its level; solid: goes to bf16 at once"
    _finish(axes, xlabel=limits, ylabel="", title="Error, in multiples of FP8's own of Gaussian values")
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    marks = [("", "os^"[i % 3], product) for i, product in enumerate(products)]
    marks += [(level, "o", LEVEL_NAMES[level]) for level in LEVEL_NAMES if level in shown]
    for level, marker, label in marks:
        axes.plot([], [], linestyle="", marker=marker, color=LEVEL_COLOURS.get(level, INK), label=label)
    axes.plot([], [], linestyle="", marker="o", color=INK, markerfacecolor="white", label="would be, not run")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
