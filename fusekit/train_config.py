"""How to train, checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fusekit.kernels.recipe import PRESETS

PROVIDERS = ("eager", "compile", "fusekit")
FP8 = ("fp8", *PRESETS, "auto")
PRECISIONS = ("float32", "tf32", "fp16", "bf16", *FP8)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. provider: "eager", "compile", "fusekit"; precision: "float32", "tf32", "fp16", "bf16",
    and with fusekit "fp8", the name of an FP8 recipe, "auto", or the path of a plan of "auto" (*.json).

    A step is `accumulate` batches of `batch` rows. The learning rate rises linearly for `warmup` steps, then
    falls as a cosine to a tenth. Intervals of 0 mean: only at the end. log_every 0: every step on a CPU,
    every 10th on a GPU, where reading the loss makes the host wait. precision_every: steps of the calibration
    of "auto", and between its samples afterwards.
    """

    steps: int = 300
    batch: int = 8
    context: int = 256
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    provider: str = "fusekit"
    precision: str = "bf16"
    seed: int = 0
    validate_every: int = 50
    validation_batches: int = 8
    checkpoint_every: int = 50
    log_every: int = 0
    precision_every: int = 50

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise ValueError(f"provider is one of {', '.join(PROVIDERS)}; got {self.provider!r}")
        check_precision(self.precision)
        if (self.precision in FP8 or self.decides) and self.provider != "fusekit":
            raise ValueError(
                f"precision {self.precision} is fusekit's own; {self.provider} trains in float32, tf32, fp16 "
                f"or bf16"
            )
        for name in ("steps", "batch", "context", "accumulate", "validation_batches", "precision_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "validate_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is not negative, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is greater than 0, got {getattr(self, name)}")

    @property
    def decides(self) -> bool:
        """Whether each product has a precision of its own: by samples, or by a plan."""
        return self.precision == "auto" or is_plan(self.precision)

    def learning_rate(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))


def is_plan(precision: str) -> bool:
    """Whether it is the path of a plan file and no name."""
    return precision.endswith(".json")


def check_precision(precision: str) -> str:
    """The precision itself.

    Raises:
        ValueError: it is neither a name nor the path of a plan.
    """
    if precision not in PRECISIONS and not is_plan(precision):
        raise ValueError(
            f"precision is one of {', '.join(PRECISIONS)}, or a plan file (*.json); got {precision!r}"
        )
    return precision
