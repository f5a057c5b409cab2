"""Documents in a mask: `ids[query] == ids[key]`, whatever the ids are, packed sequences and chunks alike.

An equality of whole numbers of which one side depends on the query only and the other on the key only is the
op's documents, without a look at the numbers. Two facts about the numbers are proved where they hold:

    own       both sides read one tensor alike, so that a query's own key is of its document;
    places    ids = cumsum(diff(positions) != 1): within a document positions grow by one with the index, so a
              bound on the difference of two positions is that bound on key - query (Hugging Face compares
              positions where sequences are packed).

Several equalities at once, as chunks of packed sequences, are one of pairs: each number becomes the count of
smaller ones among those compared, which is small whatever they are, and two counts make one number. Booleans
of the query and of the key that must both hold are an equality as well.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusekit.passes.affine import KEY, QUERY, ZERO, Affine, Index, Predicate, Reading, variables
from fusekit.passes.fused_call import operands, value_in
from fusekit.passes.index_arithmetic import EXACT, Value, aligned, element, is_written
from fusekit.passes.mask_parts import Part
from fusekit.passes.normalise import same_shape
from fusekit.passes.pattern import New
from fusekit.passes.spelling import filled, spell, value_of

aten = torch.ops.aten
BATCH, _, OURS, THEIRS = variables(4)  # only a mask of four dimensions has one for the batch

NARROW = (torch.bool, torch.uint8, torch.int8, torch.int16)


class Documents(NamedTuple):
    """queries, keys: the op's `documents` and `key_documents`, nodes or such to be made.

    own: a query's own key is proved to be of its document.
    places: position of a key - position of a query, where within a document it is key - query.
    """

    queries: Any
    keys: Any
    own: bool
    places: Affine | None

    def also(self, other: Documents) -> Documents | None:
        """Both at once, as numbers of the pairs; None where the two sides of one have different shapes."""
        mine, theirs = self.counted(), other.counted()
        if mine is None or theirs is None:
            return None
        queries, keys = (_paired(*pair) for pair in zip(mine, theirs, strict=True))
        return Documents(queries, keys, self.own and other.own, self.places)

    def counted(self) -> tuple[Any, Any] | None:
        """Both sides as counts of smaller numbers among both; None where their shapes do not fit together."""
        lines = [New(aten.to.dtype, (x, torch.int64)) for x in (self.queries, self.keys)]
        if not same_shape(*(_shape(line)[:-1] for line in lines)):
            return None
        ordered = New(operator.getitem, (New(aten.sort.default, (New(aten.cat.default, (lines, -1)), -1)), 0))
        queries, keys = (New(aten.contiguous.default, (line,)) for line in lines)
        return New(aten.searchsorted.Tensor, (ordered, queries)), New(
            aten.searchsorted.Tensor, (ordered, keys)
        )

    def where(self, seeing: Any) -> Documents | None:
        """The same for the queries for which `seeing` holds, no key for others."""
        counts = self.counted()
        if counts is None:
            return None
        queries = New(aten.masked_fill.Scalar, (counts[0], New(aten.logical_not.default, (seeing,)), -1))
        return Documents(queries, counts[1], False, self.places)

    def by_index(self, found: Predicate | None) -> Predicate | None:
        """Within a document, what is said of positions said of indices."""
        if found is None or self.places is None:
            return found
        return Predicate(frozenset(_by_index(atom, self.places) for atom in found.atoms))


def both(seeing: Any, seen: Any) -> Documents:
    """Booleans of the query and of the key that must both hold: 1 or 0 against 1 or -1."""
    queries, keys = (New(aten.to.dtype, (x, torch.int32)) for x in (seeing, seen))
    return Documents(queries, New(aten.sub.Scalar, (New(aten.mul.Scalar, (keys, 2)), 1)), False, None)


def _paired(first: Any, second: Any) -> New:
    """One number for two below 2 ** 31."""
    return New(aten.add.Tensor, (New(aten.mul.Scalar, (first, 1 << 31)), second))


def _shape(x: Any) -> Sequence[Any]:
    return value_in(x, operands({"": x})[0]).shape


def documents_of(part: Part) -> Documents | None:
    """A part of a mask as documents, None where it is something else."""
    name, args = spell(part.node)
    if name != ("ne" if part.negated else "eq") or is_written(part.node) or not all(map(_is_exact, args)):
        return None
    index = {a: aligned(a, part.at) for a in args}
    for ours, theirs in (args, args[::-1]):
        queries, keys = line(ours, index[ours], OURS), line(theirs, index[theirs], THEIRS)
        if queries is not None and keys is not None:
            own, places = _proved(element(ours, index[ours]), element(theirs, index[theirs]))
            return Documents(_wide(queries, ours), _wide(keys, theirs), own, places)
    return None


def _is_exact(x: Any) -> bool:
    return _is_whole(x) or (getattr(value_of(x), "dtype", None) in NARROW and not is_written(x))


def _wide(made: Any, node: fx.Node) -> Any:
    return New(aten.to.dtype, (made, torch.int32)) if value_of(node).dtype in NARROW else made


def _is_whole(x: Any) -> bool:
    return isinstance(x, fx.Node) and getattr(value_of(x), "dtype", None) in EXACT and not is_written(x)


def line(node: fx.Node, index: Index, own: Affine) -> Any:
    """(length,) or (batch, length) of a tensor that depends on nothing else."""
    used = [i for i in index if i != ZERO]
    if used not in ([own], [BATCH, own]):
        return None
    ones = [dim for dim, i in enumerate(index) if i == ZERO]
    return New(aten.squeeze.dims, (node, ones)) if ones else node


def _proved(query: Value, key: Value) -> tuple[bool, Affine | None]:
    if not isinstance(query, Affine) or not isinstance(key, Affine):
        return False, None
    own = query.renamed({QUERY: KEY}) == key
    if not own or query.constant or len(query.terms) != 1:
        return own, None
    ((source, factor),) = query.terms
    ((other, _),) = key.terms
    if factor != 1 or not isinstance(source, Reading) or not isinstance(other, Reading):
        return own, None
    return own, _places(source, other)


def _places(query: Reading, key: Reading) -> Affine | None:
    """The difference of what positions say at key and query, if ids count where they do not grow by one."""
    positions = _counted(query.source) if isinstance(query.source, fx.Node) else None
    step = Affine(0, frozenset({(KEY, 1), (QUERY, -1)}))
    if positions is None or key.at[-1].plus(query.at[-1], -1) != step:
        return None
    here, there = element(positions, key.at), element(positions, query.at)
    if not isinstance(here, Affine) or not isinstance(there, Affine):
        return None
    difference = here.plus(there, -1)
    return difference if difference.reads() else None


def _counted(node: fx.Node) -> fx.Node | None:
    """x of cumsum(diff(x, in front: one element) != 1), all along the last dimension."""
    name, args = spell(node)
    last = value_of(node).dim() - 1
    if name != "cumsum" or value_of(node).dtype != torch.int64 or args[1] % (last + 1) != last:
        return None
    changes = args[0]
    source: Any = filled(changes)[0] if _is_call(changes, "ne") and filled(changes)[1] == 1 else None
    if not _is_call(source, "diff") or not _is_whole(source):
        return None
    positions, times, dim, front, behind = filled(source)
    if times != 1 or dim % (last + 1) != last or behind is not None or not isinstance(front, fx.Node):
        return None
    one = statically_known_true(value_of(front).shape[-1] == 1)
    return positions if one and _is_whole(positions) else None


def _is_call(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and not is_written(node) and spell(node).name == name


def _by_index(atom: Affine, places: Affine) -> Affine:
    """The atom with key - query in place of `places`, if that is all it says."""
    for sign in (1, -1):
        rest = atom.plus(places, -sign)
        if not rest.terms:
            return Affine(rest.constant, frozenset({(KEY, sign), (QUERY, -sign)}))
    return atom
