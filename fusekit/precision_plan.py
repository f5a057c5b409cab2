"""`PrecisionPlan`: which products of which layers run in FP8, as a file that another run can follow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fusekit.checkpoint import replace_text
from fusekit.precision_levels import BF16, FINE, MOST_FLIPS, Layer, Unit, level_name
from fusekit.precision_report import summary, table
from fusekit.report import render

FORMAT = "fusekit precision plan"
VERSION = 1
PLAN_FILE = "precision.json"  # in the folder of a run
MOST_NAMED = 4  # differences that an error names

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """The level of every product of every layer that FP8 could take, with the reasons and statistics.

    model: shapes of the model's matrices by parameter name; a model with others is refused.
    layers: by module name.
    fine: the scales of the middle level, "row" or "block".
    steps: optimizer steps that the statistics were taken over.
    guarded: weight gradients run in bf16 for now, after an alarm.
    """

    model: Shapes
    layers: Mapping[str, Layer] = field(default_factory=dict)
    fine: str = "row"
    steps: int = 0
    guarded: bool = False

    def rows(self) -> list[dict[str, Any]]:
        """One entry a product: layer, product, level, runs, reason, statistics, flips, window."""
        return [
            {
                "layer": name,
                "product": product,
                "level": level_name(unit.level, self.fine),
                "runs": level_name(self._runs(layer, product), self.fine),
                "reason": self._reason(layer, product),
                "statistics": unit.last,
                "samples": unit.samples,
                "flips": unit.flips,
                "pinned": unit.pinned,
                "step": unit.window,
            }
            for name, layer in self.layers.items()
            for product, unit in layer.units.items()
        ]

    def _runs(self, layer: Layer, product: str) -> int:
        return BF16 if self.guarded and product == "grad_weight" else layer.runs(product)

    def _reason(self, layer: Layer, product: str) -> str:
        unit, runs = layer.units[product], self._runs(layer, product)
        if runs == BF16 and unit.level < BF16:
            return "weight gradients are in bf16 after an alarm of the guard"
        if runs != unit.level:
            others = [name for name, other in layer.units.items() if other.level == runs]
            return f"shares the scales that {' and '.join(others)} needs"
        return unit.reason

    def to_dict(self) -> dict[str, Any]:
        layers = {
            name: {"shape": list(layer.shape), "products": {p: u.to_dict() for p, u in layer.units.items()}}
            for name, layer in self.layers.items()
        }
        model = {name: list(shape) for name, shape in self.model.items()}
        return {"format": FORMAT, "version": VERSION, "fine": self.fine, "steps": self.steps} | {
            "guarded": self.guarded, "layers": layers, "model": model,
        }  # fmt: skip

    @staticmethod
    def from_dict(content: Any, *, source: str = "this") -> PrecisionPlan:
        """What `to_dict` gave.

        Raises:
            ValueError: it is no plan, or one of another version.
        """
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{source} is no precision plan of fusekit; PrecisionPlan.save writes one")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{source} is a precision plan of version {content.get('version')}, and this fusekit reads "
                f"version {VERSION}: calibrate again"
            )
        try:
            layers = {name: _layer(entry) for name, entry in content["layers"].items()}
            model = {name: tuple(map(int, shape)) for name, shape in content["model"].items()}
            fine, steps = content["fine"], int(content["steps"])
            if fine not in FINE:
                raise ValueError
            return PrecisionPlan(
                model=model, layers=layers, fine=fine, steps=steps, guarded=bool(content["guarded"])
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"{source} is a damaged precision plan; restore it, or calibrate again"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; what was at `path` is replaced at once or, on an error, kept."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, json.dumps(self.to_dict(), indent=1) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> PrecisionPlan:
        """Read what `save` wrote.

        Raises:
            ValueError: missing, damaged, or no plan.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"a plan is a PrecisionPlan or the path of one, and got a {type(path).__name__}")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is no text"
            raise ValueError(f"the precision plan {path} cannot be read: {why}") from None
        try:
            content = json.loads(text)
        except json.JSONDecodeError:
            raise ValueError(f"{path} is no JSON, so no precision plan") from None
        return PrecisionPlan.from_dict(content, source=str(path))

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            ValueError: its matrices differ; the sentence names the first few.
        """
        own = fingerprint(model)
        missing = [f"it has no {name}" for name in self.model if name not in own]
        added = [f"the plan has no {name}" for name in own if name not in self.model]
        other = [
            f"{name} is {_by(own[name])} and was {_by(shape)}"
            for name, shape in self.model.items()
            if name in own and own[name] != shape
        ]
        if differences := [*other, *missing, *added]:
            more = f", and {len(differences) - MOST_NAMED} more" if len(differences) > MOST_NAMED else ""
            raise ValueError(
                f"this precision plan was made for another model than this {type(model).__name__}: "
                f'{"; ".join(differences[:MOST_NAMED])}{more}. Calibrate this model with precision="auto"'
            )

    def __str__(self) -> str:
        return f"{summary(self.rows())}\n{render(table(self.rows()))}"


def fingerprint(model: nn.Module) -> Shapes:
    """Shapes of the parameters that have two dimensions or more, by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.dim() > 1}


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _layer(entry: dict[str, Any]) -> Layer:
    N, K = map(int, entry["shape"])
    layer = Layer((N, K))
    for product in layer.units:
        unit = Unit(**entry["products"][product])
        if unit.level not in range(BF16 + 1) or not 0 <= unit.flips <= MOST_FLIPS:
            raise ValueError
        layer.units[product] = unit
    return layer
