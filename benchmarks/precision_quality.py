"""What FP8 costs in training: every recipe against bf16 from the same seeds, on the same batches.

python -m benchmarks.precision_quality

A small GPT on CPython's documentation, as in `fusekit train`. Runs are paired: one seed gives both the same
weights and the same order of the data, so that the scatter between seeds, several times the effect, cancels.
The figure is the gap of the validation loss to bf16's, in per cent, with Student's 95 % interval over the
seeds. A pair is of one machine: sums of products differ between processors, and a run remembers that.

"auto" calibrates for 50 steps in bf16 and emulates its plan from there on. "fp8-attention-head" is
"fp8-tensorwise" with FP8 attention, in a model of 3 heads: the 24 features of each of 4 would not be cast.

One core, one thread. Every finished run is written down at once: a stopped experiment goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.report import style
from benchmarks.results_file import QUALITY_SCHEMA, RESULTS, environment, read_results, write_results
from fusekit.auto_precision import AutoPrecision
from fusekit.data import Corpus, load_corpus
from fusekit.gpt import GPT, GPTConfig
from fusekit.kernels.recipe import PRESETS, Recipe
from fusekit.monitor import Monitor
from fusekit.plots import INK, _finish, _pyplot
from fusekit.train_config import TrainConfig
from fusekit.trainer import Trainer

FILE = RESULTS / "precision_quality.json"
SIZES: dict[str, Any] = {"vocab": 1024, "context": 128, "layers": 3, "heads": 4, "width": 96}
STEPS, SEEDS = 250, 6


@dataclass(frozen=True)
class Way:
    """How a run trains: the precision of its configuration, or what `optimize` is given for it."""

    precision: str
    given: Recipe | AutoPrecision | None = None
    heads: int = SIZES["heads"]
    baseline: str = "bf16"


BASELINES = {"bf16": Way("bf16"), "bf16-3-heads": Way("bf16", heads=3)}
RECIPES = {
    **{name: Way(name) for name in PRESETS},
    "auto": Way("auto", AutoPrecision(emulate=True)),
    "fp8-attention-head": Way("fp8-tensorwise", Recipe(attention="head"), 3, "bf16-3-heads"),
}
WAYS = BASELINES | RECIPES
# Student's t at 97.5 % and 95 %, by degrees of freedom.
T = {
    1: (12.706, 6.314), 2: (4.303, 2.920), 3: (3.182, 2.353), 4: (2.776, 2.132), 5: (2.571, 2.015),
    6: (2.447, 1.943), 7: (2.365, 1.895), 8: (2.306, 1.860), 9: (2.262, 1.833), 10: (2.228, 1.812),
}  # fmt: skip


def train(corpus: Corpus, name: str, seed: int, steps: int, advance: Any) -> dict[str, Any]:
    """One run from its seed to its validation loss."""
    way, at = WAYS[name], environment()
    config = TrainConfig(
        steps=steps, batch=8, context=SIZES["context"], lr=2e-3, warmup=min(20, steps // 4), seed=seed,
        precision=way.precision, validate_every=0, validation_batches=20, checkpoint_every=0, log_every=1,
    )  # fmt: skip
    torch._dynamo.reset()
    torch.manual_seed(seed)
    losses: list[float] = []

    def watch(record: dict[str, Any]) -> None:
        if "loss" in record:
            losses.append(record["loss"])
            advance()

    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(steps, quiet=True)
        trainer = Trainer(
            GPT(GPTConfig(**SIZES | {"heads": way.heads})), corpus, config, Path(folder), monitor=monitor,
            watch=watch, precision=way.given,
        )  # fmt: skip
        trainer.fit()
    return {
        "precision": name,
        "seed": seed,
        "cpu": at["cpu"],
        "commit": at["commit"],
        "validation_loss": trainer.validation_loss,
        "losses": [float(f"{loss:.5g}") for loss in losses],
        "cpu_seconds": time.process_time() - started,
    }


def gaps(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """By recipe, the relative gap of the validation loss to its baseline's of the same seed and machine."""
    baseline = {_place(run): run["validation_loss"] for run in runs if run["precision"] in BASELINES}
    found: dict[str, list[float]] = {}
    for run in runs:
        if run["precision"] in BASELINES:
            continue
        base = baseline.get(_place(run | {"precision": WAYS[run["precision"]].baseline}))
        if base is not None:
            found.setdefault(run["precision"], []).append((run["validation_loss"] - base) / base)
    return found


def _place(run: dict[str, Any]) -> tuple[str, int, str]:
    return run["precision"], run["seed"], run["cpu"]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, half the width of the 95 % interval, and the one-sided 95 % upper bound."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.inf, math.inf
    both, one = T[min(len(values) - 1, max(T))]
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, both * error, mean + one * error


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table: recipe, seeds, gap with its interval, its scatter, upper bound, machine and commit."""
    found: list[tuple[str, ...]] = []
    places = {run["precision"]: f"{run['cpu']}, {run['commit']}" for run in results["runs"]}
    for name, values in gaps(results["runs"]).items():
        mean, half, upper = interval(values)
        spread = f"{statistics.stdev(values):.2%}" if len(values) > 1 else ""
        found.append((
            f"`{name}`", str(len(values)), f"{mean:+.2%} ± {half:.2%}", spread, f"{upper:+.2%}",
            places[name],
        ))  # fmt: skip
    return found


def plot(results: dict[str, Any], out: Path) -> None:
    """Every seed's gap, and the mean with its interval, beside the results file; none without matplotlib."""
    found = gaps(results["runs"])
    if _pyplot() is None or not found:
        return
    figure, axes = _pyplot().subplots(figsize=(7.2, 0.6 * len(found) + 1.4), dpi=120)
    for row, values in enumerate(found.values()):
        mean, half, _ = interval(values)
        axes.plot([100 * v for v in values], [row] * len(values), "o", color="#8a929c", markersize=4)
        axes.errorbar(100 * mean, row, xerr=100 * half, fmt="D", color="#1f9d6b", capsize=4, zorder=3)
    axes.axvline(0.0, color=INK, linewidth=1)
    axes.axvline(0.5, color=INK, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    _finish(
        axes, xlabel="validation loss above bf16's of the same seed, % (dotted: 0.5 %)", ylabel="",
        title=f"{results['settings']['steps']} steps, gap by seed, mean and 95 % interval",
    )  # fmt: skip
    figure.tight_layout()
    style.save(figure, out.parent, out.stem)


def planned(recipes: list[str], seeds: int, runs: list[dict[str, Any]], cpu: str) -> list[tuple[str, int]]:
    """What is left to run on this machine, seed by seed: what is there when it is stopped is paired."""
    done = {_place(run) for run in runs}
    paired = {(name, seed) for name, seed, at in done if (WAYS[name].baseline, seed, at) in done}
    left: list[tuple[str, int]] = []
    for seed in range(seeds):
        names = [name for name in recipes if (name, seed) not in paired]
        needed = dict.fromkeys([WAYS[name].baseline for name in names] + names)
        left += [(name, seed) for name in needed if (name, seed, cpu) not in done]
    return left


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision_quality", description=__doc__)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES), help="by default all")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"paired runs a recipe (default {SEEDS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps a run (default {STEPS})")
    parser.add_argument("--out", type=Path, default=FILE, help="results file; continued where it exists")
    parser.add_argument("--fresh", action="store_true", help="start over")
    options = parser.parse_args(arguments)
    for name, value in (("--seeds", options.seeds), ("--steps", options.steps)):
        if value < 1:
            parser.error(f"{name} is at least 1, got {value}")
    torch.set_num_threads(1)
    settings = {"sizes": SIZES, "steps": options.steps, "model": asdict(GPTConfig(**SIZES))}
    results: dict[str, Any] = {"kind": "quality", "schema": QUALITY_SCHEMA, "environment": environment()}
    results |= {"settings": settings, "runs": []}
    if options.out.exists() and not options.fresh:
        results = read_results(options.out, "quality")
        if results["settings"] != settings:
            parser.error(
                f"{options.out} holds an experiment of other settings; give --fresh or another --out"
            )
    left = planned(options.recipes, options.seeds, results["runs"], environment()["cpu"])
    with tempfile.TemporaryDirectory() as folder:
        corpus = load_corpus(None, vocab=SIZES["vocab"], context=SIZES["context"], folder=Path(folder))
    _run(left, corpus, options.steps, results, options.out)
    for row in rows(results):
        print("  ".join(row).replace("`", ""))
    plot(results, options.out)
    return 0


def _run(left: list[tuple[str, int]], corpus: Corpus, steps: int, results: dict[str, Any], out: Path) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(left) * steps)
        for name, seed in left:
            progress.update(task, description=f"{name}, seed {seed}")
            results["runs"].append(train(corpus, name, seed, steps, lambda: progress.advance(task)))
            write_results(out, results)


if __name__ == "__main__":
    sys.exit(main())
