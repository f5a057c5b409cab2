"""What precision="auto" says of layers, and what `verify` takes out of FP8."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusekit
from fusekit.passes.canonicalise import bodies
from fusekit.precision_levels import BF16
from fusekit.session import session

AutoPrecision = partial(fusekit.AutoPrecision, emulate=True)

pytestmark = pytest.mark.usefixtures("checked")


class Blocks(nn.Module):
    """Blocks in a loop, one line for all of them."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(count))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(count))
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(x + block(x).sin())
        return self.out(x)


def train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(torch.randn(40, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def in_fp8(model: nn.Module) -> set[str]:
    target = torch.ops.fusekit.linear_fp8.default
    found = [b for captured in session(model).regions for b in bodies(captured.region.module)]
    nodes = [n for body in found for n in body.graph.find_nodes(op="call_function", target=target)]
    return {n.meta["fusion"].layer for n in nodes}


def reasons(model: nn.Module) -> set[str]:
    return {refusal.reason for refusal in fusekit.explain(model).refused}


@pytest.mark.parametrize("mode", ["calibrate", "frozen"])
def test_reasons_are_those_of_now(mode: str) -> None:
    """Also where no graph has to be built again for them."""
    model = fusekit.optimize(Blocks(), precision=fusekit.AutoPrecision(mode=mode, every=1, calibration=2))
    train(model, 2)
    assert any("until the plan is made, after 2 steps" in reason for reason in reasons(model))
    train(model, 2)
    told = reasons(model)
    assert not any("until the plan is made" in reason for reason in told)
    expected = "the plan is made" if mode == "calibrate" else "this device has no FP8 products"
    assert any(expected in reason for reason in told)


def test_a_reason_that_a_sample_changed_is_told() -> None:
    """All layers in bf16 by the plan, before and after: the graph stays and the reason moves on."""
    model = fusekit.optimize(Blocks(), precision=AutoPrecision(mode="adaptive", every=1, calibration=2))
    train(model, 3)
    controller = fusekit.auto_precision(model)
    for layer in controller._layers.values():
        for unit in layer.units.values():
            unit.level, unit.reason = BF16, "before"
    controller.changes.append({})
    train(model, 1)
    assert any("output bf16: before" in reason for reason in reasons(model))
    for layer in controller._layers.values():
        layer.units["output"].reason = "after"
    assert any("output bf16: after" in reason for reason in reasons(model))
    assert not any("output bf16: before" in reason for reason in reasons(model))


def test_one_reverted_block_of_a_loop_stays_the_only_one() -> None:
    model = fusekit.optimize(Blocks(), precision=AutoPrecision(every=100, calibration=2))
    train(model, 3)
    (captured,) = session(model).regions
    norms = [f for f in captured.region.fusions if f.op == "add_layer_norm"]
    assert len({(f.op, f.rule, f.location) for f in norms}) < len(norms)
    victim = next(f for f in norms if f.module == "norms.1")
    captured.rebuild(frozenset({victim.site}))
    controller = fusekit.auto_precision(model)
    for unit in controller._layers["blocks.0"].units.values():
        unit.level = BF16
    controller.changes.append({})
    train(model, 1)
    left = [f.module for f in captured.region.fusions if f.op == "add_layer_norm"]
    assert in_fp8(model) == {"blocks.1", "blocks.2"}
    assert sorted(left) == ["norms.0", "norms.2"]


def test_what_verify_reverts_reads_bf16_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusekit import verification

    model = fusekit.optimize(Blocks(), precision=AutoPrecision(mode="adaptive", every=1, calibration=2))
    train(model, 3)
    with torch.no_grad():
        model(torch.randn(40, 32))  # another graph of the same layers
    real = verification.certify_site

    def certify(call: Any, *rest: Any, **settings: Any) -> Any:
        found = real(call, *rest, **settings)
        wrong = found.op == "linear_fp8" and found.site == victim
        return verification.replace(found, fused_seconds=2.0, eager_seconds=1.0) if wrong else found

    (training,) = (c for c in session(model).regions if c.region.training)
    victim = next(f.site for f in training.region.fusions if f.layer == "blocks.1")
    monkeypatch.setattr(verification, "certify_site", certify)
    fusekit.verify(model, torch.randn(40, 32))
    assert in_fp8(model) == {"blocks.0", "blocks.2"}
    controller = fusekit.auto_precision(model)
    rows = [row for row in controller.plan.rows() if row["layer"] == "blocks.1"]
    assert {(r["runs"], r["reason"], r["pinned"]) for r in rows} == {
        ("bf16", "reverted by verify: takes 2.00 times eager's time on this batch", True)
    }
    assert [c["layer"] for c in controller.changes] == ["blocks.1"] * 3
    assert any("output bf16: reverted by verify: takes 2.00" in reason for reason in reasons(model))
    train(model, 3)
    assert in_fp8(model) == {"blocks.0", "blocks.2"}


class Functional(nn.Module):
    """Weights without a module of their own, all on one line; and one that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(32, 32) / 8) for _ in range(3))
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 1, 2, 0):
            x = torch.tanh(F.linear(x, self.weights[i]))
        return self.out(x)


def test_functional_layers_on_one_line_have_names_of_their_own() -> None:
    model = fusekit.optimize(Functional(), precision=AutoPrecision(every=1, calibration=2))
    train(model, 3)
    found = fusekit.auto_precision(model).plan.layers
    first, *others = found
    assert others == [f"{first}#2", f"{first}#3"] and in_fp8(model) == set(found)
    assert all(unit.samples == 3 for layer in found.values() for unit in layer.units.values())
    with torch.no_grad():
        model(torch.randn(4, 32))
    assert set(fusekit.auto_precision(model).plan.layers) == set(found)
