"""Affine forms over whole numbers and conjunctions of `form <= 0`: what a mask of index arithmetic says.

A variable is an index into the mask, by its name, or a number read from a tensor that holds data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

QUERY, KEY = "query", "key"


class Reading(NamedTuple):
    """The element of an integer tensor at an index: of any sign, and the same wherever it is read again.

    source: the tensor's node; or (name, number) of a function of the one index, as ("floor_divide", 4).
    """

    source: Any
    at: tuple[Affine, ...]


Variable = str | Reading


@dataclass(frozen=True)
class Affine:
    """constant + sum of coefficient * variable, over whole numbers."""

    constant: int
    terms: frozenset[tuple[Variable, int]] = frozenset()

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        sums = dict(self.terms)
        for name, coefficient in other.terms:
            sums[name] = sums.get(name, 0) + factor * coefficient
        return Affine(
            self.constant + factor * other.constant, frozenset((n, c) for n, c in sums.items() if c)
        )

    def times(self, factor: int) -> Affine:
        return Affine(0).plus(self, factor)

    def never_negative(self) -> bool:
        return (
            self.constant >= 0 and not self.reads() and all(coefficient >= 0 for _, coefficient in self.terms)
        )

    def reads(self) -> bool:
        """Whether data takes part."""
        return any(isinstance(name, Reading) for name, _ in self.terms)

    def renamed(self, names: dict[str, str]) -> Affine:
        """With other names for indices, also for those of what is read."""

        def rename(variable: Variable) -> Variable:
            if isinstance(variable, str):
                return names.get(variable, variable)
            return variable._replace(at=tuple(i.renamed(names) for i in variable.at))

        return Affine(self.constant, frozenset((rename(name), factor) for name, factor in self.terms))


@dataclass(frozen=True)
class Predicate:
    """All of: `atom <= 0` for each atom. No atoms: true everywhere."""

    atoms: frozenset[Affine] = frozenset()

    def also(self, other: Predicate) -> Predicate:
        return Predicate(self.atoms | other.atoms)

    def opposite(self) -> Predicate | None:
        """not (a <= 0) is 1 - a <= 0; the opposite of several atoms at once is no conjunction."""
        if len(self.atoms) != 1:
            return None
        (atom,) = self.atoms
        return Predicate(frozenset({Affine(1).plus(atom, -1)}))


TRUE = Predicate()
CAUSAL = Predicate(frozenset({Affine(0, frozenset({(KEY, 1), (QUERY, -1)}))}))
Index = tuple[Affine, ...]
ZERO = Affine(0)


def variables(rank: int) -> Index:
    names = [*(f"dim{-i}" for i in range(rank, 2, -1)), QUERY, KEY][-rank:] if rank else []
    return tuple(Affine(0, frozenset({(name, 1)})) for name in names)


def simplified(found: Predicate) -> Predicate | None:
    """Without the atoms that hold for all indices, 0 and more; None where one is false everywhere."""
    if any(not atom.terms and atom.constant > 0 for atom in found.atoms):
        return None
    return Predicate(frozenset(a for a in found.atoms if not a.times(-1).never_negative()))
