"""Price: a fusion stays only where it is estimated to pay, and learns what it is estimated to gain.

The estimate is for the forward pass, from FLOPs, bytes and what starting an op costs (`cost`); `verify`
measures. An estimate a little below one is within its own error, and stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.kernels import FP8_OPS, attention, linear_fp8
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.op import LOW_PRECISION
from fusekit.kernels.recipe import Recipe
from fusekit.passes import cost, decoding, tf32
from fusekit.passes.canonicalise import bodies
from fusekit.passes.cost import Cost, bytes_of, device_of, node_cost, roofline
from fusekit.passes.propagate import complete, faking, tensors_of
from fusekit.passes.region import Fusion, Region
from fusekit.passes.rewrite import erase_unread, merge_copies

LEAST_GAIN = 0.9  # estimated gains below this are reverted
EMULATED = "emulated"  # FP8 where there are no FP8 products
# Where there is a choice.
WHO_RUNS: dict[str, Callable[..., str]] = {"attention": attention.runs_on, "linear_fp8": linear_fp8.runs_on}

# On a CPU an op is a composition of library calls: the share of the intermediates' traffic that remains, and
# who runs.
CPU_PATHS = {
    "add_layer_norm": (1.0, "aten"),
    "add_rms_norm": (0.5, "aten"),
    "attention": (0.0, ""),
    "attention_fp8": (0.0, EMULATED),
    "gated_act": (0.0, "aten"),
    "gated_mlp": (0.5, "onednn"),
    "linear_act": (1.0, "onednn"),
    "linear_cross_entropy": (0.0, "chunks"),
    "linear_fp8": (1.0, EMULATED),
    "mlp": (0.5, "onednn"),
    "qkv_linear": (1.0, "onednn"),
    "rms_norm_rope": (0.5, "aten"),
    "rope": (0.5, "aten"),
}

# Library calls of a CPU path that consists of many, beyond the start of the op itself.
CPU_CALLS = {"rms_norm_rope": 14, "rope": 8}


def price(region: Region) -> None:
    """Fill in estimates, revert what is estimated slower, refuse it with the figures."""
    for module in bodies(region.module):
        reverted = False
        for node in _fused(module):
            eager, fused = _estimate(node)
            fusion: Fusion = node.meta["fusion"]
            if fusion.op in FP8_OPS:
                continue  # asked for, and priced before it was placed
            reason = _declined(node)
            if fusion.estimated_gain is not None and fusion.estimated_gain < LEAST_GAIN:
                reason = (
                    f"estimated {_time(fused)} fused against {_time(eager)} as it was, on {_device(node)}: "
                    "at this size starting the op costs more than it saves"
                )
            if reason is not None:
                put_back(module, node)
                region.fusions[:] = [f for f in region.fusions if f is not fusion]
                region.refuse(fusion.op, fusion.location, reason, fusion.rule)
                reverted = True
        if reverted:
            merge_copies(module.graph)
            module.graph.lint()
            module.recompile()


def _declined(node: fx.Node) -> str | None:
    """Why a site does not pay whatever its size."""
    value = tensors_of(node.meta["val"])[0]
    if node.meta["fusion"].op == "rope" and not on_gpu(value) and value.dtype in LOW_PRECISION:
        return "on a CPU a 16-bit rotation is widened to round once, and takes as long as eager's five passes"
    return None


def coverage(region: Region) -> tuple[float, float]:
    """Shares of the graph's forward FLOPs and memory traffic, as it was written, that fused ops stand for."""
    fused, rest = Cost(), Cost()
    for module in bodies(region.module):
        for node in module.graph.nodes:
            if "fusion" in node.meta:
                fused += _replaced_cost(node)[0]
            else:
                rest += node_cost(node)
    total = fused + rest
    return fused.flops / max(total.flops, 1), fused.bytes / max(total.bytes, 1)


def _fused(module: fx.GraphModule) -> Iterator[fx.Node]:
    return iter([node for node in module.graph.nodes if "fusion" in node.meta])


def _estimate(node: fx.Node) -> tuple[float, float]:
    """Seconds of the replaced nodes and of the fused one; the fusion is told what follows from them."""
    fusion: Fusion = node.meta["fusion"]
    value = node.meta["val"]
    kind = "cuda" if on_gpu(tensors_of(value)[0]) else "cpu"
    replaced, started = _replaced_cost(node)
    ends = bytes_of(_inputs(node)) + bytes_of(tensors_of(value))
    remaining, fusion.implementation = CPU_PATHS[fusion.op] if kind == "cpu" else (0.0, "triton")
    if fusion.op == "attention":
        fusion.implementation = runs_on(node)
    if fusion.op in FP8_OPS:
        return _estimate_fp8(node, replaced)
    moved = ends + int(remaining * max(0, replaced.bytes - ends))
    fused = roofline(replaced.flops, moved, value, tf32=tf32.is_on(node))
    fusion.bytes_saved = max(0, replaced.bytes - moved)
    # One roofline is never above the sum of its parts: where it seems so, the model is wrong.
    seconds = min(fused.seconds, replaced.seconds)
    if fusion.op == "attention":
        started_again = cost.EAGER_OVERHEAD[kind]
        seconds = decoding.fused_seconds(_inputs(node)[0], fusion.implementation, seconds, started_again)
    seconds += cost.FUSED_OVERHEAD[kind]
    if kind == "cpu":
        seconds += CPU_CALLS.get(fusion.op, 0) * cost.EAGER_OVERHEAD[kind]
    eager = replaced.seconds + started * cost.EAGER_OVERHEAD[kind]
    fusion.estimated_gain = eager / seconds if seconds else 1.0
    return eager, seconds


def runs_on(node: fx.Node) -> str:
    """Who computes a site of attention or linear_fp8, and why, at the sizes it was captured with."""

    args: Any
    kwargs: Any

    def concrete(argument: Any) -> Any:
        value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
        if isinstance(value, Tensor):
            size, stride = tuple(map(cost.hint, value.shape)), tuple(map(cost.hint, value.stride()))
            return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
        return cost.hint(value) if isinstance(value, torch.SymInt) else value

    with faking(node):
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), concrete)
        return WHO_RUNS[node.meta["fusion"].op](*args, **kwargs)


def name_implementations(region: Region) -> None:
    """Say anew who runs sites where there is a choice: a trial or a measurement may have changed it."""
    for module in bodies(region.module):
        for node in _fused(module):
            fusion: Fusion = node.meta["fusion"]
            if fusion.op in WHO_RUNS and fusion.implementation != EMULATED:
                fusion.implementation = runs_on(node)


def _estimate_fp8(node: fx.Node, replaced: Cost) -> tuple[float, float]:
    """Forward and backward of the site, in bf16 and in FP8; emulated there is no gain to speak of."""
    fusion: Fusion = node.meta["fusion"]
    fusion.bytes_saved = 0
    if cost.emulates_fp8(node.meta["val"]):
        fusion.implementation = EMULATED
        return replaced.seconds, replaced.seconds
    if fusion.op == "attention_fp8":
        q, k, v = _inputs(node)[:3]
        low, fp8 = cost.fp8_attention_seconds(q, k, v, fusion.flops, str(node.args[-1]), q.requires_grad)
    else:
        x, weight = _inputs(node)[:2]
        fusion.implementation = runs_on(node)
        N, K = map(cost.hint, weight.shape)
        low, fp8 = cost.fp8_seconds(cost.size(x) // K, N, K, x, Recipe.parse(str(node.args[4])))
    fusion.estimated_gain = low / fp8
    return low, fp8


def _replaced_cost(node: fx.Node) -> tuple[Cost, int]:
    """What the replaced nodes cost, and how many of them start work."""
    fusion: Fusion = node.meta["fusion"]
    if fusion.eager is None:
        return roofline(fusion.flops, bytes_of(_inputs(node)), node.meta["val"]), 1
    complete(fusion.eager, _inputs(node))
    costs = [decoding.eager_cost(n, c) for n in fusion.eager.graph.nodes if (c := node_cost(n)).bytes]
    return sum(costs, Cost()), len(costs)


def _inputs(node: fx.Node) -> list[Tensor]:
    values: list[Any] = []
    fx.map_arg((node.args, node.kwargs), lambda n: values.append(n.meta["val"]))
    return [v for v in values if isinstance(v, Tensor)]


def put_back(module: fx.GraphModule, node: fx.Node) -> None:
    """The replaced nodes in the place of the fused one."""
    fusion: Fusion = node.meta["fusion"]
    assert fusion.eager is not None
    arguments: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), arguments.append)
    own = iter(n for n in arguments if isinstance(n.meta["val"], Tensor))
    named = {n.name: n for n in module.graph.find_nodes(op="placeholder")}
    placeholders = fusion.eager.graph.find_nodes(op="placeholder")
    names = fusion.inputs or (None,) * len(placeholders)
    pairs = zip(placeholders, names, strict=True)
    values = {p: next(own) if name is None else named[name] for p, name in pairs}
    for constant in fusion.eager.graph.find_nodes(op="get_attr"):
        if not hasattr(module, constant.target):
            setattr(module, constant.target, getattr(fusion.eager, constant.target))
    with module.graph.inserting_before(node):
        results = module.graph.graph_copy(fusion.eager.graph, values)
    for original in fusion.eager.graph.nodes:
        if original.op == "call_function":
            values[original].meta["put_back"] = True
    if isinstance(results, tuple):
        for part in list(node.users):
            assert part.target is operator.getitem
            part.replace_all_uses_with(results[part.args[1]])  # type: ignore[index]
            module.graph.erase_node(part)
    else:
        node.replace_all_uses_with(results)  # type: ignore[arg-type]
    module.graph.erase_node(node)
    for argument in set(arguments):  # a seed that only this site drew
        if not argument.users and argument.target is torch.ops.aten.randint.default:
            module.graph.erase_node(argument)
            arguments = [other for other in arguments if other is not argument]
    erase_unread(arguments)  # made for the fused op


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _device(node: fx.Node) -> str:
    return device_of(node.meta["val"]).name
