"""precision="auto" end to end: who is demoted, and that looking changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from auto_checks import PLANTED, AutoPrecision, gpt, levels, planted, recipes, tokens, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusekit
from fusekit import PrecisionPlan, Recipe
from fusekit.precision_levels import BF16, FINER, TENSOR

pytestmark = pytest.mark.usefixtures("checked")


def test_a_calibration_demotes_the_planted_layer_and_no_other() -> None:
    model = planted()
    fusekit.optimize(model, precision=AutoPrecision(every=3, calibration=4))
    controller = fusekit.auto_precision(model)
    train(model, 4)
    assert recipes(model) == {} and not controller.ready  # bf16 while it looks
    train(model, 3, start=4)
    assert controller.ready and controller.live
    found = levels(model)
    assert len(found) == 8
    assert found.pop(PLANTED)[0] == FINER
    assert set(found.values()) == {(TENSOR,) * 3}
    now = recipes(model)
    assert Recipe.parse(now.pop(PLANTED)).scaling == "row"
    assert set(now.values()) == {Recipe().token()} and len(now) == 7
    (row,) = (r for r in controller.plan.rows() if (r["layer"], r["product"]) == (PLANTED, "output"))
    assert "row errors" in row["reason"] and row["statistics"]["tensor"]["error"] > 4 * 0.037
    assert all(change["layer"] == PLANTED for change in controller.changes)
    assert list(found) == [n for n, _ in model.named_modules() if n in found]  # the model's order


def test_a_plan_followed_live_sends_the_planted_layer_to_bf16_at_once_and_it_stays() -> None:
    """A plan made before the outliers came: demotion only."""
    calm = gpt()
    fusekit.optimize(calm, precision=AutoPrecision(every=1, calibration=2))
    train(calm, 3)
    plan = fusekit.auto_precision(calm).plan
    entry = plan.to_dict()
    entry["layers"] = {
        name.replace("blocks.1.expand", PLANTED): layer for name, layer in entry["layers"].items()
    }
    model = planted()
    entry["model"] = {n: list(p.shape) for n, p in model.named_parameters() if p.dim() > 1}
    fusekit.optimize(model, precision=AutoPrecision(every=2, plan=PrecisionPlan.from_dict(entry)))
    losses = train(model, 1)
    assert Recipe.parse(recipes(model)[PLANTED]).scaling == "tensor"  # from the first step
    losses += train(model, 1, start=1)
    found = levels(model)
    assert found.pop(PLANTED)[0] == BF16 and set(found.values()) == {(TENSOR,) * 3}
    losses += train(model, 6, start=2)
    assert not Recipe.parse(recipes(model)[PLANTED]).output
    assert levels(model)[PLANTED][0] == BF16 and losses[-1] < losses[0]
    assert plan.layers["blocks.1.expand"].units["output"].level == TENSOR  # the user's plan is the user's


def test_observe_never_casts_and_tells_what_would_be() -> None:
    model = planted()
    fusekit.optimize(model, precision=AutoPrecision(mode="observe", every=1))
    train(model, 4)
    assert recipes(model) == {} and not fusekit.auto_precision(model).live
    plan = fusekit.auto_precision(model).plan
    units = [unit for layer in plan.layers.values() for unit in layer.units.values()]
    assert all(set(unit.last) == {"tensor", "row"} and unit.samples == 4 for unit in units)
    assert levels(model)[PLANTED][0] == FINER
    report = fusekit.explain(model)
    assert any("only observed" in r.reason for r in report.refused)
    assert len(report.precision) == 24 and PLANTED in str(report) and "within FP8's margins" in str(report)
    assert len(report.to_dict()["precision"]) == 24


def test_adaptive_brings_a_layer_back_once_its_outliers_have_gone() -> None:
    model = planted()
    fusekit.optimize(model, precision=AutoPrecision(mode="adaptive", every=1, calibration=1))
    train(model, 3)
    assert levels(model)[PLANTED][0] != TENSOR
    with torch.no_grad():
        model.blocks[1].expand.factor.fill_(1.0)
    train(model, 50, start=3)
    unit = fusekit.auto_precision(model).plan.layers[PLANTED].units["output"]
    assert unit.level == TENSOR and unit.flips >= 1 and "promoted" in unit.reason
    assert Recipe.parse(recipes(model)[PLANTED]).output


@pytest.mark.parametrize(
    ("config", "accumulate"),
    [
        ({"mode": "observe"}, 1),
        ({"mode": "observe", "fine": "block"}, 2),
        ({"mode": "adaptive", "calibration": 2}, 2),
        ({"mode": "frozen", "calibration": 1}, 1),
    ],
)
def test_looking_changes_no_bit(config: dict[str, Any], accumulate: int) -> None:
    """The same steps with samples at each and with hardly any."""
    runs = []
    for every in (1, 1000):
        model = gpt(dropout=0.1)
        fusekit.optimize(model, precision=AutoPrecision(every=every, **config))
        torch.manual_seed(1)
        losses = train(model, 5, accumulate=accumulate)
        runs.append((losses, [p.detach().clone() for p in model.parameters()], levels(model)))
    (a, first, at), (b, second, then) = runs
    assert a == b and all(torch.equal(p, q) for p, q in zip(first, second, strict=True)) and at == then


class Checkpointed(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on, self.out = on, nn.Linear(32, 16)
        blocks = (
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 32), nn.Tanh())
            for _ in range(2)
        )
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.on else block(x)
        return self.out(x)


@pytest.mark.parametrize("every", [1, 1000])
def test_activation_checkpoints_are_sampled_once_and_give_the_same_bits(every: int) -> None:
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(on)
        fusekit.optimize(model, precision=AutoPrecision(every=every, calibration=2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            torch.manual_seed(step)
            model(torch.randn(64, 32)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        plan = fusekit.auto_precision(model).plan
        assert set(plan.layers) == {f"blocks.{i}.{j}" for i in (0, 1) for j in (0, 3)}
        rows = [(r["product"], r["samples"], r["statistics"]) for r in plan.rows()]
        found.append(([p.detach().clone() for p in model.parameters()], rows))
    assert found[0][1] == found[1][1]
    assert all(torch.equal(p, q) for p, q in zip(found[0][0], found[1][0], strict=True))


@pytest.mark.parametrize("live", [False, True])
def test_a_step_with_nan_leaves_a_calibration_alone_and_a_live_plan_to_bf16(live: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))
    fusekit.optimize(model, precision=AutoPrecision(every=1, calibration=1 if live else 100))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(6):
        x = torch.randn(40, 32)
        if step == 3:
            x[5] = float("nan")
        model(x).square().sum().backward()
        if step == 3:  # the user skips the update
            optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    assert set(levels(model).values()) == {(BF16,) * 3 if live else (TENSOR,) * 3}
    reasons = {r["reason"] for r in fusekit.auto_precision(model).plan.rows()}
    assert reasons == {"a NaN or an infinity in an operand" if live else "within FP8's margins"}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_an_optimizer_step_and_its_first_batch_is_sampled(accumulate: int) -> None:
    model = gpt(layers=1)
    fusekit.optimize(model, precision=AutoPrecision(mode="observe", every=2))
    train(model, 6, accumulate=accumulate)
    controller = fusekit.auto_precision(model)
    assert controller.steps == 6
    assert {unit.samples for layer in controller.plan.layers.values() for unit in layer.units.values()} == {3}
    with torch.no_grad():
        model(tokens(), tokens())
    assert controller.steps == 6
    controller.step()  # by hand, where no optimizer of torch's steps
    model(tokens(), tokens())[1].backward()
    controller.step()
    assert controller.steps == 7


@pytest.mark.parametrize(
    ("kind", "layers_of_a_block", "sizes"),
    [
        ("gpt2", 4, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}),
        ("llama", 7, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "num_key_value_heads": 2}),
    ],
)  # fmt: skip
def test_transformers_layers_are_sampled_in_both_spellings(
    kind: str, layers_of_a_block: int, sizes: Any
) -> None:
    """Also GPT-2's Conv1D, whose weight is stored transposed."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, vocab_size=64, **sizes)
    config.update({"use_cache": False})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    fusekit.optimize(model, precision=AutoPrecision(every=1, calibration=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(4):
        loss = model(input_ids=tokens(step), labels=tokens(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plan = fusekit.auto_precision(model).plan
    assert len(plan.layers) == 2 * layers_of_a_block == len(recipes(model))
    names = {name for name, _ in model.named_modules()}
    assert set(plan.layers) <= names and loss.isfinite()
    for row in plan.rows():
        assert row["samples"] == 4 and set(row["statistics"]) == {"tensor", "row"}
        assert 0.01 < row["statistics"]["row"]["error"] < 0.2, row
    shapes = {name: plan.layers[name].shape for name in plan.layers}
    for name, shape in shapes.items():
        weight = tuple(model.get_submodule(name).weight.shape)
        assert shape == (weight[::-1] if kind == "gpt2" else weight)


def test_an_activations_gradient_is_what_the_layer_itself_would_see() -> None:
    """Statistics of dz, from dy and sampled rows, against the two written apart."""
    rows = {}
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 16))
        fuse: Any = "all" if fused else "none"
        fusekit.optimize(model, precision=AutoPrecision(mode="observe"), fuse=fuse)
        x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
        model(x).square().sum().backward()
        fusekit.auto_precision(model).step()
        ops = [f.op for f in fusekit.explain(model).fused]
        assert ops.count("linear_act") == (2 if fused else 0)
        plan = fusekit.auto_precision(model).plan
        rows[fused] = {(r["layer"], r["product"]): r["statistics"] for r in plan.rows()}
    assert rows[True].keys() == rows[False].keys() and len(rows[True]) == 6
    for key, of_levels in rows[True].items():
        for level, found in of_levels.items():
            for name, near in (
                ("error", 0.01),
                ("snr_loss", 1.0),
                ("cosine_loss", 1e-3),
                ("underflow", 0.02),
            ):
                assert found[name] == pytest.approx(rows[False][key][level][name], abs=near), (key, name)
            assert found["amax"] == pytest.approx(rows[False][key][level]["amax"], rel=0.02)
