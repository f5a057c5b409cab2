"""The casts of a graph that is brought to a low dtype: each value is cast once, however many read it.

A float32 value is either *settled*, the result of a float32 op on activations or a user's input: arithmetic
with a low partner promotes, as under autocast; or free, a parameter, buffer, embedding, constant, or made of
these alone (RoPE's cosines): then it is cast down to its partner.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fusekit.passes.dtype_policy import Policy, policy_of
from fusekit.passes.normalise import is_mutation
from fusekit.passes.propagate import dtype_of, faking, propagate

aten = torch.ops.aten
_VIEWS = (aten.reshape, aten.view)


class Casts:
    """Those of one graph.

    original: dtypes as captured. What was not float32 then is never cast.
    parameters: placeholders whose low copy is an input of its own, so that it can be made once per update.
    parameter_casts: those copies, by the placeholder they are copies of.
    changed: nodes whose value is another one than at capture.
    """

    def __init__(self, graph: fx.Graph, low: torch.dtype, parameters: Iterable[fx.Node]) -> None:
        self.graph, self.low = graph, low
        self.original = {node: dtype_of(node) for node in graph.nodes}
        self.parameters = set(parameters)
        self.parameter_casts: dict[fx.Node, fx.Node] = {}
        self.settled: set[fx.Node] = set()
        self.changed: set[fx.Node] = set()
        self._made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def forget(self) -> None:
        """What was cast so far is not to be read from here on."""
        self._made.clear()

    def is_lowered(self, node: fx.Node) -> bool:
        return self.original.get(node, torch.float32) == torch.float32 and dtype_of(node) == self.low

    def is_single(self, node: fx.Node) -> bool:
        return self.original.get(node, torch.float32) == torch.float32 and dtype_of(node) == torch.float32

    def is_parameter(self, source: fx.Node) -> bool:
        """A parameter, or a view of one that needs nothing else."""
        while source not in self.parameters:
            if source.op != "call_function" or len(source.all_input_nodes) != 1 or is_mutation(source):
                return False
            if policy_of(source, self.low) is not Policy.MOVE or _is_random(source):
                return False
            source = source.all_input_nodes[0]
        return True

    def down(self, source: fx.Node, before: fx.Node) -> fx.Node:
        """`source` in the low dtype; of a view of a parameter the same view of its copy."""
        if source in self.parameters:
            return self.of_parameter(source)
        if (source, self.low) not in self._made and self.is_parameter(source):
            self._made[source, self.low] = self._again(
                source, self.down(source.all_input_nodes[0], before), before
            )
        return self.to(source, self.low, before)

    def _again(self, view: fx.Node, base: fx.Node, before: fx.Node) -> fx.Node:
        """The op of `view` on another base."""
        with self.graph.inserting_before(before):
            again = self.graph.node_copy(view, lambda n: base if n is view.all_input_nodes[0] else n)
        propagate(again)
        self.changed.add(again)
        return again

    def of_parameter(self, source: fx.Node) -> fx.Node:
        if source not in self.parameter_casts:
            with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                target = self.graph.placeholder(f"{source.name}_low")
            with faking(source):
                value = source.meta["val"].detach().to(self.low)
                value.requires_grad_(source.meta["val"].requires_grad)
            target.meta = {**source.meta, "val": value, "parameter": False}
            self.parameter_casts[source] = target
            self.changed.add(target)
        return self.parameter_casts[source]

    def to(self, source: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        if (source, dtype) in self._made:
            return self._made[source, dtype]
        if dtype == torch.float32 and getattr(source.target, "overloadpacket", None) in _VIEWS:
            # Logits are often returned, and flattened for the loss: one float32 copy serves both.
            self._made[source, dtype] = self._again(
                source, self.to(source.all_input_nodes[0], dtype, before), before
            )
        else:
            with self.graph.inserting_before(before):
                cast = self.graph.call_function(aten.to.dtype, (source, dtype))
            cast.meta = {k: v for k, v in source.meta.items() if k in ("stack_trace", "nn_module_stack")}
            propagate(cast)
            self.changed.add(cast)
            self._made[source, dtype] = cast
        if dtype == torch.float32:
            self.settled.add(self._made[source, dtype])
        return self._made[source, dtype]

    def replace(self, node: fx.Node, old: fx.Node, new: fx.Node) -> None:
        node.replace_input_with(old, new)
        self.drop_view(old)
        if "fusion_inputs" in node.meta:
            node.meta["fusion_inputs"] = [new if n is old else n for n in node.meta["fusion_inputs"]]

    def drop_view(self, node: fx.Node) -> None:
        if not node.users and getattr(node.target, "overloadpacket", None) in _VIEWS:
            self.graph.erase_node(node)


def _is_random(node: fx.Node) -> bool:
    """A second call, as randn_like of the copy, would draw again."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
