"""`AutoPrecision`: what `precision="auto"` may do, checked when made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusekit.kernels.recipe import Recipe
from fusekit.precision_levels import FINE

if TYPE_CHECKING:
    from fusekit.precision_plan import PrecisionPlan

MODES = ("observe", "calibrate", "frozen", "adaptive")


@dataclass(frozen=True, kw_only=True)
class AutoPrecision:
    """A precision for each product of each linear layer, from samples of the run's own values.

    mode: "observe" runs in bf16 and records what FP8 would lose. "calibrate" does so for `calibration` steps,
        after which the plan is ready to be saved, and stays in bf16. "frozen" follows a plan, by default one
        that it calibrates first, and only ever takes products out of FP8. "adaptive" also puts them back.
    every: steps between samples.
    calibration: steps in bf16 before a plan is made, where none is given.
    rows: tokens of a sample, of one batch.
    fine: "row" or "block": the scales of the level between one scale a tensor and bf16. A given plan has its
        own.
    plan: a PrecisionPlan, or the path of one.
    guard: for 200 steps after a burst of the loss or of the gradient's norm weight gradients run in bf16;
        needs `step(loss, gradient_norm)` after every optimizer step.
    emulate: run FP8 levels also on a device without FP8 products, where they cost time; otherwise the plan is
        made there and the model stays in bf16.
    across_ranks: decide on the worst statistics of all ranks of torch.distributed's default group; False
        where ranks hold different layers.
    edge_blocks, keep: as of Recipe: what stays in bf16 whatever the statistics say.
    delayed, history, margin: as of Recipe, of layers with one scale a tensor. A layer that comes to FP8 has
        no history, and its first step takes each tensor's own scale.

    A step is one optimizer step, however many micro-batches it has; the first of them is sampled.
    """

    mode: str = "frozen"
    every: int = 100
    calibration: int = 50
    rows: int = 256
    fine: str = "row"
    plan: PrecisionPlan | str | os.PathLike[str] | None = None
    guard: bool = True
    emulate: bool = False
    across_ranks: bool = True
    edge_blocks: int = 0
    keep: tuple[str, ...] = ()
    delayed: bool = False
    history: int = 1024
    margin: int = 0

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("fine", tuple(FINE))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"AutoPrecision: {name} is one of {', '.join(known)}, and got {getattr(self, name)!r}"
                )
        for name in ("every", "calibration", "rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"AutoPrecision: {name} is a whole number above 0, and got {value!r}")
        for name in ("guard", "emulate", "across_ranks"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"AutoPrecision: {name} is True or False, and got {getattr(self, name)!r}")
        if self.rows > 4096:
            raise ValueError(
                f"AutoPrecision: rows={self.rows} is above 4096, and a sample would cost more than it tells"
            )
        if self.mode == "calibrate" and self.plan is not None:
            raise ValueError('AutoPrecision: mode="calibrate" makes a plan and takes none; use mode="frozen"')
        self.recipe()

    def recipe(self) -> Recipe:
        """The coarsest level, with what stays in bf16; Recipe checks the latter."""
        return Recipe(
            edge_blocks=self.edge_blocks, keep=self.keep, delayed=self.delayed, history=self.history,
            margin=self.margin,
        )  # fmt: skip

    @property
    def interval(self) -> int:
        """Steps between samples while a plan is made: ten of them, or more."""
        return max(1, min(self.every, self.calibration // 10))
