"""Frames that Dynamo gives up: told to each model they belong to, and to no other."""

from __future__ import annotations

import functools
import threading
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


class Lazy(nn.Module):
    """As transformers' models that return router logits: Dynamo does not follow the first call's set-up."""

    lock = threading.Lock()

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.ready = nn.Linear(8, 8), False

    def set_up(self) -> None:
        if not self.ready:
            with self.lock:
                self.ready = True

    @_decorated
    def forward(self, x: Tensor) -> Tensor:
        self.set_up()
        return F.gelu(self.linear(x))


def test_a_frame_that_was_given_up_once_is_none_where_it_is_inlined() -> None:
    model, x = nn.Sequential(Lazy(), nn.LayerNorm(8)), torch.randn(3, 8)
    with pytest.warns(UserWarning, match=r"left test_given_up.py:\d+ unoptimised"):
        fusekit.optimize(model)(x)
    for again in (model, nn.Sequential(Lazy(), nn.LayerNorm(8))):
        again[0].ready = True
        fusekit.optimize(again)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again(x)
        report = fusekit.explain(again)
        assert report.graphs == 1 and not report.notes and not report.graph_breaks
