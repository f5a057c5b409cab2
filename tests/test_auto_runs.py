"""precision="auto" beside what else a run has: alarms, verify, other optimizers, sizes, devices, errors."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from auto_checks import PLANTED, AutoPrecision, gpt, levels, planted, recipes, tokens, train
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fusekit
from fusekit import Recipe
from fusekit.precision_levels import BF16, FINER, TENSOR
from fusekit.session import session

pytestmark = pytest.mark.usefixtures("checked")


def test_an_alarm_takes_weight_gradients_to_bf16_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusekit.precision_controller.GUARDED_STEPS", 12)
    model = gpt(layers=1)
    fusekit.optimize(model, precision=AutoPrecision(every=1000, calibration=1))
    controller = fusekit.auto_precision(model)
    seen = []
    for step in range(48):
        model(tokens(step), tokens(step))[1].backward()
        burst = 50.0 if 30 <= step < 33 else 1.0
        controller.step(torch.tensor(burst), torch.tensor(1.0))
        seen.append({Recipe.parse(token).grad_weight for token in recipes(model).values()})
    # Read every tenth step: up from 40, and down again twelve steps later.
    assert seen[39] == {True} and seen[40] == {False} and seen[47] == {False}
    assert [c["reason"] for c in controller.changes] == [
        "a burst of the loss or the gradient's norm: weight gradients in bf16 for 12 steps"
    ]
    rows = [r for r in controller.plan.rows() if r["product"] == "grad_weight"]
    assert {r["runs"] for r in rows} == {"bf16"} and {r["level"] for r in rows} == {"tensor"}
    for step in range(48, 54):
        model(tokens(step), tokens(step))[1].backward()
        controller.step(torch.tensor(1.0), torch.tensor(1.0))
    assert {Recipe.parse(token).grad_weight for token in recipes(model).values()} == {True}


def test_what_verify_reverted_stays_reverted_when_levels_change() -> None:
    model = planted()
    fusekit.optimize(model, precision=AutoPrecision(every=1, calibration=2))
    train(model, 3)
    (captured,) = (c for c in session(model).regions if c.region.training)
    victim = next(f for f in captured.region.fusions if f.layer == "blocks.0.contract")
    captured.rebuild(frozenset({victim.site}))
    assert "blocks.0.contract" not in recipes(model)
    before = recipes(model)
    controller = fusekit.auto_precision(model)
    state = controller.state_dict()
    for unit in state["plan"]["layers"]["blocks.0.expand"]["products"].values():
        unit["level"] = BF16
    controller.load_state_dict(state)
    train(model, 2, start=3)
    after = recipes(model)
    assert "blocks.0.expand" not in after and "blocks.0.contract" not in after
    assert before.keys() - after.keys() == {"blocks.0.expand"}


def test_verify_certifies_the_sites_of_a_plan_and_is_no_step() -> None:
    model = planted()
    fusekit.optimize(model, precision=AutoPrecision(every=1, calibration=2))
    train(model, 3)
    controller = fusekit.auto_precision(model)
    before = controller.state_dict()
    certificate = fusekit.verify(model, tokens(), tokens())
    assert certificate.ok and sum(site.op == "linear_fp8" for site in certificate.sites) == 8
    assert controller.state_dict() == before
    from fusekit.bisect import bisect_model

    again = planted()
    fusekit.optimize(
        again, precision=AutoPrecision(every=1, calibration=1), example_inputs=((tokens(), tokens()), {})
    )
    assert fusekit.auto_precision(again).plan.layers == {}
    train(again, 1)  # the plan is to be made at the next call, which is no step
    assert not bisect_model(again, tokens(), tokens()).guilty and recipes(again) == {}
    assert not fusekit.auto_precision(again).ready


def test_a_frozen_weight_and_an_input_without_gradient_stay_out_of_fp8() -> None:
    """What no sample has seen is not trusted; a product that nobody asks for is never computed."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    fusekit.optimize(model, precision=AutoPrecision(every=1, calibration=2))
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    for _ in range(4):
        model(torch.randn(40, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert levels(model) == {"0": (TENSOR, BF16, BF16), "2": (TENSOR, BF16, BF16)}
    rows = fusekit.auto_precision(model).plan.rows()
    assert {r["reason"] for r in rows if r["product"] != "output"} == {"not sampled in the calibration"}


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_batches_of_any_size_and_evaluation_follow_the_plan(remainder: str) -> None:
    model = planted()
    fusekit.optimize(model, precision=AutoPrecision(every=2, calibration=2), remainder=remainder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for step in range(9):
        x = tokens(0)[: 2 + step % 3]
        loss = model(x, x)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        assert model(tokens())[0].isfinite().all()
    for captured in session(model).regions:
        of_layer = {f.layer: f for f in captured.region.fusions if f.op == "linear_fp8"}
        assert len(of_layer) == 8
    assert losses[-1] < losses[0]


def test_fewer_and_more_ops_than_all() -> None:
    model = gpt(layers=1)
    fusekit.optimize(model, precision=AutoPrecision(mode="observe", every=1), fuse=["attention"])
    train(model, 2)
    assert {f.op for f in fusekit.explain(model).fused} == {"attention"}
    assert len(levels(model)) == 4
    assert all(
        u.samples == 2
        for layer in fusekit.auto_precision(model).plan.layers.values()
        for u in layer.units.values()
    )


def test_an_optimizer_of_another_model_ends_no_step() -> None:
    model, other = gpt(layers=1), nn.Linear(4, 4)
    fusekit.optimize(model, precision=AutoPrecision(mode="observe", every=1))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (other, model)]
    other(torch.ones(4)).sum().backward()
    for _ in range(3):  # micro-batches, between which somebody else steps
        model(tokens(), tokens())[1].backward()
        optimizers[0].step()
    assert fusekit.auto_precision(model).steps == 0
    optimizers[1].step()
    assert fusekit.auto_precision(model).steps == 1
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # new parameters, a new optimizer
    model(tokens(), tokens())[1].backward()
    torch.optim.SGD([model.head.weight], lr=0.1).step()
    assert fusekit.auto_precision(model).steps == 2


def test_a_cpu_without_16_bit_products_is_sampled_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """There linears become linear_act after fusing, those without a bias too, and others are widened."""
    for place in ("kernels.linear_cpu", "passes.lowering", "kernels.precision_statistics", "passes.cost"):
        monkeypatch.setattr(f"fusekit.{place}.multiplies", lambda dtype: dtype == torch.float32)
    model = planted()
    model.blocks[0].attention.project = nn.Linear(32, 32, bias=False)
    fusekit.optimize(model, precision=AutoPrecision(every=1, calibration=2))
    train(model, 3)
    found = levels(model)
    assert found.pop(PLANTED)[0] == FINER and set(found.values()) == {(TENSOR,) * 3} and len(found) == 7


def test_samples_cost_less_than_a_hundredth_of_training() -> None:
    """Of 2048 tokens, where a sample costs as much as a step. The bound is twice what is asked, for a busy
    machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = gpt(layers=1, width=256, context=256, vocab=512)
        fusekit.optimize(model, precision=AutoPrecision(every=2, calibration=1, mode="adaptive"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        x = torch.randint(512, (8, 256))
        seconds: dict[bool, list[float]] = {True: [], False: []}
        controller = fusekit.auto_precision(model)
        for step in range(20):
            started = time.process_time()
            model(x, x)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
            sampled = controller.state_dict()["sampled_at"] == step
            if step >= 4:
                seconds[sampled].append(time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    sampled, plain = (statistics.median(seconds[kind]) for kind in (True, False))
    assert len(seconds[True]) == 8 and (sampled - plain) / (AutoPrecision().every * plain) < 0.02


def test_a_sampled_call_that_raises_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusekit.kernels import precision_statistics

    model = fusekit.optimize(gpt(), precision=AutoPrecision(mode="adaptive", every=2, calibration=2))
    controller = fusekit.auto_precision(model)

    def step(number: int) -> None:
        model(tokens(number), tokens(number))[1].backward()
        controller.step()

    for number in range(4):
        step(number)
    state = controller.state_dict()

    def no_memory(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("simulated")

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(precision_statistics, "sample", no_memory)
        for number in range(4, 8):
            step(number)
    controller.load_state_dict(state)
    assert all(place.recorder is None for place in session(model).regions)
    before = controller.state_dict()["sampled_at"]
    for number in range(8, 14):
        step(number)
    assert controller.state_dict()["sampled_at"] > before


def test_a_compiled_optimizer_step_is_noticed_and_compiled_once() -> None:
    model = fusekit.optimize(gpt(), precision=AutoPrecision(every=1, calibration=2))
    optimizer, counter = torch.optim.SGD(model.parameters(), lr=0.01), CompileCounter()
    step = torch.compile(lambda: optimizer.step(), backend=counter)
    for number in range(4):
        model(tokens(number), tokens(number))[1].backward()
        step()
        optimizer.zero_grad()
    assert fusekit.auto_precision(model).steps == 4 and counter.frame_count == 1
