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
