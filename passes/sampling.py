"""A captured graph run node by node, with the values of its linear layers sampled on the way.

The nodes that run are those of the emitted graph, so the results have the same bits; where Inductor compiles
the remainder, those of the same nodes in eager. A step that is not sampled knows nothing of any of this.
Gradients are seen by hooks on the layers' results. Per layer and FP8 level one vector of
`kernels.precision_statistics` is kept for each product, on the device.

Of a layer with an activation, dz = dy * act'(z) is not in the graph: it is computed for the sampled rows, and
its largest values are taken to exceed the sample's as those of dy do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.kernels import precision_statistics as statistics
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.precision_statistics import BLOCK, FEATURES, Sample
from fusekit.kernels.recipe import Recipe
from fusekit.passes.canonicalise import call_checkpoint
from fusekit.passes.spelling import spell

Key = tuple[str, str]  # layer and product


@dataclass
class Samples:
    """What one step gave: found[layer, product] is (FP8 levels, STATISTICS).

    recipes: of the FP8 levels, coarsest first.
    wanted: layers that are sampled.
    rows, offset: which rows, see `precision_statistics.positions`.
    open: whether values are still taken; a checkpoint's second forward pass comes after it was closed.
    """

    recipes: Sequence[Recipe]
    wanted: Callable[[str], bool]
    rows: int
    offset: int
    open: bool = True
    found: dict[Key, Tensor] = field(default_factory=dict)
    repeats: bool = False  # a checkpoint around the graph runs it again, and wants the same tensors saved

    def add(self, layer: str, product: str, vectors: Sequence[Tensor]) -> None:
        """The worst of all calls counts."""
        new = torch.stack(list(vectors))
        old = self.found.get((layer, product))
        self.found[layer, product] = new if old is None else torch.maximum(old, new)

    def recorder(self, module: fx.GraphModule) -> fx.Interpreter:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self.repeats = self.repeats or hooks is not None
        return _Sampler(module, self)


@dataclass
class _Layer:
    """A layer's operands: x (rows, K), weight (N, K), the activation between z and what the node gives."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    act: str
    scale: Tensor | None = None  # of earlier steps, where the layer has it

    def stale(self, recipe: Recipe) -> Tensor | None:
        """What the statistics of this FP8 level go by."""
        return self.scale if recipe.scaling == "tensor" else None


class _Sampler(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, samples: Samples) -> None:
        super().__init__(module)
        self._samples = samples

    def run_node(self, n: fx.Node) -> Any:
        if n.target is call_checkpoint:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return call_checkpoint(_Body(args[0], self._samples), *args[1:], **kwargs)
        layer = n.meta.get("layer") if n.op == "call_function" and self._samples.open else None
        result = super().run_node(n)
        if layer and self._samples.wanted(layer) and isinstance(result, Tensor) and result.numel():
            args, _ = self.fetch_args_kwargs_from_env(n)
            with torch.no_grad():
                _watch(self._samples, layer, _operands(n, args), result)
        return result


class _Body:
    """A checkpoint's body that is interpreted as well, in both of its forward passes."""

    def __init__(self, module: fx.GraphModule, samples: Samples) -> None:
        self.meta, self._module, self._samples = module.meta, module, samples

    def __call__(self, *args: Any) -> Any:
        return _Sampler(self._module, self._samples).run(*args)


def _operands(node: fx.Node, args: tuple[Any, ...]) -> _Layer:
    name = spell(node).name
    if "fusion" in node.meta or node.target is torch.ops.fusekit.linear_act.default:
        x, weight, bias = (*args[:2], args[2] if len(args) > 2 else None)
        at = 3 if node.target is torch.ops.fusekit.linear_fp8.default else 4
        act = args[at] if len(args) > at else "none"
    elif name == "linear":
        (x, weight), bias, act = args[:2], None, "none"
    elif name == "addmm":
        (_, x, weight), bias, act = args[:3], None, "none"
        weight = weight.t()
    else:  # x @ w.t()
        (x, weight), bias, act = args[:2], None, "none"
        weight = weight.t()
    delayed = node.target is torch.ops.fusekit.linear_fp8.default and len(args) > 5
    return _Layer(
        _rows(x.detach()), weight.detach(), None if bias is None else bias.detach(), act,
        args[5] if delayed else None,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _watch(samples: Samples, name: str, layer: _Layer, result: Tensor) -> None:
    """Statistics of the output now, those of the gradients when they come."""
    x = statistics.sample(layer.x, samples.rows, samples.offset)
    features = statistics.sample(layer.weight, FEATURES, samples.offset, BLOCK)
    found = [statistics.output_statistics(x, features, r, layer.stale(r)) for r in samples.recipes]
    samples.add(name, "output", found)
    if not result.requires_grad:
        return
    z = None
    if layer.act != "none":
        chosen = statistics.chosen(layer.x, samples.rows, samples.offset)
        z = torch.nn.functional.linear(chosen, layer.weight.to(chosen.dtype))
        z = z if layer.bias is None else z + layer.bias.to(z.dtype)
    result.register_hook(partial(_on_gradient, samples, name, x, layer, z))


def _on_gradient(
    samples: Samples, name: str, x: Sample, layer: _Layer, z: Tensor | None, grad: Tensor
) -> None:
    with torch.no_grad():
        g = statistics.sample(_rows(grad), samples.rows, samples.offset)
        if z is not None:
            g = _through_activation(g, layer.act, z)
        columns = statistics.sample(layer.weight.t(), FEATURES, samples.offset, BLOCK)
        of_input, of_weight = statistics.grad_input_statistics, statistics.grad_weight_statistics
        levels = [(r, layer.stale(r)) for r in samples.recipes]
        samples.add(name, "grad_input", [of_input(g, columns, r, scale) for r, scale in levels])
        samples.add(name, "grad_weight", [of_weight(g, x, r, scale) for r, scale in levels])


def _through_activation(dy: Sample, act: str, z: Tensor) -> Sample:
    """The sample of dz from that of dy; see the head of this file."""
    wide = z.float()
    with torch.enable_grad():
        wide.requires_grad_()
        dz = torch.autograd.grad(ACTIVATIONS[act].reference(wide), wide, dy.values.float())[0]
    dz = dz.to(dy.values.dtype)
    seen, own = statistics.column_amax(dy.values), statistics.column_amax(dz)
    beyond = torch.where(seen > 0, dy.columns / seen, torch.ones_like(seen))
    largest = own.amax() * torch.where(seen.amax() > 0, dy.top / seen.amax(), torch.ones_like(dy.top))
    columns = torch.minimum(own * beyond, largest)
    found = statistics.measured(dz, torch.where(own == own.amax(), largest, columns))
    return found._replace(amax=found.amax / dy.unit, unit=found.unit * dy.unit)
