"""Frames that Dynamo gives up: told to each model they belong to, and to no other."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusekit


def _decorated(forward: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    """As transformers decorates every forward: Dynamo meets one code for all of them."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        try:
            return forward(self, x)
        finally:
            self.called = True  # type: ignore[assignment]

    return wrapper


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


class GivenUp(Layer):
    """As Wav2Vec2's feature encoder under gradient checkpointing: Dynamo does not follow."""

    @_decorated
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach()
        x.requires_grad = True
        return F.gelu(self.linear(x))


class Captured(Layer):
    @_decorated
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x))


def test_a_frame_given_up_is_told_to_every_model_that_has_it_and_to_no_other() -> None:
    for _ in range(2):
        model = fusekit.optimize(GivenUp())
        with pytest.warns(UserWarning, match=r"left test_given_up.py:\d+ unoptimised: setattr"):
            model(torch.randn(3, 8))
        assert "setattr" in str(fusekit.explain(model))
    model = fusekit.optimize(Captured())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 8))
    report = fusekit.explain(model)
    assert not report.notes and [fusion.op for fusion in report.fused] == ["linear_act"]
