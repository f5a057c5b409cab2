"""Plans of precision="auto": made, saved, followed, refused; and runs that go on from a state."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_checks import PLANTED, AutoPrecision, gpt, levels, planted, recipes, tokens, train
from torch import nn

import fusekit
from fusekit import PrecisionPlan
from fusekit.precision_levels import FINER

pytestmark = pytest.mark.usefixtures("checked")


def test_a_device_without_fp8_products_makes_the_plan_and_stays_in_bf16() -> None:
    """FP8 would cost time there: asked for in so many words it is emulated, "auto" does not choose it."""
    model = planted()
    fusekit.optimize(model, precision=fusekit.AutoPrecision(every=1, calibration=2))
    train(model, 4)
    controller = fusekit.auto_precision(model)
    assert controller.ready and not controller.live and recipes(model) == {}
    assert levels(model)[PLANTED][0] == FINER
    assert "this device has no FP8 products" in str(fusekit.explain(model))
    # Nothing is left to decide: no more samples, and the MLPs are fused as in bf16.
    assert {row["samples"] for row in controller.plan.rows()} == {2}
    assert "mlp" in {f.op for f in fusekit.explain(model).fused}


def test_a_plan_makes_the_round_trip_and_is_followed_from_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusekit.precision_decisions.emulates_fp8", lambda value: False)
    model = planted()
    fusekit.optimize(model, precision=AutoPrecision(every=1, calibration=2, fine="block"))
    train(model, 3)
    plan = fusekit.auto_precision(model).plan
    path = tmp_path / "a" / "plan.json"
    plan.save(path)
    assert PrecisionPlan.load(path) == plan
    expected = recipes(model)
    for given in (plan, path, str(path), AutoPrecision(plan=path), AutoPrecision(plan=plan, mode="adaptive")):
        again = planted()
        fusekit.optimize(again, precision=given)
        again(tokens(), tokens())
        assert recipes(again) == expected and fusekit.auto_precision(again).ready
    assert "planted" not in str(plan) and PLANTED in str(plan)


def damage(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], str]:
    def write(content: dict[str, Any]) -> str:
        change(content)
        return json.dumps(content)

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (damage(lambda c: c["model"].pop("head.weight")), "the plan has no head.weight"),
        (damage(lambda c: c["model"].update(extra=[3, 4])), "it has no extra"),
        (
            damage(lambda c: c["model"].update({"tokens.weight": [9, 9]})),
            "tokens.weight is 64×32 and was 9×9",
        ),
        (damage(lambda c: c.update(version=7)), "version 7, and this fusekit reads version 1"),
        (damage(lambda c: c.pop("layers")), "damaged"),
        (damage(lambda c: c["layers"]["blocks.0.expand"]["products"]["output"].update(level=5)), "damaged"),
        (damage(lambda c: c["layers"]["blocks.0.expand"].update(shape="wide")), "damaged"),
        (damage(lambda c: c.update(format="recipe")), "no precision plan of fusekit"),
        (lambda c: "{", "no JSON"),
        (lambda c: "[]", "no precision plan of fusekit"),
    ],
)
def test_a_plan_of_another_model_or_a_damaged_one_is_refused(
    tmp_path: Path, write: Callable[[dict[str, Any]], str], words: str
) -> None:
    model = gpt(tied=False)
    fusekit.optimize(model, precision=AutoPrecision(every=1, calibration=1))
    train(model, 2)
    path = tmp_path / "plan.json"
    path.write_text(write(fusekit.auto_precision(model).plan.to_dict()))
    with pytest.raises(ValueError, match=words):
        fusekit.optimize(gpt(tied=False), precision=path)
    with pytest.raises(ValueError, match="cannot be read"):
        fusekit.optimize(model, precision=str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="the path of one, and got a dict"):
        fusekit.optimize(model, precision=AutoPrecision(plan={"layers": {}}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "auto"}, "mode is one of observe, calibrate, frozen, adaptive"),
        ({"fine": "mx"}, "fine is one of row, block"),
        ({"every": 0}, "every is a whole number above 0"),
        ({"calibration": 2.5}, "calibration is a whole number"),
        ({"rows": 5000}, "above 4096"),
        ({"mode": "calibrate", "plan": "x.json"}, "makes a plan and takes none"),
        ({"keep": "head"}, "keep is a tuple"),
        ({"edge_blocks": -1}, "not negative"),
        ({"guard": "no"}, "guard is True or False"),
        ({"emulate": 1}, "emulate is True or False"),
        ({"history": 8}, "use delayed=True"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AutoPrecision(**arguments)


def test_calibrate_makes_a_plan_and_stays_in_bf16() -> None:
    model = planted()
    fusekit.optimize(model, precision=AutoPrecision(mode="calibrate", every=1, calibration=3))
    train(model, 3)
    assert not fusekit.auto_precision(model).ready
    train(model, 2, start=3)
    assert fusekit.auto_precision(model).ready and recipes(model) == {}
    assert levels(model)[PLANTED][0] == FINER


def test_what_a_recipe_keeps_and_what_fp8_cannot_take_is_no_part_of_the_plan() -> None:
    model = gpt(layers=3)
    fusekit.optimize(
        model, precision=AutoPrecision(every=1, calibration=1, edge_blocks=1, keep=("blocks.1.expand",))
    )
    train(model, 2)
    assert set(levels(model)) == {"blocks.1.attention.qkv", "blocks.1.attention.project", "blocks.1.contract"}
    odd = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
    fusekit.optimize(odd, precision="auto")
    odd(torch.randn(4, 24)).sum().backward()
    assert fusekit.auto_precision(odd).plan.layers == {}
    assert any("16 does not divide" in r.reason for r in fusekit.explain(odd).refused)
    assert "no layer that FP8 could take" in str(fusekit.auto_precision(odd).plan)


def test_a_state_goes_on_where_it_was_and_is_refused_elsewhere() -> None:
    config = AutoPrecision(every=2, calibration=3)
    straight, broken = planted(), planted()
    for model in (straight, broken):
        fusekit.optimize(model, precision=config)
    train(straight, 4)
    train(broken, 4)
    state = copy.deepcopy(fusekit.auto_precision(broken).state_dict())
    resumed = planted()
    resumed.load_state_dict(broken.state_dict())
    fusekit.optimize(resumed, precision=config)
    fusekit.auto_precision(resumed).load_state_dict(state)
    a, b = (train(model, 7, start=4) for model in (straight, resumed))
    assert a == b
    after = [fusekit.auto_precision(model).state_dict() for model in (straight, resumed)]
    assert after[0] == after[1] and recipes(straight) == recipes(resumed)
    other = gpt()
    fusekit.optimize(other, precision=config)
    with pytest.raises(ValueError, match="another model"):
        fusekit.auto_precision(other).load_state_dict(state)
    for wrong in ({"scale": 1.0}, {"plan": state["plan"]}, None):
        with pytest.raises(ValueError, match="no state of precision"):
            fusekit.auto_precision(other).load_state_dict(wrong)
    fusekit.optimize(other, precision="bf16")
    with pytest.raises(ValueError, match="decides nothing"):
        fusekit.auto_precision(other)
