"""Masks that a checkpoint's body takes from outside, made inside it for as long as rules look.

Hugging Face makes masks and ALiBi once, outside its layers; with gradient checkpointing a layer is a body
of its own, to which they come as inputs that say nothing. `sink_masks` puts a copy of what made them in front
of the body, down to inputs of the graph and to what is no pure function of them, which become inputs of the
body. `lift_masks` undoes it: what the rules left of the copies is taken from outside again, made once as
before, and what nobody reads any more is not passed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from fusekit.passes.canonicalise import bodies, call_checkpoint
from fusekit.passes.gradient import needs_gradient
from fusekit.passes.index_arithmetic import is_written
from fusekit.passes.normalise import is_mutation, memory
from fusekit.passes.region import Region
from fusekit.passes.replaced import MOST_NODES
from fusekit.passes.rewrite import erase_unread
from fusekit.passes.spelling import spell, value_of

# From the softmax back to masks and biases; a matmul ends the way.
_AROUND_SCORES = {
    "add", "and", "baddbmm", "clone", "contiguous", "div", "dropout", "expand", "masked_fill", "mul", "ne",
    "neg", "not", "reshape", "slice", "sub", "to", "unsqueeze", "where",
}  # fmt: skip
_WORK = frozenset({"linear", "matmul", "softmax", "layer_norm", "rms_norm", "embedding", "sdpa", "sort"})
SUNK = "sunk"  # meta of a copy: the node outside that it is a copy of


def sink_masks(region: Region) -> None:
    """Copy what made the masks of every checkpoint's body into the body, outermost first."""
    for module, call, body in _checkpoints(region):
        _Sinking(module, call, body).run()
        body.recompile()


def lift_masks(region: Region) -> None:
    """Take what is left of the copies from outside again, innermost first."""
    for module, call, body in reversed(list(_checkpoints(region))):
        _lift(call, body)
        module.graph.lint()
        module.recompile()


def _checkpoints(region: Region) -> Iterator[tuple[fx.GraphModule, fx.Node, fx.GraphModule]]:
    """Every checkpoint whose inputs are all positional and whose body is nobody else's, with its graph."""
    for module in bodies(region.module):
        calls = module.graph.find_nodes(op="call_function", target=call_checkpoint)
        targets = [call.args[0].target for call in calls]
        for call in calls:
            body = getattr(module, call.args[0].target)
            inputs = body.graph.find_nodes(op="placeholder")
            if len(inputs) == len(call.args) - 1 and targets.count(call.args[0].target) == 1:
                yield module, call, body


class _Sinking:
    """One checkpoint: its call, the placeholders of its body, and what is inside by the node outside."""

    def __init__(self, module: fx.GraphModule, call: fx.Node, body: fx.GraphModule) -> None:
        self.call, self.body, self.graph = call, body, body.graph
        self.placeholders = body.graph.find_nodes(op="placeholder")
        self.first = next(node for node in body.graph.nodes if node.op != "placeholder")
        self.written = _written_inside(module)
        self.inside: dict[fx.Node, fx.Node] = {}
        for outside, placeholder in zip(call.args[1:], self.placeholders, strict=True):
            if isinstance(outside, fx.Node):
                self.inside.setdefault(outside, placeholder)

    def run(self) -> None:
        wanted = _near_scores(self.body)
        for outside, placeholder in zip(self.call.args[1:], list(self.placeholders), strict=True):
            if placeholder not in wanted or not isinstance(outside, fx.Node):
                continue
            if self.is_pure(outside):
                self.sink(outside, placeholder)
        self.graph.lint()

    def sink(self, outside: fx.Node, placeholder: fx.Node) -> None:
        nodes, leaves = self.origins(outside)
        # With a gradient, or without one that what it is made of has, the place where it is computed matters.
        if len(nodes) > MOST_NODES or any(map(needs_gradient, (outside, *leaves))):
            return
        copies = {leaf: self.input_of(leaf) for leaf in sorted(leaves)}
        for node in sorted(nodes):
            with self.graph.inserting_before(self.first):
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
            copies[node].meta |= {SUNK: node, "region": 0}
        placeholder.replace_all_uses_with(copies[outside])

    def origins(self, outside: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
        """The nodes to copy, and what they are made of."""
        nodes: set[fx.Node] = set()
        leaves: set[fx.Node] = set()
        pending = [outside]
        while pending and len(nodes) <= MOST_NODES:
            node = pending.pop()
            if self.is_pure(node) and node not in nodes:
                nodes.add(node)
                pending += node.all_input_nodes
            elif node not in nodes:
                leaves.add(node)
        return nodes, leaves

    def is_pure(self, node: fx.Node) -> bool:
        """Whether it may be computed again at the checkpoint with the same result."""
        if node.op != "call_function" or "fusion" in node.meta or is_mutation(node):
            return False
        if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
            return False
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or _is_work(node):
            return False
        return not any(map(self.may_change, (node, *node.all_input_nodes)))

    def may_change(self, node: fx.Node) -> bool:
        """Whether it may hold something else by the time of the checkpoint; or is known outside only."""
        return node.op == "get_attr" or is_written(node) or memory(value_of(node)) in self.written

    def input_of(self, outside: fx.Node) -> fx.Node:
        """The placeholder for a node outside, a new one where there is none."""
        if outside not in self.inside:
            self.inside[outside] = _new_input(self.call, self.placeholders, outside)
        return self.inside[outside]


def _is_work(node: fx.Node) -> bool:
    """Whether making it once for all layers is worth more than what a rule may read in it."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet in flop_registry or spell(node).name in _WORK


def _new_input(call: fx.Node, placeholders: list[fx.Node], outside: fx.Node) -> fx.Node:
    """One input more for a checkpoint: `outside`, that needs no gradient."""
    graph = placeholders[-1].graph
    with graph.inserting_after(placeholders[-1]):
        placeholder = graph.placeholder(outside.name)
    placeholder.target = placeholder.name
    placeholder.meta = {"val": value_of(outside), "requires_grad": False, "written": False, "region": 0}
    placeholders.append(placeholder)
    call.args = (*call.args, outside)
    return placeholder


def _near_scores(body: fx.GraphModule) -> set[fx.Node]:
    """What masks and biases of attention are made of, also in checkpoints of its own."""
    pending: list[fx.Node] = []
    for node in body.graph.nodes:
        if node.target is call_checkpoint:
            inner = getattr(body, node.args[0].target)
            inputs, near = inner.graph.find_nodes(op="placeholder"), _near_scores(inner)
            pending += [a for a, own in zip(node.args[1:], inputs, strict=False) if own in near]
            continue
        name, args = spell(node)
        pending += [args[3]] if name == "sdpa" and isinstance(args[3], fx.Node) else []
        pending += [args[0]] if name == "softmax" else []
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        name, args = spell(node)
        if name in _AROUND_SCORES:
            pending += args[:1] if name == "baddbmm" else node.all_input_nodes
    return found


def _written_inside(module: fx.GraphModule) -> set[int | None]:
    """Memory that bodies of checkpoints write to."""
    found: set[int | None] = set()
    for call in module.graph.find_nodes(op="call_function", target=call_checkpoint):
        body = getattr(module, call.args[0].target)
        deeper = _written_inside(body)
        for outside, inside in zip(call.args[1:], body.graph.find_nodes(op="placeholder"), strict=False):
            value = value_of(inside)
            if isinstance(value, Tensor) and (inside.meta.get("written") or memory(value) in deeper):
                found.add(memory(value_of(outside)))
    return found


def _lift(call: fx.Node, body: fx.GraphModule) -> None:
    graph = body.graph
    copies = [node for node in graph.nodes if SUNK in node.meta]  # rewriting has erased others
    placeholders = graph.find_nodes(op="placeholder")
    inside = dict(zip(call.args[1:], placeholders, strict=True))
    for copy in copies:
        if any(SUNK not in user.meta for user in copy.users):
            outside = copy.meta[SUNK]
            if outside not in inside:
                inside[outside] = _new_input(call, placeholders, outside)
            copy.replace_all_uses_with(inside[outside], delete_user_cb=lambda user: SUNK not in user.meta)
    for copy in reversed(copies):
        graph.erase_node(copy)
    _drop_unread(call, placeholders)
    graph.lint()
    body.recompile()


def _drop_unread(call: fx.Node, placeholders: list[fx.Node]) -> None:
    """Pass no input that nobody reads, and make none of what was read by nobody else."""
    if not placeholders:
        return
    fusions = [n.meta["fusion"] for n in placeholders[0].graph.nodes if "fusion" in n.meta]
    named = {name for fusion in fusions for name in fusion.inputs}  # what a site that is put back reads
    unread = {own for own in placeholders if not own.users and own.name not in named}
    kept = [a for a, own in zip(call.args[1:], placeholders, strict=True) if own not in unread]
    pending = [a for a, own in zip(call.args[1:], placeholders, strict=True) if own in unread]
    for own in unread:
        own.graph.erase_node(own)
    call.args = (call.args[0], *kept)
    erase_unread(node for node in pending if isinstance(node, fx.Node))
