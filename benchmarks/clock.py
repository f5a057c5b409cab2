"""How long calls take: device time on CUDA, process time on a CPU; contenders take turns; medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
QUEUE_CYCLES = 4_000_000  # about 2 ms: the host gets ahead, so launch gaps are not measured


class Clock(Protocol):
    """sample: seconds of each call, made one after the other."""

    def sample(self, calls: Sequence[Call]) -> list[float]: ...


class CudaClock:
    """CUDA events around each call, behind a sleeping kernel that lets the host fill the queue."""

    def sample(self, calls: Sequence[Call]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        torch.cuda._sleep(QUEUE_CYCLES)
        for call, (start, end) in zip(calls, events, strict=True):
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in events]


class CpuClock:
    """Process time over all threads."""

    def sample(self, calls: Sequence[Call]) -> list[float]:
        seconds = []
        for call in calls:
            started = time.process_time()
            call()
            seconds.append(time.process_time() - started)
        return seconds


def samples(
    contenders: Mapping[str, Sequence[Call]], clock: Clock, *, seconds: float, least: int, most: int
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds of single calls, the contenders in turn, each on its next copy of the data.

    Args:
        contenders: per name, the same call on several copies of the data, so that each finds the cache cold.
            Each has been called before, so nothing is compiled here.
        seconds: of wall clock for each contender; one that has used them up stops.
        least, most: samples of each, whatever the time.

    Returns:
        Samples by name, and what those raised that failed; they leave the others running.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, Exception] = {}
    used = dict.fromkeys(contenders, 0.0)
    running = dict(contenders)
    while running:
        for name, calls in list(running.items()):
            taken = found[name]
            each = used[name] / len(taken) if taken else seconds
            count = min(most - len(taken), len(calls), max(1, int((seconds - used[name]) / max(each, 1e-9))))
            started = time.perf_counter()
            try:
                taken += clock.sample([calls[(len(taken) + i) % len(calls)] for i in range(count)])
            except Exception as error:
                failed[name] = error
                del running[name]
                continue
            used[name] += time.perf_counter() - started
            if len(taken) >= most or (len(taken) >= least and used[name] >= seconds):
                del running[name]
    return found, failed
