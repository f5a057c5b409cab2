"""Sizes that attention takes for granted, as guards of the captured frame.

Of a cache that grows Dynamo makes every tensor's length a symbol of its own: keys and values of each layer,
and the mask's; the rules ask for one length of keys and values. Sizes that are equal in the call being
captured are guarded as equal: a call in which they differ is captured anew, and left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import SymInt, Tensor, fx

from fusekit.passes.canonicalise import bodies
from fusekit.passes.region import Region
from fusekit.passes.spelling import spell, value_of


def equate_lengths(region: Region) -> None:
    """Guard equal sizes of every call of attention. A graph rebuilt outside its frame has its guards."""
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
    """Equality of two sizes that are equal in this call; of a size and a number it makes a number of both."""
    if isinstance(one, SymInt) or isinstance(other, SymInt):
        values = [size.node.hint if isinstance(size, SymInt) else size for size in (one, other)]
        if (
            values[0] is not None and values[0] == values[1] != 1
        ):  # a mask's 1 is repeated, whatever the other is
            bool(one == other)
