"""One spelling per meaning, and nothing else: what normalising changes, what it leaves, the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusekit.passes.normalise import normalise_graph

CHANGED: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "view": (lambda x: x.view(3, 2).sin(), ["reshape", "sin"]),
    "cast to the same dtype": (lambda x: x.to(torch.float32).float().type_as(x).sin(), ["sin"]),
    "contiguous of contiguous": (lambda x: x.contiguous().sin(), ["sin"]),
    "dropout that drops nothing": (lambda x: F.dropout(F.dropout(x, 0.0, True), 0.5, False).sin(), ["sin"]),
    "times one": (lambda x: ((x * 1.0) / 1 + 0).sin(), ["sin"]),
    "reshape to the same shape": (lambda x: x.reshape(2, 3).expand(2, 3).sin(), ["sin"]),
    "empty cache": (lambda x: torch.cat([torch.empty(0), x.sin()]).cos(), ["empty", "sin", "cos"]),
    "in place on a temporary": (lambda x: x.sin().mul_(2.0).relu_(), ["sin", "mul", "relu"]),
    "masked_fill_ on a temporary": (lambda x: x.sin().masked_fill_(x > 0, 1.0), ["sin", "gt", "masked_fill"]),
}
KEPT: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "in place on an input": (lambda x: x.mul_(2.0), ["mul_"]),
    "in place on a view": (lambda x: x.sin().t().mul_(2.0), ["sin", "t", "mul_"]),
    "in place with a view alive": (
        lambda x: (lambda y: (y.t(), y.mul_(2.0)))(x.sin()),
        ["sin", "t", "mul_"],
    ),
    "in place, result of another dtype": (lambda x: (x > 0).mul_(x > 1), ["gt", "gt", "mul"]),
    "random in place": (lambda x: x.sin().bernoulli_(0.5), ["sin", "bernoulli_"]),
    "active dropout": (lambda x: F.dropout(x, 0.5, True), ["dropout"]),
    "a cast": (lambda x: x.to(torch.bfloat16), ["to"]),
    "a whole number times one": (lambda x: (x > 0).sum() * 1.0, ["gt", "sum", "mul"]),
    "contiguous of a transpose": (lambda x: x.t().contiguous(), ["t", "contiguous"]),
    "times one, then written to": (
        lambda x: (lambda y: (y.t().add_(1.0), x.sin()))(x * 1.0),
        ["mul", "t", "add_", "sin"],
    ),
    "a view handed out": (lambda x: x.expand(2, 3), ["expand"]),
    "scaled sum": (lambda x: torch.add(x, 0, alpha=2.0), ["add"]),
}


def _graph(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    graph = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)
    normalise_graph(graph)
    return graph


def _names(graph: fx.GraphModule) -> list[str]:
    calls = (n for n in graph.graph.nodes if n.op == "call_function" and hasattr(n.target, "_schema"))
    return [n.target._schema.name.removeprefix("aten::") for n in calls]


@pytest.mark.parametrize("case", [*CHANGED, *KEPT])
def test_calls_after_normalising(case: str) -> None:
    function, names = (CHANGED | KEPT)[case]
    x = torch.randn(2, 3)
    graph = _graph(function, x.clone())
    assert _names(graph) == names
    torch.manual_seed(0)
    expected = function(x.clone())
    torch.manual_seed(0)
    torch.testing.assert_close(graph(x.clone()), expected, rtol=0, atol=0)


def test_dims_count_from_the_end() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.transpose(1, 2).softmax(2).unsqueeze(0).mean([2, 3], True).permute(1, 0, 2, 3)
        return torch.cat([y, y], 1)

    x = torch.randn(2, 3, 4)
    graph = _graph(function, x)
    dims = [n.args[1:] for n in graph.graph.nodes if n.op == "call_function"]
    assert dims == [(-2, -1), (-1,), (-4,), ([-2, -1], True), ([-3, -4, -2, -1],), (-3,)]
    torch.testing.assert_close(graph(x), function(x))


def test_regions_end_at_grad_mode_and_mutation() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.sin()
        with torch.no_grad():
            z = x.cos()
        w = (y * z).tanh()
        x.add_(1.0)
        return w.exp()

    graph = _graph(function, torch.randn(2))
    region = {
        n.target._schema.name: n.meta["region"] for n in graph.graph.nodes if hasattr(n.target, "_schema")
    }
    sin, cos, mul, tanh, exp = (region[f"aten::{name}"] for name in ("sin", "cos", "mul", "tanh", "exp"))
    assert mul == tanh and len({sin, cos, mul, exp}) == 4


def test_normalising_twice_changes_nothing() -> None:
    for function, names in (CHANGED | KEPT).values():
        graph = _graph(function, torch.randn(2, 3))
        normalise_graph(graph)
        assert _names(graph) == names
