"""One attempt to find a traced pattern at one node of a graph: backtracking over spellings and orders.

`find` returns the match, or the nearest miss: at which node it ended and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from fusekit.passes.match_check import State, is_shared, why_not, with_producers
from fusekit.passes.normalise import same_meta
from fusekit.passes.pattern import (
    ANCHORS,
    COMMUTATIVE,
    INVERSE_ARGS,
    INVERTIBLE,
    NEUTRAL,
    Match,
    Miss,
    New,
    Pattern,
)
from fusekit.passes.spelling import Spelling, Start, said, spell, value_of

# Nodes from an argument to an output: the longest linear is x.view(-1, K), addmm, and the view back.
REACH = 3


def find(pattern: Pattern, root: fx.Node) -> Match | Miss | None:
    """The match that ends at `root`, else the nearest miss, else None: even the root is another op."""
    search = Search(pattern, root)
    for state in search.outputs():
        reason = why_not(pattern, state)
        if reason is None:
            return search.match(state)
        search.miss = Miss(pattern.rule, root, root, reason, pattern.weight, complete=True)
    return search.miss


class Search:
    """One attempt at one root."""

    def __init__(self, pattern: Pattern, root: fx.Node) -> None:
        self.pattern, self.root = pattern, root
        self.miss: Miss | None = None
        self.beyond_first = False

    def outputs(self) -> Iterator[State]:
        """Every way in which the pattern ends at the root; its other outputs where they are found."""
        for state in self.node(self.pattern.outputs[0], self.root, State({}, {}, {}, {}, {})):
            yield from self.others(self.pattern.outputs[1:], state)

    def others(self, left: Sequence[fx.Node], state: State) -> Iterator[State]:
        """Every way to find the outputs in `left`. Where one is not there, the first is no near-match."""
        while left and (left[0] in state.nodes or left[0] in state.skipped):
            left = left[1:]
        if not left:
            yield state
            return
        before, self.beyond_first = self.beyond_first, True
        for candidate in self.candidates(left[0], state):
            for extended in self.node(left[0], candidate, state):
                yield from self.others(left[1:], extended)
        self.beyond_first = before

    def candidates(self, p: fx.Node, state: State) -> list[fx.Node]:
        """Free nodes of the root's module near what is known of p's arguments, in graph order."""
        known = [self.known(a, state) for a in self.pattern.spelled[p].args if isinstance(a, fx.Node)]
        found: set[fx.Node] = set()
        level = {node for node in known if isinstance(node, fx.Node)}
        level |= {cast for node in level for cast in _casts_beside(node)}
        for _ in range(REACH):
            level = {user for node in level for user in node.users} - found
            found |= level
        taken, names = {*state.nodes.values(), *state.skipped.values()}, self.pattern.names_of(p)
        module = _module(self.root)
        return sorted(n for n in found - taken if spell(n).name in names and _module(n) == module)

    def known(self, p: fx.Node, state: State) -> Any:
        if p.op == "placeholder":
            return state.operands.get(str(p.target))
        return state.nodes.get(p, state.skipped.get(p))

    def fail(self, state: State, at: Any, reason: str) -> None:
        if self.beyond_first:
            return
        progress = len(self.pattern.heavy & state.nodes.keys())
        if progress and not (self.miss and (self.miss.complete or self.miss.progress >= progress)):
            node = at if isinstance(at, fx.Node) else self.root
            anchored = any(self.pattern.spelled[p].name in ANCHORS for p in state.nodes)
            self.miss = Miss(self.pattern.rule, self.root, node, reason, progress, anchored=anchored)

    def node(self, p: fx.Node, value: Any, state: State) -> Iterator[State]:
        """Every way in which graph value `value` can be pattern node `p`."""
        known = state.nodes.get(p, state.skipped.get(p))
        if known is not None:
            if known is value:
                yield state
            else:
                self.fail(
                    state, value, f"two different tensors where one {self.pattern.spelled[p].name} is needed"
                )
            return
        if p.op == "placeholder":
            yield from self.operand(str(p.target), value, state)
            return
        wanted = self.pattern.spelled[p]
        if not isinstance(value, fx.Node):
            return  # a number where a computed tensor belongs: scaling is another function, not a near-match
        there = spell(value)
        if there.name == wanted.name:
            extended = state.having(**{"skipped" if is_shared(wanted) else "nodes": {p: value}})
            for ours, theirs in self.orders(wanted, there):
                yield from self.arguments(ours, theirs, value, extended)
        elif wanted.name not in ("to", "reshape", *NEUTRAL) and p not in self.pattern.also:
            self.fail(state, value, f"{said(value)} where {wanted.name} is needed")
        yield from self.absent(p, wanted, there, value, state)

    def orders(self, wanted: Spelling, there: Spelling) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        if len(wanted.args) == len(there.args):
            yield wanted.args, there.args
            if wanted.name in COMMUTATIVE:
                yield wanted.args, there.args[::-1]

    def absent(
        self, p: fx.Node, wanted: Spelling, there: Spelling, value: Any, state: State
    ) -> Iterator[State]:
        """The spellings that leave `p` out, or write it as its inverse."""
        if not isinstance(value, fx.Node):
            return
        for other in self.pattern.also.get(p, ()):
            for found in self.node(other, value, state):
                yield found.having(nodes={p: value})
        if wanted.name in ("to", "reshape"):
            yield from self.node(wanted.args[0], value, state.having(skipped={p: value}))
        elif wanted.name in NEUTRAL and self.captured(wanted.args[1]):
            name = self.pattern.magic[wanted.args[1]]
            if wanted.name == "mul" and there.name == "div" and _is_number(there.args[1]) and there.args[1]:
                state = state.having(nodes={p: value}, captures={name: 1 / there.args[1]})
                yield from self.node(wanted.args[0], there.args[0], state)
            elif there.name != wanted.name and name not in state.captures:
                state = state.having(skipped={p: value}, captures={name: NEUTRAL[wanted.name]})
                yield from self.node(wanted.args[0], value, state)
        elif is_shared(wanted) and there.name != wanted.name and isinstance(value_of(value), Tensor):
            inverse = New(INVERTIBLE[wanted.name], (value, *INVERSE_ARGS[wanted.name]))
            yield from self.operand(str(wanted.args[0].target), inverse, state)

    def captured(self, literal: Any) -> bool:
        return isinstance(literal, float) and literal in self.pattern.magic

    def arguments(self, ours: Any, theirs: Any, at: fx.Node, state: State) -> Iterator[State]:
        if not ours:
            yield state
            return
        for extended in self.argument(ours[0], theirs[0], at, state):
            yield from self.arguments(ours[1:], theirs[1:], at, extended)

    def argument(self, ours: Any, theirs: Any, at: fx.Node, state: State) -> Iterator[State]:
        if isinstance(ours, fx.Node):
            yield from self.node(ours, theirs, state)
        elif isinstance(ours, Start):
            yield state  # a size: compared when all sizes are known
        elif isinstance(ours, (list, tuple)):
            if isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
                yield from self.arguments(tuple(ours), tuple(theirs), at, state)
            else:
                self.fail(state, at, f"{theirs} where {list(ours)} is needed")
        elif self.captured(ours):
            name = self.pattern.magic[ours]
            if theirs is not None and not _is_number(theirs):
                self.fail(state, at, f"{name} is computed, not a number known at capture")
            elif name in state.captures and state.captures[name] != theirs:
                self.fail(state, at, f"{name} has two values")
            else:
                yield state.having(captures={name: theirs})
        elif _same_literal(ours, theirs):
            yield state
        elif not isinstance(theirs, fx.Node):  # a product with a tensor is another function, no near-match
            self.fail(state, at, f"{spell(at).name} has {theirs} where {ours} is needed")

    def operand(self, name: str, value: Any, state: State) -> Iterator[State]:
        if name in state.operands:
            first = state.operands[name]
            if first == value:
                yield state
            elif isinstance(value, fx.Node) and isinstance(first, fx.Node) and first in _casts_beside(value):
                yield state.having(operands={name: min(first, value)}, casts={max(first, value): name})
            else:
                self.fail(state, value, f"{name} would have to be two different tensors")
            return
        operand = next(o for o in self.pattern.operands if o.name == name)
        source = value.args[0] if isinstance(value, New) else value
        if isinstance(value_of(source), Tensor) or (value is None and "optional" in operand.words):
            yield state.having(operands={name: value})
        else:
            self.fail(state, value, f"{name} is not a tensor")

    def match(self, state: State) -> Match:
        outputs = tuple(state.nodes.get(p) or state.skipped[p] for p in self.pattern.outputs)
        arguments = {**state.operands, **state.captures, **self.pattern.rule.fixed}
        stands_for: dict[fx.Node, tuple[str, New | None]] = {}
        for p, node in state.skipped.items():
            wanted = self.pattern.spelled[p]
            if is_shared(wanted):
                made = New(INVERTIBLE[wanted.name], (node, *INVERSE_ARGS[wanted.name]))
                stands_for[node] = (str(wanted.args[0].target), made)
        for name, value in state.operands.items():
            if isinstance(value, New):
                stands_for[value.args[0]] = (name, value)
            elif value is not None:
                stands_for[value] = (name, None)
        stands_for |= {node: (name, None) for node, name in state.casts.items()}
        return Match(
            self.pattern.rule, outputs, sorted(with_producers(state.nodes.values())), arguments, stands_for
        )


def _casts_beside(node: fx.Node) -> list[fx.Node]:
    """Other casts of the same tensor to the same dtype, within one region: autocast casts an activation for
    each of its readers. An op that reads one sums the gradients before it rounds them."""
    spelled = spell(node)
    if spelled.name != "to" or not isinstance(spelled.args[0], fx.Node):
        return []
    region = node.meta.get("region")
    others = [n for n in spelled.args[0].users if n is not node and n.meta.get("region") == region]
    return [n for n in others if spell(n) == spelled and same_meta(value_of(n), value_of(node))]


def _module(node: fx.Node) -> list[Any]:
    """The module whose forward made the node: of a layer's own node, the module that holds the layer."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return [path for path, kind in (stack[:-1] if stack and _is_layer(stack[-1][1]) else stack)]


def _is_layer(kind: Any) -> bool:
    return getattr(kind, "__name__", str(kind)).rsplit(".", 1)[-1].endswith(("Linear", "Conv1D"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _same_literal(ours: Any, theirs: Any) -> bool:
    if _is_number(ours) and _is_number(theirs):
        return math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-12)
    return type(ours) is type(theirs) and ours == theirs
