"""A mask as the conditions that all must hold, or of which one must, each with its place in the mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from fusekit.passes.affine import ZERO, Index, Predicate, simplified, variables
from fusekit.passes.index_arithmetic import aligned, element, is_written, opposite, unwrapped
from fusekit.passes.pattern import New
from fusekit.passes.spelling import spell, value_of

aten = torch.ops.aten


class Part(NamedTuple):
    """A condition: the mask at its indices needs `node` at the index `at`, or its complement.

    rank: dimensions of the mask.
    tensor: a node, or one to be made, that is the condition and broadcasts to the mask as the part does; None
    where none was met.
    """

    node: fx.Node
    at: Index
    rank: int
    tensor: Any = None
    negated: bool = False

    def predicate(self) -> Predicate | None:
        """What it says about (query, key), None where it is not made of comparisons of whole numbers."""
        value = (opposite if self.negated else element)(self.node, self.at)
        return simplified(value) if isinstance(value, Predicate) else None

    def of(self, node: fx.Node, index: Index, tensor: Any, negated: bool) -> Part:
        """A condition on another node, which may be the same as `tensor`."""
        wanted = variables(self.rank)
        view: Any = None
        if len(index) <= self.rank and index == aligned(node, wanted):
            view = node
        elif tensor is None and len(index) + 1 == self.rank:
            for dim in range(self.rank - 1):
                widened = (*index[:dim], ZERO, *index[dim:])
                if all(i in (ZERO, own) for i, own in zip(widened, wanted, strict=True)):
                    view = New(aten.unsqueeze.default, (node, dim))
        if negated and view is not None:  # of a tensor of every score it would cost what skipping saves
            made = tensor is None and not {wanted[-1], wanted[-2]} <= set(index)
            view = New(aten.logical_not.default, (view,)) if made else None
        return Part(node, index, self.rank, tensor if view is None else view, negated)


def parts_of(mask: fx.Node, forbidden: bool = False) -> list[Part]:
    """The conditions of which a boolean mask is the conjunction, or, where it says what is forbidden, its
    complement."""
    rank = value_of(mask).dim()
    tensor: Any = New(aten.logical_not.default, (mask,)) if forbidden else mask
    return joined_by("and", Part(mask, aligned(mask, variables(rank)), rank, tensor, forbidden))


def joined_by(word: str, part: Part) -> list[Part]:
    """The conditions that `word`, "and" or "or", joins to this one: not (a or b) is not a and not b."""
    node, index = part.node, part.at
    name, args = spell(node)
    if is_written(node):  # it may hold something else by now
        return [part]
    if name == (_DUAL[word] if part.negated else word) and all(map(_is_boolean, args)):
        found = [part.of(a, aligned(a, index), None, part.negated) for a in args]
        return [inner for a in found for inner in joined_by(word, a)]
    if name == "not" and _is_boolean(args[0]):
        return joined_by(word, part.of(args[0], index, part.tensor, not part.negated))
    inner = unwrapped(node, index)
    return [part] if inner is None else joined_by(word, part.of(*inner, part.tensor, part.negated))


_DUAL = {"and": "or", "or": "and"}


def _is_boolean(x: Any) -> bool:
    return isinstance(x, fx.Node) and getattr(value_of(x), "dtype", None) == torch.bool
