"""One part of `make gpu`, in the process that `benchmarks.gpu.run` started for it.

It measures until its time is up, and leaves a note: status, failures, what was left out and why. Without a
note, the process crashed.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu.run import LOST_DEVICE
from benchmarks.kernels import run as kernel_run
from benchmarks.kernels.cases import MEASURED
from benchmarks.kernels.providers import STANDARD
from benchmarks.kernels.rivals import RIVALS
from benchmarks.kernels.suite import Settings
from benchmarks.results_file import read_kernels, write_results

DTYPES = (torch.bfloat16, torch.float32, torch.float16)  # the first is finished before the next begins
MODELS = ("GPT-2 124M", "Llama 1B", "ViT-B", "ResNet-50")
MODEL_PROVIDERS = (
    "eager float32",
    "eager bf16",
    "compile bf16",
    "liger bf16",
    "fusekit bf16",
    "fusekit bf16 inductor",
)
MODEL_MINUTES = 2.0  # for one model: its providers start one after the other, and most compile


@dataclass(frozen=True, kw_only=True)
class Job:
    """until: of time.time()."""

    out: Path
    until: float
    dry: bool
    fresh: bool
    console: Console

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def minutes(self) -> float:
        return max((self.until - time.time()) / 60, 1e-3)


def kernels(job: Job) -> dict[str, Any]:
    settings = Settings(
        device=job.device,
        ops=tuple(MEASURED),
        dtypes=DTYPES[:1] if job.dry else DTYPES,
        providers=("eager", "fusekit") if job.dry else (*STANDARD, *RIVALS),
        minutes=job.minutes,
        seconds=0.002 if job.dry else Settings.seconds,
        small=job.dry,
        largest_first=True,
    )
    _reopen(job)
    results = _anew_if_in_the_way(kernel_run.run, settings, job)
    ours = [text for text in kernel_run.failures(results) if " fusekit: " in text]
    counts = {"cases": len(results["done"]), "cells": len(results["cells"])}
    return _outcome(results["left_out"], ours) | {"counts": counts}


def _reopen(job: Job) -> None:
    """A run that ended with cases left out for lack of time continues with them."""
    partial = job.out.with_name(job.out.name + ".partial")
    if job.fresh or partial.exists() or not job.out.exists():
        return
    try:
        earlier = read_kernels(job.out)
    except ValueError:
        return
    if earlier["left_out"]:
        write_results(partial, earlier)


def models(job: Job) -> dict[str, Any]:
    """As many as there is time for, the most telling first; dry, a small one by two providers."""
    suite = _module("benchmarks.models.run")
    many = max(1, int(job.minutes / MODEL_MINUTES))
    settings = suite.Settings(
        device=job.device,
        models=("GPT 17M",) if job.dry else MODELS[:many],
        providers=("eager float32", "fusekit bf16") if job.dry else MODEL_PROVIDERS,
        minutes=job.minutes,
        small=job.dry,
    )
    results = _anew_if_in_the_way(suite.run, settings, job)
    ours = [text for text in suite.failures(results) if " fusekit " in text]
    counts = {"models": len(results["done"]), "cells": len(results["cells"])}
    return _outcome(results["left_out"], ours) | {"counts": counts}


def _anew_if_in_the_way(run: Callable[..., dict[str, Any]], settings: Any, job: Job) -> dict[str, Any]:
    """An interrupted run of other code must not stop this one: the machine's time is short."""
    try:
        return run(settings, job.out, job.console, fresh=job.fresh)
    except ValueError as error:
        if job.fresh:
            raise
        job.console.print(f"starting anew, for {error}", highlight=False, soft_wrap=True, markup=False)
        return run(settings, job.out, job.console, fresh=True)


def tuning(job: Job) -> dict[str, Any]:
    tune = _module("benchmarks.tune")
    held = tune.run(job.device, job.out, job.console, minutes=job.minutes, dry=job.dry)
    if not job.dry:
        tune.install(held)
        for name in ("benchmarks.tune_attention", "benchmarks.tune_fp8"):
            _module(name).run(job.device, job.console)
    left = dict.fromkeys(held["left"], "the time was over")
    return _outcome(left, tune.failures(held)) | {"counts": {"buckets": len(held["done"])}}


PARTS: dict[str, Callable[[Job], dict[str, Any]]] = {"kernels": kernels, "models": models, "tuning": tuning}


class Missing(Exception):
    """The part needs something that is not here."""


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = error.name or name
        if package.startswith("benchmarks"):
            raise Missing(f"this checkout has no {package}") from None
        raise Missing(f"needs {package}, which is not installed: pip install {package}") from None


def _outcome(left_out: dict[str, str], failures: list[str]) -> dict[str, Any]:
    reason = f"{len(left_out)} measurements were left out" if left_out else ""
    status = "incomplete" if left_out else "complete"
    return {"status": status, "reason": reason, "failures": failures, "left_out": left_out}


def _run(name: str, job: Job) -> tuple[int, dict[str, Any]]:
    try:
        return 0, PARTS[name](job)
    except Missing as error:
        return 0, {"status": "skipped", "reason": str(error)}
    except ValueError as error:  # ours: a sentence
        return 0, {"status": "skipped", "reason": str(error)}
    except kernel_run.DeviceLost as error:
        return LOST_DEVICE, {"status": "incomplete", "reason": str(error)}
    except KeyboardInterrupt:
        return 0, {"status": "incomplete", "reason": "stopped; the same command continues"}
    except Exception as error:
        import traceback

        traceback.print_exc()
        return 0, {
            "status": "failed",
            "reason": f"{type(error).__name__}: {str(error).strip() or 'no message'}",
        }


def main(arguments: list[str]) -> int:
    name, given = arguments[0], json.loads(arguments[1])
    if given["dry"]:
        torch.set_num_threads(1)
    job = Job(
        out=Path(given["out"]),
        until=given["until"],
        dry=given["dry"],
        fresh=given["fresh"],
        console=Console(width=None if sys.stdout.isatty() else 150),
    )
    code, outcome = _run(name, job)
    write_results(Path(given["note"]), outcome)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
