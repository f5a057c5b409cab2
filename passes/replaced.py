"""The nodes a fusion replaced, as a graph of their own: `verify` compares with it, a revert puts it back."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fusekit.passes.gradient import in_no_grad
from fusekit.passes.normalise import is_mutation, memory
from fusekit.passes.pattern import Match, New
from fusekit.passes.spelling import value_of

Writes = dict[int | None, list[fx.Node]]
MOST_NODES = 200  # a mask's arithmetic is some 20 nodes; beyond this the walk has left the mask


class NotSelfContained(Exception):
    """The replaced nodes cannot be recomputed from the fused op's arguments and the graph's inputs."""


def replaced_graph(
    match: Match, tensors: dict[str, Tensor], results: int, written: Writes
) -> tuple[fx.GraphModule, tuple[str | None, ...]]:
    """The replaced nodes as a GraphModule, and its inputs as `Fusion.inputs` lists them.

    Args:
        tensors: the fused node's tensor arguments, in order, as fakes.
        results: how many tensors the op returns; those that the pattern does not compute are empty.
        written: the graph's nodes that write in place, by memory.

    Raises:
        NotSelfContained: a value comes from elsewhere in the graph.
    """
    builder = _Builder(tensors, match, written)
    for node, (name, inverse) in match.stands_for.items():
        if name in builder.arguments:
            builder.copies[node] = builder.from_argument(builder.arguments[name], inverse)
    outputs = [builder.copy(node) for node in match.outputs]
    for _ in range(results - len(outputs)):
        first = next(iter(builder.arguments.values()))
        outputs.append(builder.graph.call_function(torch.ops.aten.new_empty.default, (first, [0])))
    builder.graph.output(tuple(outputs) if results > 1 else outputs[0])
    builder.graph.lint()
    owner = match.root.graph.owning_module
    assert owner is not None, "a captured graph belongs to its module"
    return fx.GraphModule(owner, builder.graph), (*[None] * len(tensors), *builder.extra)


class _Builder:
    def __init__(self, tensors: dict[str, Tensor], match: Match, written: Writes) -> None:
        self.graph, self.without_grad = fx.Graph(), in_no_grad(match.root.graph)
        self.root, self.matched, self.written = match.root, set(match.nodes), written
        self.arguments = {name: self.graph.placeholder(name) for name in tensors}
        for name, placeholder in self.arguments.items():
            placeholder.meta["val"] = tensors[name]
        self.copies: dict[fx.Node, fx.Node] = {}
        self.extra: list[str] = []

    def from_argument(self, argument: fx.Node, inverse: New | None) -> fx.Node:
        return (
            argument
            if inverse is None
            else self.graph.call_function(inverse.target, (argument, *inverse.args[1:]))
        )

    def copy(self, node: fx.Node) -> fx.Node:
        """`node` in the new graph, with everything it needs down to arguments and graph inputs."""
        for needed in self.needed(node):
            if needed.op == "placeholder":
                self.copies[needed] = self.extra_input(needed)
            else:
                self.copies[needed] = self.graph.node_copy(needed, self.copies.__getitem__)
                self.copies[needed].meta = {
                    k: v
                    for k, v in needed.meta.items()
                    if k in ("val", "stack_trace", "full_precision", "layer")
                }
                if needed in self.without_grad and isinstance(value_of(needed), Tensor):
                    self.copies[needed] = self.detached(self.copies[needed])
        return self.copies[node]

    def detached(self, copy: fx.Node) -> fx.Node:
        """What the model computes with gradients off: the copy stands where they are on."""
        detached = self.graph.call_function(torch.ops.aten.detach.default, (copy,))
        detached.meta["val"] = value_of(copy)
        return detached

    def extra_input(self, node: fx.Node) -> fx.Node:
        self.extra.append(node.name)
        with self.graph.inserting_after([*self.graph.find_nodes(op="placeholder")][-1]):
            placeholder = self.graph.placeholder(node.name)
        placeholder.meta["val"] = value_of(node)
        return placeholder

    def size_of_argument(self, node: fx.Node) -> fx.Node | None:
        """A symbolic size, read off an argument that has it: the walk need not find its origin."""
        size = value_of(node)
        if not isinstance(size, torch.SymInt):
            return None
        for placeholder in self.arguments.values():
            tensor = value_of(placeholder)
            for dim, other in enumerate(tensor.shape if isinstance(tensor, Tensor) else ()):
                if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                    return self.graph.call_function(torch.ops.aten.sym_size.int, (placeholder, dim))
        return None

    def may_differ(self, node: fx.Node) -> bool:
        """Whether it would be something else if made again at the site: it is random, or what it reads is
        written to in between. Of what was matched neither is so."""
        if node in self.matched or node.op != "call_function":
            return False
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return True
        own = memory(value_of(node))
        read = {memory(value_of(x)) for x in node.all_input_nodes} - {own, None}  # a view reads nothing
        return any(node < write < self.root for place in read for write in self.written.get(place, ()))

    def needed(self, root: fx.Node) -> list[fx.Node]:
        """What `root` depends on beyond what is copied already, in graph order."""
        found: set[fx.Node] = set()
        pending = [root]
        while pending:
            node = pending.pop()
            if node in self.copies or node in found:
                continue
            if (size := self.size_of_argument(node)) is not None:
                self.copies[node] = size
                continue
            found.add(node)
            if is_mutation(node) or len(found) > MOST_NODES or self.may_differ(node):
                raise NotSelfContained(f"{root.name} depends on {node.name}")
            pending += node.all_input_nodes
        return sorted(found)
