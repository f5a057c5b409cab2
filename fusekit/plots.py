"""Pictures of runs. Without matplotlib nothing is drawn, and the numbers are still in the JSON files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
