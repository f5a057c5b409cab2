"""A graph edited site by site: the fused op put in, what it replaces taken out, one seed drawn for all.

The replaced nodes are erased one by one: dead code elimination keeps random nodes, and both would draw.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fusekit.kernels.op import Op
from fusekit.passes.fused_call import as_tuple, layout_shows, value_in
from fusekit.passes.gradient import needs_gradient
from fusekit.passes.normalise import is_mutation, is_view, same_shape, writes
from fusekit.passes.pattern import SEED, Match, New
from fusekit.passes.region import Fusion
from fusekit.passes.spelling import value_of

SEED_RANGE = 2**62


class Rewriter:
    """One graph. gone: nodes that were replaced. seeded: sites that draw from the graph's seed."""

    def __init__(self, graph: fx.Graph, ops: dict[str, Op]) -> None:
        self.graph, self.ops = graph, ops
        self.gone: set[fx.Node] = set()
        self.made: dict[tuple[str, Any], fx.Node] = {}
        self.seed: fx.Node | None = None
        self.seeded = 0

    def insert(
        self, fusion: Fusion, match: Match, arguments: dict[str, Any], results: Any, before: fx.Node
    ) -> None:
        """The fused op in front of `before`, read by all who read what it replaces."""
        with self.graph.inserting_before(before):
            made = [self.materialise(argument, match, before) for argument in arguments.values()]
            fused = self.graph.call_function(self.ops[fusion.op].fused, tuple(made))
            parts = [fused]
            if isinstance(results, tuple):
                parts = [
                    self.graph.call_function(operator.getitem, (fused, i)) for i in range(len(match.outputs))
                ]
        _describe_node(fused, match.root, results)
        fused.meta["fusion"] = fusion
        if fusion.layer:
            fused.meta["layer"] = fusion.layer
        fused.meta["fusion_inputs"] = [a for a in fused.args if isinstance(a, fx.Node)]
        for part, output, result in zip(parts, match.outputs, as_tuple(results), strict=False):
            if part is not fused:
                _describe_node(part, output, result)
            if layout_shows(output) and not same_shape(value_of(output).stride(), result.stride()):
                part = self.as_contiguous(part, output)
            output.replace_all_uses_with(part)
            if not part.users:  # the sum, where nobody reads it again
                self.graph.erase_node(part)

    def as_contiguous(self, part: fx.Node, output: fx.Node) -> fx.Node:
        """What the model hands out, in the layout it had."""
        with self.graph.inserting_after(part):
            copied = self.graph.call_function(torch.ops.aten.contiguous.default, (part,))
        _describe_node(copied, output, value_of(output))
        return copied

    def materialise(self, argument: Any, match: Match, before: fx.Node) -> Any:
        if argument is SEED:
            self.seeded += 1
            return self.seed_node(match, before)
        if isinstance(argument, list):
            return [self.materialise(inner, match, before) for inner in argument]
        if not isinstance(argument, New):
            return argument
        args = tuple(self.materialise(arg, match, before) for arg in argument.args)
        # Slopes and masks serve all layers; where nothing is written between two sites, one node does.
        key = f"{argument.target}{args}", match.root.meta.get("region")
        made = self.made.get(key)
        if made is not None and made not in self.gone and made < before:
            return made
        node = self.graph.call_function(argument.target, args)
        _describe_node(node, match.root, value_in(argument, match.root))
        self.made[key] = node
        return node

    def seed_node(self, match: Match, before: fx.Node) -> fx.Node:
        """One draw per graph, in front of its first use: random ops before it see the state they did."""
        if self.seed is None:
            device = value_of(match.root).device
            self.seed = self.graph.call_function(
                torch.ops.aten.randint.default, (SEED_RANGE, [1]), {"dtype": torch.int64, "device": device}
            )
            _describe_node(self.seed, match.root, value_in(SEED, match.root))
        elif before < self.seed:
            before.prepend(self.seed)
        return self.seed

    def erase(self, match: Match) -> None:
        pending = sorted({*match.nodes, *match.stands_for}, reverse=True)
        replaced = set(match.nodes)
        while pending:
            node = pending.pop(0)
            if node in self.gone or node.users or (node not in replaced and not is_disposable(node)):
                continue
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            self.gone.add(node)
            pending += sorted(inputs, reverse=True)
        assert replaced <= self.gone, f"{match.rule.source} left {replaced - self.gone} behind"


def erase_unread(nodes: Iterable[fx.Node]) -> None:
    """Erase those of the nodes that nobody reads, and what only they read."""
    pending = set(nodes)
    while pending:
        node = max(pending)
        pending.discard(node)
        if not node.users and is_disposable(node):
            pending |= set(node.all_input_nodes)
            node.graph.erase_node(node)


def merge_copies(graph: fx.Graph) -> None:
    """One node for equal ones that were put back: each site computes its mask by itself, which all share.

    Not where something is written in place, and not where a gradient would be summed in another order.
    """
    if writes(graph):
        return
    first: dict[str, fx.Node] = {}
    for node in [node for node in graph.nodes if node.meta.get("put_back") and is_disposable(node)]:
        other = first.setdefault(f"{node.target}{node.args}{node.kwargs}", node)
        if other is node or needs_gradient(node):
            continue
        if not (_is_handed_out(node) or _is_handed_out(other)):
            node.replace_all_uses_with(other)
            graph.erase_node(node)


def _is_handed_out(node: fx.Node) -> bool:
    """Whether the caller gets it, or a view of it."""
    return any(user.op == "output" or (is_view(user) and _is_handed_out(user)) for user in node.users)


def is_disposable(node: fx.Node) -> bool:
    """Left without readers by a fusion, it may go: no effect, nothing random, not an input."""
    if node.op != "call_function" or "fusion" in node.meta:
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return not is_mutation(node) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _describe_node(node: fx.Node, like: fx.Node, value: Any) -> None:
    for key in ("stack_trace", "nn_module_stack", "region"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["val"] = value
