"""One graph brought to a low dtype, node by node.

Each value is cast once, however many read it (casts.py); which op takes what dtype: dtype_policy.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.kernels import OPS, linear_cpu
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.linear_cpu import multiplies
from fusekit.passes import _compat
from fusekit.passes.canonicalise import call_checkpoint
from fusekit.passes.casts import Casts
from fusekit.passes.dtype_policy import (
    Policy,
    enters_product,
    fills_beyond,
    is_mask,
    masks_scores,
    overflows,
    policy_of,
    saturate,
    takes_dtype,
)
from fusekit.passes.normalise import is_mutation
from fusekit.passes.propagate import dtype_of, propagate

aten = torch.ops.aten
_LOWERED: dict[Policy, tuple[int, ...]] = {  # positions; of a matmul all that it multiplies
    Policy.LOW: (), Policy.NORM: (0, 1), Policy.ROPE: (0,), Policy.FP8: (0, 2),
}  # fmt: skip
_PARAMETERS = {  # of ops whose products a CPU may widen: the position of the last one; x comes before them
    torch.ops.fusekit.linear_act.default: 2,
    torch.ops.fusekit.linear_cross_entropy.default: 2,
    torch.ops.fusekit.mlp.default: 4,
    torch.ops.fusekit.gated_mlp.default: 6,
    torch.ops.fusekit.qkv_linear.default: 6,
}


class Lowering:
    """A graph on its way to the low dtype; a checkpoint's body is lowered with the graph that calls it.

    casts: what is cast, and what is known of the values (casts.py).
    emulated: such a matmul was met, see `widened`.
    widened: on a CPU without 16-bit matrix instructions ATen's low matmuls run in scalar code, an order of
        magnitude slower than float32 ones. Linears then become linear_act, which widens blocks of rows, and
        other matmuls run in float32 between casts. Off for graphs that stand for eager.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        low: torch.dtype,
        parameters: Iterable[fx.Node] = (),
        *,
        widened: bool = True,
    ) -> None:
        self.module, self.graph, self.low, self.widened = module, module.graph, low, widened
        self.casts = Casts(module.graph, low, parameters)
        self.emulated = False

    def give(self, placeholder: fx.Node, value: Any) -> None:
        """What the caller now passes for this placeholder."""
        placeholder.meta["val"] = value
        self.casts.changed.add(placeholder)

    def run(self) -> None:
        grad_enabled = torch.is_grad_enabled()
        try:
            for node in list(self.graph.nodes):
                if node.op == "call_function" and not self._is_boundary(node):
                    self._lower(node)
        finally:
            torch.set_grad_enabled(grad_enabled)

    def restore_outputs(self, dtype: torch.dtype | None = None) -> None:
        """Cast results back to the dtypes they were captured in, or all to `dtype`."""
        output = self.graph.output_node()
        for node in output.all_input_nodes:
            wanted = dtype or self.casts.original.get(node)
            if isinstance(node.meta.get("val"), Tensor) and wanted is not None and dtype_of(node) != wanted:
                output.replace_input_with(node, self.casts.to(node, wanted, output))
                self.casts.drop_view(node)

    def _is_boundary(self, node: fx.Node) -> bool:
        """A grad mode node: no cast is shared across one."""
        if node.target is not _compat.set_grad_enabled:
            return False
        torch.set_grad_enabled(bool(node.args[0]))
        self.casts.forget()
        return True

    def _lower(self, node: fx.Node) -> None:
        if fills_beyond(node, self.low) and enters_product(node, self.low):
            saturate(node, self.low)
        policy = Policy.FLOAT32 if _full_precision(node) else policy_of(node, self.low)
        if node.target is call_checkpoint:
            self._lower_checkpoint(node)
        elif is_mutation(node):
            self._match_destination(node, policy)
            self.casts.forget()  # a copy made before the write is stale after it
            self._update(node)
        elif policy is Policy.LOW and self._is_emulated(node):
            self._widen(node)
        elif policy in _LOWERED:
            lowered = [node.args[i] for i in _LOWERED[policy]]
            self._bring_down(node, _nodes(lowered) or self._low_inputs(node))
            self._update(node)
        elif policy is Policy.FLOAT32:
            self._bring_up(node)  # inputs as captured, so the value is as well
        elif policy is not Policy.CAST or not self._drop_cast(node):
            if policy is Policy.FLOW:
                self._meet(node)
                if _is_mixed_site(node):
                    self._bring_up(node)
            self._update(node)
        if overflows(node, self.low) or any(
            n in self.casts.settled or dtype_of(n) == self.low for n in node.all_input_nodes
        ):
            self.casts.settled.add(node)

    def _update(self, node: fx.Node) -> None:
        if any(n in self.casts.changed for n in node.all_input_nodes):
            propagate(node)
            self.casts.changed.add(node)

    def _is_emulated(self, node: fx.Node) -> bool:
        """Whether ATen would run this matmul in scalar code."""
        aten_op = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"
        if not self.widened or not aten_op or self.casts.original[node] != torch.float32:
            return False
        return not on_gpu(node.meta["val"]) and not multiplies(self.low)

    def _widen(self, node: fx.Node) -> None:
        self.emulated = True
        if node.target is aten.linear.default and not node.kwargs:
            node.target = torch.ops.fusekit.linear_act.default
            self._bring_down(node, self._low_inputs(node))
            if OPS["linear_act"].supports(*fx.map_arg(node.args, lambda n: n.meta["val"])) is not None:
                node.target = aten.linear.default
                self._bring_down(node, node.all_input_nodes)
            propagate(node)
            self.casts.changed.add(node)
            return
        self._bring_up(node)
        readers = [user for user in node.users if user.op != "output"]
        for reader in readers:
            self.casts.replace(reader, node, self.casts.to(node, self.low, min(readers)))

    def _low_inputs(self, node: fx.Node) -> list[fx.Node]:
        """What a product takes in the low dtype: where a CPU widens its operands, not the parameters."""
        inputs = node.all_input_nodes
        if node.target not in _PARAMETERS or linear_cpu.multiplies(self.low):
            return inputs
        x, last = node.args[0], _PARAMETERS[node.target]
        assert isinstance(x, fx.Node)
        parameters = {n for n in node.args[1 : last + 1] if isinstance(n, fx.Node)}
        if on_gpu(x.meta["val"]) or not all(map(self._stays_wide, parameters)):
            return inputs
        return [n for n in inputs if n not in parameters or n is x or n in node.args[last + 1 :]]

    def _stays_wide(self, source: fx.Node) -> bool:
        return self.casts.is_single(source) and self.casts.is_parameter(source)

    def _bring_down(self, node: fx.Node, inputs: Iterable[fx.Node]) -> None:
        for source in inputs:
            if self.casts.is_single(source) and not is_mask(node, source):
                self.casts.replace(node, source, self.casts.down(source, node))

    def _bring_up(self, node: fx.Node) -> None:
        lowered = [n for n in node.all_input_nodes if self.casts.is_lowered(n)]
        if lowered and takes_dtype(node.target):
            _accumulate_in_float32(node)
            return
        for source in lowered:
            self.casts.replace(node, source, self.casts.to(source, torch.float32, node))

    def _meet(self, node: fx.Node) -> None:
        """Elementwise: free inputs follow a low partner; settled ones promote it, as ATen does by itself."""
        if any(map(self.casts.is_single, node.all_input_nodes)) and masks_scores(node):
            self._bring_up(node)
            return
        single = [n for n in node.all_input_nodes if self.casts.is_single(n) and n.meta["val"].dim()]
        lowered = any(self.casts.is_lowered(n) for n in node.all_input_nodes)
        if not lowered or any(n in self.casts.settled for n in single):
            return
        for source in single:
            self.casts.replace(node, source, self.casts.down(source, node))

    def _match_destination(self, node: fx.Node, policy: Policy) -> None:
        """In place: the destination keeps its dtype. ATen converts elementwise operands; others are cast."""
        destination, *others = node.all_input_nodes
        if self.casts.is_lowered(destination) and overflows(node, self.low):
            saturate(node, self.low)
            return
        if policy is Policy.FLOW or not isinstance(node.target, torch._ops.OpOverload):
            return
        wanted = dtype_of(destination)
        for source in others:
            if wanted is not None and (self.casts.is_lowered(source) or self.casts.is_single(source)):
                self.casts.replace(node, source, self.casts.to(source, wanted, node))

    def _drop_cast(self, node: fx.Node) -> bool:
        """A user's cast that has nothing left to do; one of a parameter to low is the parameter's copy."""
        source, *others = node.all_input_nodes
        if (
            others
            or self.casts.original[node] != self.low
            or source.meta["val"].device != node.meta["val"].device
        ):
            return False
        if self.casts.is_single(source) and self.casts.is_parameter(source):
            replacement = self.casts.down(source, node)
        elif self.casts.is_lowered(source):
            replacement = source
        else:
            return False
        node.replace_all_uses_with(replacement)
        self.graph.erase_node(node)
        return True

    def _lower_checkpoint(self, node: fx.Node) -> None:
        body: fx.GraphModule = getattr(self.module, str(node.args[0].target))  # type: ignore[union-attr]
        inputs = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True))
        parameters = {p for p, arg in inputs.items() if arg in self.casts.parameters}
        child = Lowering(body, self.low, parameters, widened=self.widened)
        for placeholder, arg in inputs.items():
            if isinstance(arg, fx.Node):
                if arg in self.casts.changed:
                    child.give(placeholder, arg.meta["val"])
                if arg in self.casts.settled:
                    child.casts.settled.add(placeholder)
        child.run()
        self.emulated |= child.emulated
        for placeholder in child.casts.parameter_casts:
            node.args = (*node.args, self.casts.of_parameter(inputs[placeholder]))
        results = body.graph.output_node().args[0]
        node.meta["val"] = fx.map_arg(results, lambda n: n.meta["val"])
        self.casts.changed.add(node)


def _accumulate_in_float32(node: fx.Node) -> None:
    """Let a reduction read low and accumulate in float32: no float32 copy of its input is made."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    position = [a.name for a in arguments].index("dtype")
    if not arguments[position].kwarg_only and len(node.args) > position:
        if node.args[position] is None:
            node.update_arg(position, torch.float32)
    elif node.kwargs.get("dtype") is None:
        node.update_kwarg("dtype", torch.float32)


def _is_mixed_site(node: fx.Node) -> bool:
    """A fused op with inputs of several dtypes, which it does not promote as ATen's elementwise ops do."""
    fused = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fusekit"
    return fused and len({dtype_of(n) for n in node.all_input_nodes}) > 1


def _full_precision(node: fx.Node) -> bool:
    """The user wrote autocast(enabled=False) around the node, or around a node it replaces."""
    fusion = node.meta.get("fusion")
    replaced = fusion.eager.graph.nodes if fusion is not None and fusion.eager is not None else ()
    return any(n.meta.get("full_precision", False) for n in (node, *replaced))


def _nodes(values: Iterable[Any]) -> list[fx.Node]:
    return [v for v in values if isinstance(v, fx.Node)]
