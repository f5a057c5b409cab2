"""The criterion for FP8 sites: it passes what is right, and sees what one wide tolerance would hide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusekit
from fusekit import site_check
from fusekit.fp8_check import check_fp8
from fusekit.kernels import FP8_OPS
from fusekit.kernels.linear_act import reference
from fusekit.kernels.parity import results_and_grads, widen
from fusekit.kernels.recipe import PRESETS

M, N, K = 96, 64, 128


def arguments(act: str = "none", recipe: str = "fp8-tensorwise", spread: float = 0.0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = (draw(M, K) * (spread * draw(M, 1)).exp()).bfloat16().requires_grad_()
    return (
        x,
        (draw(N, K) / K**0.5).requires_grad_(),
        draw(N).bfloat16().requires_grad_(),
        act,
        recipe,
        None,
        None,
    )


def judge(args: tuple[Any, ...], fused: dict[str, Tensor], act: str | None = None) -> list[str]:
    """The names of what failed."""
    act = act or args[3]
    truth = results_and_grads(lambda x, w, b: reference(x, w, b, None, act), widen(args)[:3])
    return [v.name for v in check_fp8(args, fused, truth) if not v.ok]


@pytest.mark.parametrize("recipe", PRESETS)
@pytest.mark.parametrize("act", ["none", "gelu_tanh", "relu_squared"])
def test_every_recipe_passes(recipe: str, act: str) -> None:
    args = arguments(act, recipe)
    assert judge(args, results_and_grads(FP8_OPS["linear_fp8"].fused, args)) == []


def _without_last(results: dict[str, Tensor], args: tuple[Any, ...]) -> Tensor:
    """grad_input that forgets one of N output features: a loop that ends too early."""
    weight = args[1].detach().clone()
    weight[-1] = 0
    again = (args[0], weight.requires_grad_(), *args[2:])
    return results_and_grads(FP8_OPS["linear_fp8"].fused, again)["grad_0"]


def _truncated(args: tuple[Any, ...]) -> Tensor:
    exact = FP8_OPS["linear_fp8"].reference(*widen(args)).detach().float()
    return exact.view(torch.int32).bitwise_and(-65536).view(torch.float32).bfloat16()


BUGS = {
    "output 1 % too large": lambda r, a: {"output": (r["output"].float() * 1.01).bfloat16()},
    "a column without bias": lambda r, a: {
        "output": r["output"] - a[2].detach().bfloat16() * (torch.arange(N) == 5)
    },
    "output truncated": lambda r, a: {"output": _truncated(a)},
    "unquantised": lambda r, a: {"output": reference(*a[:3], None, a[3]).detach()},
    "weight gradient 10 % short": lambda r, a: {"grad_1": r["grad_1"] * 0.9},
    "weight gradient 3 % short": lambda r, a: {"grad_1": r["grad_1"] * 0.97},
    "a row of the weight gradient missing": lambda r, a: {
        "grad_1": r["grad_1"] * (torch.arange(N) != 7)[:, None]
    },
    "one feature short": lambda r, a: {"grad_0": _without_last(r, a)},
    "bias gradient of rounded dz": lambda r, a: {"grad_2": r["grad_2"].to(torch.float8_e4m3fn).float()},
    "gradient infinite": lambda r, a: {"grad_0": r["grad_0"].index_fill(0, torch.tensor(3), torch.inf)},
}


@pytest.mark.parametrize("act", ["none", "gelu_tanh"])
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_seen(bug: str, act: str) -> None:
    args = arguments(act)
    right = results_and_grads(FP8_OPS["linear_fp8"].fused, args)
    wrong = BUGS[bug](right, args)
    failed = judge(args, right | wrong)
    assert failed and {name.split()[0] for name in failed} == set(wrong), failed


def test_another_activation_than_the_models_is_seen() -> None:
    """erf for tanh GELU: 40 times below FP8's own rounding."""
    args = arguments("gelu_tanh")
    failed = judge(args, results_and_grads(FP8_OPS["linear_fp8"].fused, args), act="gelu")
    assert "output as read" in failed


def test_values_outside_the_recipes_range_are_named() -> None:
    """Rows whose scales differ by e^3: one scale for all flushes most of them; a scale a row does not."""
    for recipe, expected in (("fp8-tensorwise", {"output", "grad_1"}), ("fp8-rowwise", set())):
        args = arguments(recipe=recipe, spread=3.0)
        failed = judge(args, results_and_grads(FP8_OPS["linear_fp8"].fused, args))
        assert {name.split()[0] for name in failed} <= expected
    rows = args[0].detach().float().norm(dim=1)
    assert rows.max() / rows.min() > 1e4


def test_a_broken_kernel_is_reverted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4))
    fusekit.optimize(model, precision="fp8")
    x = torch.randn(24, 32)
    assert fusekit.verify(model, x).ok
    assert len([f for f in fusekit.explain(model).fused if f.op == "linear_fp8"]) == 2

    def planted(target: Any) -> Any:
        broken = target is torch.ops.fusekit.linear_fp8.default
        return (lambda *args: target(*args) * 1.02) if broken else target

    monkeypatch.setattr(site_check, "call_target", planted)
    with pytest.warns(UserWarning, match="reverted linear_fp8_0"):
        certificate = fusekit.verify(model, x)
    assert not certificate.ok
    report = fusekit.explain(model)
    assert not [f for f in report.fused if f.op == "linear_fp8"]
    assert any(r.op == "linear_fp8" and "reverted by verify" in r.reason for r in report.refused)
