"""Whether a structural match is one: shapes, dtypes, one region, no intermediate that is read elsewhere."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from fusekit.passes.letters import equal, translate, unify
from fusekit.passes.pattern import INVERTIBLE, LOW, New, Pattern
from fusekit.passes.spelling import Spelling, said, spell, value_of

_PROMOTED = frozenset({"add", "mul", "masked_fill", "where"})  # on the way from the products to the softmax


class State(NamedTuple):
    """What of the pattern is found: its nodes in the graph, those left out, its operands and numbers; and
    second casts of a tensor that an operand is the first of, by the operand's name."""

    nodes: dict[fx.Node, fx.Node]
    skipped: dict[fx.Node, fx.Node]
    operands: dict[str, Any]
    captures: dict[str, float]
    casts: dict[fx.Node, str]

    def having(self, **changes: dict[Any, Any]) -> State:
        return self._replace(**{name: {**getattr(self, name), **new} for name, new in changes.items()})


def why_not(pattern: Pattern, state: State) -> str | None:
    """Why a structural match is no match: shapes, dtypes, regions, escapes."""
    sizes: dict[str, Any] = {}
    for operand in pattern.operands:
        value = state.operands.get(operand.name)
        if value is not None and (reason := unify(operand, _shape(value), sizes)):
            return reason
    return _wrong_intermediate(pattern, state, sizes) or _wrong_surroundings(pattern, state)


def _wrong_intermediate(pattern: Pattern, state: State, sizes: dict[str, Any]) -> str | None:
    first = state.operands[next(iter(pattern.rule.shapes))]
    low = value_of(first.args[0] if isinstance(first, New) else first).dtype
    for p, node in (*state.nodes.items(), *state.skipped.items()):
        ours, theirs = value_of(p), value_of(node)
        wanted = pattern.spelled[p]
        if is_shared(wanted):
            continue  # its argument is checked, or may have a shape of its own
        name = wanted.name
        expected = low if ours.dtype == LOW else ours.dtype
        fits = theirs.dtype == expected or (name == "softmax" and theirs.dtype in (low, torch.float32))
        # A bias or mask of float32 promotes the scores; the op keeps them in float32 in any case.
        fits |= pattern.rule.op == "attention" and name in _PROMOTED and theirs.dtype == torch.float32
        # A cast left out does no harm itself: what reads it is checked, and promotes as the cast would.
        if not fits and p not in state.skipped:
            return f"{name} is computed in {_named(theirs.dtype)}, not {_named(expected)}"
        if not _is_free(pattern, wanted) and not _shape_fits(pattern, ours.shape, theirs.shape, sizes):
            return f"{name} has shape {tuple(theirs.shape)}, which the pattern does not give it"
        if name == "slice" and not _shape_fits(pattern, wanted.args[2], spell(node).args[2], sizes):
            return f"the slice starts at {spell(node).args[2].at}, not where the pattern's does"
    return None


def _shape_fits(pattern: Pattern, ours: Sequence[Any], theirs: Sequence[Any], sizes: dict[str, Any]) -> bool:
    expected = translate(ours, pattern.sizes, sizes)
    return len(expected) == len(theirs) and all(map(equal, expected, theirs))


def _wrong_surroundings(pattern: Pattern, state: State) -> str | None:
    nodes = with_producers(state.nodes.values())
    if len({n.meta.get("region") for n in nodes}) > 1:
        return "a grad-mode, autocast or in-place boundary lies inside"
    for name, value in state.operands.items():
        if (value.args[0] if isinstance(value, New) else value) in nodes:
            return f"{name} is computed inside the chain itself"
    outputs = {state.nodes.get(p, state.skipped.get(p)) for p in pattern.outputs}
    for node in nodes - outputs:
        for user in node.users:
            if user not in nodes:
                promise = user.op == "output" and pattern.rule.op == "linear_cross_entropy"
                hint = "; keep_logits=False promises that nobody reads the logits" if promise else ""
                return f"the result of {spell(node).name} is also read by {said(user)}{hint}"
    return None


def is_shared(wanted: Spelling) -> bool:
    """A transposed or complemented argument may serve many sites: it is read through, not replaced."""
    inner = wanted.args[0]
    return wanted.name in INVERTIBLE and isinstance(inner, fx.Node) and inner.op == "placeholder"


def _is_free(pattern: Pattern, wanted: Spelling) -> bool:
    """Made of nothing but an argument that has a shape of its own."""
    names = {str(a.target) if a.op == "placeholder" else "" for a in wanted.args if isinstance(a, fx.Node)}
    return names <= {o.name for o in pattern.operands if "any" in o.words} and bool(names)


def with_producers(matched: Iterable[fx.Node]) -> set[fx.Node]:
    """Also the chunks, splits, unbinds and maxima of which every part that is read is among the nodes."""
    nodes = set(matched)
    for part in [node for node in nodes if node.target is operator.getitem]:
        producer: Any = part.args[0]
        unread = {user for user in producer.users if user.target is operator.getitem and not user.users}
        if nodes.issuperset(producer.users.keys() - unread):
            nodes |= {producer, *unread}
    return nodes


def _shape(value: fx.Node | New) -> list[Any]:
    if not isinstance(value, New):
        return list(value_of(value).shape)
    shape = list(value_of(value.args[0]).shape)
    if value.target is INVERTIBLE["transpose_last"]:
        shape[-2:] = shape[:-3:-1]
    return shape


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
