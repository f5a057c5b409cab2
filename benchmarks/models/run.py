"""One run of the model suite: progress, results on disk after every contender, resuming."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.models.providers import PROVIDERS, REFERENCE, in_order
from benchmarks.models.race import Race
from benchmarks.models.view import failures, line, table
from benchmarks.models.zoo import ZOO, described
from benchmarks.results_file import MODEL_SCHEMA, continued, environment, write_results
from fusekit.ceilings import Ceilings, measure_ceilings

__all__ = ["Settings", "failures", "run", "table"]

LEAST = {"cpu": 60.0, "cuda": 180.0}  # seconds for a model: one measured well before four hardly at all


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; `minutes` bounds the whole run.

    models, providers: names; empty is all that the device has sizes for, and all.
    small: models of no meaning, to try the suite itself.
    warm: also the start with the compiled code of an earlier process; None: on a GPU.
    """

    device: torch.device
    models: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    minutes: float = 5.0
    small: bool = False
    warm: bool | None = None

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"--minutes is greater than 0, got {self.minutes}")
        for what, names, known in (("model", self.models, ZOO), ("provider", self.providers, PROVIDERS)):
            for name in names:
                if name not in known:
                    raise ValueError(f"there is no {what} {name!r}; there are: {', '.join(known)}")
        for name in self.models:
            if not (self.small or self.device.type in ZOO[name].sizes):
                raise ValueError(
                    f"{name} is not measured on {self.device.type}; there are: {', '.join(self._at_hand())}"
                )

    def chosen_models(self) -> tuple[str, ...]:
        return self.models or self._at_hand()

    def chosen_providers(self) -> tuple[str, ...]:
        """The reference is always among them: its losses are what the others are held against."""
        chosen = {REFERENCE, *(self.providers or PROVIDERS)}
        return tuple(name for name in PROVIDERS if name in chosen)

    def measures_warm_start(self) -> bool:
        return self.device.type == "cuda" if self.warm is None else self.warm

    def _at_hand(self) -> tuple[str, ...]:
        return tuple(name for name, row in ZOO.items() if self.device.type in row.sizes)


def run(settings: Settings, path: Path, console: Console, *, fresh: bool = False) -> dict[str, Any]:
    """Measure everything that fits the time, or what an interrupted run has left over.

    Results are in `path` with the suffix .partial until the run is through, then in `path`.

    Raises:
        ValueError: an interrupted run with other settings, versions or code is in the way.
    """
    end = time.monotonic() + 60 * settings.minutes
    partial = path.with_name(path.name + ".partial")
    with _threads(settings.device):
        results = _start(settings)
        if partial.exists() and not fresh:
            results = continued(partial, results)
            console.print(f"continuing {partial}: {len(results['done'])} models are there", highlight=False)
        for name, found in results["providers"].items():
            if found["obstacle"]:
                console.print(f"{name}: skipped, {found['obstacle']}", highlight=False)
        ceilings = measure_ceilings(settings.device, (torch.float32, torch.bfloat16))
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()  # for the contenders
    results["ceilings"] = asdict(ceilings)
    # What an interrupted run began of a model is measured anew: contenders take turns, or not at all.
    results["cells"] = [c for c in results["cells"] if c["model"] in results["done"]]
    write_results(partial, results)
    _measure_all(settings, results, ceilings, end, partial, console)
    write_results(path, results)
    partial.unlink()
    return results


@contextmanager
def _threads(device: torch.device) -> Iterator[None]:
    """One thread on a CPU: the ceilings' and the environment's are those of the contenders."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _start(settings: Settings) -> dict[str, Any]:
    chosen = {
        "models": list(settings.chosen_models()),
        "providers": list(settings.chosen_providers()),
        "small": settings.small,
        "warm": settings.measures_warm_start(),
    }
    survey = {
        name: {"version": PROVIDERS[name].version(), "obstacle": PROVIDERS[name].obstacle(settings.device)}
        for name in settings.chosen_providers()
    }
    return {
        "kind": "models",
        "schema": MODEL_SCHEMA,
        "environment": environment() | {"device": settings.device.type},
        "settings": chosen,
        "providers": survey,
        "ceilings": {},
        "models": {},
        "done": [],
        "left_out": {},
        "cells": [],
    }


def _measure_all(
    settings: Settings,
    results: dict[str, Any],
    ceilings: Ceilings,
    end: float,
    partial: Path,
    console: Console,
) -> None:
    able = [name for name in settings.chosen_providers() if not results["providers"][name]["obstacle"]]
    able = in_order(able, settings.device)
    models = [name for name in settings.chosen_models() if name not in results["done"]]
    starts: dict[str, float] = {}
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
    with bar, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        task = bar.add_task("models", total=len(models) * len(able))
        for number, model in enumerate(models):
            row = ZOO[model]
            facts = described(row, row.sizes_on(settings.device, settings.small))
            results["models"][model] = facts
            before, done = list(results["cells"]), number * len(able)

            def keep(race: Race, status: str, before: list[Any] = before, done: int = done) -> None:
                results["cells"] = before + list(race.cells.values())
                bar.update(task, description=f"{race.model}: {status}", completed=done + len(race.cells))
                write_results(partial, results)

            now = time.monotonic()
            race = Race(
                model=model, facts=facts, device=settings.device, small=settings.small,
                warm=settings.measures_warm_start(), ceilings=ceilings, keep=keep, starts=starts,
                end=min(end, now + max((end - now) / (len(models) - number), LEAST[settings.device.type])),
                folder=Path(folder) / str(number),
            )  # fmt: skip
            race.run(able)
            results["done"].append(model)
            left_out = {f"{model} {n}": c["left_out"] for n, c in race.cells.items() if "left_out" in c}
            results["left_out"] |= left_out
            keep(race, "done")
            if bar.disable:
                for cell in race.cells.values():
                    console.print(line(cell), highlight=False, soft_wrap=True, markup=False)
