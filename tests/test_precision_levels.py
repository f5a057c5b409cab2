"""The levels of precision="auto": the limits to the letter, and no sequence of samples makes them swing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusekit.kernels.precision_statistics import STATISTICS
from fusekit.kernels.recipe import Recipe
from fusekit.precision_guard import Guard
from fusekit.precision_levels import (
    BAD_SAMPLES,
    BF16,
    CLEAN_SAMPLES,
    FINER,
    MOST_FLIPS,
    TENSOR,
    Layer,
    Unit,
    Verdict,
    judge,
    recipe_of,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KINDS = ("nonfinite", "urgent", "bad", "good", "clean")
HEALTHY = dict.fromkeys(STATISTICS, 0.0) | {"error": 0.037}


@pytest.mark.parametrize(
    ("product", "level", "change", "kind"),
    [
        ("output", TENSOR, {}, "clean"),
        ("output", TENSOR, {"snr_loss": 3.1}, "good"),
        ("output", TENSOR, {"snr_loss": 6.1}, "bad"),
        ("output", TENSOR, {"error": 0.056}, "good"),
        ("output", TENSOR, {"error": 0.073}, "good"),
        ("output", TENSOR, {"error": 0.075}, "bad"),
        ("output", TENSOR, {"error": 0.147}, "bad"),
        ("output", TENSOR, {"error": 0.149}, "urgent"),
        ("output", TENSOR, {"underflow": 0.9}, "clean"),  # underflow alone cries wolf
        ("output", TENSOR, {"saturation": 0.0009}, "good"),
        ("output", TENSOR, {"saturation": 0.0011}, "urgent"),
        ("output", TENSOR, {"nonfinite": 1.0}, "nonfinite"),
        ("grad_input", TENSOR, {"error": 0.117}, "good"),  # e5m2: twice 0.059
        ("grad_input", TENSOR, {"error": 0.119}, "bad"),
        ("grad_input", FINER, {"error": 0.075}, "bad"),  # e4m3
        ("grad_weight", TENSOR, {"error": 9.0}, "clean"),  # rows of it may cancel
        ("grad_weight", TENSOR, {"cosine_loss": 0.0026}, "good"),
        ("grad_weight", TENSOR, {"cosine_loss": 0.0051}, "bad"),
        ("grad_weight", TENSOR, {"cosine_loss": 0.03}, "urgent"),
        ("output", TENSOR, {"cosine_loss": 0.9}, "clean"),
    ],
)
def test_limits(product: str, level: int, change: dict[str, float], kind: str) -> None:
    verdict = judge(HEALTHY | change, product, recipe_of(level, "row"))
    assert verdict.kind == kind
    assert bool(verdict.reason) == (kind in ("bad", "urgent", "nonfinite"))


def see(
    unit: Unit, kind: str, window: int, *, live: bool = True, may_promote: bool = True, runs: int = 0
) -> bool:
    runs = max(runs, unit.level)
    verdicts = [Verdict(kind, kind), Verdict(kind, kind)]
    return unit.observe(verdicts, window, runs=runs, live=live, may_promote=may_promote)


def test_two_bad_samples_in_a_row_take_one_level_and_one_good_between_them_none() -> None:
    unit = Unit()
    for i, kind in enumerate(["bad", "good", "bad", "clean"]):
        assert not see(unit, kind, i)
    assert not see(unit, "bad", 5) and see(unit, "bad", 6) and unit.level == FINER and unit.window == 6
    assert not see(unit, "bad", 7) and see(unit, "bad", 8) and unit.level == BF16
    assert BAD_SAMPLES == 2


@pytest.mark.parametrize("kind", ["urgent", "nonfinite"])
def test_urgent_goes_to_bf16_at_once_where_fp8_runs(kind: str) -> None:
    unit = Unit()
    assert see(unit, kind, 1) and unit.level == BF16
    calm = Unit()
    moved = see(calm, kind, 1, live=False)
    assert calm.level == (FINER if kind == "urgent" else TENSOR) and moved == (kind == "urgent")


def test_promotion_takes_twenty_clean_samples_then_forty_then_eighty_and_then_never() -> None:
    unit, window = Unit(level=BF16), 0
    for patience in (20, 40, 80):
        assert unit.patience == patience
        for _ in range(patience - 1):
            assert not see(unit, "clean", window)
        assert see(unit, "clean", window) and unit.level == FINER
        assert see(unit, "urgent", window) and unit.level == BF16
    assert unit.pinned
    assert not any(see(unit, "clean", window) for _ in range(2000)) and unit.level == BF16
    assert CLEAN_SAMPLES == 20 and MOST_FLIPS == 3


def test_a_good_sample_that_is_not_clean_starts_the_count_again() -> None:
    unit = Unit(level=FINER)
    for _ in range(10):
        assert not any(see(unit, "clean", 0) for _ in range(CLEAN_SAMPLES - 1))
        assert not see(unit, "good", 0)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(1, 90)), max_size=40),
    st.booleans(),
    st.booleans(),
    st.sampled_from([TENSOR, FINER]),
)
def test_no_sequence_of_samples_makes_a_level_swing(
    runs_of: list[tuple[str, str, int]], live: bool, may_promote: bool, scales: int
) -> None:
    """Promotions are at most three, changes at most eight, and each is by what was seen."""
    unit, changes, promotions, bad = Unit(), 0, 0, 0
    for coarse, fine, times in runs_of:
        for _ in range(times):
            before, flips = unit.level, unit.flips
            runs = BF16 if before == BF16 else max(before, scales)
            verdicts = [Verdict(coarse, coarse), Verdict(fine, fine)]
            moved = unit.observe(verdicts, 0, runs=runs, live=live, may_promote=may_promote)
            seen = "" if before == BF16 else verdicts[max(runs, before)].kind
            bad = bad + 1 if seen == "bad" else 0
            assert moved == (unit.level != before)
            assert TENSOR <= unit.level <= BF16
            if unit.level < before:
                promotions += 1
                assert may_promote and unit.level == before - 1 and unit.flips == flips + 1 <= MOST_FLIPS
                assert verdicts[unit.level].kind == "clean" and not unit.clean
            elif moved:
                assert seen in ("urgent", "nonfinite") or bad >= BAD_SAMPLES
                assert (unit.level == BF16) or unit.level == max(runs, before) + 1
                bad = 0
            changes += moved
    assert promotions == unit.flips <= MOST_FLIPS and changes <= 2 + 2 * MOST_FLIPS
    if not may_promote:
        assert promotions == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([TENSOR, FINER, BF16]), min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from(["row", "block"]),
)
def test_a_layers_recipe_has_the_products_and_the_finest_scales_of_its_levels(
    levels: list[int], guarded: bool, fine: str
) -> None:
    layer = Layer((32, 16))
    for unit, level in zip(layer.units.values(), levels, strict=True):
        unit.level = level
    token = layer.token(fine, low_weight_gradient=guarded)
    cast = [level < BF16 and not (guarded and i == 2) for i, level in enumerate(levels)]
    if not any(cast):
        assert token is None
        return
    assert token is not None
    recipe = Recipe.parse(token)
    assert [recipe.output, recipe.grad_input, recipe.grad_weight] == cast
    assert recipe.scaling == (fine if FINER in levels else "tensor")
    assert recipe.gradient == (E4M3 if FINER in levels else E5M2) and recipe.forward == E4M3


def feed(guard: Guard, values: list[float]) -> None:
    for value in values:
        guard.add((torch.tensor(value), 1.0))


def test_the_guard_wants_three_bursts_in_a_row_and_a_history() -> None:
    wave = [1.0 + 0.02 * (i % 5) for i in range(60)]
    quiet, two, three, early, lost = (Guard() for _ in range(5))
    feed(quiet, wave)
    feed(two, [*wave, 9.0, 9.0, 1.0, 9.0, 9.0])
    feed(three, [*wave, 9.0, 9.0, 9.0])
    feed(early, [1.0] * 10 + [9.0] * 3)
    feed(lost, [*wave, float("nan"), float("inf"), float("nan")])
    assert [g.alarms() for g in (quiet, two, three, early, lost)] == [0, 0, 1, 0, 1]
    feed(three, [9.0] * 200)  # a new plateau is one alarm, not many
    assert three.alarms() == 1
    falling = Guard()
    feed(falling, [10.0 * 0.98**i for i in range(300)])
    assert falling.alarms() == 0


def test_the_guard_takes_numbers_tensors_and_nothing() -> None:
    guard = Guard()
    guard.add((torch.tensor(1.0, requires_grad=True) * 2, None))
    guard.add((2.0, torch.tensor(3.0, dtype=torch.bfloat16)))
    assert guard.state[:, :3].tolist() == [[2.0, 0.0, 2.0], [3.0, 0.0, 1.0]]
