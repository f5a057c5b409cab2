"""A region to a callable: the graph itself, or what Inductor makes of it with fusekit's ops opaque inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.passes import _compat
from fusekit.passes.canonicalise import bodies, call_checkpoint, copy_graph
from fusekit.passes.leaves import find_leaves, split_leaves
from fusekit.passes.region import Region
from fusekit.passes.weights import cast_parameters


def emit(region: Region) -> None:
    """Set `region.run`, a callable over the captured graph's inputs.

    "auto" is Inductor where the graph runs on CUDA; on a CPU it costs 10-140 s of compiling and gains a
    fifth at most.
    Where Inductor fails the graph runs eagerly and a note says why.
    """
    call = _inductor(region) if _wants_inductor(region) else region.module.forward

    devices = region.module.meta.get("autocast_off", ())

    def run(*args: Any) -> Any:
        with without_autocast(devices):
            return call(*graph_inputs(region, args))

    region.run = run if devices or region.input_casts else call


def graph_inputs(region: Region, args: Sequence[Any]) -> Sequence[Any]:
    """What the region's graph takes, from what Dynamo passes: copies of parameters and scales are added."""
    if not region.input_casts:
        return args
    recipe = region.settings.recipe
    region.weights.holds = recipe is not None and recipe.constant_weights
    return cast_parameters(args, region.input_casts, region.weights, region.settings.scales)


@contextlib.contextmanager
def without_autocast(devices: Sequence[str]) -> Iterator[None]:
    """Autocast off for the device types whose casts stand in the graph as nodes."""
    states = [(device, torch.is_autocast_enabled(device)) for device in devices]
    for device, _ in states:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device, enabled in states:
            torch.set_autocast_enabled(device, enabled)


def _wants_inductor(region: Region) -> bool:
    if region.settings.remainder != "auto":
        return region.settings.remainder == "inductor"
    values = (node.meta.get("val") for node in region.module.graph.find_nodes(op="placeholder"))
    return any(isinstance(value, Tensor) and value.device.type == "cuda" for value in values)


def _inductor(region: Region) -> Callable[..., Any]:
    module = copy_graph(region.module)
    if not region.in_frame and _has_symbols(module):
        # Inductor would specialise on sizes, and outside a Dynamo frame nobody guards them.
        region.notes.append("rebuilt with varying sizes: the remainder runs eagerly, not in Inductor")
        return region.module.forward
    first = None
    if find_leaves(module) and (first := split_leaves(module)) is None:
        region.notes.append("requires_grad_() behind what may not run first: the remainder runs eagerly")
        return region.module.forward
    _restore_checkpoints(module)
    try:
        with without_autocast(region.module.meta.get("autocast_off", ())):
            compiled = _compat.inductor(
                module, [_example(node) for node in module.graph.find_nodes(op="placeholder")]
            )
    except Exception as error:
        reason = str(error).strip().splitlines() or ["no message"]
        region.notes.append(
            f"Inductor failed, the remainder runs eagerly ({type(error).__name__}: {reason[0]})"
        )
        return region.module.forward
    return compiled if first is None else lambda *args: compiled(*args, *first(*args))


def _restore_checkpoints(module: fx.GraphModule) -> None:
    """Inductor knows checkpoints by their higher-order operator, and partitions the backward pass by it."""
    for body in bodies(module):
        for node in body.graph.find_nodes(op="call_function", target=call_checkpoint):
            node.target = _compat.tag_activation_checkpoint
        body.recompile()


def _has_symbols(module: fx.GraphModule) -> bool:
    values = (node.meta.get("val") for node in module.graph.find_nodes(op="placeholder"))
    return any(
        isinstance(size, torch.SymInt)
        for v in values
        for size in (v.shape if isinstance(v, Tensor) else (v,))
    )


def _example(node: fx.Node) -> Any:
    """A placeholder's fake that requires a gradient where the input did: meta["val"] has forgotten it."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(bool(node.meta.get("requires_grad")) and value.is_floating_point())
