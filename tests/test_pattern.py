"""The matcher: what it sees through, what it captures, where and why it stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusekit.passes.normalise import normalise_graph
from fusekit.passes.pattern import Match, Miss, New, Rule
from fusekit.passes.search import find

SHAPES = {"x": "* N", "weight": "M N", "bias": "optional N", "other": "* N"}


def _rule(pattern: Callable[..., Any], **kwargs: Any) -> Rule:
    return Rule("op", pattern, "test", SHAPES, **kwargs)


def _find(rule: Rule, function: Callable[..., Any], *inputs: Tensor) -> Match | Miss | None:
    graph = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*inputs)
    normalise_graph(graph)
    root: Any = graph.graph.output_node().args[0]
    return find(rule.traced, root if isinstance(root, fx.Node) else root[0])


X, Y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
LOW = X.to(torch.bfloat16)

sum_of_both = _rule(lambda x, other, scale: torch.tanh(x * scale) + other)
wide = _rule(lambda x, eps: (x.to(torch.float32) + eps).exp().to(x.dtype))
squared = _rule(lambda x: torch.tanh(x) ** 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.tanh(x * 0.5) + y,
        lambda x, y: y + torch.tanh(0.5 * x),
        lambda x, y: y + torch.tanh(x / 2.0),
    ],
)
def test_commuted_operands_and_division(function: Callable[..., Any]) -> None:
    found = _find(sum_of_both, function, X, Y)
    assert isinstance(found, Match)
    assert found.arguments["scale"] == 0.5
    assert (found.arguments["x"].name, found.arguments["other"].name) == ("x_1", "y_1")
    assert len(found.nodes) == 3


def test_an_absent_scale_is_one() -> None:
    found = _find(sum_of_both, lambda x, y: torch.tanh(x) + y, X, Y)
    assert isinstance(found, Match) and found.arguments["scale"] == 1.0


@pytest.mark.parametrize(
    "square", [lambda y: y * y, lambda y: y.square(), lambda y: y.pow(2), lambda y: y**2.0]
)
def test_spellings_of_a_square(square: Callable[[Tensor], Tensor]) -> None:
    assert isinstance(_find(squared, lambda x: square(torch.tanh(x)), X), Match)


def test_casts_match_nothing_in_float32() -> None:
    for x in (X, LOW):
        found = _find(wide, lambda x: (x.to(torch.float32) + 0.25).exp().to(x.dtype), x)
        assert isinstance(found, Match) and found.arguments["eps"] == 0.25
        assert found.arguments["x"].op == "placeholder"


def test_a_missing_cast_is_no_match_in_low_precision() -> None:
    found = _find(wide, lambda x: (x + 0.25).exp(), LOW)
    assert isinstance(found, Miss) and "bfloat16, not float32" in found.reason
    found = _find(wide, lambda x: (x.to(torch.float16).to(torch.float32) + 0.25).exp().to(x.dtype), LOW)
    assert isinstance(found, Miss), "the result has the dtype of x, and x would be the narrower tensor"


def test_a_transposed_argument_may_be_anything() -> None:
    rule = _rule(lambda x, weight: torch.tanh(x @ weight.t()))
    weight = torch.randn(5, 4)
    found = _find(rule, lambda x, w: torch.tanh(x @ w.t()), X, weight)
    assert isinstance(found, Match) and found.arguments["weight"].op == "placeholder"
    found = _find(rule, lambda x, w: torch.tanh(x @ w), X, weight.t().contiguous())
    assert isinstance(found, Match) and isinstance(found.arguments["weight"], New)


MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "another op": (lambda x, y: torch.sin(x) + torch.cos(y), "sin where tanh is needed"),
    "an argument": (lambda x, y: x + y, "an input where tanh is needed"),
    "a part": (lambda x, y: torch.aminmax(x)[0] + y, "aminmax"),
    "escape": (lambda x, y: (lambda t: (t + y, t))(torch.tanh(x * 2.0)), "also read by output"),
    "a tensor for a number": (lambda x, y: torch.tanh(x * y) + y, "scale is computed"),
    "broadcast": (lambda x, y: torch.tanh(x * 2.0) + y[0], "leading sizes"),
    "alpha": (lambda x, y: torch.add(torch.tanh(x), y, alpha=2), ""),
}


@pytest.mark.parametrize("case", MISSES)
def test_misses_say_where_and_why(case: str) -> None:
    function, reason = MISSES[case]
    found = _find(sum_of_both, function, X, Y)
    if not reason:  # a sum with alpha is another op at the very root
        assert found is None
        return
    assert isinstance(found, Miss)
    assert reason in found.reason


def test_literals_must_agree() -> None:
    rule = _rule(lambda x: torch.tanh(x) * 0.7978845608)
    assert isinstance(_find(rule, lambda x: torch.tanh(x) * 0.79788456080287, X), Match)
    found = _find(rule, lambda x: torch.tanh(x) * 0.8, X)
    assert isinstance(found, Miss) and "0.8 where 0.7978845608" in found.reason
    found = _find(rule, lambda x: torch.tanh(x) * x, X)
    assert not isinstance(found, Miss) or "0.7978845608" not in found.reason


def test_one_number_captured_twice_is_one_number() -> None:
    rule = _rule(lambda x, eps: torch.tanh(x + eps) + eps)
    assert isinstance(_find(rule, lambda x: torch.tanh(x + 0.1) + 0.1, X), Match)
    found = _find(rule, lambda x: torch.tanh(x + 0.1) + 0.2, X)
    assert isinstance(found, Miss) and "two values" in found.reason


def test_other_functions_may_stand_for_a_call() -> None:
    def scaled(x: Tensor) -> Tensor:
        return torch.tanh(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    rule = _rule(
        lambda x: torch.sin(torch.tanh(x)), also={"tanh": (lambda x: 2.0 * torch.sigmoid(x), scaled)}
    )
    for function in (
        lambda x: torch.sin(torch.tanh(x)),
        lambda x: torch.sin(2.0 * torch.sigmoid(x)),
        lambda x: torch.sin(scaled(x)),
    ):
        found = _find(rule, function, X)
        assert isinstance(found, Match) and found.arguments["x"].op == "placeholder"
    assert not isinstance(_find(rule, lambda x: torch.sin(3.0 * torch.sigmoid(x)), X), Match)


def test_a_reshape_that_mixes_rows_is_no_match() -> None:
    rule = _rule(lambda x: torch.tanh(x.reshape(-1, x.shape[-1])).reshape(x.shape))
    assert isinstance(_find(rule, lambda x: torch.tanh(x.reshape(6, 4)).reshape(2, 3, 4), X), Match)
    assert not isinstance(_find(rule, lambda x: torch.tanh(x.reshape(4, 6)).reshape(2, 3, 4), X), Match)


def test_grad_mode_inside_is_no_match() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            t = torch.tanh(x * 2.0)
        return t + y

    found = _find(sum_of_both, function, X, Y)
    assert isinstance(found, Miss) and "boundary" in found.reason


def test_symbolic_sizes() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x * 0.5) + y

    graph = make_fx(function, pre_dispatch=True, tracing_mode="symbolic")(X, Y)
    normalise_graph(graph)
    found = find(sum_of_both.traced, graph.graph.output_node().args[0])
    assert isinstance(found, Match)
    assert isinstance(found.root.meta["val"].shape[0], torch.SymInt), "matching guards on no size"
