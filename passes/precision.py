"""Precision: casts placed in the graph, after fusing, so that fused ops keep float32 inside.

float32 Parameters stay the master weights. Matmuls, convolutions and attention run in the low dtype,
activations travel in it, the residual stream included; norms read it and keep float32 weights and
statistics; softmax, losses, reductions and every op that `dtype_policy` does not know run in float32. What
was not float32 in the captured graph (integers, float64, a model or an autocast region that is low already)
is left alone, and outputs keep their dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fusekit.kernels import FP8_OPS
from fusekit.passes.canonicalise import bodies
from fusekit.passes.cost import emulates_fp8
from fusekit.passes.inputs import InputCast
from fusekit.passes.lowering import Lowering
from fusekit.passes.normalise import is_mutation
from fusekit.passes.propagate import complete, dtype_of, tensors_of
from fusekit.passes.region import Fusion, Region
from fusekit.passes.tf32 import allow_tf32

LOW_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # fp8: what is around


def place_casts(region: Region) -> None:
    """Apply `region.settings.precision` to the graph, its checkpoint bodies and the fusions' eager graphs."""
    precision = region.settings.precision
    if precision == "tf32":
        allow_tf32(region)
    elif precision in LOW_DTYPES:
        _lower_region(region, LOW_DTYPES[precision])
        if precision == "fp8":
            _report_fp8(region)


def _report_fp8(region: Region) -> None:
    nodes = [n for body in bodies(region.module) for n in body.graph.nodes]
    layers, attentions = (
        [n for n in nodes if n.target is FP8_OPS[name].fused] for name in ("linear_fp8", "attention_fp8")
    )
    assert region.settings.recipe is not None
    if region.settings.levels is None:
        recipe = region.settings.recipe
        more = "" if recipe.attention is None else f", {len(attentions)} attentions by {recipe.attention}"
        note = f"FP8 recipe {recipe.token()}: {len(layers)} linear layers{more}; the rest in bfloat16"
    else:
        note = f"precision auto: {len(layers)} of {len(region.layers)} layers have FP8 products"
    if (layers or attentions) and emulates_fp8((layers or attentions)[0].meta["val"]):
        note += ". Emulated: this device has no FP8 products, so the numbers are FP8's and the speed is not"
    region.notes.append(note)


def _lower_region(region: Region, low: torch.dtype) -> None:
    sites = [
        (n, _input_values(n))
        for body in bodies(region.module)
        for n in body.graph.nodes
        if "fusion" in n.meta
    ]
    lowering = Lowering(region.module, low, parameters=_cacheable_parameters(region.module.graph))
    for node in region.module.graph.find_nodes(op="placeholder"):
        own = node.meta.get("parameter") or "_buffers[" in node.meta.get("source", "")
        if not own and dtype_of(node) == torch.float32:
            lowering.casts.settled.add(node)  # a user's float32 input is an activation
    lowering.run()
    lowering.restore_outputs()
    if lowering.emulated:
        name = str(low).removeprefix("torch.")
        region.notes.append(
            f"this CPU has no {name} matrix instructions: products of {name} values run in float32, "
            "which saves memory and no time"
        )
    placeholders = list(region.module.graph.find_nodes(op="placeholder"))
    region.input_casts += [
        InputCast(source=placeholders.index(source), target=placeholders.index(target), dtype=low)
        for source, target in lowering.casts.parameter_casts.items()
    ]
    for body in bodies(region.module):
        body.graph.lint()
        body.recompile()
    for node, captured in sites:
        _lower_site(node, captured, low)


def _cacheable_parameters(graph: fx.Graph) -> set[fx.Node]:
    """float32 Parameters that the graph does not write to, so that one copy serves all their readers."""
    written = set()
    for node in graph.nodes:
        if is_mutation(node):
            written |= {_storage(t) for n in node.all_input_nodes for t in tensors_of(n.meta.get("val"))}
    return {
        node
        for node in graph.find_nodes(op="placeholder")
        if node.meta.get("parameter")
        and node.meta["val"].dtype == torch.float32
        and _storage(node.meta["val"]) not in written
    }


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _input_values(node: fx.Node) -> list[Any]:
    """Values of a node's tensor arguments, in order: the first inputs of its eager graph."""
    values: list[Any] = []
    fx.map_arg((node.args, node.kwargs), lambda n: values.append(n.meta["val"]))
    return [v for v in values if isinstance(v, Tensor)]


def _lower_site(node: fx.Node, captured: list[Any], low: torch.dtype) -> None:
    """Bring what a fusion replaced to the dtypes the fused node now has, for parity and for reverting."""
    fusion: Fusion = node.meta["fusion"]
    results = tensors_of(node.meta["val"])
    fusion.dtype = str(_input_values(node)[0].dtype).removeprefix("torch.")  # a loss is wider
    if fusion.eager is None:
        return
    complete(fusion.eager, captured)
    lowering = Lowering(fusion.eager, low, widened=False)
    for placeholder, value in zip(
        fusion.eager.graph.find_nodes(op="placeholder"), _input_values(node), strict=False
    ):
        lowering.give(placeholder, value)
    lowering.run()
    lowering.restore_outputs(results[0].dtype)
    fusion.eager.graph.lint()
    fusion.eager.recompile()
