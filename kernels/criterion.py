r"""What a result must satisfy to be as good as its dtype allows.

R is the reference in float64 on the same rounded inputs, f the fused result, E eager in the same dtype,
RN rounds to the dtype of the result, and relF(t) = |t - R| / |R| in the Frobenius norm.
`floor` is relF(RN(R)): what a perfect kernel would still lose. A result passes iff

    1. its infinities and NaNs are where RN(R) has them;
    2. relF(f) <= c floor + 2^-24 sqrt(K), where c is 1.1 for one rounding and 2.5 (1 + 2 / sqrt(n)) where a
       low-precision intermediate is part of the method (P in attention) and n numbers are the result; in
       float32 2 and 4;
    3. no row or column is worse than 1.5 (3.5) of its own floor: one wrong tile hides in a global norm; where
       an intermediate is rounded and eager's row is off as well, since the product after it
       cancels there, four times eager's error is the limit, up to two units of a typical row on top;
    4. relF(f) <= 1.05 relF(E) + 0.05 floor and max|f - R| <= 2 max(max|E - R|, max|RN(R) - R|);
    5. elementwise |f - R| <= gamma_K sum|a||b| + u |R|, where the caller knows sum|a||b|;
    6. the error has no bias: the means of d = f - R and of d sign(R) are within 5 standard errors of zero.
       This is the one that sees a truncating store, a D-1 variance, or the wrong GELU in bfloat16.

K is the longest sum behind a result. It matters in float32, whose rounding is finer than the order of
summation: there rules 3 and 4 get the same 2^-24 sqrt(K). Where the method rounds an intermediate, rule 4's
baseline is at least c / 1.1 floors, because E may be a reference that does not.
Rule 5 is the bound of Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ACCUMULATOR = 2.0**-24  # every reduction of ours is kept in float32

SLICE_LENGTH = 16  # shorter rows and columns scatter too much to be judged alone; rule 4 covers them
BIAS_CLUSTERS = 8  # fewer rows or columns than this have no standard error worth the name
ILL_CONDITIONED = 64.0  # floors by which eager itself is off: the input, not the kernel, makes the error
MOST_STRAIN = 8.0  # floors that an inherent low-precision intermediate may cost where eager pays them too
SCATTER = (
    2.0  # over sqrt(n): norms of n errors scatter. A right mlp's dx of 24 numbers needs up to 3.3 floors
)
TF32_ERROR = 1e-3  # two operands, each cut (not rounded) to 11 bits: 7.7e-4 measured for random data


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found about one result. Errors are relative Frobenius norms against float64.

    worst_slice is the worst row or column in units of what it is allowed, so 1 is the limit.
    reason says what failed, or, of a passing result, why it could not be judged in full; "" otherwise.
    """

    name: str
    error: float
    floor: float
    eager_error: float
    worst_slice: float
    ok: bool
    reason: str = ""


def failed(name: str, reason: str) -> Verdict:
    """A verdict on a result that cannot even be measured."""
    return Verdict(
        name=name, error=math.inf, floor=0.0, eager_error=0.0, worst_slice=math.inf, ok=False, reason=reason
    )


class Case:
    """One result on its way to a verdict."""

    def __init__(
        self,
        name: str,
        fused: Tensor,
        eager: Tensor,
        truth: Tensor,
        dtype: torch.dtype,
        terms: int,
        inherent: bool,
        tf32: bool,
        products: Tensor | None,
    ):
        self.name, self.raw, self.eager_dtype, self.products = name, fused, eager.dtype, products
        coarse = (
            inherent and UNIT.get(dtype, 0.0) > UNIT[fused.dtype]
        )  # a float32 gradient behind a bfloat16 P
        self.dtype = dtype if coarse else fused.dtype
        self.unit = UNIT[self.dtype]
        self.tf32 = tf32 and fused.dtype == torch.float32
        self.inherent, self.terms, self.strain = inherent, max(terms, 1), 1.0
        self.accumulation = ACCUMULATOR * math.sqrt(self.terms)
        low_precision = self.unit > ACCUMULATOR
        self.c = (2.5 if inherent else 1.1) if low_precision else (4.0 if inherent else 2.0)
        self.shapes = [tuple(t.shape) for t in (fused, eager, truth)]
        self.fused, self.eager, self.truth = (t.detach().double() for t in (fused, eager, truth))

    def verdict(self) -> Verdict:
        if len(set(self.shapes)) > 1:
            return failed(
                self.name,
                "shapes of the fused, eager and float64 results differ: {}, {}, {}".format(*self.shapes),
            )
        if self.raw.dtype != self.eager_dtype:
            return failed(self.name, f"the fused result is {self.raw.dtype}, eager's {self.eager_dtype}")
        if self.truth.numel() == 0:
            return self._pass("the result is empty")
        rounded = self.truth.to(self.dtype).double()
        if wrong := _non_finite_differ(self.fused, self.truth.to(self.raw.dtype).double()):
            return failed(self.name, f"{wrong} elements differ from float64 in being finite, infinite or NaN")
        finite = rounded.isfinite() & self.eager.isfinite()
        self.d, self.d_eager, self.d_floor = (
            torch.where(finite, t - self.truth, 0.0) for t in (self.fused, self.eager, rounded)
        )
        self.truth = torch.where(finite, self.truth, 0.0)
        self.norm = self.truth.norm().item()
        if self.norm == 0.0:
            return self._zero()
        return self._judge()

    def _zero(self) -> Verdict:
        """Truth is zero everywhere (all keys masked, an ignored argument): nothing to be relative to."""
        worst, allowed = self.d.abs().max().item(), 2 * self.d_eager.abs().max().item()
        if worst <= allowed:
            return self._pass("the result is zero everywhere")
        return failed(
            self.name, f"the result is zero everywhere in float64, but as large as {worst:.3g} here"
        )

    def _judge(self) -> Verdict:
        self.error, self.eager_error = (d.norm().item() / self.norm for d in (self.d, self.d_eager))
        # RN(R) = R where R has few bits; a quarter of a uniform rounding error is then still granted.
        self.floor = max(self.d_floor.norm().item() / self.norm, 0.25 * self.unit / math.sqrt(3))
        if self.inherent and self.unit > ACCUMULATOR:
            # Where P is near uniform dS cancels, and what rounding did to P or the output shows enlarged in
            # dq: 4.9 floors, eager's 5.1, in GPT-2 at initialisation. Eager's error then sets the limit.
            self.strain = max(
                1.0, min(1.05 * self.eager_error, MOST_STRAIN * self.floor) / (self.c * self.floor)
            )
            self.c *= 1.0 + SCATTER / math.sqrt(self.truth.numel())
        self.c *= self.strain
        self.worst_slice = self._worst_slice()
        if not self.tf32 and self.eager_error > ILL_CONDITIONED * self.floor + 4 * self.accumulation:
            note = f"ill-conditioned: eager itself is {self.eager_error / self.floor:.0f} floors away"
            ok = self.error <= 2 * self.eager_error
            return self._done(
                ok, note if ok else f"{note}, and the fused result {self.error / self.floor:.0f}"
            )
        rules = (self._absolute, self._slices, self._maximum, self._elementwise, self._biased)
        reasons = [reason for rule in rules if (reason := rule())]
        return self._done(not reasons, "; ".join(reasons))

    def _absolute(self) -> str:
        """Rules 2 and the first half of 4."""
        if self.tf32:
            limit = TF32_ERROR * (2.5 if self.inherent else 1.0)
            return "" if self.error <= limit else f"error {self.error:.3g} exceeds TF32's {limit:.3g}"
        limit = self.c * self.floor + self.accumulation
        if self.error > limit:
            floors = self.error / self.floor
            allowed = f"{self.c:g} and {self.accumulation:.3g} for its sums"
            return f"error {self.error:.3g} is {floors:.3g} rounding floors; allowed are {allowed}"
        baseline = max(self.eager_error, self.c / 1.1 * self.floor)
        if self.error > 1.05 * baseline + 0.05 * self.floor + 0.5 * self.accumulation:
            return f"error {self.error:.3g} exceeds eager's {self.eager_error:.3g}"
        return ""

    def _slices(self) -> str:
        if self.worst_slice <= 1.0:
            return ""
        return f"a row or column has {self.worst_slice:.3g} times the error allowed to it"

    def _worst_slice(self) -> float:
        """Rule 3: the worst error of a row or column over what it is allowed."""
        if self.truth.ndim < 2:
            return 0.0
        worst = 0.0
        for dim in (1, 0):
            parts = (self.d, self.d_floor, self.truth, self.d_eager)
            d, d_floor, r, d_eager = (t.reshape(-1, t.shape[-1]) for t in parts)
            length = d.shape[dim]
            if length < SLICE_LENGTH:
                continue
            d, d_floor, r, d_eager = (t.norm(dim=dim) for t in (d, d_floor, r, d_eager))
            typical = self.norm * math.sqrt(length / self.truth.numel())
            floor = torch.maximum(d_floor, 0.25 * self.unit / math.sqrt(3) * r)
            allowed = (3.5 * self.strain if self.c > 2 else 1.5 * self.c / 1.1) * floor
            allowed = allowed + 3 * self.accumulation * r.clamp(min=typical)
            if self.inherent and self.unit > ACCUMULATOR:
                allowed = torch.maximum(
                    allowed, torch.minimum(4 * d_eager, allowed + 2 * self.unit * typical)
                )
            if self.inherent and self.name.startswith("grad"):
                # dS = P (dP - delta) cancels, in the first row of causal dq down to the rounding of delta.
                # Rows of a flash attention needed up to 5.4 units of a typical row on top of 3.5 floors.
                allowed = allowed + 8 * self.unit * typical
            if self.tf32:
                allowed = allowed + 3.5 * TF32_ERROR * r.clamp(min=typical)
            worst = max(worst, (d / allowed.clamp(min=1e-300)).max().item())
        return worst

    def _maximum(self) -> str:
        """The second half of rule 4."""
        rms = self.norm / math.sqrt(self.truth.numel())
        floor = max(self.d_floor.abs().max().item(), 0.25 * self.unit * rms)
        limit = 2 * max(self.d_eager.abs().max().item(), self.c / 1.1 * floor) + 4 * self.accumulation * rms
        if self.tf32:
            limit += 8 * TF32_ERROR * rms * (2.5 if self.inherent else 1.0)  # as in _absolute
        worst = self.d.abs().max().item()
        return "" if worst <= limit else f"the largest error {worst:.3g} exceeds {limit:.3g}, twice eager's"

    def _elementwise(self) -> str:
        """Rule 5."""
        if self.products is None:
            return ""
        gamma = self.terms * ACCUMULATOR / (1 - self.terms * ACCUMULATOR) + (2.0**-10 if self.tf32 else 0.0)
        tiny = torch.finfo(self.dtype).smallest_normal * self.unit
        bound = gamma * self.products.double() + self.unit * self.truth.abs() + tiny
        excess = (self.d.abs() / bound).max().item()
        return (
            ""
            if excess <= 1.0
            else f"an element is {excess:.3g} times as wrong as its sum of products allows"
        )

    def _biased(self) -> str:
        """Rule 6. Errors of a row share its statistic: the standard error is over rows and columns too."""
        if self.tf32:  # cutting operands is biased by nature
            return ""
        allowance = (0.02 * self.unit + ACCUMULATOR) * self.truth.abs().mean().item()
        for sign, what in ((1.0, "mean error"), (self.truth.sign(), "mean error towards or from zero")):
            d = self.d * sign
            error = _standard_error(d)
            mean = d.mean().item()
            if error is not None and abs(mean) > 5 * error + allowance:
                away = abs(mean) / (error + 1e-300)
                return f"{what} {mean:.3g} is {away:.0f} standard errors from zero: a bias"
        return ""

    def _pass(self, reason: str) -> Verdict:
        return Verdict(
            name=self.name, error=0.0, floor=0.0, eager_error=0.0, worst_slice=0.0, ok=True, reason=reason
        )

    def _done(self, ok: bool, reason: str) -> Verdict:
        return Verdict(
            name=self.name,
            error=self.error,
            floor=self.floor,
            eager_error=self.eager_error,
            worst_slice=self.worst_slice,
            ok=ok,
            reason=reason,
        )


def _standard_error(d: Tensor) -> float | None:
    """Of the mean of d, the largest of what elements, rows and columns say; None where there are too few."""
    d = d.reshape(-1, d.shape[-1]) if d.ndim > 1 else d.reshape(-1, 1)
    groups = [d.reshape(-1)]
    groups += [d.mean(dim=dim) for dim in (0, 1) if d.shape[dim] > 1 and d.shape[1 - dim] > 1]
    if min(g.numel() for g in groups) < BIAS_CLUSTERS:
        return None
    return max(g.std().item() / math.sqrt(g.numel()) for g in groups)


def _non_finite_differ(result: Tensor, expected: Tensor) -> int:
    kinds = (torch.isnan, torch.isposinf, torch.isneginf)
    return sum(int((kind(result) != kind(expected)).sum()) for kind in kinds)
