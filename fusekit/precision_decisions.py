"""What `precision="auto"` has decided for one model, and why: levels of layers, moved by statistics.

It knows neither graphs nor samples nor ranks: that is the controller's. Levels and limits are those of
precision_levels.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fusekit.auto_precision import AutoPrecision
from fusekit.passes.cost import emulates_fp8
from fusekit.passes.region import Levels
from fusekit.passes.sampling import Key
from fusekit.precision_guard import Guard
from fusekit.precision_levels import BF16, Layer, judge, level_name, named, recipe_of
from fusekit.precision_plan import PrecisionPlan, Shapes, fingerprint
from fusekit.precision_report import reason_of


class PrecisionDecisions:
    """Layers by name with the levels of their products.

    changes: what happened, as {"step", "layer", "product", "from", "to", "reason"}; of an alarm of the guard
        layer and product are "".
    """

    def __init__(self, config: AutoPrecision, model: nn.Module) -> None:
        self.config = config
        plan = config.plan
        if plan is not None and not isinstance(plan, PrecisionPlan):
            plan = PrecisionPlan.load(plan)
        if plan is not None:
            plan.check(model)
        self.fine = config.fine if plan is None else plan.fine
        self.changes: list[dict[str, Any]] = []
        self._model: Shapes = fingerprint(model)
        self._layers: dict[str, Layer] = {}
        if plan is not None:  # a copy: levels move on
            self._layers = dict(PrecisionPlan.from_dict(plan.to_dict()).layers)
        self._planned = plan is not None
        self._calibrating = plan is None and config.mode != "observe"
        self._guard, self._alarms, self._guarded_until = Guard(), 0, 0
        self._step = 0
        self._starts_emulated = lacks_fp8(model)

    def _emulated(self) -> bool:
        return self._starts_emulated

    @property
    def live(self) -> bool:
        """Whether products run in FP8 by the plan, and not in bf16."""
        return not self.why_not_live

    @property
    def why_not_live(self) -> str:
        """Why all runs in bf16 whatever the levels say; "" where they hold."""
        if self.config.mode == "observe":
            return "only observed: the model runs in bf16"
        if self._calibrating:
            return f"in bf16 until the plan is made, after {self.config.calibration} steps"
        if self.config.mode == "calibrate":
            return "the plan is made, and the model stays in bf16 (mode calibrate)"
        if not self.config.emulate and self._emulated():
            return "in bf16: this device has no FP8 products, and AutoPrecision(emulate=True) emulates them"
        return ""

    @property
    def ready(self) -> bool:
        """Whether the plan rests on a whole calibration, or was given."""
        return not self._calibrating

    def levels(self) -> Levels:
        """What the pipeline is told."""
        watched = not (self._idle or (self.config.mode == "frozen" and self.ready))
        if why := self.why_not_live:
            return Levels(why=f"precision auto: {why}", watched=watched)
        tokens, reasons = {}, {}
        rows = PrecisionPlan(model={}, layers=self._layers, fine=self.fine, guarded=self._guarded).rows()
        for name, layer in self._layers.items():
            tokens[name] = layer.token(self.fine, low_weight_gradient=self._guarded)
            reasons[name] = reason_of([row for row in rows if row["layer"] == name])
        return Levels(tokens=tokens, reasons=reasons, why="precision auto: not in the plan", watched=watched)

    @property
    def _guarded(self) -> bool:
        return self._step < self._guarded_until

    @property
    def _idle(self) -> bool:
        """The plan is made and nothing runs by it: there is nothing left to decide."""
        return self.ready and not self.live and self.config.mode != "observe"

    @property
    def _tellable(self) -> tuple[Any, ...]:
        """Changes where `levels` does, and is quick to compare every step."""
        return len(self.changes), len(self._layers), self._guarded, self._calibrating, self.live

    def _meet(self, name: str, shape: tuple[int, int]) -> None:
        if name in self._layers:
            return
        self._layers[name] = layer = Layer(shape)
        if self._planned:
            for unit in layer.units.values():
                unit.level, unit.reason = BF16, "not in the plan"

    def _judge(self, key: Key, vectors: list[list[float]], runs: int) -> None:
        name, product = key
        unit = self._layers[name].units[product]
        statistics = [named(vector) for vector in vectors]
        for level, of_level in enumerate(statistics):
            at = level_name(level, self.fine)
            before = unit.last.get(at, {}).get("largest_amax", 0.0)
            unit.last[at] = of_level | {"largest_amax": max(before, of_level["amax"])}
        verdicts = [judge(s, product, recipe_of(i, self.fine)) for i, s in enumerate(statistics)]
        left = unit.level
        promotes = self.config.mode == "adaptive" and self.live
        if unit.observe(verdicts, self._step, runs=runs, live=self.live, may_promote=promotes):
            self._note(name, product, level_name(left, self.fine), level_name(unit.level, self.fine),
                       unit.reason)  # fmt: skip

    def _note(self, layer: str, product: str, before: str, after: str, reason: str) -> None:
        self.changes.append({
            "step": self._step, "layer": layer, "product": product, "from": before, "to": after,
            "reason": reason,
        })  # fmt: skip

    def _revert(self, name: str, reason: str) -> None:
        for product, unit in self._layers[name].units.items():
            if unit.level < BF16:
                left = level_name(unit.level, self.fine)
                unit.revert(reason, self._step)
                self._note(name, product, left, level_name(BF16, self.fine), reason)

    def _end_calibration(self) -> None:
        """The plan is made; what no sample has seen is not trusted to FP8."""
        self._calibrating, self._planned = False, True
        for layer in self._layers.values():
            for unit in layer.units.values():
                if not unit.samples:
                    unit.level, unit.reason = BF16, "not sampled in the calibration"


def lacks_fp8(model: nn.Module) -> bool:
    parameter = next(model.parameters(), None)
    return parameter is None or emulates_fp8(parameter)
