"""Sizes that attention takes for granted, as guards of the captured frame.

Of a cache that grows Dynamo makes every tensor's length a symbol of its own: keys and values of each layer,
and the mask's. The rules ask for one length of keys and values. A call whose keys and values differ in length
fails in eager as well, so a guard on that costs no capture; other sizes are guarded where they are equal now.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import SymInt, Tensor, fx

from fusekit.passes.canonicalise import bodies
from fusekit.passes.region import Region
from fusekit.passes.spelling import spell, value_of


def equate_lengths(region: Region) -> None:
    """Guard equal sizes of every call of attention. A graph that is rebuilt outside its frame has its guards."""
    if not region.in_frame:
        return
    for module in bodies(region.module):
        for node in module.graph.nodes:
            if spell(node).name == "sdpa":
                for one, other in _equal_sizes(node):
                    _guard(one, other)


def _equal_sizes(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    operands = [value_of(x) for x in spell(node).args[:4]]
    q, k, v, mask = (*operands, None)[:4]
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)):
        return
    yield k.shape[-2], v.shape[-2]
    yield from ((q.shape[0], x.shape[0]) for x in (k, v))
    yield k.shape[1], v.shape[1]
    if isinstance(mask, Tensor):
        yield from zip(reversed(mask.shape), (k.shape[-2], q.shape[-2], q.shape[1], q.shape[0]), strict=False)


def _guard(one: Any, other: Any) -> None:
    """Equality of two symbolic sizes that are equal in this call; a number would bind the symbol to itself."""
    if not all(isinstance(size, SymInt) and not size.node.expr.is_number for size in (one, other)):
        return
    if one.node.hint is not None and one.node.hint == other.node.hint:
        bool(one == other)
