"""How a layer's product moves between FP8 with one scale a tensor, FP8 with fine scales, and bf16.

Per product (output, grad_input, grad_weight) of a layer, from samples of `kernels/precision_statistics.py`.
With Gaussian values FP8 has a signal-to-noise ratio I and a relative error E (31.5 dB and 0.037 of e4m3,
25.5 dB and 0.059 where e5m2 takes part). A sample is

    bad      5th percentile of the rows' ratio below I - 6 dB, or 95th percentile of the rows' errors
             above 2 E, or of grad_weight a cosine below 0.995
    urgent   a NaN or infinity, over 0.1 % saturated, or an error above 4 E
    clean    half of those margins are kept

A row of grad_weight may be two large numbers whose sums cancel by chance, so its error is read off the
cosine, as sqrt(2 (1 - cos)).

Two bad samples in a row demote by one level, an urgent one to bf16. After 20 clean samples at the finer-
grained level's own statistics a product is promoted by one; each promotion doubles the 20, and the third is
the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fusekit.kernels.precision_statistics import PRODUCTS, STATISTICS
from fusekit.kernels.recipe import PRESETS, Recipe

FINE = {"row": PRESETS["fp8-rowwise"], "block": PRESETS["fp8-block"]}
TENSOR, FINER, BF16 = range(3)
ERROR = {torch.float8_e4m3fn: 0.037, torch.float8_e5m2: 0.059}  # E, Gaussian values
SNR_MARGIN, ERROR_MARGIN, URGENT_ERROR = 6.0, 2.0, 4.0  # dB, and multiples of E
COSINE_LOSS, SATURATION = 0.005, 1e-3
BAD_SAMPLES, CLEAN_SAMPLES, MOST_FLIPS = 2, 20, 3

Statistics = Mapping[str, float]


def recipe_of(level: int, fine: str) -> Recipe:
    return recipe_named(level_name(level, fine))


def level_name(level: int, fine: str) -> str:
    return ("tensor", fine, "bf16")[level]


@dataclass(frozen=True)
class Verdict:
    """reason: why the sample is bad or urgent, "" if it is neither."""

    kind: str  # "nonfinite", "urgent", "bad", "good", "clean"
    reason: str = ""


def recipe_named(level: str) -> Recipe:
    return PRESETS["fp8-tensorwise"] if level == "tensor" else FINE[level]


def ideal_error(product: str, recipe: Recipe) -> float:
    """What FP8 loses of Gaussian values."""
    return ERROR[recipe.forward if product == "output" else recipe.gradient]


def deciding_error(statistics: Statistics, product: str) -> float:
    """The 95th percentile of the rows' errors, or by the cosine."""
    if product == "grad_weight":
        return math.sqrt(max(0.0, 2 * statistics["cosine_loss"]))
    return statistics["error"]


def judge(statistics: Statistics, product: str, recipe: Recipe) -> Verdict:
    """One sample of one product at the recipe of one level."""
    lost, snr, saturated = (statistics[name] for name in ("cosine_loss", "snr_loss", "saturation"))
    ideal, error = ideal_error(product, recipe), deciding_error(statistics, product)
    by_cosine = product == "grad_weight"
    what = "error by the cosine" if by_cosine else "row errors (95th percentile)"
    if statistics["nonfinite"]:
        return Verdict("nonfinite", "a NaN or an infinity in an operand")
    if saturated > SATURATION:
        return Verdict("urgent", f"{saturated:.2%} of the values beyond the scale")
    if error > URGENT_ERROR * ideal:
        return Verdict("urgent", f"{what} {error:.2g}, over {URGENT_ERROR:g} × FP8's {ideal:g}")
    if snr > SNR_MARGIN:
        return Verdict("bad", f"rows lose {snr:.1f} dB of FP8's own ratio, over {SNR_MARGIN:g}")
    if by_cosine and lost > COSINE_LOSS:
        return Verdict("bad", f"cosine of the gradient {1 - lost:.4f}, below {1 - COSINE_LOSS:g}")
    if not by_cosine and error > ERROR_MARGIN * ideal:
        return Verdict("bad", f"{what} {error:.2g}, over {ERROR_MARGIN:g} × FP8's {ideal:g}")
    half = lost <= COSINE_LOSS / 2 if by_cosine else error <= (1 + ERROR_MARGIN) / 2 * ideal
    clean = half and snr <= SNR_MARGIN / 2 and saturated <= SATURATION / 2
    return Verdict("clean" if clean else "good")


@dataclass
class Unit:
    """One product of one layer. window: when its level last changed."""

    level: int = TENSOR
    bad: int = 0
    clean: int = 0
    flips: int = 0
    window: int = 0
    reason: str = "not sampled yet"
    samples: int = 0
    last: dict[str, dict[str, float]] = field(default_factory=dict)  # per FP8 level, the latest statistics

    @property
    def pinned(self) -> bool:
        """No further promotion."""
        return self.flips >= MOST_FLIPS

    @property
    def patience(self) -> int:
        return CLEAN_SAMPLES << self.flips

    def observe(
        self, verdicts: Sequence[Verdict], window: int, *, runs: int, live: bool, may_promote: bool
    ) -> bool:
        """One sample: its verdict at each FP8 level. Returns whether the level changed.

        runs: the level whose scales the product has now; a layer's products share theirs, so it may be finer
            than its own.
        live: FP8 runs by these levels. Otherwise nothing is at stake: an urgent sample demotes by one level,
            and values that are not finite say nothing about FP8.
        """
        self.samples += 1
        at_risk = self.level < BF16
        verdict = verdicts[max(runs, self.level)] if at_risk else Verdict("good")
        if verdicts[FINER].kind == "nonfinite" and not (live and at_risk):
            self.bad = self.clean = 0
            return False
        if verdict.kind in ("urgent", "nonfinite"):
            return self._move(BF16 if live else max(runs, self.level) + 1, verdict.reason, window)
        self.bad = self.bad + 1 if verdict.kind == "bad" else 0
        if self.bad >= BAD_SAMPLES:
            return self._move(max(runs, self.level) + 1, verdict.reason, window)
        if at_risk and self.reason == "not sampled yet":
            self.reason = "within FP8's margins"
        return may_promote and self._try_promotion(verdicts, window)

    def revert(self, reason: str, window: int) -> None:
        """To bf16, and never back."""
        self._move(BF16, reason, window)
        self.flips = MOST_FLIPS

    def _try_promotion(self, verdicts: Sequence[Verdict], window: int) -> bool:
        if self.level == TENSOR or self.pinned:
            return False
        self.clean = self.clean + 1 if verdicts[self.level - 1].kind == "clean" else 0
        if self.clean < self.patience:
            return False
        samples = self.clean
        self.flips += 1
        return self._move(self.level - 1, f"promoted after {samples} clean samples", window)

    def _move(self, level: int, reason: str, window: int) -> bool:
        self.level, self.reason, self.window, self.bad, self.clean = level, reason, window, 0, 0
        return True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Layer:
    """The three products of a layer whose weight is (N, K)."""

    shape: tuple[int, int]
    units: dict[str, Unit] = field(default_factory=lambda: {name: Unit() for name in PRODUCTS})

    def token(self, fine: str, *, low_weight_gradient: bool = False) -> str | None:
        """The layer's recipe as a word, None where no product is in FP8.

        low_weight_gradient: the model's guard is up, grad_weight runs in bf16.
        """
        in_fp8: dict[str, Any] = {name: unit.level < BF16 for name, unit in self.units.items()}
        if low_weight_gradient:
            in_fp8["grad_weight"] = False
        if not any(in_fp8.values()):
            return None
        return replace(recipe_of(self.scales, fine), **in_fp8).token()

    @property
    def scales(self) -> int:
        """Products of a layer share how they are scaled: the finest that one of them needs."""
        levels = (unit.level for unit in self.units.values())
        return max((level for level in levels if level < BF16), default=TENSOR)

    def runs(self, product: str) -> int:
        level = self.units[product].level
        return level if level == BF16 else self.scales


def named(values: Sequence[float]) -> dict[str, float]:
    """A vector of STATISTICS with its names."""
    return dict(zip(STATISTICS, values, strict=True))
