"""What is asked of linear_fp8 on any device: tests/test_linear_fp8.py and tests/gpu/test_linear_fp8.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusekit.kernels.fp8_format import dequantise, group_of, quantise
from fusekit.kernels.linear_fp8 import OP
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen
from fusekit.kernels.recipe import Recipe

# Relative Frobenius errors of a product of well-scaled Gaussian operands against the unquantised one.
IDEAL = {torch.float8_e4m3fn: 3.7e-2, torch.float8_e5m2: 5.9e-2}


class Blocks(nn.Module):
    """Four layers that are cast and one that is not."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed, self.out = checkpointed, nn.Linear(32, 16)
        blocks = (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Tanh()) for _ in range(2))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.out(x)


def draw(device: str, dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()


def arguments(device: str, dtype: torch.dtype, recipe: str, act: str = "none", master: bool = False,
              shape: tuple[int, int, int] = (70, 144, 160)) -> tuple[Any, ...]:  # fmt: skip
    M, N, K = shape
    weights = torch.float32 if master else dtype
    x, weight = draw(device, dtype, 2, M // 2, K), draw(device, weights, N, K, scale=K**-0.5)
    return x, weight, draw(device, weights, N), act, recipe


def assert_parity(args: tuple[Any, ...]) -> None:
    """As good as one rounding of the float64 result on the decoded codes, output and every gradient."""
    truth = results_and_grads(OP.reference, widen(args))
    eager = results_and_grads(OP.reference, args)
    fused = results_and_grads(OP.fused, args)
    verdicts = check(fused, eager, truth, dtype=args[0].dtype, terms=longest_sum(args))
    assert all(v.ok for v in verdicts), "\n".join(f"{v.name}: {v.reason}" for v in verdicts)
    assert any(v.error > 0 for v in verdicts)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _behind(t: Tensor, recipe: Recipe, dtype: torch.dtype, weight: bool = False) -> Tensor:
    group = group_of(recipe, (t.shape[0], t.shape[1]), weight)
    return dequantise(quantise(t, dtype, group, recipe.power_of_two), group, torch.float64)


def straight_through(x: Tensor, weight: Tensor, dz: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """dx = deq(g) deq(w) and dw = deq(g)^T deq(x) in float64, written out once more; x, dz: (M, ...)."""
    x, weight = x.detach(), weight.detach()
    g, wide = recipe.gradient, recipe.forward
    if recipe.grad_input:
        grad_input = _behind(dz, recipe, g) @ _behind(weight.t().contiguous(), recipe, wide, True).t()
    else:
        grad_input = dz.double() @ weight.to(dz.dtype).double()
    if recipe.grad_weight:
        grad_weight = _behind(dz.t().contiguous(), recipe, g) @ _behind(x.t().contiguous(), recipe, wide).t()
    else:
        grad_weight = dz.double().t() @ x.double()
    return grad_input, grad_weight
