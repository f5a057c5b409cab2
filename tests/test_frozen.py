"""FP8 codes of frozen weights and of inference: made once, and never those of another value."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusekit
from fusekit.kernels import linear_fp8_cpu
from fusekit.kernels.linear_fp8_cpu import WEIGHT
from fusekit.kernels.recipe import Recipe
from fusekit.passes import frozen

LAYERS = 3
CONSTANT = Recipe(constant_weights=True)


class Adapted(nn.Module):
    """Linear layers that are frozen, and a gain that learns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(LAYERS))
        self.gain = nn.Parameter(torch.ones(32))
        self.out = nn.Linear(32, 16)  # an output layer stays in bf16
        self.requires_grad_(False)
        self.gain.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x * self.gain))
        return self.out(x)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was quantised as a weight, in order."""
    made: list[Tensor] = []
    real = linear_fp8_cpu.through_fp8

    def counting(x: Tensor, recipe: Any, which: int, *rest: Any) -> Tensor:
        if which == WEIGHT:
            made.append(x)
        return real(x, recipe, which, *rest)

    monkeypatch.setattr(linear_fp8_cpu, "through_fp8", counting)
    return made


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of a comparison is there in the next call, not in this one."""
    monkeypatch.setattr(frozen, "compares_at_once", lambda parameter: False)


def fresh(model: Adapted, x: Tensor) -> Tensor:
    """The result by a model that has seen nothing."""
    twin = Adapted()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        return fusekit.optimize(twin, precision=CONSTANT)(x)


def train(model: Adapted, steps: int, **sizes: Any) -> list[Tensor]:
    """Losses of training the gain."""
    optimizer = torch.optim.AdamW([model.gain], lr=1e-2, **sizes)
    losses = []
    for step in range(steps):
        losses.append(model(torch.full((6, 32), 0.1 * (step + 1))).square().sum())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.detach() for loss in losses]


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_weights_are_quantised_once_in_training(weights: list[Tensor], fused: bool) -> None:
    model = fusekit.optimize(Adapted(), precision=CONSTANT)
    losses = train(model, 5, fused=fused)
    assert len(weights) == LAYERS
    twin = fusekit.optimize(Adapted(), precision=CONSTANT)
    for layer in twin.layers:  # asks for gradients: made anew for each step
        layer.weight.requires_grad_(True)
    assert all(map(torch.equal, losses, train(twin, 5, fused=fused)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("asks", [False, True])
def test_inference_quantises_once(weights: list[Tensor], mode: Any, asks: bool) -> None:
    model = fusekit.optimize(Adapted().requires_grad_(asks), precision=CONSTANT)
    x = torch.randn(6, 32)
    with mode():
        results = [model(x) for _ in range(4)]
    assert len(weights) == LAYERS and all(torch.equal(r, results[0]) for r in results)


CHANGES = ["data", "merge", "copy", "load", "optimizer", "fused optimizer", "parameter", "storage"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_changed_weight_is_quantised_anew(change: str, asks: bool, recorded: bool) -> None:
    model = Adapted()
    model.layers.requires_grad_(asks)
    fusekit.optimize(model, precision=CONSTANT)
    x = torch.randn(6, 32)
    with torch.set_grad_enabled(recorded):
        for _ in range(2):
            before = model(x)
    weight = model.layers[1].weight
    halved = {name: t * 0.5 for name, t in model.state_dict().items()}
    with torch.no_grad():
        if change == "data":
            weight.data.mul_(0.5)
        elif change == "merge":
            weight.data += 0.1 * torch.randn(32, 32)
        elif change == "copy":
            weight.copy_(halved["layers.1.weight"])
        elif change == "load":
            model.load_state_dict(halved)
        elif change == "parameter":
            model.layers[1].weight = nn.Parameter(halved["layers.1.weight"], requires_grad=asks)
        elif change == "storage":
            weight.data = halved["layers.1.weight"]
        else:  # an optimizer goes by .grad, whatever it asks for
            weight.requires_grad_(True).grad = torch.randn(32, 32)
            torch.optim.SGD([weight], lr=0.1, fused=change != "optimizer").step()
            weight.requires_grad_(asks)
    with torch.set_grad_enabled(recorded):
        after = model(x)
    assert not torch.equal(before, after) and torch.equal(after, fresh(model, x))


def test_validation_between_steps_follows_the_optimizer(weights: list[Tensor]) -> None:
    """Weights that learn: validation quantises them once for each time that they moved."""
    model = fusekit.optimize(Adapted().requires_grad_(True), precision=CONSTANT)
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(6, 32)
    for step in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        before = len(weights)
        with torch.no_grad():
            for _ in range(4):
                assert torch.equal(model(x), fresh(model, x))
        own = len(weights) - before - 4 * LAYERS
        assert own == (4 if step == 0 else 1) * LAYERS  # a first step may still have been one by hand
        optimizer.zero_grad()


def test_a_gpu_trusts_a_weight_that_a_step_has_left_alone(weights: list[Tensor], as_on_a_gpu: None) -> None:
    model = fusekit.optimize(Adapted(), precision=CONSTANT)
    train(model, 3)
    assert len(weights) <= 3 * LAYERS
    before = len(weights)
    train(model, 2 * frozen.CALLS)
    assert len(weights) == before


def test_a_teacher_written_through_data_never_lags_on_a_gpu(as_on_a_gpu: None) -> None:
    teacher, student = Adapted().requires_grad_(False), nn.Linear(4, 4)
    fusekit.optimize(teacher, precision=CONSTANT)
    optimizer, x = torch.optim.SGD(student.parameters(), lr=0.1), torch.randn(6, 32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for _ in range(6):
            for _ in range(2):
                assert torch.equal(teacher(x), fresh(teacher, x))
            optimizer.step()
            for layer in teacher.layers:
                layer.weight.data.mul_(0.9)


def test_a_late_write_on_a_gpu_is_said_and_ends_the_trust(weights: list[Tensor], as_on_a_gpu: None) -> None:
    model = fusekit.optimize(Adapted(), precision=CONSTANT)
    train(model, 4)
    model.layers[0].weight.data.mul_(0.5)
    with pytest.warns(UserWarning, match=r"32×32 that takes no gradient was written to through \.data"):
        train(model, frozen.CALLS + 2)
    before, x = len(weights), torch.randn(6, 32)
    train(model, 3)
    assert len(weights) == before + 3
    result = model(x).detach()
    assert torch.equal(result, fresh(model, x))


def test_delayed_scales_move_and_weights_with_them(weights: list[Tensor]) -> None:
    model = fusekit.optimize(Adapted(), precision=Recipe(delayed=True, constant_weights=True))
    train(model, 3)
    assert len(weights) == 3 * LAYERS


def test_without_the_promise_no_write_goes_unseen(weights: list[Tensor], as_on_a_gpu: None) -> None:
    """Not one of a single row, which no sample of elements would tell."""
    model = fusekit.optimize(Adapted(), precision="fp8")
    x = torch.randn(6, 32)
    for row in range(4):
        before, made = model(x), len(weights)
        model.layers[1].weight.data[row] += 1.0
        after = model(x)
        assert len(weights) == made + LAYERS
        assert not torch.equal(before, after) and torch.equal(after, fresh(model, x))
