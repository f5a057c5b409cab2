"""One quantisation for each tensor and layout, however many FP8 layers read it; and delayed scales.

A weight becomes a graph input of its own that `weights` fills once per version, in both layouts: micro-
batches and the second forward passes of checkpoints find it made. What several layers read, such as the
normed x of q, k and v, is quantised by a visible op in front of the first. What one layer reads it quantises
itself, unless what makes it can help: fp8_producers.py.

With delayed scales a layer gets scale and amax of its weight's slots; where no Parameter of the model stands
behind a weight, nothing could remember them, and the layer takes current scales.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.kernels.fp8_operand import PARTS, fp8_operand
from fusekit.kernels.linear_fp8_cpu import WEIGHT, X
from fusekit.kernels.recipe import Recipe
from fusekit.passes.canonicalise import call_checkpoint
from fusekit.passes.fp8_producers import (
    LINEAR,
    Made,
    argument,
    help_quantise,
    set_argument,
    value_of,
    whereabouts,
)
from fusekit.passes.inputs import InputOperand, InputScales
from fusekit.passes.normalise import is_mutation, memory, writes
from fusekit.passes.propagate import faking
from fusekit.passes.region import Region

aten = torch.ops.aten


def quantise_once(region: Region) -> None:
    """Give the region's linear_fp8 nodes their operands and scales."""
    if region.settings.recipe is not None:
        graph = _Graph(region, region.module)
        graph.run()
        region.input_casts += graph.inputs.listed()
        if region.settings.scales is not None and graph.inputs.without_history:
            region.notes.append(
                f"{graph.inputs.without_history} FP8 layers take current scales and not delayed ones: no "
                "matrix among the Parameters is their weight"
            )


@dataclass
class _Inputs:
    """Inputs that are added to the outermost graph."""

    graph: fx.Graph
    made: dict[Any, list[fx.Node]] = field(default_factory=dict)
    without_history: int = 0  # layers whose scales nothing remembers
    described: dict[Any, Callable[[int, int], InputOperand | InputScales]] = field(default_factory=dict)

    def add(self, key: Any, values: list[Tensor], name: str, describe: Callable[..., Any]) -> list[fx.Node]:
        """Placeholders for `values`, the same ones for an equal key. describe(source, target)."""
        if key not in self.made:
            nodes = []
            for i, value in enumerate(values):
                with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                    nodes.append(self.graph.placeholder(f"{name}_{len(self.made)}_{i}"))
                nodes[-1].meta = {"val": value, "added": True}
            self.made[key], self.described[key] = nodes, describe
        return self.made[key]

    def listed(self) -> list[InputOperand | InputScales]:
        places = {node: i for i, node in enumerate(self.graph.find_nodes(op="placeholder"))}
        return [
            describe(places[key[0]], places[self.made[key][0]]) for key, describe in self.described.items()
        ]


class _Graph:
    """The region's graph, or a checkpoint's body, whose inputs are its call's arguments."""

    def __init__(
        self,
        region: Region,
        module: fx.GraphModule,
        parent: _Graph | None = None,
        call: fx.Node | None = None,
    ) -> None:
        self.region, self.module, self.graph = region, module, module.graph
        self.parent, self.call = parent, call
        self.inputs: _Inputs = _Inputs(module.graph) if parent is None else parent.inputs
        self.written: Any = writes(module.graph) if parent is None else parent.written
        self.received: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        assert self.region.settings.recipe is not None
        layers = list(self.graph.find_nodes(op="call_function", target=LINEAR))
        for layer in layers:
            self.give_weight(layer)
        together: dict[Any, list[fx.Node]] = defaultdict(list)
        for layer in layers:  # no write and no change of grad mode lies within one region
            together[layer.args[0], layer.meta.get("region"), layer.args[4]].append(layer)
        for readers in together.values():
            first = min(readers)
            turned = self.region.training and any(map(self.wants_turned, readers))
            made = help_quantise(first, turned)
            if len(readers) > 1 or made is not None:
                self.share(sorted(readers), made, turned)
        for node in self.graph.find_nodes(op="call_function", target=call_checkpoint):
            body = getattr(self.module, node.args[0].target)
            _Graph(self.region, body, self, node).run()
        self.graph.lint()
        self.module.recompile()

    def give_weight(self, layer: fx.Node) -> None:
        source, transposed = self.parameter_of(layer.args[1])
        if Recipe.parse(str(layer.args[4])).scaling == "tensor":  # a plan has layers of other scales as well
            if source is None or source.meta["val"].dim() != 2:
                self.inputs.without_history += 1
            elif self.region.settings.scales is not None:
                self.give_scales(layer, source)
        if source is None:
            return
        if transposed is not None and memory(source.meta["val"]) not in self.written:
            self.give_operand(layer, source, transposed)

    def give_scales(self, layer: fx.Node, source: fx.Node) -> None:
        device = source.meta["val"].device
        values = [_fake(source, lambda: torch.empty(3, device=device)) for _ in ("scale", "amax")]
        given = self.inputs.add(
            (source, "scales"), values, f"{source.name}_scales",
            lambda source, target: InputScales(source=source, target=target),
        )  # fmt: skip
        set_argument(layer, "recipe", replace(Recipe.parse(str(layer.args[4])), delayed=True).token())
        set_argument(layer, "scale", self.receive(given[0]))
        set_argument(layer, "amax", self.receive(given[1]))

    def give_operand(self, layer: fx.Node, source: fx.Node, transposed: bool) -> None:
        x, scale, token = layer.args[0], argument(layer, "scale"), str(layer.args[4])
        assert isinstance(x, fx.Node)
        dtype, turned = x.meta["val"].dtype, self.region.training

        def quantised() -> Any:
            weight = source.meta["val"].t() if transposed else source.meta["val"]
            given = None if scale is None else scale.meta["val"]
            return fp8_operand(weight, token, WEIGHT, dtype, True, turned, given, None)

        def describe(source: int, target: int) -> InputOperand:
            return InputOperand(
                source=source, target=target, dtype=dtype, recipe=token, transposed=transposed, turned=turned
            )

        key = (source, transposed, dtype, token)
        operand = self.inputs.add(key, list(_fake(source, quantised)), f"{source.name}_fp8", describe)
        set_argument(layer, "w_operand", [self.receive(node) for node in operand])

    def share(self, readers: list[fx.Node], made: Made | None, turned: bool) -> None:
        """Quantise once what these layers, in graph order, read as x; `made` by what makes x."""
        first = readers[0]
        x, token = first.args[0], str(first.args[4])
        assert isinstance(x, fx.Node)
        rows: list[fx.Node] = []  # codes and inverse scales that are there
        if made is not None and made.codes is not None and Recipe.parse(token).scaling == "row":
            assert made.inverse is not None
            rows = [made.codes, made.inverse]
        if made is not None and rows and not turned:
            operand = [*rows, made.maxima, made.maxima]  # those are absent at run time
        else:
            arguments = (
                x, token, X, x.meta["val"].dtype, not rows, turned, argument(first, "scale"),
                argument(first, "amax"), None if made is None else made.maxima,
            )  # fmt: skip
            operand = [*rows, *self.quantised(first, arguments)[len(rows) :]]
        for reader in readers:
            set_argument(reader, "x_operand", operand)

    def quantised(self, reader: fx.Node, arguments: tuple[Any, ...]) -> list[fx.Node]:
        """The parts of an fp8_operand in front of this layer."""
        with self.graph.inserting_before(reader):
            operand = self.graph.call_function(fp8_operand, arguments)
            parts = [self.graph.call_function(operator.getitem, (operand, i)) for i in range(PARTS)]
        operand.meta |= whereabouts(reader) | {"val": value_of(operand)}
        for i, part in enumerate(parts):
            part.meta |= whereabouts(reader) | {"val": operand.meta["val"][i]}
        return parts

    def wants_turned(self, layer: fx.Node) -> bool:
        """Whether its weight wants a gradient by an FP8 product, for which x has another layout."""
        if not Recipe.parse(str(layer.args[4])).grad_weight:
            return False
        source, _ = self.parameter_of(layer.args[1])
        return source is None or bool(source.meta.get("requires_grad", True))

    def parameter_of(self, node: Any) -> tuple[fx.Node | None, bool | None]:
        """The outermost graph's input, a Parameter, that a weight is; and whether it is its transpose, None
        where it is something else made of it."""
        transposed: bool | None = False
        while isinstance(node, fx.Node) and node.op == "call_function" and len(node.all_input_nodes) == 1:
            if is_mutation(node):
                return None, None
            transposed = None if transposed is None or not _transposes(node) else not transposed
            node = node.all_input_nodes[0]
        if not isinstance(node, fx.Node) or node.op != "placeholder":
            return None, None
        if self.parent is None or self.call is None:
            return (node, transposed) if node.meta.get("parameter") else (None, None)
        position = list(self.graph.find_nodes(op="placeholder")).index(node)
        source, outside = self.parent.parameter_of(self.call.args[1 + position])
        both = None if transposed is None or outside is None else transposed != outside
        return source, both

    def receive(self, node: fx.Node) -> fx.Node:
        """The outermost graph's input `node`, in this graph."""
        if self.parent is None or self.call is None:
            return node
        if node not in self.received:
            outside = self.parent.receive(node)
            with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
                inside = self.graph.placeholder(node.name)
            inside.meta = dict(node.meta)
            self.call.args = (*self.call.args, outside)
            self.received[node] = inside
        return self.received[node]


def _transposes(node: fx.Node) -> bool:
    dims: Any = node.args[1:]
    if node.target is aten.transpose.int:
        return sorted(int(d) % 2 for d in dims) == [0, 1] and node.meta["val"].dim() == 2
    if node.target is aten.permute.default:
        return [int(d) % 2 for d in dims[0]] == [1, 0]
    return node.target in (aten.t.default, aten.numpy_T.default)


def _fake(near: fx.Node, make: Callable[[], Any]) -> Any:
    with faking(near), torch.no_grad():
        return make()
