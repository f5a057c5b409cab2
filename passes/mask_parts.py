"""A mask as the conditions that all must hold, each with its place in the mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from fusekit.passes.affine import ZERO, Index, Predicate, simplified, variables
from fusekit.passes.index_arithmetic import aligned, element, is_written, unwrapped
from fusekit.passes.pattern import New
from fusekit.passes.spelling import spell, value_of

aten = torch.ops.aten


class Part(NamedTuple):
    """A condition: the mask at its indices needs `node` at the index `at`.

    rank: dimensions of the mask.
    tensor: a node, or one to be made, that broadcasts to the mask as the part does; None where none was met.
    """

    node: fx.Node
    at: Index
    rank: int
    tensor: Any = None

    def predicate(self) -> Predicate | None:
        """What it says about (query, key), None where it is not made of comparisons of whole numbers."""
        value = element(self.node, self.at)
        return simplified(value) if isinstance(value, Predicate) else None

    def of(self, node: fx.Node, index: Index, tensor: Any) -> Part:
        """A condition on another node, whose view may be `tensor`."""
        wanted = variables(self.rank)
        if len(index) <= self.rank and index == aligned(node, wanted):
            tensor = node
        elif tensor is None and len(index) + 1 == self.rank:
            for dim in range(self.rank - 1):
                widened = (*index[:dim], ZERO, *index[dim:])
                if all(i in (ZERO, own) for i, own in zip(widened, wanted, strict=True)):
                    tensor = New(aten.unsqueeze.default, (node, dim))
        return Part(node, index, self.rank, tensor)


def parts_of(mask: fx.Node) -> list[Part]:
    """The conditions of which a boolean mask is the conjunction."""
    rank = value_of(mask).dim()
    return _parts(Part(mask, aligned(mask, variables(rank)), rank, mask))


def _parts(part: Part) -> list[Part]:
    node, index = part.node, part.at
    name, args = spell(node)
    if is_written(node):  # it may hold something else by now
        return [part]
    if name == "and" and all(isinstance(a, fx.Node) and value_of(a).dtype == torch.bool for a in args):
        return [found for a in args for found in _parts(part.of(a, aligned(a, index), None))]
    inner = unwrapped(node, index)
    return [part] if inner is None else _parts(part.of(*inner, part.tensor))
