"""A cell of the kernel suite as pytest-benchmark sees it: judged first, then timed with the suite's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch

from benchmarks.clock import Call
from benchmarks.kernels.accuracy import Judge
from benchmarks.kernels.cases import Case, copies, prepare
from benchmarks.kernels.plan import draw
from benchmarks.kernels.providers import function, survey
from benchmarks.kernels.rivals import Unfit
from benchmarks.kernels.suite import (
    CPU_CACHE_BYTES,
    LEAST_SAMPLES,
    MOST_SAMPLES,
    Settings,
    dtype_name,
    obstacle,
)
from benchmarks.kernels.work import work
from benchmarks.results_file import environment
from fusekit.ceilings import measure_ceilings

Cell = tuple[str, torch.dtype, int, str, str]  # op, dtype, position of the sample, direction, provider


class Bench:
    """One case at a time is in memory: cells come in the order of their cases."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clock = settings.clock()
        self._key: tuple[Any, ...] = ()

    def measure(self, cell: Cell, benchmark: Any) -> None:
        """Skips what cannot run, fails what is wrong, and gives the rest to pytest-benchmark."""
        *key, direction, provider = cell
        self._skip_unable(provider)
        self._draw(*key)  # type: ignore[arg-type]
        if direction not in self._work:
            pytest.skip("the sample has no gradient")
        reason = obstacle(self._case, self.settings, self.ceilings, float("inf"))
        if reason is not None:
            pytest.skip(reason)
        fn, error = self._judged(provider, direction)
        calls = self._calls(fn, direction)
        self._describe(benchmark, cell, error)
        self._time(benchmark, calls)
        self._rate(benchmark, direction)

    @cached_property
    def ceilings(self) -> Any:
        return measure_ceilings(self.settings.device, self.settings.dtypes)

    @cached_property
    def _survey(self) -> dict[str, dict[str, str | None]]:
        return survey(self.settings.providers, self.settings.device)

    @cached_property
    def _environment(self) -> dict[str, Any]:
        return environment()

    def _skip_unable(self, provider: str) -> None:
        reason = self._survey[provider]["obstacle"]
        if reason:
            pytest.skip(f"{provider}: {reason}")

    def _draw(self, op: str, dtype: torch.dtype, index: int) -> None:
        if self._key == (op, dtype, index):
            return
        torch._dynamo.reset()
        self._case: Case = draw(op, dtype, self.settings, index)
        self._work = work(self._case)
        self._results: dict[str, Any] = {}
        self._judge: Judge | None = None
        self._key = (op, dtype, index)

    def _judged(self, provider: str, direction: str) -> tuple[Callable[..., Any], float]:
        """The provider's function and its error; eager is judged first, because it sets the standard."""
        if self._judge is None:
            self._judge = Judge(self._case)
            eager = function("eager", self._case.name)
            self._results["eager"] = eager, *self._judge.errors(eager, "eager")
        if provider not in self._results:
            try:
                fn = function(provider, self._case.name)
                self._results[provider] = fn, *self._judge.errors(fn, provider)
            except Unfit as reason:
                pytest.skip(f"{provider}: {reason}")
        fn, errors, wrong = self._results[provider]
        if direction in wrong:
            pytest.fail(wrong[direction], pytrace=False)
        return fn, errors[direction]

    def _calls(self, fn: Callable[..., Any], direction: str) -> list[Call]:
        cache = CPU_CACHE_BYTES if self.settings.device.type == "cpu" else None
        calls = [
            prepare(self._case.name, direction)(fn, args) for args in copies(self._case.sample.args, cache)
        ]
        return [call for call in calls if call is not None]

    def _describe(self, benchmark: Any, cell: Cell, error: float) -> None:
        op, _, index, direction, provider = cell
        name = self._case.sample.name or str(index)
        task, machine = self._work[direction], self._environment
        benchmark.group = f"{op} {name} {dtype_name(self._case)} {direction}"
        benchmark.extra_info |= {
            "op": op,
            "sample": name,
            "dtype": dtype_name(self._case),
            "direction": direction,
            "provider": provider,
            "version": self._survey[provider]["version"],
            "device": machine.get("gpu", machine["cpu"]),
            "torch": machine["torch"],
            "triton": machine["triton"],
            "commit": machine["commit"],
            "shapes": [list(a.shape) for a in self._case.sample.args if isinstance(a, torch.Tensor)],
            "flops": task.flops,
            "bytes": task.moved,
            "error": error,
        }

    def _time(self, benchmark: Any, calls: list[Call]) -> None:
        """Rounds of one call each, on the next copy of the data; the timer reads what our clock summed."""
        calls[0]()  # warm: on these strides it may compile again
        started = time.perf_counter()
        self.clock.sample(calls[:1])
        each = max(time.perf_counter() - started, 1e-9)
        rounds = int(min(MOST_SAMPLES, max(LEAST_SAMPLES, self.settings.seconds / each)))
        summed, number = 0.0, 0

        def call() -> None:
            nonlocal summed, number
            summed += self.clock.sample([calls[number % len(calls)]])[0]
            number += 1

        benchmark._timer = lambda: summed
        benchmark.pedantic(call, rounds=rounds, iterations=1)

    def _rate(self, benchmark: Any, direction: str) -> None:
        if benchmark.stats is None:  # --benchmark-disable
            return
        seconds, task = benchmark.stats.stats.median, self._work[direction]
        least = self.ceilings.least_seconds(task.flops, task.moved, dtype_name(self._case))
        benchmark.extra_info |= {
            "flops_per_second": task.flops / seconds,
            "bytes_per_second": task.moved / seconds,
            "share": least / seconds,
        }
