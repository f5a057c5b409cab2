"""What Hopper's FP8 accumulator does to sums: mmaemu has an H100's bits on a CPU, exact_product the truth.

This is why "promote128" is the default: on sums of one sign the narrow accumulator is a bias, not noise.
"""

from __future__ import annotations

import mmaemu
import pytest
import torch
from torch import Tensor

from fusekit.kernels.fp8_exact import exact_product

K = 4096


def operands(positive: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(16, K, generator=generator) * 60 for _ in range(2))
    a, b = (t.abs() if positive else t for t in pair)
    return a.clamp(-448, 448).to(torch.float8_e4m3fn), b.clamp(-448, 448).to(torch.float8_e4m3fn)


def sums(a: Tensor, b: Tensor, fast: bool) -> Tensor:
    return mmaemu.accumulate(a, b, use_fast_accum=fast, profile="hopper", splitk=1).double()


@pytest.mark.parametrize("positive", [False, True], ids=["zero mean", "one sign"])
def test_accumulators_of_an_h100(positive: bool) -> None:
    a, b = operands(positive)
    exact = exact_product(a.float(), b.float().t())
    products = a.double().abs() @ b.double().abs().t()
    errors = {fast: sums(a, b, fast) - exact for fast in (False, True)}
    # A wgmma aligns 32 products and the sum so far to the largest and cuts each to 13 bits behind its leading
    # one: 33 cuts a step of 32, over 128 of the contraction or over all of it.
    bounds = {False: 132 * 2.0**-13, True: K * 33 / 32 * 2.0**-13}
    for fast, error in errors.items():
        assert bool((error.abs() <= (bounds[fast] + K * 2.0**-24) * products).all())
    relative = {fast: float(error.norm() / exact.norm()) for fast, error in errors.items()}
    assert relative[True] > 5 * relative[False] and relative[False] < 1e-3
    if positive:
        assert bool((errors[True] < 0).all()), "a bias towards zero"
        assert relative[True] > 5e-2
