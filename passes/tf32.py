"""precision="tf32": float32 matmuls on a GPU's tensor cores, inputs rounded to 10 mantissa bits."""

from __future__ import annotations

import torch
from torch import fx

from fusekit.kernels import OPS
from fusekit.passes.canonicalise import bodies
from fusekit.passes.propagate import tensors_of
from fusekit.passes.region import Region


def allow_tf32(region: Region) -> None:
    """Ask fused matmuls and attention for tf32; a plain linear becomes linear_act, which has the switch."""
    on_cpu = False
    for body in bodies(region.module):
        for node in list(body.graph.nodes):
            if node.op != "call_function" or not _is_float32(node):
                continue
            if tensors_of(node.meta["val"])[0].device.type != "cuda":
                on_cpu = on_cpu or _has_switch(node) or node.target is torch.ops.aten.linear.default
            elif _has_switch(node):
                _switch_on(node)
            elif node.target is torch.ops.aten.linear.default:
                _linear(body.graph, node)
        body.recompile()
    if on_cpu:
        region.notes.append("TF32 exists on GPUs only: float32 kept")


def _linear(graph: fx.Graph, node: fx.Node) -> None:
    op = OPS.get("linear_act")
    if op is None or op.supports(*fx.map_arg(node.args, lambda n: n.meta["val"])):
        return
    with graph.inserting_before(node):
        fused = graph.call_function(torch.ops.fusekit.linear_act.default, node.args, {"tf32": True})
    fused.meta = {k: v for k, v in node.meta.items() if k != "fusion"}
    node.replace_all_uses_with(fused)
    graph.erase_node(node)


def _switch_on(node: fx.Node) -> None:
    position = _position(node)
    if position < len(node.args):
        node.update_arg(position, True)
    else:
        node.update_kwarg("tf32", True)


def is_on(node: fx.Node) -> bool:
    """Whether a fused op was asked for tf32, by position or by name."""
    if not _has_switch(node):
        return False
    position = _position(node)
    return bool(node.args[position] if position < len(node.args) else node.kwargs.get("tf32"))


def _position(node: fx.Node) -> int:
    return [a.name for a in node.target._schema.arguments].index("tf32")  # type: ignore[union-attr]


def _has_switch(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "fusekit":
        return False
    return any(argument.name == "tf32" for argument in target._schema.arguments)


def _is_float32(node: fx.Node) -> bool:
    tensors = tensors_of(node.meta.get("val"))
    return bool(tensors) and tensors[0].dtype == torch.float32
