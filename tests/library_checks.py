"""Stand-ins for libraries of attention, on a CPU that takes a GPU's way: for the tests of who computes it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusekit.kernels import (
    attention,
    attention_choice,
    attention_launch,
    attention_libraries,
    attention_native,
    attention_tail,
    attention_trial,
    times_file,
)
from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_libraries import Library
from fusekit.kernels.attention_tiles import LOG2E


def heads(length: int, count: int = 2, features: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, length, count, features).to(dtype).transpose(1, 2)


def form(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Form:
    return attention._settings(q, k, v, **settings)


def exact(q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """What a right library returns: out in other strides than ours, and the natural log sum exp."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q.float() @ k.float().transpose(-1, -2) * form.scale
    if form.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(form.offset)
        scores = scores.masked_fill(~seen, -math.inf)
    out = scores.softmax(-1).to(q.dtype) @ v
    return out.contiguous(), scores.logsumexp(-1)


def library(
    run: Callable[..., Any] = exact, name: str = "cuDNN", gradient: Callable[..., Any] | None = None
) -> Library:
    return Library(name, attention_libraries._cudnn_unfit, run, lambda: None, gradient)


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96, bias=False)  # a bias of keys has a gradient of rounding alone

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2) / 4).masked_fill(torch.ones(600, 600).tril() == 0, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@contextlib.contextmanager
def nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No times, no trials and no plans of other tests."""
    monkeypatch.setattr(times_file, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(times_file, "device_name", lambda device: "test")
    monkeypatch.setattr(attention_choice, "capability", lambda q: (9, 0))
    monkeypatch.setattr(attention_trial, "_outcomes", {})
    times_file.forget()
    attention_choice._plans.held.clear()
    torch.manual_seed(0)
    yield
    times_file.forget()
    attention_choice._plans.held.clear()


def take_the_gpus_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the GPU's way; the CPU's passes stand in for our kernels, in their units."""

    def backward(
        dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, tail: Tensor, form: Form,
        _: bool,
    ):  # fmt: skip
        grads = attention_native.backward(dy, q, k, v, out, stats / LOG2E, *attention._native(form))
        return *grads, None, None

    def forward(q: Tensor, k: Tensor, v: Tensor, form: Form, tail: int = attention_tail.NONE):
        out, stats = attention_native.forward(q, k, v, *attention._native(form))
        return out, stats * LOG2E, attention_tail.empty(q, v, tail)

    monkeypatch.setattr(attention, "on_gpu", lambda x: True)
    monkeypatch.setattr(attention_launch, "backward", backward)
    monkeypatch.setattr(attention_launch, "forward", forward)


def offer(monkeypatch: pytest.MonkeyPatch, *libraries: Library) -> None:
    monkeypatch.setattr(attention_choice, "LIBRARIES", libraries)
