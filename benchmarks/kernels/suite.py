"""The kernel suite: op × shape × dtype × direction × provider, on the device at hand.

A case (an op on one sample in one dtype) is the unit of work: its providers are checked against float64, then
timed in turn, so that a slow moment meets all of them, on copies of the data that together fit no cache. A
provider that fails or computes something else shows that in its cell; everything else goes on.

The forward pass is a training step's: it saves what its backward pass needs. Bytes are the least any
implementation must move (inputs once, outputs once; backward: inputs, their gradients and the outputs'
gradients once), so GB/s of two providers compare their times, not their traffic.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Call, Clock, CpuClock, CudaClock, samples
from benchmarks.kernels.accuracy import Judge
from benchmarks.kernels.cases import Case, copies, prepare
from benchmarks.kernels.providers import function
from benchmarks.kernels.rivals import Unfit
from benchmarks.kernels.work import Work, work
from fusekit.ceilings import Ceilings
from fusekit.kernels.trial import failure
from fusekit.meter import peak_memory, reset_peak

CPU_CACHE_BYTES = 64 << 20
Cells = dict[tuple[str, str], dict[str, Any]]  # by provider and direction
Functions = dict[str, Callable[..., Any]]  # by provider
LEAST_SAMPLES, MOST_SAMPLES = 3, 40
CASE_SHARE = 0.15  # a case that is expected to take more of the time given is left out
COMPILE_SECONDS = 6.0  # what torch.compile adds to a case, roughly


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; `minutes` bounds the whole run."""

    device: torch.device
    ops: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    providers: tuple[str, ...]
    minutes: float = 5.0
    seconds: float = 0.3  # per cell
    small: bool = False
    largest_first: bool = False  # and the first dtype before the others: for a GPU that is lent for minutes

    def clock(self) -> Clock:
        return CudaClock() if self.device.type == "cuda" else CpuClock()


def obstacle(case: Case, settings: Settings, ceilings: Ceilings, left: float) -> str | None:
    """Why a case is not worth its time or memory here, as a sentence; None: measure it."""
    tasks = work(case).values()
    seconds = _eager_seconds(case, ceilings) * len(settings.providers) * (1 + LEAST_SAMPLES)
    seconds += COMPILE_SECONDS * sum(name.startswith("compile") for name in settings.providers)
    if seconds > left:
        return f"no time left for its {seconds:.0f} s; more --minutes include it"
    if seconds > CASE_SHARE * 60 * settings.minutes:
        return (
            f"would take about {seconds:.0f} s of the {60 * settings.minutes:.0f}; more --minutes include it"
        )
    needed, available = 2 * len(settings.providers) * max(t.moved for t in tasks), _memory(settings.device)
    if available and needed > 0.8 * available:
        return (
            f"would take about {needed / 2**30:.1f} GiB of memory, of which {available / 2**30:.1f} are free"
        )
    return None


def _eager_seconds(case: Case, ceilings: Ceilings) -> float:
    """About how long one forward and backward pass takes; where a CPU emulates a dtype, that is long."""
    rates = ceilings.flops_per_second
    own = rates.get(dtype_name(case), rates["float32"])
    return sum(t.flops / own + 3 * t.moved / ceilings.bytes_per_second for t in work(case).values())


def measure(case: Case, settings: Settings, ceilings: Ceilings) -> list[dict[str, Any]]:
    """The cells of one case: per provider and direction times and errors, or what went wrong."""
    torch._dynamo.reset()
    tasks = work(case)
    cells, working = _judge(case, settings, tasks)
    cache = CPU_CACHE_BYTES if settings.device.type == "cpu" else None
    repeated = copies(case.sample.args, cache)
    if _eager_seconds(case, ceilings) > settings.seconds:  # so much arithmetic that a cold cache is nothing
        del repeated[2:]
    for direction in tasks:
        timed = {name: fn for name, fn in working.items() if "failed" not in cells[name, direction]}
        for name, result in _time(case.name, timed, direction, repeated, settings).items():
            cells[name, direction] |= result
    return [_described(case, *key, cell, tasks[key[1]], ceilings) for key, cell in cells.items()]


def _judge(case: Case, settings: Settings, tasks: Mapping[str, Work]) -> tuple[Cells, Functions]:
    """Every provider's errors, and the functions that work at all."""
    judge, working = Judge(case), Functions()
    cells: Cells = {}
    for provider in sorted(settings.providers, key=lambda name: name != "eager"):  # eager sets the standard
        started = time.perf_counter()
        try:
            fn = function(provider, case.name)
            errors, wrong = judge.errors(fn, provider)
        except Unfit as reason:
            cells |= {(provider, direction): {"skipped": str(reason)} for direction in tasks}
        except Exception as error:  # one provider that fails must not hide the others
            cells |= {(provider, direction): {"failed": failure(error)} for direction in tasks}
        else:
            working[provider] = fn
            for direction in tasks:
                cell = {"error": errors[direction], "first_seconds": time.perf_counter() - started}
                cells[provider, direction] = cell | (
                    {"failed": wrong[direction]} if direction in wrong else {}
                )
    return cells, working


def _time(
    op: str,
    working: Mapping[str, Callable[..., Any]],
    direction: str,
    repeated: list[tuple[Any, ...]],
    settings: Settings,
) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {name: {} for name in working}
    contenders: dict[str, list[Call]] = {}
    for name, fn in working.items():
        try:
            made = (prepare(op, direction)(fn, args) for args in repeated)
            calls = [call for call in made if call is not None]
            reset_peak(settings.device)
            calls[0]()  # warm: judged before, but the first call on these strides may compile again
            if settings.device.type == "cuda":
                results[name]["peak_bytes"] = peak_memory(settings.device)
            contenders[name] = calls
        except Exception as error:
            results[name]["failed"] = failure(error)
    found, failed = samples(
        contenders, settings.clock(), seconds=settings.seconds, least=LEAST_SAMPLES, most=MOST_SAMPLES
    )
    for name, raised in failed.items():
        results[name]["failed"] = failure(raised)
    for name, values in found.items():
        if name not in failed:
            results[name] |= _spread(values)
    contenders.clear()
    gc.collect()
    return results


def _spread(values: list[float]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    rounded = [float(f"{v:.5g}") for v in values]
    return {"seconds": statistics.median(values), "quartiles": [low, high], "samples": rounded}


def _described(
    case: Case, provider: str, direction: str, cell: dict[str, Any], task: Work, ceilings: Ceilings
) -> dict[str, Any]:
    """A cell with its coordinates, and its rates where it has a time."""
    name = case.sample.name or str(case.index)
    shapes = [list(a.shape) for a in case.sample.args if isinstance(a, Tensor)]
    key = {"op": case.name, "sample": name, "dtype": dtype_name(case), "shapes": shapes}
    full = key | {"direction": direction, "provider": provider} | cell
    if "failed" in cell or "seconds" not in cell:
        return {
            name: value for name, value in full.items() if name not in ("seconds", "samples", "quartiles")
        }
    return full | {
        "flops": task.flops,
        "bytes": task.moved,
        "flops_per_second": task.flops / cell["seconds"],
        "bytes_per_second": task.moved / cell["seconds"],
        "share": ceilings.least_seconds(task.flops, task.moved, dtype_name(case)) / cell["seconds"],
    }


def dtype_name(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def _memory(device: torch.device) -> int | None:
    """Free bytes; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
