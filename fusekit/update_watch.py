"""Notices when an optimizer has updated a given model: other models' optimizers step in the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class UpdateWatch:
    """updated: whether an optimizer of one of the model's parameters has stepped; reset by whoever reads it.

    Args:
        parameter_ids: the ids of the model's parameters as they are now, empty once the model is gone.
    """

    def __init__(self, parameter_ids: Callable[[], set[int]]) -> None:
        self.updated = False
        self._current, self._known = parameter_ids, set[int]()
        _watches.add(self)

    def see(self, optimizer: Optimizer) -> None:
        if self.updated:
            return
        stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        if self._known.isdisjoint(stepped):  # another model's, or parameters were replaced
            self._known = self._current()
        self.updated = not self._known.isdisjoint(stepped)


_watches: WeakSet[UpdateWatch] = WeakSet()


def _see(optimizer: Optimizer, *_: Any) -> None:
    for watch in _watches:
        watch.see(optimizer)


register_optimizer_step_post_hook(_see)
