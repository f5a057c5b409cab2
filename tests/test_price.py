"""Price: what is estimated slower goes back to the nodes it replaced; the rest learns its gain."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fusekit.passes import cost
from fusekit.passes.canonicalise import canonicalise
from fusekit.passes.config import Config
from fusekit.passes.precision import place_casts
from fusekit.passes.price import coverage, price
from fusekit.passes.region import Fusion, Region, Settings
from fusekit.passes.weights import cast_parameters

aten = torch.ops.aten


@pytest.fixture
def costly_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "EAGER_OVERHEAD", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(cost, "FUSED_OVERHEAD", {"cpu": 1.0, "cuda": 1.0})


class AddNorm(nn.Module):
    def __init__(self, features: int = 32) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(features, features), nn.LayerNorm(features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x + self.linear(x)
        return self.norm(h), h


def fuse_add_norm(region: Region) -> None:
    """What the fuse pass does to AddNorm, by hand: the sum and the norm become one op."""
    graph = region.module.graph
    (norm,) = graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    total = norm.args[0]
    eager = fx.Graph()
    names = ("x", "residual", "weight", "bias")
    x, residual, weight, bias = (eager.placeholder(name) for name in names)
    h = eager.call_function(aten.add.Tensor, (residual, x))
    y = eager.call_function(aten.layer_norm.default, (h, norm.args[1], weight, bias))
    eager.output((y, h))
    stream, branch = total.args
    inputs = (branch, stream, *norm.args[2:4], 1e-5)
    with graph.inserting_before(norm):
        fused = graph.call_function(torch.ops.fusekit.add_layer_norm.default, inputs)
        parts = [graph.call_function(operator.getitem, (fused, i)) for i in range(2)]
    for part, old in zip(parts, (norm, total), strict=True):
        part.meta["val"] = old.meta["val"]
    fused.meta["val"] = (norm.meta["val"], total.meta["val"])
    fused.meta["fusion"] = Fusion(
        site="add_layer_norm_0", op="add_layer_norm", rule="test", location="model.py:1", shapes=(),
        dtype="float32", eager=fx.GraphModule(region.module, eager),
    )  # fmt: skip
    region.fusions.append(fused.meta["fusion"])
    norm.replace_all_uses_with(parts[0])
    graph.erase_node(norm)
    total.replace_all_uses_with(parts[1])
    graph.erase_node(total)
    region.module.recompile()


def captured(model: nn.Module, x: Tensor, precision: str = "keep") -> tuple[Region, Callable[..., Any]]:
    regions: list[Region] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        region = Region(
            module=canonicalise(module, inputs), settings=Settings(precision=precision), config=Config()
        )
        fuse_add_norm(region)
        place_casts(region)
        regions.append(region)
        return lambda *args: region.module(*cast_parameters(args, region.input_casts, region.weights))

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    return regions[0], compiled


def targets(region: Region) -> list[Any]:
    return [n.target for n in region.module.graph.nodes if n.op == "call_function"]


def test_a_site_that_pays_stays_and_learns_its_gain() -> None:
    region, _ = captured(AddNorm(), torch.randn(4, 32))
    price(region)
    (fusion,) = region.fusions
    assert fusion.estimated_gain is not None and fusion.estimated_gain >= 1
    assert fusion.implementation == "aten" and region.refusals == []


@pytest.mark.parametrize("precision", ["keep", "bf16"])
def test_a_site_that_does_not_pay_goes_back(costly_start: None, precision: str) -> None:
    model, x = AddNorm(), torch.randn(4, 32)
    expected = model(x)
    region, compiled = captured(model, x, precision)
    fused = compiled(x)
    price(region)
    region.module.graph.lint()
    assert aten.layer_norm.default in targets(region)
    assert torch.ops.fusekit.add_layer_norm.default not in targets(region)
    assert region.fusions == []
    (refusal,) = region.refusals
    assert (refusal.op, refusal.rule, refusal.location) == ("add_layer_norm", "test", "model.py:1")
    assert "1000.00 ms fused" in refusal.reason and "CPU" in refusal.reason
    again = compiled(x)
    for now, before, eager in zip(again, fused, expected, strict=True):
        assert now.dtype == eager.dtype and torch.allclose(now, eager, atol=0.05)
        assert torch.allclose(now, before, atol=0.05)
    sum(t.sum() for t in again).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sizes_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "EAGER_OVERHEAD", {"cpu": 3e-6})
    monkeypatch.setattr(cost, "FUSED_OVERHEAD", {"cpu": 12e-6})
    for rows, stays in ((1, False), (4096, True)):
        region, _ = captured(AddNorm(256), torch.randn(rows, 256))
        price(region)
        assert bool(region.fusions) == stays


def test_coverage_counts_flops_and_bytes_of_what_was_replaced() -> None:
    region, _ = captured(AddNorm(), torch.randn(4, 32))
    flops, moved = coverage(region)
    linear = 2 * 4 * 32 * 32  # the sum and the norm: one per element
    assert flops == pytest.approx(2 * 4 * 32 / (linear + 2 * 4 * 32))
    row, weight = 4 * 4 * 32, 4 * 32
    replaced, rest = (row + row + row) + (row + row + 2 * weight), row + 32 * weight + weight + row
    assert moved == pytest.approx(replaced / (replaced + rest))


def test_precision_lowers_the_site_and_what_it_replaced() -> None:
    region, _ = captured(AddNorm(), torch.randn(4, 32), "bf16")
    (fusion,) = region.fusions
    assert fusion.dtype == "bfloat16" and fusion.eager is not None
    (node,) = [n for n in region.module.graph.nodes if "fusion" in n.meta]
    assert [n.meta["val"].dtype for n in node.all_input_nodes] == [torch.bfloat16] * 2 + [torch.float32] * 2
    values = [torch.randn(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in node.all_input_nodes]
    for eager, fused in zip(fusion.eager(*values), node.target(*values, 1e-5), strict=True):
        assert eager.dtype == fused.dtype == torch.bfloat16
        assert torch.allclose(eager.float(), fused.float(), atol=0.05)


@pytest.mark.parametrize(
    "call, flops",
    [
        (lambda m, x: F.linear(x, m.w), 2 * 4 * 8 * 16),
        (lambda m, x: x @ m.w.t(), 2 * 4 * 8 * 16),
        (lambda m, x: torch.addmm(m.b, x, m.w.t()), 2 * 4 * 8 * 16),
        (lambda m, x: F.gelu(x), 4 * 8),
        (lambda m, x: F.scaled_dot_product_attention(*[x.view(1, 1, 4, 8)] * 3), 2 * 2 * 4 * 4 * 8),
    ],
    ids=["linear", "matmul", "addmm", "gelu", "attention"],
)
def test_flops(call: Callable[..., Tensor], flops: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return call(self, x)

    graphs: list[fx.GraphModule] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(canonicalise(module, inputs))
        return graphs[-1]

    torch._dynamo.reset()
    torch.compile(Model(), backend=backend)(torch.randn(4, 8))
    assert sum((cost.node_cost(n) for n in graphs[0].graph.nodes), cost.Cost()).flops == flops


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_tf32_is_priced_at_its_rate(tf32: bool, by_name: bool) -> None:
    """However it was asked for: what the fuse pass inserts has every argument by position."""
    graph, mode = fx.Graph(), FakeTensorMode()
    with mode:
        values = [torch.empty(4096, 4096, device="cuda") for _ in range(3)]
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    if by_name:
        arguments, named = (x, weight, None, None, "gelu"), {"tf32": tf32}
    else:
        arguments, named = (x, weight, None, None, "gelu", tf32), {}
    fused = graph.call_function(torch.ops.fusekit.linear_act.default, arguments, named)
    graph.output(fused)
    for node, value in zip((x, weight, fused), values, strict=True):
        node.meta["val"] = value
    fusion = Fusion(
        site="linear_act_0", op="linear_act", rule="test", location="model.py:1", shapes=(), dtype="float32",
        flops=2 * 4096**3,
    )  # fmt: skip
    fused.meta["fusion"] = fusion
    region = Region(module=fx.GraphModule({}, graph), settings=Settings(), config=Config())
    price(region)
    device = cost.device_of(values[0])
    rates = device.tf32 / device.float32 if tf32 else 1.0
    assert fusion.estimated_gain == pytest.approx(rates, rel=0.02)
