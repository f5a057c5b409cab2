"""Two results files side by side: which cells became slower or faster, beyond what their spread explains.

Per cell: the ratio of medians, its 95 % bootstrap interval, and the probability that both sets of samples
come from one distribution (Mann & Whitney 1947, normal approximation with ties). Over the cells the
probabilities are corrected for their number (Holm 1979). A change counts when it is improbable and the whole
interval lies beyond a threshold, since a machine never repeats itself exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.kernels.run import COORDINATES as COORDINATES_OF_A_CASE
from benchmarks.kernels.run import grouped

ALPHA = 0.05
COORDINATES = {"kernels": COORDINATES_OF_A_CASE, "models": ("model",)}
RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Change:
    """One cell in both files. ratio: new seconds over old; low, high: its interval; verdict: a word."""

    key: tuple[str, ...]
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    probability: float = 1.0
    verdict: str = "same"


def compare(
    old: dict[str, Any], new: dict[str, Any], *, providers: tuple[str, ...] = ("fusekit",), threshold: float
) -> list[Change]:
    """The cells of `providers` that both files hold, in the new file's order.

    Raises:
        ValueError: the files are from different devices, or share no cell.
    """
    for name in ("device", "cpu", "gpu", "threads"):
        before, now = (r["environment"].get(name) for r in (old, new))
        if before != now:
            raise ValueError(f"the files are from different machines: {name} is {before!r} and {now!r}")
    coordinates = COORDINATES[new["kind"]]
    rows = grouped(old["cells"], coordinates)
    pairs = [
        ((*key, provider), rows[key][provider], row[provider])
        for key, row in grouped(new["cells"], coordinates).items()
        for provider in providers
        if provider in row and provider in rows.get(key, {})
    ]
    if not pairs:
        raise ValueError(f"the files share no cell of {', '.join(providers)}")
    changes = [_change(key, before, now) for key, before, now in pairs]
    return _judged(changes, threshold)


def _change(key: tuple[str, ...], before: dict[str, Any], now: dict[str, Any]) -> Change:
    if "seconds" not in before or "seconds" not in now:
        broke, mended = "seconds" in before and "failed" in now, "seconds" in now
        return Change(key=key, verdict="broken" if broke else "mended" if mended else "no times")
    a, b = np.array(before["samples"]), np.array(now["samples"])
    low, high = ratio_interval(a, b)
    ratio = now["seconds"] / before["seconds"]
    return Change(key=key, ratio=ratio, low=low, high=high, probability=mann_whitney(a, b))


def _judged(changes: list[Change], threshold: float) -> list[Change]:
    """Holm: the smallest probability is held against alpha / n, the next against alpha / (n - 1), ..."""
    timed = sorted((c for c in changes if not math.isnan(c.ratio)), key=lambda c: c.probability)
    improbable: set[tuple[str, ...]] = set()
    for rank, change in enumerate(timed):
        if change.probability > ALPHA / (len(timed) - rank):
            break
        improbable.add(change.key)
    judged = []
    for c in changes:
        verdict = c.verdict
        if c.key in improbable and c.low > 1 + threshold:
            verdict = "slower"
        elif c.key in improbable and c.high < 1 / (1 + threshold):
            verdict = "faster"
        judged.append(Change(**{**vars(c), "verdict": verdict}))
    return judged


def mann_whitney(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided probability of so unequal ranks if a and b are from one distribution."""
    both = np.concatenate([a, b])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # ties share their middle rank
    n, m, total = len(a), len(b), len(both)
    u = ranks[:n].sum() - n * (n + 1) / 2
    ties = float((counts**3 - counts).sum()) / (total * (total - 1))
    deviation = math.sqrt(n * m / 12 * (total + 1 - ties))
    if not deviation:
        return 1.0
    z = max(abs(u - n * m / 2) - 0.5, 0.0) / deviation
    return math.erfc(z / math.sqrt(2))


def ratio_interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """95 % interval of median(b) / median(a), by resampling; the same every time."""
    generator = np.random.default_rng(0)
    medians = [np.median(generator.choice(values, (RESAMPLES, len(values))), axis=1) for values in (a, b)]
    low, high = np.quantile(medians[1] / medians[0], (0.025, 0.975))
    return float(low), float(high)


def regressions(changes: list[Change]) -> list[Change]:
    return [c for c in changes if c.verdict in ("slower", "broken")]


def drift(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How the machine itself changed between the two runs, by the ceilings measured in both."""
    copy = new["ceilings"]["bytes_per_second"] / old["ceilings"]["bytes_per_second"]
    rates = [r["ceilings"]["flops_per_second"]["float32"] for r in (old, new)]
    return f"the machine, new over old: copies at {copy:.2f}×, float32 products at {rates[1] / rates[0]:.2f}×"


def summary(changes: list[Change], threshold: float) -> str:
    faster = sum(c.verdict == "faster" for c in changes)
    return (
        f"{len(changes)} cells: {len(regressions(changes))} slower or broken, {faster} faster, "
        f"beyond {threshold:.0%} and the spread"
    )


def table(changes: list[Change], kind: str = "kernels") -> Table:
    view = Table(title="new over old: time", title_justify="left")
    for heading in (*COORDINATES[kind], "provider"):
        view.add_column(heading)
    for heading in ("ratio", "95 % interval", "p"):
        view.add_column(heading, justify="right", no_wrap=True)
    view.add_column("verdict")
    colours = {"slower": "red", "broken": "red", "faster": "green", "mended": "green"}
    for c in changes:
        numbers = (
            ("", "", "")
            if math.isnan(c.ratio)
            else (f"{c.ratio:.3f}", f"{c.low:.3f}–{c.high:.3f}", f"{c.probability:.1e}")
        )
        view.add_row(*c.key, *numbers, c.verdict, style=colours.get(c.verdict))
    return view
