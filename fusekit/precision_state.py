"""`precision_state`: what a recipe remembers from step to step, for checkpoints and loops of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusekit.passes.delayed import ModelScales
from fusekit.session import session


class PrecisionState:
    """The delayed scales of an optimised model. Empty, and every method allowed, where it has none.

    They follow the steps of torch.optim optimizers by themselves, and those that `fusekit.LossScaler` skips.
    """

    def __init__(self, scales: ModelScales | None) -> None:
        self._scales = scales

    def update(self, skip: Tensor | None = None) -> None:
        """For a loop without a torch.optim optimizer: once a step, after the last backward pass.

        Args:
            skip: one number, on any device, that is not 0 where the step is skipped; it is not waited for.
        """
        if self._scales is not None:
            self._scales.update(skip=skip)

    def agree_within(self, group: torch.distributed.ProcessGroup | None) -> None:
        """The processes that share the largest values. Inside DistributedDataParallel they are found."""
        if self._scales is not None:
            self._scales.group = group

    def state_dict(self) -> dict[str, Any]:
        """Names and tensors, for a checkpoint; {} where nothing is remembered."""
        return {} if self._scales is None else self._scales.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, bit for bit. An empty state starts anew.

        Raises:
            ValueError: the state is of another model, or of a recipe with another length of history.
        """
        if self._scales is not None:
            self._scales.load_state_dict(state or {"weights": list(self._scales.names)})
        elif state:
            raise ValueError(
                "this state has delayed scales and the model none: optimise it with the precision that the "
                "state was saved with"
            )


def precision_state(model: nn.Module) -> PrecisionState:
    """What the precision of an optimised model remembers between steps; model.state_dict() has none of it.

        torch.save({"model": model.state_dict(), "precision": fusekit.precision_state(model).state_dict()}, f)
        fusekit.precision_state(model).load_state_dict(torch.load(f)["precision"])

    Raises:
        ValueError: the model is not optimised.
    """
    return PrecisionState(session(model).settings.scales)
