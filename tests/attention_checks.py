"""Attention's arguments by name, and parity with float64, for the tests on either device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.attention import OP
from fusekit.kernels.attention_form import around
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen

NAMES = [argument.name for argument in OP.fused._schema.arguments]
DEFAULTS = {argument.name: argument.default_value for argument in OP.fused._schema.arguments}

# Windows beside which global tokens are tested: on both sides, seen ahead of as well, and behind a query.
EVERYWHERE = around(16, 16) | {"global_ahead": True}
BEHIND = {"causal": True, "window": 20}


def heads(device: str, B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, H, T, D) in the memory of (B, T, H, D), as a model makes it."""
    return torch.randn(B, T, H, D).to(device, dtype).transpose(1, 2).requires_grad_()


def tokens(T: int, *chosen: int) -> Tensor:
    """(T,) flags of the chosen tokens."""
    return torch.zeros(T, dtype=torch.bool).index_fill(0, torch.tensor(chosen, dtype=torch.int64), True)


def arguments(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Any, ...]:
    """All arguments in the schema's order."""
    values = {**DEFAULTS, "q": q, "k": k, "v": v, **given}
    assert len(values) == len(NAMES), f"no such argument: {set(values) - set(NAMES)}"
    return tuple(values[name] for name in NAMES)


def assert_parity(args: tuple[Any, ...]) -> dict[str, Tensor]:
    truth = results_and_grads(OP.reference, widen(args))
    eager = results_and_grads(OP.reference, args)
    fused = results_and_grads(OP.fused, args)
    terms = longest_sum(args[:4])
    verdicts = check(fused, eager, truth, dtype=args[0].dtype, terms=terms, inherent=True)
    assert all(v.ok for v in verdicts), verdicts
    return fused


def assert_sinks_gradient_is_rounded_once(sinks: Tensor, args: tuple[Any, ...]) -> None:
    """Few numbers, each a sum that cancels in part: with y rounded in it, a fifth is 3 to 11 floors off."""
    result = f"grad_{NAMES.index('sinks')}"
    truth = results_and_grads(OP.reference, widen(args))[result]
    error = (results_and_grads(OP.fused, args)[result].double() - truth).norm()
    floor = (truth.to(sinks.dtype).double() - truth).norm()
    assert error <= 1.1 * floor + 1e-6 * truth.norm()
