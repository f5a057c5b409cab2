"""The trial of torch._scaled_mm: an H100's own sums pass, and libraries that break their word do not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fp8_choice_checks import KINDS, call, fails, fresh, h100  # noqa: F401 (fresh is a fixture)
from torch import Tensor

from fusekit.kernels import fp8_choice, fp8_library, fp8_trial
from fusekit.kernels.fp8_choice import choose
from fusekit.kernels.fp8_format import Operand
from fusekit.kernels.fp8_library import LIBRARY, Call
from fusekit.kernels.times_file import OWN


def shifts_steps(a: Operand, b: Operand, output: Tensor, *rest: Any) -> None:
    """Reads scales of 128 x 128 as if each group of columns had as many steps as were not padded."""
    padded = torch.nn.functional.pad(b.inverse.t(), (0, -b.inverse.shape[0] % 4)).flatten()
    h100(a, Operand(b.codes, padded[: b.inverse.numel()].view_as(b.inverse.t()).t()), output, *rest)


def never_promotes(a: Operand, b: Operand, output: Tensor, call: Call, bias: Tensor | None = None) -> None:
    h100(a, b, output, call._replace(accumulation="fast"), bias)


def drops_nan(*args: Any) -> None:
    h100(*args)
    args[2].nan_to_num_(0.0, torch.inf, -torch.inf)


def saturates(*args: Any) -> None:
    h100(*args)
    limits = torch.finfo(args[2].dtype)
    args[2].clamp_(limits.min, limits.max)


def scales_by_the_wrong_side(a: Operand, b: Operand, output: Tensor, *rest: Any) -> None:
    h100(a, Operand(b.codes, a.inverse[:, :1].expand_as(b.inverse)), output, *rest)


def rounds_the_bias_away(a: Operand, b: Operand, output: Tensor, call: Call, bias: Tensor | None) -> None:
    h100(a, b, output, call)


JITTER = itertools.cycle((0, 1))


def jitters(*args: Any) -> None:
    h100(*args)
    args[2][0, 0] *= 1 + next(JITTER) * 2.0**-7


@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_of_an_h100_pass_the_trial(kind):
    """use_fast_accum=False is promote128 there: recorded on the card, repeated by mmaemu."""
    assert fp8_trial.passes(call(**KINDS[kind]), h100, h100), fp8_trial._outcomes


@pytest.mark.parametrize(
    "library, kind, reason",
    [
        (never_promotes, "output", "of one sign its error is 0.0"),
        (never_promotes, "float32 gradient", "of one sign its error is 0.0"),
        (scales_by_the_wrong_side, "rows", "its error is"),
        (rounds_the_bias_away, "bias", "its error is"),
        (drops_nan, "output", "what must be NaN is not"),
        (drops_nan, "rows", "what must be NaN is not"),
        (shifts_steps, "blocks", "its error is"),
        (drops_nan, "blocks", "what must be NaN is not"),
        (saturates, "blocks", "what must be infinite is not"),
        (jitters, "blocks", "two runs of it differ"),
        (fails, "blocks", "it fails: RuntimeError: no algorithm for this product"),
        (saturates, "float16", "what must be infinite is not"),
        (jitters, "output", "two runs of it differ"),
        (fails, "output", "it fails: RuntimeError: no algorithm for this product"),
    ],
)
def test_a_library_that_breaks_its_word_computes_nothing(monkeypatch, library, kind, reason):
    monkeypatch.setattr(fp8_library, "run", library)
    asked = call(**KINDS[kind])
    assert choose(asked).name == LIBRARY  # as documented
    assert not fp8_choice._proved(asked)
    assert choose(asked).name == OWN and reason in choose(asked).reason, choose(asked)
