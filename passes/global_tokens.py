"""Global tokens in a mask: `near | is_global[query] | is_global[key]`, where near bounds key - query.

Which tokens are global is data, of which only its place is looked at: a boolean that depends on the query (or
key) alone. One bound may hold for global tokens as well, `& causal` around all of it. What else is joined by
"or", as two bands, is none of the op's and stays a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fusekit.passes.affine import Affine, Predicate
from fusekit.passes.bands import Band, band_of, is_band
from fusekit.passes.documents import OURS, THEIRS, line
from fusekit.passes.index_arithmetic import constant, is_written
from fusekit.passes.mask_parts import Part, joined_by
from fusekit.passes.pattern import New
from fusekit.passes.spelling import value_of

aten = torch.ops.aten
Reading = Callable[[Predicate | None], Predicate | None]


class Globals(NamedTuple):
    """queries, keys: the op's `global_queries` and `global_keys`, nodes or such to be made, or None.

    ahead: whether no bound holds for global tokens.
    """

    queries: Any
    keys: Any
    ahead: bool


class Either(NamedTuple):
    """Near, or seen by or from a global token."""

    near: Band
    queries: Any
    keys: Any

    def within(self, outer: Band) -> tuple[Band, Globals] | None:
        """As the op has it, beside a bound that holds for all; None where the op has no such form.

        The op bounds global tokens from above or not at all, and where it does, by the bound of the others.
        """
        both = self.near.also(outer)
        if outer.low is not None or both.as_arguments() is None:
            return None
        if outer.high is not None and both.high != outer.high:
            return None
        return both, Globals(self.queries, self.keys, outer.high is None)


def either_of(part: Part, by_index: Reading = lambda found: found) -> Either | None:
    """A part of a mask as a band or global tokens, None where it is something else.

    by_index: reads what is said of positions as said of indices, as Documents.by_index.
    """
    near: list[Band] = []
    lines: dict[Affine, Any] = {}
    for found in joined_by("or", part):
        if constant(found.node) == int(found.negated):  # or nothing, as transformers begins
            continue
        band = _band(found, by_index)
        if band is not None:
            near.append(band)
        elif not _add_line(found, lines):
            return None
    if len(near) != 1 or not lines:
        return None
    return Either(near[0], lines.get(OURS), lines.get(THEIRS))


def _band(part: Part, by_index: Reading) -> Band | None:
    said = [by_index(found.predicate()) for found in joined_by("and", part)]
    return band_of(said) if all(map(is_band, said)) else None


def _add_line(part: Part, lines: dict[Affine, Any]) -> bool:
    """Add what a part says of the query alone, or of the key alone, if that is what it is."""
    node = part.node
    if is_written(node) or value_of(node).dtype != torch.bool:
        return False
    for own in (OURS, THEIRS):
        found = line(node, part.at, own)
        if found is None:
            continue
        found = New(aten.logical_not.default, (found,)) if part.negated else found
        other = lines.get(own)
        lines[own] = found if other is None else New(aten.logical_or.default, (other, found))
        return True
    return False


def chosen(
    parts: Sequence[Part], said: Sequence[Predicate | None], by_index: Reading
) -> tuple[Part, Band, Globals] | None:
    """The first part that the op takes as global tokens, with the band of all parts and how it is taken."""
    outer = band_of(found for found in said if is_band(found))
    for part, found in zip(parts, said, strict=True):
        either = None if is_band(found) else either_of(part, by_index)
        taken = None if either is None else either.within(outer)
        if taken is not None:
            return part, *taken
    return None
