"""FP8 codes and scales on the CPU: against ml_dtypes and torch, and the sweep without codes against both."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from fusekit.kernels import fp8_cpu, fp8_format
from fusekit.kernels.fp8_exact import exact_product
from fusekit.kernels.recipe import LARGEST, PRESETS, Recipe

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ORACLE = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
every_code = pytest.mark.parametrize("code", ORACLE, ids=["e4m3", "e5m2"])


def oracle(x: Tensor, code: torch.dtype) -> Tensor:
    """Codes by ml_dtypes, which rounds to nearest even and does not saturate."""
    clipped = np.clip(x.float().numpy(), -LARGEST[code], LARGEST[code])
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(clipped.astype(ORACLE[code]).view(np.uint8))


def assert_codes(x: Tensor, code: torch.dtype) -> None:
    found, expected = fp8_format.encode(x.float(), code).view(torch.uint8), oracle(x, code)
    nan = x.isnan()
    assert torch.equal(found[~nan], expected[~nan])
    assert fp8_format.encode(x.float(), code).float()[nan].isnan().all()


def patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def midpoints(code: torch.dtype) -> Tensor:
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(code).float()
    values = values[values.isfinite()].sort().values
    values = torch.cat([values, (values[1:] + values[:-1]) / 2])
    past = LARGEST[code] * (1 + 2.0 ** -torch.arange(1, 24))
    values = torch.cat([values, past, -past])
    return torch.cat([values, *(torch.nextafter(values, torch.tensor(s)) for s in (torch.inf, -torch.inf))])


@every_code
def test_decoding_all_256_codes(code: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    expected = torch.from_numpy(codes.numpy().view(ORACLE[code]).astype(np.float32))
    operand = fp8_format.Operand(codes.view(code).view(1, 256), torch.ones(1, 1))
    found = fp8_format.dequantise(operand, (1, 256), torch.float64)[0]
    finite = expected.isfinite()
    assert torch.equal(found[finite], expected[finite].double())
    assert torch.equal(found[~finite].isnan(), expected[~finite].isnan())


@every_code
@pytest.mark.parametrize("what", ["bfloat16", "float16", "midpoints", "random", "special"])
def test_encoding_rounds_to_nearest_even_and_saturates(code: torch.dtype, what: str) -> None:
    if what == "random":
        bits = torch.randint(-(2**31), 2**31 - 1, (1 << 20,), generator=torch.Generator().manual_seed(0))
        x = bits.to(torch.int32).view(torch.float32)
    elif what == "midpoints":
        x = midpoints(code)
    elif what == "special":
        x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 1e-38, 3.4e38])
    else:
        x = patterns(getattr(torch, what))
    assert_codes(x, code)


@every_code
def test_rounding_is_idempotent_monotone_and_odd(code: torch.dtype) -> None:
    x = torch.randn(1 << 14, generator=torch.Generator().manual_seed(1)).mul(LARGEST[code] / 4).sort().values
    q = fp8_format.encode(x, code).float()
    assert torch.equal(fp8_format.encode(q, code).float(), q) and bool((q[1:] >= q[:-1]).all())
    assert torch.equal(fp8_format.encode(-x, code).float(), -q)


@every_code
@pytest.mark.parametrize("amax", [2.0**-149, 2.0**-126, 1e-30, 1.0, 1.75, 1.7500001, 448.0, 3.4028234e38])
def test_scale_is_the_largest_power_of_two_that_fits(code: torch.dtype, amax: float) -> None:
    amax = torch.tensor(amax).item()
    scale = fp8_format.scale_of(torch.tensor([amax]), code).item()
    assert math.frexp(scale)[0] == 0.5 and Fraction(amax) * Fraction(scale) <= LARGEST[code]
    assert scale == 2.0**100 or Fraction(amax) * Fraction(scale) * 2 > LARGEST[code]
    other = fp8_format.scale_of(torch.tensor([amax]), code, power_of_two=False).item()
    with np.errstate(over="ignore"):
        assert other == min(np.float32(LARGEST[code]) / np.float32(amax), np.float32(2.0**100))


@pytest.mark.parametrize("amax", [0.0, torch.inf, torch.nan])
def test_scale_without_information_is_one(amax: float) -> None:
    held = torch.tensor([amax])
    scale = fp8_format.scale_of(held, E4M3)
    assert scale.item() == 1.0
    inverse = fp8_format.inverse_of(scale, held).item()
    assert inverse == 1.0 if amax == 0.0 else math.isnan(inverse)


def test_scales_of_microscaling_are_rounded_up() -> None:
    """RCEIL: the e8m0 exponent of amax / 448, rounded up to a power of two."""
    amax = torch.rand(4096, generator=torch.Generator().manual_seed(2)).mul(40).sub(20).exp2()
    inverse = 1 / fp8_format.scale_of(amax, E4M3)
    assert torch.equal(inverse.log2(), (amax.double() / 448).log2().ceil().float())


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


GROUPS = [(256, 256), (1, 256), (256, 1), (1, 128), (128, 128), (1, 32), (32, 1), (1, 96)]


@every_code
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_sweep_is_quantise_and_dequantise(code: torch.dtype, dtype: torch.dtype) -> None:
    """All 65,536 values; then those among which no NaN takes its whole group, and no huge scale."""
    every = patterns(dtype).view(256, 256)
    finite = torch.where(every.isfinite(), every, 0)
    for x in (every, finite, torch.where(finite.float().abs() < 1e30, finite, 0)):
        for group in GROUPS:
            for power_of_two in (True, False):
                expected = fp8_format.quantise(x, code, group, power_of_two)
                found, amax = fp8_cpu.through_fp8(x, code, group, torch.float32, power_of_two)
                assert same(found, fp8_format.dequantise(expected, group, torch.float32)), group
                assert same(amax, fp8_format.amax_of(x, group))
        scale = torch.tensor(4.0)  # of delayed scaling: larger values saturate
        expected = fp8_format.quantise(x, code, (256, 256), True, scale)
        found, _ = fp8_cpu.through_fp8(x, code, (256, 256), torch.float32, True, scale)
        assert same(found, fp8_format.dequantise(expected, (256, 256), torch.float32))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 300), st.sampled_from(sorted(PRESETS)), st.booleans(), st.booleans(),
    st.integers(-20, 20), st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_sweep_on_any_shape(rows, columns, name, weight, transposed, exponent, random) -> None:
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    x = torch.randn(rows, columns, generator=generator).mul(3).exp() * 2.0**exponent
    x = (x.t().contiguous().t() if transposed else x).bfloat16()
    group = fp8_format.group_of(PRESETS[name], (rows, columns), weight)
    expected = fp8_format.dequantise(fp8_format.quantise(x, E4M3, group), group, torch.float32)
    found, _ = fp8_cpu.through_fp8(x, E4M3, group, torch.bfloat16)  # which holds every code / scale
    assert torch.equal(found.float(), expected)


@pytest.mark.parametrize("spread", [0.0, 3.0, 8.0])
def test_exact_products_do_not_depend_on_the_order_of_sums(spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    a = (
        torch.randn(24, 512, generator=generator)
        * torch.randn(24, 512, generator=generator).mul(spread).exp()
    )
    a = fp8_format.encode(a, E5M2).float()
    b = fp8_format.encode(torch.randn(512, 20, generator=generator) * 40, E4M3).float()
    if spread:  # scales of groups
        a *= torch.randint(-20, 20, (24, 16), generator=generator).float().exp2().repeat_interleave(32, 1)
    order = torch.randperm(512, generator=generator)
    exact = exact_product(a, b)
    assert torch.equal(exact, exact_product(a[:, order], b[order]))
    for row in (0, 7):
        terms = zip(a[row].tolist(), b[:, 3].tolist(), strict=True)
        total = sum((Fraction(x) * Fraction(y) for x, y in terms), Fraction(0))
        assert exact[row, 3].item() == float(total)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_exact_products_of_zeros_and_of_nan(value: float) -> None:
    a, b = torch.full((24, 32), value), torch.ones(32, 20)
    assert torch.equal(exact_product(a, b).nan_to_num(7.0), (a @ b).double().nan_to_num(7.0))
    layer = nn.Linear(32, 32)
    x = torch.full((4, 32), value, dtype=torch.bfloat16, requires_grad=True)
    recipe = Recipe(accumulation="exact").token()
    y = torch.ops.fusekit.linear_fp8(x, layer.weight, None, "none", recipe)
    y.sum().backward()
    assert bool(y.isnan().all()) == (value != value)
    assert torch.equal(layer.weight.grad.nan_to_num(7.0), torch.full((32, 32), value).nan_to_num(7.0))


def test_exact_products_of_the_largest_numbers() -> None:
    a = torch.full((4, 32), 1.75 * 2.0**127)
    assert torch.equal(exact_product(a, torch.ones(32, 3)), a.double() @ torch.ones(32, 3).double())
    a[1, 3] = torch.inf
    assert exact_product(a, torch.ones(32, 3)).isinf().all(1).tolist() == [False, True, False, False]


def test_a_recipe_of_a_list_is_one_of_a_tuple() -> None:
    assert hash(Recipe(keep=["a"])) == hash(Recipe(keep=("a",)))  # type: ignore[arg-type]
    short = Recipe(delayed=True, history=7, margin=1, head=True)
    assert short.current() == Recipe(head=True)


def test_recipes_travel_as_words() -> None:
    for name, recipe in PRESETS.items():
        assert Recipe.parse(recipe.token()) == recipe == Recipe.parse(name)
        for change in ({"grad_weight": False}, {"accumulation": "fast"}):
            changed = dataclasses.replace(recipe, **change)
            assert Recipe.parse(changed.token()) == changed
    with pytest.raises(ValueError, match="is no FP8 recipe: give a preset"):
        Recipe.parse("fp9")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"forward": torch.float16}, "no FP8 dtype"),
        ({"scaling": "column"}, "none of tensor, row, block, mx"),
        ({"accumulation": "int8"}, "none of exact, fp32"),
        ({"scaling": "row", "delayed": True}, "one amax a tensor"),
        ({"scaling": "block", "power_of_two": False}, "power_of_two=True"),
        ({"scaling": "mx"}, "known to diverge"),
        ({"accumulation": "exact", "power_of_two": False}, "no format holds"),
        ({"output": False, "grad_input": False, "grad_weight": False}, "precision='bf16'"),
        ({"history": 16}, "use delayed=True"),
        ({"margin": 1}, "use delayed=True"),
        ({"delayed": True, "history": 2.5}, "history is a whole number, and got 2.5"),
        ({"delayed": True, "margin": "1"}, "margin is a whole number, and got '1'"),
        ({"edge_blocks": True}, "edge_blocks is a whole number, and got True"),
        ({"delayed": "no"}, "delayed is True or False, and got 'no'"),
        ({"grad_weight": "bf16"}, "grad_weight is True or False, and got 'bf16'"),
        ({"keep": None}, "keep is a tuple"),
        ({"keep": "head"}, "keep is a tuple"),
        ({"keep": (1,)}, "keep is a tuple"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(fields, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe(**fields)
