"""Statistics of sampled FP8 products: against float64, against the reference's table, and at their edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusekit.kernels.precision_statistics import (
    BLOCK,
    STATISTICS,
    WORST,
    chosen,
    column_amax,
    grad_input_statistics,
    grad_weight_statistics,
    output_statistics,
    positions,
    sample,
)
from fusekit.kernels.recipe import LARGEST, PRESETS, Recipe

BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
TENSOR, ROW, BLOCKS = (PRESETS[name] for name in ("fp8-tensorwise", "fp8-rowwise", "fp8-block"))


def named(vector: Tensor) -> dict[str, float]:
    return dict(zip(STATISTICS, vector.tolist(), strict=True))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def through(x: Tensor, code: torch.dtype, scaling: str, weight: bool) -> Tensor:
    """Q of (rows, contraction), in float64, written with nothing of fusekit's."""
    rows, columns = x.shape
    high = {"tensor": rows, "row": 1, "block": 128 if weight else 1}[scaling]
    wide = 128 if scaling == "block" else columns
    result = torch.zeros_like(x)
    for i in range(0, rows, high):
        for j in range(0, columns, wide):
            part = x[i : i + high, j : j + wide]
            amax = part.abs().max().item()
            scale = 2.0 ** math.floor(math.log2(LARGEST[code] / amax)) if amax else 1.0
            result[i : i + high, j : j + wide] = (part * scale).float().to(code).double() / scale
    return result


def oracle(
    a: Tensor, b: Tensor, codes: tuple[torch.dtype, torch.dtype], scaling: str, weight: bool
) -> dict[str, float]:
    a, b = a.double(), b.double()
    rounded = [through(t, code, scaling, weight and t is b) for t, code in zip((a, b), codes, strict=True)]
    exact, product = a @ b.t(), rounded[0] @ rounded[1].t()
    lost = []
    for t, q, code in zip((a, b), rounded, codes, strict=True):
        snr = 10 * torch.log10(t.square().sum(1) / (t - q).square().sum(1))
        lost.append((31.5 if code == E4M3 else 25.5) - torch.quantile(snr, 0.05).item())
    errors = (product - exact).norm(dim=1) / exact.norm(dim=1)
    cosine = (product * exact).sum() / (product.norm() * exact.norm())
    underflow = [((q == 0) & (t != 0)).sum().item() / t.numel() for t, q in zip((a, b), rounded, strict=True)]
    return {
        "snr_loss": max(lost), "underflow": max(underflow), "saturation": 0.0, "nonfinite": 0.0,
        "error": torch.quantile(errors, 0.95).item(), "cosine_loss": 1 - cosine.item(),
        "amax": a.abs().max().item(),
    }  # fmt: skip


@pytest.mark.parametrize("recipe", [TENSOR, ROW, BLOCKS], ids=["tensor", "row", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_all_statistics_of_all_products_are_those_of_float64(
    recipe: Recipe, dtype: torch.dtype, spread: float
) -> None:
    """Sizes at which the sample is everything."""
    M, N, K = 96, 128, 112
    x, w, g = draw(M, K), draw(N, K) * K**-0.5, draw(M, N) * 1e-3
    x, g = x * torch.exp(spread * draw(M, 1)), g * torch.exp(spread * draw(M, 1, seed=1))
    x, w, g = (t.to(dtype) for t in (x, w, g))
    codes = {"g": recipe.gradient, "x": recipe.forward}
    X, W, G, T = sample(x), sample(w), sample(g), sample(w.t())
    cases = [
        (output_statistics(X, W, recipe), oracle(x, w, (codes["x"], E4M3), recipe.scaling, True)),
        (grad_input_statistics(G, T, recipe), oracle(g, w.t(), (codes["g"], E4M3), recipe.scaling, True)),
        (
            grad_weight_statistics(G, X, recipe),
            oracle(g.t(), x.t(), (codes["g"], E4M3), recipe.scaling, False),
        ),
    ]
    for found, expected in cases:
        for name, value in named(found).items():
            # A bfloat16 product is rounded, to 0.0017 of itself; float16 holds no power of two below 2^-24.
            near = {"error": 3e-3, "cosine_loss": 2e-4, "snr_loss": 0.02, "underflow": 2e-3}.get(name, 0.0)
            assert value == pytest.approx(expected[name], abs=near + 1e-6), name


# (x, worst row error of the output under tensor scales is near 1, or near Gaussian's)
def _table() -> dict[str, tuple[Tensor, bool]]:
    M, K = 2048, 512
    x = draw(M, K)
    outliers = x.clone()
    outliers[:, :2] *= 300
    return {
        "Gaussian": (x, False),
        "token scale lognormal 1.5": (x * torch.exp(1.5 * draw(M, 1)), False),
        "token scale lognormal 3": (x * torch.exp(3 * draw(M, 1)), True),
        "elementwise lognormal 2.5": (x * torch.exp(2.5 * draw(M, K, seed=7)), False),
        "2 outlier channels": (outliers, False),
    }


@pytest.mark.parametrize("name", _table())
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_table_of_the_reference(name: str, dtype: torch.dtype) -> None:
    """precision.md 4.3: rows tell token scales from the rest, underflow does not, fine scales mend them."""
    x, hurt = _table()[name]
    w = sample(draw(256, 512) * 512**-0.5)
    coarse, fine = (named(output_statistics(sample(x.to(dtype)), w, recipe)) for recipe in (TENSOR, ROW))
    assert fine["error"] < 0.06 and fine["snr_loss"] < 6
    if hurt:
        assert coarse["error"] > 0.9 and coarse["snr_loss"] > 25 and coarse["underflow"] > 0.1
    else:
        assert coarse["error"] < 0.06 and coarse["snr_loss"] < 6
    if name == "elementwise lognormal 2.5":
        assert coarse["underflow"] > 0.3  # and nothing is wrong
    if name == "Gaussian":
        assert coarse["error"] == pytest.approx(0.041, abs=0.003) and coarse["underflow"] < 5e-4


def test_the_scale_is_the_whole_tensors_and_the_sample_small() -> None:
    """A token that the sample misses, and that takes the scale away from all others."""
    x, w = draw(4096, 64), sample(draw(64, 64))
    usual = named(output_statistics(sample(x, 64), w, TENSOR))
    x[1] *= 2.0**22
    assert sample(x, 64).values.shape == (64, 64) and sample(x, 64).values.abs().max() < 1e-3
    found = named(output_statistics(sample(x, 64), w, TENSOR))
    assert usual["error"] < 0.06 and found["error"] == 1.0 and found["amax"] > 2.0**21
    assert named(output_statistics(sample(x, 64), w, ROW))["error"] < 0.06
    columns = x.clone()
    columns[1, 1:] = 0  # one column's largest value, of the groups of grad_weight
    g = sample(draw(4096, 64), 64)
    assert named(grad_weight_statistics(g, sample(columns, 64), ROW))["snr_loss"] < 6
    underflow = named(grad_weight_statistics(g, sample(columns, 64), ROW))["underflow"]
    assert underflow == pytest.approx(1 / 64, abs=2e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_what_is_not_finite_is_seen_wherever_it_is(bad: float, dtype: torch.dtype) -> None:
    x, w, g = draw(512, 64).to(dtype), sample(draw(64, 64).to(dtype)), sample(draw(512, 64).to(dtype), 16)
    x[3, 5] = bad  # outside the sample
    for vector in (
        output_statistics(sample(x, 16), w, TENSOR),
        grad_input_statistics(sample(x, 16), w, ROW),
        grad_weight_statistics(g, sample(x, 16), BLOCKS),
    ):
        assert named(vector)["nonfinite"] == 1.0
        assert all(math.isfinite(v) and abs(v) <= WORST for v in vector.tolist())
    assert named(output_statistics(g, w, TENSOR))["nonfinite"] == 0.0


def test_zeros_and_nothing_are_perfect() -> None:
    zero, w, some = sample(torch.zeros(32, 64)), sample(draw(64, 64)), draw(32, 64)
    some[:20] = 0
    for a in (zero, sample(some), sample(torch.zeros(0, 64))):
        found = named(output_statistics(a, w, TENSOR))
        assert found["error"] < 0.06 and found["cosine_loss"] < 0.005 and found["underflow"] < 0.01
        assert found["snr_loss"] < 2 and found["nonfinite"] == 0
    tiny = sample(draw(32, 64) * 1e-30)  # squares would underflow, and do not
    assert named(output_statistics(tiny, w, TENSOR))["error"] == pytest.approx(0.04, abs=0.01)


def test_a_scale_of_earlier_steps_saturates() -> None:
    x, w = draw(256, 64), draw(64, 64)
    scale = torch.tensor([448 / 2.0, 64.0, 64.0])  # made for |x| <= 2
    found = named(output_statistics(sample(x), sample(w), TENSOR, scale))
    assert found["saturation"] == pytest.approx((x.abs() > 2).float().mean().item(), abs=1e-6)
    assert found["error"] > 0.06
    generous = torch.tensor([32.0, 64.0, 64.0])
    assert named(output_statistics(sample(x), sample(w), TENSOR, generous))["saturation"] == 0.0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.integers(1, 300), st.integers(0, 10_000), st.sampled_from([1, 4, BLOCK]))
def test_sampled_rows_are_distinct_in_range_and_in_whole_blocks(
    count: int, limit: int, offset: int, block: int
) -> None:
    found = chosen(torch.arange(count), limit, offset, block).tolist()
    assert sorted(set(found)) == found and found[0] >= 0 and found[-1] < count
    assert len(found) <= max(limit, block)
    assert all(b % block == 0 or b == a + 1 for a, b in itertools.pairwise(found))
    taken, blocks, moved = positions(count, limit, offset, block)
    assert found == list(range(count)) if taken == blocks else moved < blocks // taken


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16, torch.float64])
def test_column_amax(dtype: torch.dtype) -> None:
    x = draw(37, 19).to(dtype)
    assert torch.equal(column_amax(x), x.abs().amax(0).float())
    assert torch.equal(column_amax(x.t()), x.abs().amax(1).float())
    assert column_amax(x[:0]).tolist() == [0.0] * 19
