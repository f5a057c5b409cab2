"""Attention masks back from index arithmetic: the keys a query sees by its place, and what is left.

Models build masks with arange, comparisons and `&`; Hugging Face does so even where none is needed, because
it cannot look at data while being captured. A mask is read as a predicate over (batch, head, query, key):
index arithmetic is followed through views and gathers as affine forms, comparisons of those become atoms, and
everything else stays a tensor. Only what is proved is dropped: atoms that bound `key - query` by a number,
which are the op's causal, window and offset, and atoms that are constant and true. A wrong proof would train
another model without a sound, so there is no guessing here: whatever is not understood keeps its tensor.
Equalities of numbers of the query and of the key become the op's documents (documents.py), a band or
booleans of query and key its global tokens (global_tokens.py). Sizes may be symbolic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusekit.kernels.attention_form import band
from fusekit.passes import global_tokens
from fusekit.passes.affine import TRUE, Affine, Predicate, simplified, variables
from fusekit.passes.bands import Band, band_of, is_band
from fusekit.passes.documents import BATCH, OURS, THEIRS, Documents, both, documents_of, line
from fusekit.passes.global_tokens import Globals
from fusekit.passes.index_arithmetic import Value, aligned, constant, element, is_written
from fusekit.passes.mask_parts import Part, parts_of
from fusekit.passes.pattern import New
from fusekit.passes.spelling import spell, value_of

aten = torch.ops.aten


class Mask(NamedTuple):
    """A mask as the op's band (kernels/attention_form.py), documents, global tokens and `rest`, a node or one
    to be made; rest None is true everywhere."""

    causal: bool
    rest: Any
    window: int | None = None
    offset: int = 0
    documents: Documents | None = None
    globals: Globals | None = None

    def leaves_a_key(self, shape: Sequence[Any]) -> bool:
        """Whether every query of a mask of this shape is proved to see a key."""
        low, high = band(self.causal, self.window, self.offset)
        if self.rest is not None or high < 0:
            return False
        if self.documents is not None:  # its own, at the same index
            return self.documents.own and low <= 0 and statically_known_true(shape[-2] <= shape[-1])
        return self.window is None or statically_known_true(shape[-2] + low <= shape[-1])


def recover(mask: fx.Node) -> Mask:
    """Take a boolean mask (True may attend; its last two dimensions are query and key) apart."""
    return _joined(parts_of(mask)) or Mask(False, mask)


def _joined(parts: list[Part]) -> Mask | None:
    """Conditions that all must hold as one mask, None where that is none the op has."""
    if any(is_written(part.node) for part in parts):  # it may hold something else by now
        return None
    documents, parts = _documents(parts)
    said = [part.predicate() for part in parts]
    if documents is not None:
        said = [documents.by_index(p) for p in said]
    near, beside = band_of(p for p in said if is_band(p)), None
    taken = global_tokens.chosen(parts, said, (lambda p: p) if documents is None else documents.by_index)
    if taken is not None:
        used, near, beside = taken
        said = [TRUE if part is used else p for part, p in zip(parts, said, strict=True)]
    left = [part for part, p in zip(parts, said, strict=True) if not is_band(p)]
    rest = [part.tensor for part in left]
    if len(rest) > 1:
        documents, rest = _lines(documents, left)
    found = from_band(near)
    if found is None or len(rest) > 1 or None in rest:  # joining several again would cost what it saves
        return None
    return found._replace(rest=rest[0] if rest else None, documents=documents, globals=beside)


def _documents(parts: list[Part]) -> tuple[Documents | None, list[Part]]:
    """The parts that the op takes as documents, first one that says more, and the others."""
    found = [(part, documents_of(part)) for part in parts if not is_band(part.predicate())]
    candidates = [(part, documents) for part, documents in found if documents is not None]
    candidates.sort(key=lambda candidate: candidate[1].places is None)
    chosen: Documents | None = None
    taken = []
    for part, documents in candidates:
        joined = documents if chosen is None else chosen.also(documents)
        if joined is not None:
            chosen = joined
            taken.append(part)
    return chosen, [part for part in parts if part not in taken]


def _lines(documents: Documents | None, parts: list[Part]) -> tuple[Documents | None, list[Any]]:
    """What is said of queries alone and of keys alone, joined where the op has a form for it; the rest."""
    seeing, seen = (_all_of(parts, own) for own in (OURS, THEIRS))
    rest = [part.tensor for part in parts if not _is_line(part)]
    if documents is None and seeing is not None and seen is not None:
        return both(seeing, seen), rest
    if seeing is not None:
        documents = None if documents is None else documents.where(seeing)
        if documents is None:
            return None, [part.tensor for part in parts]
    if seen is not None:
        batched = any(BATCH in part.at for part in parts if _is_line(part))
        row = New(aten.unsqueeze.default, (New(aten.unsqueeze.default, (seen, -2)), -2))
        rest.append(row if batched else seen)
    return documents, rest


def _is_line(part: Part) -> bool:
    return _line(part, OURS) is not None or _line(part, THEIRS) is not None


def _line(part: Part, own: Affine) -> Any:
    if value_of(part.node).dtype != torch.bool or (found := line(part.node, part.at, own)) is None:
        return None
    return New(aten.logical_not.default, (found,)) if part.negated else found


def _all_of(parts: list[Part], own: Affine) -> Any:
    lines = [found for part in parts if (found := _line(part, own)) is not None]
    return functools.reduce(lambda x, y: New(aten.logical_and.default, (x, y)), lines) if lines else None


def recover_additive(mask: fx.Node, lowest: float) -> Mask | None:
    """Read a mask that is added to the scores: 0 where a key may be attended to, at most `lowest` elsewhere.

    Returns None where it is not such a mask made of index arithmetic alone: with every key of some row
    forbidden, adding -1e9 and forbidding differ, so only a mask known in full that leaves every row a key may
    be replaced.
    """
    allowed = _additive_predicate(mask, lowest)
    found = from_band(band_of([allowed])) if is_band(allowed) else _chosen(mask, lowest)
    return found if found is not None and found.leaves_a_key(value_of(mask).shape) else None


def _chosen(mask: fx.Node, lowest: float) -> Mask | None:
    """What a boolean mask says that chooses between 0 and `lowest`."""
    if is_written(mask):
        return None
    name, args = spell(mask)
    if name in ("to", "clone", "contiguous"):
        return _chosen(args[0], lowest) if _keeps_infinity(mask) and _is_floating(args[0]) else None
    if name == "where" and constant(args[1]) == 0 and _is_low(constant(args[2]), lowest):
        return recover(args[0])
    if name == "masked_fill" and constant(args[0]) == 0 and _is_low(args[2], lowest):
        return recover_forbidden(args[1])
    return None


def recover_forbidden(mask: fx.Node) -> Mask | None:
    """Read a boolean mask that is True where a key may not be attended to; None where all that is left is its
    complement."""
    if is_written(mask):
        return None
    name, args = spell(mask)
    if name == "to" and _is_floating(args[0]):  # MPT's: finfo.min is true, and 0 false
        return _chosen(args[0], -math.ulp(0.0))
    if name == "lt" and _is_floating(args[0]) and _is_at_most_zero(args[1]):
        return _chosen(args[0], 2 * args[1] - 1)  # Falcon's: finfo.min is below -1, however cast; 0 not
    if value_of(mask).dtype == torch.bool:
        found = _joined(parts_of(mask, forbidden=True))
        return found if found is not None and found._replace(rest=None) != Mask(False, None) else None
    forbidden = predicate(mask)
    allowed = None if forbidden is None else forbidden.opposite()
    return from_band(band_of([allowed])) if is_band(allowed) else None


def split_additive(mask: fx.Node, lowest: float) -> Mask | None:
    """Read a mask that is added to the scores as a band and a bias, as T5 joins them: bias + mask, or
    where(mask, bias, lowest). As in `recover_additive`, only a band that leaves every row a key will do."""
    if is_written(mask):
        return None
    name, args = spell(mask)
    if name in ("contiguous", "clone"):
        return split_additive(args[0], lowest)
    if name == "add":
        for band_node, bias in (args, args[::-1]):
            if _is_floating(band_node) and _is_floating(bias):
                found = recover_additive(band_node, lowest)
                if found is not None:
                    return found._replace(rest=bias)
    if name == "masked_fill" and _is_floating(args[0]) and _is_low(args[2], lowest):
        found = recover_forbidden(args[1]) if constant(args[0]) is None else None
        if found is not None and found.leaves_a_key(value_of(args[1]).shape):
            return found._replace(rest=args[0])
    if name == "where" and _is_floating(args[1]) and constant(args[1]) is None:
        found = recover(args[0])
        if found.leaves_a_key(value_of(args[0]).shape) and _is_low(constant(args[2]), lowest):
            return found._replace(rest=args[1])
    return recover_additive(mask, lowest)


def _is_at_most_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and -math.inf < value <= 0


def _is_floating(node: Any) -> bool:
    value = value_of(node)
    return isinstance(node, fx.Node) and isinstance(value, Tensor) and value.is_floating_point()


def from_band(found: Band) -> Mask | None:
    """A mask that is a band and nothing else, None where that is none the op has."""
    arguments = found.as_arguments()
    return None if arguments is None else Mask(arguments[0], None, *arguments[1:])


def predicate(mask: fx.Node) -> Predicate | None:
    """What a mask says about (query, key), None where it is not made of index arithmetic alone."""
    value = element(mask, aligned(mask, variables(value_of(mask).dim())))
    return simplified(value) if isinstance(value, Predicate) else None


def _additive_predicate(node: fx.Node, lowest: float) -> Predicate | None:
    if is_written(node):
        return None
    if constant(node) == 0 and value_of(node).is_floating_point():
        return TRUE
    name, args = spell(node)
    index = aligned(node, variables(value_of(node).dim()))
    allowed: Value
    if name in ("to", "clone", "contiguous"):
        return _additive_predicate(args[0], lowest) if _keeps_infinity(node) else None
    if name == "masked_fill" and _is_low(args[2], lowest) and constant(args[0]) == 0:
        forbidden = element(args[1], aligned(args[1], index))
        allowed = forbidden.opposite() if isinstance(forbidden, Predicate) else None
    elif name == "where" and constant(args[1]) == 0 and _is_low(constant(args[2]), lowest):
        allowed = element(args[0], aligned(args[0], index))
    elif name == "triu" and _is_low(constant(args[0]), lowest) and isinstance(args[1], int):
        allowed = Predicate(frozenset({index[-1].plus(index[-2], -1).plus(Affine(1 - args[1]))}))
    else:
        return None
    return simplified(allowed) if isinstance(allowed, Predicate) else None


def _keeps_infinity(node: fx.Node) -> bool:
    return value_of(node).is_floating_point()


def _is_low(value: Any, lowest: float) -> bool:
    return isinstance(value, (int, float)) and value <= lowest
