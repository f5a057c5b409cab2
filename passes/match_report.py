"""What is told of matches and near-matches: places, reasons, the bytes that a site saves."""

from __future__ import annotations

from torch import Tensor

from fusekit.passes.canonicalise import location
from fusekit.passes.cost import hint
from fusekit.passes.normalise import is_view
from fusekit.passes.pattern import LAYOUT, Match, Miss
from fusekit.passes.spelling import spell, value_of


def sentence(miss: Miss) -> str:
    """The reason, and the line where the difference is if that is another one than the site's.

    Equal layers give equal sentences, so that a report can count them.
    """
    where = location(miss.node)
    elsewhere = not miss.complete and where and where != location(miss.root)
    return f"{miss.reason} (at {where})" if elsewhere else miss.reason


def is_worth_telling(miss: Miss) -> bool:
    """A near-match: all of the structure, or so much of it that the rest was to be expected."""
    return miss.complete or (miss.anchored and 2 * miss.progress > miss.rule.traced.weight)


def location_of(match: Match) -> str:
    heavy = [n for n in match.nodes if spell(n).name not in LAYOUT] or [match.root]
    return next(filter(None, map(location, [*heavy, match.root])), "")


def bytes_saved(match: Match) -> int:
    """Written and read back once each: what the intermediates cost that no longer exist."""
    inner = [n for n in match.nodes if n not in match.outputs and not is_view(n)]
    inner = [n for n in inner if isinstance(value_of(n), Tensor)]  # max gives a pair, whose parts are counted
    return sum(2 * value_of(n).element_size() * hint(value_of(n).numel()) for n in inner)
