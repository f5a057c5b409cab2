"""Predicates that bound key - query by numbers, as `low <= key - query <= high`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fusekit.kernels.attention_form import UNBOUNDED
from fusekit.passes.affine import KEY, QUERY, Predicate

UP_TO = frozenset({(KEY, 1), (QUERY, -1)})  # key - query + constant <= 0
FROM = frozenset({(KEY, -1), (QUERY, 1)})


class Band(NamedTuple):
    """None where there is no bound."""

    low: int | None
    high: int | None

    def also(self, other: Band) -> Band:
        lows = [low for low in (self.low, other.low) if low is not None]
        highs = [high for high in (self.high, other.high) if high is not None]
        return Band(max(lows, default=None), min(highs, default=None))

    def as_arguments(self) -> tuple[bool, int | None, int] | None:
        """The op's causal, window and offset; None where it has no such band."""
        offset = self.high or 0
        window = None if self.low is None else offset - self.low + 1
        if abs(offset) >= UNBOUNDED or (window is not None and not 0 < window < UNBOUNDED):
            return None
        return self.high is not None, window, offset


def is_band(found: Predicate | None) -> bool:
    """Whether all that is said is how far a key may be from a query."""
    return found is not None and all(atom.terms in (UP_TO, FROM) for atom in found.atoms)


def band_of(predicates: Iterable[Predicate | None]) -> Band:
    """All of these bands at once."""
    atoms = [atom for p in predicates if p is not None for atom in p.atoms]
    high = min((-atom.constant for atom in atoms if atom.terms == UP_TO), default=None)
    low = max((atom.constant for atom in atoms if atom.terms == FROM), default=None)
    return Band(low, high)
