"""FP8 quantisation kernels against fp8_format, bit for bit: every code, both layouts, awkward values."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fusekit.kernels import fp8_cast, fp8_format
from fusekit.kernels.recipe import PRESETS, Recipe

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
every_code = pytest.mark.parametrize("code", DTYPES.values(), ids=DTYPES)
encoders = pytest.mark.parametrize("hardware", [True, False], ids=["processor", "integers"])


def same_codes(codes: Tensor, expected: Tensor) -> bool:
    """NaN has several codes."""
    nan = expected.float().isnan()
    found = codes.view(torch.uint8)
    return bool(((found == expected.view(torch.uint8)) | (nan & (found & 0x7F >= 0x7D))).all())


def assert_cast(
    x: Tensor, code: torch.dtype, recipe: Recipe, weight: bool = False, hardware: bool | None = None
) -> None:
    plain = fp8_cast.empty_operand(x, recipe, weight, False)
    turned = fp8_cast.empty_operand(x, recipe, weight, True)
    fp8_cast.cast(x, code, recipe, plain, turned, weight=weight, hardware=hardware)
    for operand, seen in ((plain, x), (turned, x.t())):
        shape = (seen.shape[0], seen.shape[1])
        group = fp8_format.group_of(recipe, shape, weight)
        expected = fp8_format.quantise(seen.contiguous(), code, group, recipe.power_of_two)
        assert same_codes(operand.codes[:, : shape[1]], expected.codes)
        assert not operand.codes[:, shape[1] :].any()
        groups = expected.inverse.shape[1]
        torch.testing.assert_close(
            operand.inverse.t()[:, :groups], expected.inverse, rtol=0, atol=0, equal_nan=True
        )


def patterns(dtype: torch.dtype) -> Tensor:
    """All 65,536 values of a 16-bit dtype."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).to("cuda")


def midpoints(code: torch.dtype) -> Tensor:
    """Every code, the middle between neighbours, and the float32 on either side of each; and past the end."""
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(code).float()
    values = values[values.isfinite()].sort().values
    values = torch.cat(
        [values, (values[1:] + values[:-1]) / 2, values[-1:] * torch.tensor([1.03, 1.04, 1.07, 2, 1e30])]
    )
    values = torch.cat([values, -values])
    away = [torch.nextafter(values, torch.tensor(s)) for s in (torch.inf, -torch.inf)]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 1e-38, 3.4e38])
    return torch.cat([values, *away, special])


@every_code
@encoders
@pytest.mark.parametrize("what", ["bfloat16", "float16", "midpoints", "random"])
def test_encoder_rounds_to_nearest_even_and_saturates(code: torch.dtype, hardware: bool, what: str) -> None:
    if what == "random":
        bits = torch.randint(-(2**31), 2**31 - 1, (1 << 15,), generator=torch.Generator().manual_seed(0))
        x = bits.to(torch.int32).view(torch.float32).to("cuda")
    else:
        x = midpoints(code).to("cuda") if what == "midpoints" else patterns(getattr(torch, what))
    x = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256)
    delayed = Recipe(delayed=True)
    scale, amax = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    operand = fp8_cast.empty_operand(x, delayed, False, False)
    fp8_cast.cast(x, code, delayed, operand, None, scale=scale, amax=amax, hardware=hardware)
    assert same_codes(operand.codes[:, :256], fp8_format.encode(x.float(), code))


@every_code
@pytest.mark.parametrize("name", PRESETS)
def test_groups_scales_and_layouts(name: str, code: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(130, 272, generator=generator) * torch.randn(130, 1, generator=generator).exp()
    assert_cast(x.to("cuda", torch.bfloat16), code, PRESETS[name])
    if name == "fp8-block":
        assert_cast(x.to("cuda"), code, PRESETS[name], weight=True)


@pytest.mark.parametrize("name", ["fp8-tensorwise", "fp8-rowwise"])
def test_scales_that_are_no_powers_of_two(name: str) -> None:
    recipe = dataclasses.replace(PRESETS[name], power_of_two=False)
    x = torch.randn(40, 144, generator=torch.Generator().manual_seed(1)).to("cuda")
    assert_cast(x, torch.float8_e4m3fn, recipe)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 448.0, 449.0, 3.4e38, torch.inf, -torch.inf, torch.nan])
def test_awkward_largest_magnitudes(name: str, value: float) -> None:
    """Zero, subnormal, largest, infinite and NaN groups, beside a group that is none of these."""
    x = torch.zeros(17, 144)
    x[3] = torch.linspace(-2, 2, 144)
    x[5, 40] = value
    assert_cast(x.to("cuda"), torch.float8_e4m3fn, PRESETS[name])


def test_strided_input() -> None:
    x = torch.randn(144, 70, generator=torch.Generator().manual_seed(2)).to("cuda", torch.float16).t()
    assert_cast(x, torch.float8_e4m3fn, PRESETS["fp8-block"])


def test_delayed_scale_saturates_and_amax_is_kept() -> None:
    recipe = Recipe(delayed=True)
    x = torch.randn(33, 48, generator=torch.Generator().manual_seed(3)).to("cuda")
    scale, amax = torch.tensor(256.0, device="cuda"), torch.tensor(0.5, device="cuda")
    operand = fp8_cast.empty_operand(x, recipe, False, True)
    for _ in range(2):  # a second pass over the same tensor changes nothing
        fp8_cast.cast(x, torch.float8_e4m3fn, recipe, None, operand, scale=scale, amax=amax)
        assert amax == x.abs().max() and operand.inverse.item() == 2.0**-8
        assert same_codes(operand.codes[:, :33], fp8_format.encode(x.t() * 256, torch.float8_e4m3fn))
    x[3, 4] = torch.inf
    fp8_cast.cast(x, torch.float8_e4m3fn, recipe, None, operand, scale=scale, amax=amax)
    assert amax == torch.inf and operand.inverse.isnan().all()
