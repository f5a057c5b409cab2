"""Rules on the spellings they are for: how many sites, the same results and gradients, the ops left over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_checks import Functional, calls, capture, check, reasons, sites
from torch import Tensor, nn

from fusekit.kernels import OPS
from fusekit.passes.canonicalise import canonicalise, copy_graph
from fusekit.passes.config import Config
from fusekit.passes.fuse import fuse
from fusekit.passes.normalise import normalise
from fusekit.passes.region import Region, Settings


class Act(nn.Module):
    """act(linear(x)), with a residual sum where asked."""

    def __init__(self, act: Callable[[Tensor], Tensor], bias: bool = True, residual: bool = False) -> None:
        super().__init__()
        self.linear, self.act, self.residual = nn.Linear(8, 8, bias=bias), act, residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.linear(x))
        return x + y if self.residual else y


ACTS = {
    "gelu": [nn.GELU(), lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5))],
    "gelu_tanh": [
        nn.GELU("tanh"),
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    ],
    "relu": [nn.ReLU(), nn.ReLU(inplace=True)],
    "silu": [nn.SiLU(), nn.SiLU(inplace=True), lambda x: x * torch.sigmoid(x)],
    "quick_gelu": [lambda x: x * torch.sigmoid(1.702 * x)],
    "tanh": [nn.Tanh()],
    "sigmoid": [nn.Sigmoid()],
    "relu_squared": [lambda x: F.relu(x).square(), lambda x: F.relu(x) ** 2],
}
CASES = [(name, i) for name, functions in ACTS.items() for i in range(len(functions))]


@pytest.mark.parametrize("name, number", CASES)
def test_every_activation_after_a_linear(name: str, number: int) -> None:
    act = ACTS[name][number]
    for bias, residual in ((True, False), (False, True)):
        regions = check(Act(act, bias, residual), torch.randn(2, 3, 8))
        assert sites(regions) == {"linear_act": 1}
        (node,) = (n for n in regions[0].module.graph.nodes if "fusion" in n.meta)
        assert node.args[4] == name
        assert [n for n in regions[0].module.graph.nodes if n.op == "call_function"] == [node]


LINEARS = {
    "x @ w + b": lambda x, w, b: F.gelu(x @ w + b),
    "b + matmul(x, w)": lambda x, w, b: F.gelu(b + torch.matmul(x, w)),
    "x @ w": lambda x, w, b: F.gelu(x @ w),
    "Conv1D": lambda x, w, b: F.gelu(torch.addmm(b, x.view(-1, 8), w).view(2, 3, 16)),
    "addmm": lambda x, w, b: F.gelu(torch.addmm(b, x[0], w)),
    "x @ w.T": lambda x, w, b: F.gelu(x @ w.t().contiguous().t() + b),
}


@pytest.mark.parametrize("spelling", LINEARS)
def test_every_spelling_of_a_linear(spelling: str) -> None:
    regions = check(Functional(LINEARS[spelling], (8, 16), (16,)), torch.randn(2, 3, 8))
    assert sites(regions) == {"linear_act": 1}
    assert not any(calls(regions, name) for name in ("matmul", "addmm", "gelu", "add"))


def _rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


NORMS: dict[str, Callable[..., Tensor]] = {
    "F.rms_norm": lambda x, w: F.rms_norm(x, (8,), w, 1e-6),
    "F.rms_norm, no epsilon": lambda x, w: F.rms_norm(x, (8,), w),
    "Llama": lambda x, w: w * _rms(x.to(torch.float32)).to(x.dtype),
    "T5": lambda x, w: (
        w * (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)).to(w.dtype)
    ),
    "Gemma": lambda x, w: (_rms(x.float()) * (1.0 + w.float())).type_as(x),
    "OLMo2": lambda x, w: (w * _rms(x.float())).to(x.dtype),
    "square and divide": lambda x, w: w * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)),
    "torch.square": lambda x, w: torch.rsqrt(torch.square(x).mean(-1, keepdim=True) + 1e-5) * x * w,
}


@pytest.mark.parametrize("spelling", NORMS)
def test_every_spelling_of_rms_norm(spelling: str) -> None:
    norm = NORMS[spelling]
    alone = check(Functional(norm, (8,)), torch.randn(2, 3, 8))
    summed = check(Functional(lambda x, w: norm(x + x.sin(), w), (8,)), torch.randn(2, 3, 8))
    assert sites(alone) == sites(summed) == {"add_rms_norm": 1}
    assert calls(summed, "add") == calls(alone, "mean") == 0


@pytest.mark.parametrize("spelling", ["Llama", "T5", "Gemma", "OLMo2"])
def test_casts_of_low_precision_norms_are_part_of_the_match(spelling: str) -> None:
    model = Functional(NORMS[spelling], (8,)).to(torch.bfloat16)
    regions = check(model, torch.randn(2, 3, 8, dtype=torch.bfloat16), tolerance=2e-2)
    assert sites(regions) == {"add_rms_norm": 1}
    assert calls(regions, "to") == 0


def test_layer_norm_of_a_sum_that_is_read_again() -> None:
    def block(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = x + x.cos()
        return F.layer_norm(h, (8,), w, b) * h

    regions = check(Functional(block, (8,), (8,)), torch.randn(2, 3, 8))
    assert sites(regions) == {"add_layer_norm": 1}
    assert calls(regions, "layer_norm") == calls(regions, "add") == 0


def test_a_norm_without_weight_and_bias() -> None:
    class Bare(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x * self.parameters_[0], (8,))

    assert sites(check(Bare(lambda: None, (8,)), torch.randn(2, 8))) == {"add_layer_norm": 1}


REFUSALS: dict[str, tuple[Callable[..., Any], str]] = {
    "intermediate read elsewhere": (
        lambda x, w, b: (lambda y: F.gelu(y) * y.sum())(F.linear(x, w, b)),
        "also read by",
    ),
    "the linear added to its own activation": (
        lambda x, w, b: (lambda y: F.gelu(y) + y)(F.linear(x, w, b)),
        "inside the chain",
    ),
    "the linear added to itself": (
        lambda x, w, b: (lambda y: y + y)(F.linear(x, w, b)),
        "inside the chain",
    ),
    "a cast in between": (
        lambda x, w, b: F.gelu(F.linear(x, w, b).half().float()),
        "",
    ),
    "another GELU constant": (
        lambda x, w, b: (lambda y: 0.5 * y * (1 + torch.tanh(0.7978845608 * (y + 0.05 * y**3))))(
            F.linear(x, w, b)
        ),
        "0.05 where 0.044715",
    ),
    "an in-place write in between": (
        lambda x, w, b: (lambda y: (x.mul_(2.0), F.gelu(y))[1])(F.linear(x.clone(), w, b)),
        "boundary",
    ),
    "grad mode switched in between": (
        lambda x, w, b: _gelu_without_grad(F.linear(x, w, b)) + w.sum(),
        "boundary",
    ),
    "a residual that broadcasts": (
        lambda x, w, b: F.gelu(F.linear(x[:, :1], w, b)) + x,
        "",
    ),
    "layer norm over two dims": (
        lambda x, w, b: F.layer_norm(x * w.sum(), (3, 8)),
        "2 where 1",
    ),
    "RMS over another dim": (
        lambda x, w, b: b * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)),
        "-2",
    ),
    "a weight of the whole shape": (
        lambda x, w, b: F.rms_norm(x, (8,)) * x,
        "",
    ),
}


def _gelu_without_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.gelu(y)


@pytest.mark.parametrize("case", REFUSALS)
def test_what_must_not_fuse_is_left_and_named(case: str) -> None:
    function, reason = REFUSALS[case]
    x = torch.randn(2, 3, 8)
    expected = Functional(function, (8, 8), (8,))
    twin = copy.deepcopy(expected)
    result, regions = capture(twin, x.clone())
    torch.testing.assert_close(result, expected(x.clone()))
    if reason:
        assert reason in reasons(regions), reasons(regions)
        assert not sites(regions)
    else:
        assert sum(sites(regions).values()) <= 1


SCALED: dict[str, Callable[..., Any]] = {
    "a scale after a linear": lambda x, w, b: F.linear(x, w, b) * 2.0,
    "LoRA": lambda x, w, b: F.linear(x, w, b) + F.linear(x, w) * 0.5,
    "half of a linear": lambda x, w, b: 0.5 * F.linear(x, w, b),
}


@pytest.mark.parametrize("case", SCALED)
def test_scaling_is_no_near_match_of_an_activation(case: str) -> None:
    _, regions = capture(Functional(SCALED[case], (8, 8), (8,)), torch.randn(2, 3, 8))
    assert not reasons(regions)


def test_equal_misses_read_alike_and_name_the_line() -> None:
    def bent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        scores = torch.sin(scores / 50.0) * 50.0
        return torch.softmax(scores, dim=-1) @ v

    def twice(x: Tensor, w: Tensor) -> Tensor:
        return bent(bent(x @ w, x, x), x, x)

    _, regions = capture(Functional(twice, (8, 8)), torch.randn(2, 2, 5, 8))
    first, second = reasons(regions).splitlines()
    assert first == second
    assert first.startswith("attention: sin where matmul is needed (at test_rules.py:")


def test_an_intermediate_read_elsewhere_is_told_alike_for_every_layer() -> None:
    def layer(x: Tensor, w: Tensor) -> Tensor:
        h = F.linear(x, w)
        return F.gelu(h) + h * 2.0

    _, regions = capture(Functional(lambda x, w: layer(layer(x, w), w), (8, 8)), torch.randn(3, 8))
    told = {r.reason for region in regions for r in region.refusals if r.op == "linear_act"}
    assert told == {"the result of linear is also read by mul"}


def test_varying_sizes_match_alike() -> None:
    regions = check(Act(nn.GELU(), residual=True), torch.randn(2, 3, 8), dynamic=True)
    assert sites(regions) == {"linear_act": 1}
    assert any(isinstance(s, str) for f in regions[0].fusions for shape in f.shapes for s in shape)


def test_switches() -> None:
    model, x = nn.Sequential(Act(nn.GELU()), Act(nn.ReLU()), nn.LayerNorm(8)), torch.randn(2, 8)
    assert sites(check(model, x)) == {"linear_act": 2, "add_layer_norm": 1}
    assert sites(check(model, x, settings=Settings(fuse=frozenset({"linear_act"})))) == {"linear_act": 2}
    assert sites(check(model, x, config=Config(disable=frozenset({"linear_act"})))) == {"add_layer_norm": 1}
    assert (
        sites(check(model, x, config=Config(disable=frozenset({"linear, torch.nn.GELU"}))))["linear_act"] == 1
    )
    assert sum(sites(check(model, x, config=Config(fuel=1))).values()) == 1


def test_a_disabled_site_stays_and_the_others_keep_their_names() -> None:
    model, x = nn.Sequential(Act(nn.GELU()), Act(nn.ReLU()), Act(nn.GELU())), torch.randn(2, 8)
    named = {f.site: f.rule for f in check(model, x)[0].fusions}
    graph = _canonical(model, x)
    for site in named:
        region = Region(
            module=copy_graph(graph), settings=Settings(), config=Config(), disabled_sites=frozenset({site})
        )
        normalise(region)
        fuse(region)
        assert {f.site: f.rule for f in region.fusions} == {s: r for s, r in named.items() if s != site}


def _canonical(model: nn.Module, x: Tensor) -> Any:
    graphs = []

    def backend(module: Any, example_inputs: Any) -> Any:
        graphs.append(canonicalise(module, example_inputs))
        return graphs[0].forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x)
    return graphs[0]


def test_strict_refuses_what_no_rule_came_near() -> None:
    model = Functional(lambda x, w, b: F.layer_norm(x * w.sum(), (8,)), (8, 8), (8,))
    only_linears = Settings(fuse=frozenset({"linear_act"}))
    for settings, refused in (
        (only_linears, ""),
        (replace(only_linears, strict=True), "add_layer_norm: no rule fits"),
    ):
        _, regions = capture(model, torch.randn(2, 3, 8), settings=settings)
        assert reasons(regions) == refused


def test_the_replaced_nodes_compute_the_same_alone() -> None:
    model = Functional(lambda x, w, b: F.layer_norm(x + F.gelu(F.linear(x, w, b)), (8,)), (8, 8), (8,))
    x = torch.randn(2, 8)
    _, (region,) = capture(model, x)
    for node in region.module.graph.nodes:
        if "fusion" not in node.meta:
            continue
        fusion = node.meta["fusion"]
        values = {n: torch.randn(n.meta["val"].shape) for n in node.meta["fusion_inputs"]}
        tensors = [values[n] for n in node.meta["fusion_inputs"]]
        assert fusion.inputs == (None,) * len(tensors) and fusion.location
        arguments = [values.get(a, a) for a in node.args]
        torch.testing.assert_close(OPS[fusion.op].fused(*arguments), fusion.eager(*tensors))
