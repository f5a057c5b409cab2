"""What every plot shares: a colour and a marker for each provider, axes, and files as PNG and SVG.

Colours differ in lightness as well as in hue (Okabe & Ito, "Color Universal Design", for the hues), so that
they are told apart by the colour-blind and in print; markers tell apart what colours cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusekit.plots import GRID, INK, _finish, _pyplot

COLOURS = {
    "eager": "#8a929c",
    "eager float32": "#8a929c",
    "eager autocast": "#4d545c",
    "eager bf16": "#4d545c",
    "eager fp16": "#4d545c",
    "compile": "#2f6fb5",
    "compile-max": "#7db8e8",
    "fusekit": "#1f9d6b",
    "fusekit-inductor": "#0b5c3b",
    "fusekit-fp8": "#8fd6b4",
    "fusekit fp8": "#8fd6b4",
    "liger": "#d9822b",
    "liger-kernel": "#d9822b",
    "quack": "#b8860b",
    "flash-attn": "#8e5bb5",
    "flash-sdpa": "#c9a3df",
    "cudnn-sdpa": "#c2455a",
    "xformers": "#e79aa8",
    "transformer-engine": "#7a6a2f",
    "torchao": "#3a3f9e",
}
NAMES = {"compile": "torch.compile", "compile-max": "torch.compile max-autotune", "liger": "Liger"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p", "d", "8", "H")
_OTHER = ("#5a6b00", "#a0522d", "#5f9ea0", "#708090")


def colour(provider: str) -> str:
    """The provider's own colour, or its family's: "fusekit bf16" is drawn as "fusekit"."""
    if provider in COLOURS:
        return COLOURS[provider]
    families = [name for name in COLOURS if provider.removeprefix("torch.").startswith(name)]
    if families:
        return COLOURS[max(families, key=len)]
    return _OTHER[sum(map(ord, provider)) % len(_OTHER)]


def shown_name(provider: str) -> str:
    """As it is written in legends."""
    return NAMES.get(provider, provider)


def marker(provider: str) -> str:
    known = list(COLOURS)
    return MARKERS[(known.index(provider) if provider in known else len(provider)) % len(MARKERS)]


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of `width` x `height` inches and a (rows, columns) array of axes; needs matplotlib."""
    return _pyplot().subplots(
        rows, columns, figsize=(width, height), dpi=120, squeeze=False, layout="constrained", **options
    )


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return _pyplot() is not None


def finish(axes: Any, *, xlabel: str, ylabel: str, title: str, grid: str = "y") -> None:
    """Labels with units, title at the left, a faint grid along `grid` ("x", "y", "both"), no frame."""
    _finish(axes, xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(visible=False)
    axes.grid(axis=grid, color=GRID, linewidth=0.7)


def sizes_axis(axes: Any, sizes: Sequence[int]) -> None:
    """A logarithmic axis whose ticks are the sizes themselves, written out."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=30 if len(sizes) > 5 else 0)
    axes.minorticks_off()


def legend_below(figure: Any, handles: Sequence[Any], columns: int = 4) -> None:
    """One legend for all panels, under them, where it covers no point."""
    figure.legend(
        handles=list(handles), loc="outside lower left", ncols=columns, frameon=False, fontsize=9,
        labelcolor=INK,
    )  # fmt: skip


def save(figure: Any, folder: Path, name: str) -> Path:
    """`name`.png and `name`.svg in `folder`; the same bytes every time. Returns the SVG's path."""
    import matplotlib.pyplot as pyplot

    folder.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context({"svg.hashsalt": "fusekit"}):
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)
    return folder / f"{name}.svg"


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e-9:.3g} ns"
