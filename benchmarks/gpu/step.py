"""A GPT's training step, forward to optimizer, in bf16: eager autocast, torch.compile and fusekit."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.suite import sentence
from benchmarks.results_file import environment, write_results
from fusekit.data import Corpus
from fusekit.gpt import GPT, GPTConfig
from fusekit.meter import Stopwatch, peak_memory, reset_peak
from fusekit.monitor import Monitor
from fusekit.train_config import TrainConfig
from fusekit.trainer import Trainer

# Name: sizes, rows of a batch, timed steps.
MODELS = {
    "GPT-2 124M": (GPTConfig(vocab=50304, context=1024, layers=12, heads=12, width=768), 16, 10),
    "tiny GPT": (GPTConfig(vocab=128, context=32, layers=1, heads=2, width=32), 2, 2),
}
PROVIDERS = ("eager", "fusekit", "compile")
WARM_UP = 2
LEAST_SECONDS = 30.0  # to compile a model and take its steps


@dataclass(frozen=True, kw_only=True)
class Settings:
    device: torch.device
    models: tuple[str, ...] = ("GPT-2 124M",)
    providers: tuple[str, ...] = PROVIDERS
    minutes: float = 3.0
    small: bool = False


def run(settings: Settings, path: Path, console: Console, *, fresh: bool = False) -> dict[str, Any]:
    """Measure what fits the time; a cell that an earlier run of the same code has is kept."""
    end = time.monotonic() + 60 * settings.minutes
    results: dict[str, Any] = {"environment": environment(), "cells": [], "left_out": {}}
    if not fresh:
        results["cells"] = _earlier(path, results["environment"])
    done = {(cell["model"], cell["provider"]) for cell in results["cells"] if "failed" not in cell}
    results["cells"] = [cell for cell in results["cells"] if "failed" not in cell]
    for model in settings.models:
        for provider in settings.providers:
            if (model, provider) in done:
                continue
            if end - time.monotonic() < (0 if settings.small else LEAST_SECONDS):
                results["left_out"][f"{model} {provider}"] = "no time left; more --minutes include it"
                continue
            cell = {"model": model, "provider": provider} | _measured(model, provider, settings.device)
            results["cells"].append(cell)
            console.print(f"{model} {provider}: {_shown(cell)}", highlight=False, soft_wrap=True)
            write_results(path, results)
    write_results(path, results)
    return results


def _earlier(path: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before["environment"].get(name) == now[name] for name in now if name != "date")
        return before["cells"] if same else []
    except (OSError, ValueError, KeyError):
        return []


def _measured(model: str, provider: str, device: torch.device) -> dict[str, Any]:
    try:
        return _steps(*MODELS[model], provider, device)
    except Exception as error:
        return {"failed": sentence(error)}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _steps(sizes: GPTConfig, batch: int, count: int, provider: str, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    tokens = torch.randint(sizes.vocab, (32 * batch * sizes.context,))
    corpus = Corpus(train=tokens, validation=tokens, vocab=sizes.vocab, digest="random")
    config = TrainConfig(provider=provider, precision="bf16", batch=batch, context=sizes.context, lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        quiet = Monitor(1, quiet=True)
        trainer = Trainer(GPT(sizes), corpus, config, Path(folder), device=device, monitor=quiet)
    watch, seconds, losses = Stopwatch(device), [], []
    for number in range(count + WARM_UP):
        if number == WARM_UP:
            reset_peak(device)
        watch.lap()
        loss, _ = trainer.train_step()
        seconds.append(watch.lap()[0])
        losses.append(loss)
    step = statistics.median(seconds[WARM_UP:])
    return {
        "seconds": step,
        "samples": seconds[WARM_UP:],
        "tokens_per_second": batch * sizes.context / step,
        "start_seconds": seconds[0] - step,
        "peak_bytes": peak_memory(device),
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
    }


def _shown(cell: dict[str, Any]) -> str:
    return cell.get("failed") or f"{1e3 * cell['seconds']:.1f} ms a step"


def table(results: dict[str, Any]) -> Table:
    eager = {cell["model"]: cell.get("seconds") for cell in results["cells"] if cell["provider"] == "eager"}
    view = Table(title="training step in bf16", title_justify="left")
    for heading in ("model", "provider", "ms", "gain", "tokens/s", "peak MB", "start s", "last loss"):
        view.add_column(heading, justify="left" if heading in ("model", "provider") else "right")
    for cell in results["cells"]:
        if "failed" in cell:
            view.add_row(cell["model"], cell["provider"], "failed")
            continue
        seconds, base = cell["seconds"], eager.get(cell["model"])
        view.add_row(
            cell["model"],
            cell["provider"],
            f"{1e3 * seconds:.1f}",
            f"{base / seconds:.2f}×" if base else "–",
            f"{cell['tokens_per_second']:,.0f}",
            f"{cell['peak_bytes'] / 2**20:,.0f}",
            f"{cell['start_seconds']:.1f}",
            f"{cell['last_loss']:.4f}",
        )
    return view


def failures(results: dict[str, Any]) -> list[str]:
    return [f"{c['model']} {c['provider']}: {c['failed']}" for c in results["cells"] if "failed" in c]
