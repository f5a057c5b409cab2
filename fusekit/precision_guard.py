"""Watches loss and gradient norm of a run for bursts, on the device, without waiting for it.

A value is a burst where it is not finite, or lies 6 standard deviations above its running mean; three steps
in a row with one are an alarm. Mean and variance are exponential averages over about 100 steps, to which
bursts do not add; after an alarm they begin anew. A standard deviation is at least 1 % of the mean: a flat
loss is no reason for alarm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SCORE, STREAK = 6.0, 3
KEEP = 0.99  # weight of the past
WARM = 20  # values before any of them is a burst
LEAST_SPREAD = 0.01
_MEAN, _VARIANCE, _COUNT, _STREAK, _ALARMS = range(5)


class Guard:
    """state: (2, 5) float64, loss and gradient norm: mean, variance, count, bursts in a row, alarms."""

    def __init__(self) -> None:
        self.state = torch.zeros(2, 5, dtype=torch.float64)
        self.fed = False

    def add(self, values: Sequence[Tensor | float | None]) -> None:
        """The loss and the gradient norm of a step; None where one is not known."""
        self.fed = True
        given = [v for v in values if isinstance(v, Tensor)]
        if given and self.state.device != given[0].device:
            self.state = self.state.to(given[0].device)
        for row, value in zip(self.state, values, strict=True):
            if value is not None:
                _add(row, torch.as_tensor(value, dtype=torch.float64, device=row.device).detach().reshape(()))

    def alarms(self, joined_on: torch.device | None = None) -> int:
        """So far. Waits for the device, where there is something to wait for.

        joined_on: the device of all ranks' sum, which the backend has to support; None: of this one alone.
            All ranks have to ask, also those that were told of no loss.
        """
        if not self.fed and joined_on is None:
            return 0
        found = self.state[:, _ALARMS].sum()
        if joined_on is not None:  # their losses differ, and their precision must not
            found = found.to(joined_on)
            dist.all_reduce(found)
        return int(found.item())


def _add(row: Tensor, value: Tensor) -> None:
    mean, variance, count = row[_MEAN].clone(), row[_VARIANCE].clone(), row[_COUNT].clone()
    spread = torch.maximum(variance.sqrt(), LEAST_SPREAD * mean.abs())
    high = (value - mean > SCORE * spread) & (count >= WARM)
    burst = high | ~value.isfinite()
    streak = torch.where(burst, row[_STREAK] + 1, torch.zeros_like(mean))
    alarm = streak == STREAK
    row[_ALARMS] += alarm.double()
    row[_STREAK] = streak
    weight = torch.maximum(1 / (count + 1), torch.full_like(count, 1 - KEEP))
    difference = torch.where(burst, torch.zeros_like(value), value - mean)
    row[_MEAN] = mean + weight * difference
    row[_VARIANCE] = torch.where(burst, variance, (1 - weight) * (variance + weight * difference.square()))
    row[_COUNT] = torch.where(alarm, torch.zeros_like(count), count + (~burst).double())
