"""Whether a gradient would have to flow into a value: asked of masks and tables, which ops give none."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from fusekit.passes import _compat
from fusekit.passes.propagate import tensors_of
from fusekit.passes.spelling import spell, value_of


def needs_gradient(value: fx.Node) -> bool:
    """Whether a parameter or input that is trained reaches `value` through floating point values."""
    pending, seen = [value], set()
    without = in_no_grad(value.graph)
    while pending:
        node = pending.pop()
        if node in seen or node in without or not any(map(_carries_gradient, tensors_of(value_of(node)))):
            continue
        seen.add(node)
        name, args = spell(node)
        if name == "detach":
            continue
        if node.op == "placeholder" and node.meta.get("requires_grad", True):
            return True
        known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        if node.op == "call_function" and not known:
            return True  # a checkpoint or another call that is not looked into
        # x.to(other) takes other's dtype, not its values
        pending += [args[0]] if name == "to" else node.all_input_nodes
    return False


def _carries_gradient(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def in_no_grad(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are computed with gradients off; an input never is."""
    found, enabled = set(), True
    for node in graph.nodes:
        if node.target is _compat.set_grad_enabled:
            enabled = bool(node.args[0])
        elif not enabled and node.op == "call_function":
            found.add(node)
    return found
