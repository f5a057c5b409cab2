"""Is a provider's result the op's? Its error against float64, beside eager's and the dtype's own rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, gradients_of
from fusekit.kernels.parity import longest_sum, results_and_grads, widen

# Times the error that eager, or rounding alone, would make. Above it a result is not worse, but another one;
# whether an op is as good as its dtype allows is asked by the tests, more strictly.
WRONG = 8.0


class Judge:
    """Holds a case's float64 results while its providers are compared with them; eager comes first."""

    def __init__(self, case: Case) -> None:
        self.args, self.dtype, self.gradients = case.sample.args, case.dtype, gradients_of(case.name)
        self.truth = results_and_grads(case.op.reference, widen(self.args))
        self.allowed = {
            name: max(_error(exact.to(self.dtype), exact), 2.0**-24 * math.sqrt(longest_sum(self.args)))
            for name, exact in self.truth.items()
        }

    def errors(self, fn: Callable[..., Any], provider: str) -> tuple[dict[str, float], dict[str, str]]:
        """Largest relative Frobenius error by direction, and a sentence for a direction that is wrong."""
        results = results_and_grads(fn, self.args)
        by_name = {name: self._error_of(results, name) for name in self.truth}
        if provider == "eager":
            for name, error in by_name.items():
                if math.isfinite(error):
                    self.allowed[name] = max(self.allowed[name], error)
        errors: dict[str, float] = {}
        wrong: dict[str, str] = {}
        for name, error in by_name.items():
            direction = self.gradients if name.startswith("grad") else "forward"
            errors[direction] = max(errors.get(direction, 0.0), error)
            if not error <= WRONG * self.allowed[name]:
                wrong.setdefault(direction, _sentence(name, error, self.allowed[name]))
        return errors, wrong

    def forget(self) -> None:
        """Free the float64 results."""
        self.truth = {}

    def _error_of(self, results: Mapping[str, Tensor], name: str) -> float:
        if name not in results or results[name].shape != self.truth[name].shape:
            return math.nan
        return _error(results[name], self.truth[name])


def _error(result: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; infinite where one is finite and the other is not."""
    result = result.to(torch.float64)
    finite = exact.isfinite()
    if not torch.equal(finite, result.isfinite()):
        return math.inf
    norm = torch.where(finite, exact, 0.0).norm().item()
    difference = torch.where(finite, result - exact, 0.0).norm().item()
    return difference / norm if norm else difference


def _sentence(name: str, error: float, allowed: float) -> str:
    if math.isnan(error):
        return f"wrong result: {name} is missing or has another shape"
    if math.isinf(error):
        return f"wrong result: {name} is not finite where float64 is, or the reverse"
    return f"wrong result: the error of {name} is {error:.1e}, eager's or rounding's {allowed:.1e}"
