"""Attention masks back from index arithmetic: which part of a mask is `key <= query`, and what is left of it.

Models build masks with arange, comparisons and `&`; Hugging Face does so even where none is needed, because
it cannot look at data while being captured. A mask is read as a predicate over (batch, head, query, key):
index arithmetic is followed through views and gathers as affine forms, comparisons of those become atoms, and
everything else stays a tensor. Only what is proved is dropped: an atom that is `key - query <= 0` itself, and
atoms that are constant and true. A wrong proof would train another model without a sound, so there is no
guessing here: whatever is not understood keeps its tensor. Sizes may be symbolic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from fusekit.passes.affine import CAUSAL, TRUE, Affine, Predicate, simplified, variables
from fusekit.passes.index_arithmetic import Value, aligned, constant, element, is_written
from fusekit.passes.spelling import spell, value_of


class Mask(NamedTuple):
    """A mask as (key <= query, where `causal`) and `rest`; rest None is true everywhere."""

    causal: bool
    rest: fx.Node | None


def recover(mask: fx.Node) -> Mask:
    """Take a boolean mask (True may attend; its last two dimensions are query and key) apart."""
    parts = [(part, predicate(part)) for part in _conjuncts(mask)]
    if any(is_written(part) for part, _ in parts):  # it may hold something else by now
        return Mask(False, mask)
    causal = any(p == CAUSAL for _, p in parts)
    rest = [part for part, p in parts if p is None or p not in (CAUSAL, TRUE)]
    if not rest:
        return Mask(causal, None)
    if len(rest) == 1:
        return Mask(causal, rest[0])
    return Mask(False, mask)  # several tensors are left: joining them again would cost what it saves


def recover_additive(mask: fx.Node, lowest: float) -> Mask | None:
    """Read a mask that is added to the scores: 0 where a key may be attended to, at most `lowest` elsewhere.

    Returns None where it is not such a mask made of index arithmetic alone: with every key of some row
    forbidden, adding -1e9 and forbidding differ, so only a mask known in full may be replaced.
    """
    allowed = _additive_predicate(mask, lowest)
    if allowed == CAUSAL:
        return Mask(True, None)
    return Mask(False, None) if allowed == TRUE else None


def predicate(mask: fx.Node) -> Predicate | None:
    """What a mask says about (query, key), None where it is not made of index arithmetic alone."""
    value = element(mask, aligned(mask, variables(value_of(mask).dim())))
    return simplified(value) if isinstance(value, Predicate) else None


def _conjuncts(node: fx.Node) -> list[fx.Node]:
    name, args = spell(node)
    if name != "and" or is_written(node):
        return [node]
    if all(isinstance(a, fx.Node) and value_of(a).dtype == torch.bool for a in args):
        return [part for a in args for part in _conjuncts(a)]
    return [node]


def _additive_predicate(node: fx.Node, lowest: float) -> Predicate | None:
    if is_written(node):
        return None
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
