"""precision="auto" with delayed scales: histories of the layers that have one scale a tensor."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusekit
from fusekit.gpt import GPT, GPTConfig
from fusekit.kernels import precision_statistics as statistics
from fusekit.kernels.recipe import PRESETS, Recipe
from fusekit.passes.canonicalise import bodies
from fusekit.precision_levels import BF16, FINER
from fusekit.session import session

AutoPrecision = partial(fusekit.AutoPrecision, emulate=True, delayed=True)

pytestmark = pytest.mark.usefixtures("checked")


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab=64, context=32, layers=2, heads=2, width=32))


def train(model: nn.Module, steps: int, start: int = 0) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for step in range(start, start + steps):
        x = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(step))
        loss = model(x, x)[1]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def recipes(model: nn.Module) -> dict[str, Recipe]:
    target = torch.ops.fusekit.linear_fp8.default
    found = [b for captured in session(model).regions for b in bodies(captured.region.module)]
    nodes = [n for body in found for n in body.graph.find_nodes(op="call_function", target=target)]
    return {n.meta["fusion"].layer: Recipe.parse(n.args[4]) for n in nodes}


def scales(model: nn.Module) -> dict[str, Tensor]:
    """(3,) by layer; 0 where no step was seen."""
    state = fusekit.precision_state(model).state_dict()
    found = state["scale"].view(-1, 3) if "scale" in state else torch.zeros(len(state["weights"]), 3)
    return {name.removesuffix(".weight"): found[i] for i, name in enumerate(state["weights"])}


def assign(model: nn.Module, layer: str, level: int) -> None:
    """As if samples had decided so."""
    controller = fusekit.auto_precision(model)
    for unit in controller._layers[layer].units.values():
        unit.level = level
    controller.changes.append({"layer": layer})


def test_histories_begin_with_the_plan_and_move_with_each_step() -> None:
    model = fusekit.optimize(gpt(), precision=AutoPrecision(every=2, calibration=2))
    train(model, 2)
    assert not any(scale.any() for scale in scales(model).values())
    losses = train(model, 3, start=2)
    found = recipes(model)
    assert len(found) == 8 and all(recipe.delayed for recipe in found.values())
    assert all(scale.all() if layer in found else not scale.any() for layer, scale in scales(model).items())
    current = fusekit.optimize(gpt(), precision=AutoPrecision(every=2, calibration=2, delayed=False))
    train(current, 2)
    assert train(current, 1, start=2) == losses[:1]  # the first step takes each tensor's own scale


def test_layers_of_other_scales_take_no_part_and_a_return_begins_anew() -> None:
    model = fusekit.optimize(gpt(), precision=AutoPrecision(every=100, calibration=2, history=8))
    train(model, 4)
    assign(model, "blocks.0.expand", FINER)
    assign(model, "blocks.1.expand", BF16)
    train(model, 2, start=4)
    found, held = recipes(model), scales(model)
    assert found["blocks.0.expand"] == PRESETS["fp8-rowwise"] and "blocks.1.expand" not in found
    assert found["blocks.0.contract"].delayed and held["blocks.0.expand"].all()
    train(model, 1, start=6)
    assert torch.equal(scales(model)["blocks.0.expand"], held["blocks.0.expand"])  # stands still
    assign(model, "blocks.0.expand", 0)
    model(*(torch.zeros(4, 32, dtype=torch.long),) * 2)
    assert not any(scale.any() for scale in scales(model).values())  # of all: inputs may be shared
    train(model, 1, start=7)
    assert all(scales(model)[layer].all() for layer in recipes(model))


class Shared(nn.Module):
    """Two layers that read one tensor, whose codes go by the slots of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w1, self.w2 = (nn.Parameter(torch.randn(32, 32) / 6) for _ in range(2))
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        first, second = nn.functional.linear(x, self.w1).tanh(), nn.functional.linear(x, self.w2)
        return self.out(first + second)


def test_no_layer_reads_a_scale_of_long_ago() -> None:
    model = fusekit.optimize(Shared(), precision=AutoPrecision(every=100, calibration=2, mode="adaptive"))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.0), torch.randn(64, 32)

    def step(size: float) -> Tensor:
        y = model(x * size)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return y.detach()

    for _ in range(4):
        step(1.0)
    first, second = fusekit.auto_precision(model)._layers
    assert recipes(model).keys() == {first, second}
    for level, size in ((BF16, 1.0), (0, 1.0), (0, 1.0), (0, 300.0), (0, 300.0)):
        assign(model, first, level)
        for _ in range(3):
            step(size)
    assign(model, first, BF16)  # the other one's slots for x are in use again, after x has grown
    found = step(300.0)
    plain = Shared()(x * 300.0)
    assert (found - plain).norm() < 0.2 * plain.norm()


def test_a_run_resumes_with_the_same_bits() -> None:
    config = AutoPrecision(mode="adaptive", every=2, calibration=2)
    straight, broken = (fusekit.optimize(gpt(), precision=config) for _ in range(2))
    train(straight, 5)
    train(broken, 5)
    expected = train(straight, 4, start=5)
    parts: list[Any] = [fusekit.precision_state, fusekit.auto_precision]
    for order in (parts, parts[::-1]):
        resumed = gpt()
        resumed.load_state_dict(broken.state_dict())
        fusekit.optimize(resumed, precision=config)
        for part in order:
            part(resumed).load_state_dict(copy.deepcopy(part(broken).state_dict()))
        assert train(resumed, 4, start=5) == expected


def test_samples_see_what_a_scale_of_earlier_steps_saturates() -> None:
    """Values that grow by 8 in a step: with the tensor's own scale nothing is lost."""
    torch.manual_seed(0)
    x, weight = (statistics.sample(torch.randn(64, 128)) for _ in range(2))
    own = statistics.output_statistics(x, weight, Recipe())
    scale = torch.tensor([448.0, 64.0, 1.0])
    stale = statistics.output_statistics(x, weight, Recipe(), scale)
    names = list(statistics.STATISTICS)
    assert own[names.index("saturation")] == 0 and stale[names.index("saturation")] > 0.1
    none_yet = statistics.output_statistics(x, weight, Recipe(), torch.zeros(3))
    assert torch.equal(none_yet, own)


def test_a_layer_that_saturates_leaves_fp8() -> None:
    model = fusekit.optimize(gpt(), precision=AutoPrecision(every=1, calibration=2))
    train(model, 4)
    with torch.no_grad():
        model.blocks[1].contract.weight.mul_(64)
    train(model, 2, start=4)
    changes = [c for c in fusekit.auto_precision(model).changes if c["layer"] == "blocks.1.contract"]
    assert {c["to"] for c in changes} == {"bf16"} and any("beyond the scale" in c["reason"] for c in changes)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="history is 1 to 1024"):
        AutoPrecision(history=0)
