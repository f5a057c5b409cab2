"""Tables and sentences about the levels of `precision="auto"`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fusekit.precision_levels import deciding_error, ideal_error, recipe_named

COLOURS = {"tensor": "green", "row": "cyan", "block": "cyan", "bf16": "yellow"}


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many products run how."""
    if not rows:
        return "precision auto: no layer that FP8 could take was met yet; train a step first"
    counts = Counter(row["runs"] for row in rows)
    names = {"tensor": "in FP8 with one scale a tensor", "bf16": "in bf16"}
    parts = [f"{n} {names.get(level, f'in FP8 with scales a {level}')}" for level, n in counts.most_common()]
    layers = len({row["layer"] for row in rows})
    return f"precision auto: {layers} layers, {len(rows)} products: {', '.join(parts)}"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Level, reason and latest statistics of every product; of one in bf16 those at the finer FP8 level.

    step: when the level last changed.
    """
    found = Table(title="Precision", title_justify="left")
    found.add_column("layer", overflow="fold", min_width=24)
    found.add_column("product", no_wrap=True)
    found.add_column("level", no_wrap=True)
    for header in ("error", "SNR lost", "underflow", "step"):
        found.add_column(header, justify="right", no_wrap=True)
    found.add_column("reason", overflow="fold")
    previous = ""
    for row in rows:
        name = row["layer"] if row["layer"] != previous else ""
        if name and previous:
            found.add_section()
        previous = row["layer"]
        found.add_row(
            name, row["product"], _level(row), *_figures(row), str(row["step"]), row["reason"] + _flips(row)
        )
    return found


def reason_of(rows: Sequence[dict[str, Any]]) -> str:
    """One layer's levels and why, as a sentence for `explain`."""
    return "; ".join(f"{row['product']} {row['runs']}: {row['reason']}" for row in rows)


def shown_statistics(row: dict[str, Any]) -> dict[str, float] | None:
    """At the level that runs; of a product in bf16 at the finer FP8 level, which it did not keep."""
    last = row["statistics"]
    return last.get(row["runs"]) or next(iter(reversed(list(last.values()))), None)


def error_shares(row: dict[str, Any]) -> dict[str, float]:
    """By FP8 level: the error that decides over what FP8 loses of Gaussian values."""
    return {
        level: deciding_error(seen, row["product"]) / ideal_error(row["product"], recipe_named(level))
        for level, seen in row["statistics"].items()
    }


def _figures(row: dict[str, Any]) -> tuple[str, str, str]:
    seen = shown_statistics(row)
    if seen is None:
        return "–", "–", "–"
    return (
        f"{deciding_error(seen, row['product']):.3f}",
        f"{seen['snr_loss']:.1f} dB",
        f"{seen['underflow']:.2%}",
    )


def _level(row: dict[str, Any]) -> str:
    return f"[{COLOURS[row['runs']]}]{row['runs']}[/]"


def _flips(row: dict[str, Any]) -> str:
    if not row["flips"]:
        return ""
    return f"; {row['flips']} promotion{'s' * (row['flips'] > 1)}{', pinned' * row['pinned']}"
