"""meta["val"] of a node whose inputs changed: the op run again on the inputs' fakes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.passes._compat import HigherOrderOperator, enable_python_dispatcher


def propagate(node: fx.Node) -> None:
    """Set meta["val"] of a call_function node by running it on its inputs' fakes, outside any autocast.

    Runs under the current grad mode. An opaque higher-order operator keeps the value it was captured with.
    """
    if isinstance(node.target, HigherOrderOperator):
        return
    assert callable(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with faking(node):
        node.meta["val"] = node.target(*args, **kwargs)


def complete(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Set meta["val"] where a copied subgraph has none."""
    for placeholder, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=False):
        placeholder.meta.setdefault("val", value)
    for node in module.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            propagate(node)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a node's meta["val"]: itself, or those of a tuple."""
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (tuple, list)) else []


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """dtype of a node's value, of the first tensor where it has several, None where it has none."""
    tensors = tensors_of(node.meta.get("val"))
    return tensors[0].dtype if tensors else None


@contextlib.contextmanager
def faking(node: fx.Node) -> Iterator[None]:
    """Run ops on fakes as the captured graph will run: in its fake mode, with ambient autocast off."""
    inputs = [t for n in (node, *node.all_input_nodes) for t in tensors_of(n.meta.get("val"))]
    mode: Any = getattr(inputs[0], "fake_mode", None) if inputs else None
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(enable_python_dispatcher())
        if mode is not None:
            stack.enter_context(mode)
        yield
