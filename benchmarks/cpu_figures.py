"""Forward and backward of single layers on a CPU, one thread: time and memory beside eager PyTorch.

    python -m benchmarks.cpu_figures [--out benchmarks/results/cpu_figures.json] [--rounds 9] [FIGURE ...]

A contender is a process of its own that takes a step when told to, so its peak of memory is its own, and
contenders take turns, so that a slow moment meets all. Time is process time, the median of the rounds.
Memory is the peak of a step, beyond what the process held before its first one with the layer and its inputs
there: saved and temporary tensors, gradients, and what a library keeps. A small layer of the same kind goes
first, so that what capturing and compiling load is not counted. It is measured in processes of its own, where
glibc returns every freed tensor to the system: otherwise the peak tells what its heap keeps for later.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fusekit
from benchmarks.results_file import RESULTS, environment, write_results
from fusekit.kernels.recipe import PRESETS
from fusekit.meter import Stopwatch, current_memory, peak_memory, reset_peak

BF16 = torch.bfloat16
WARM_UP = 2  # steps that capture, build and fill caches
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)}  # of bytes; also stops glibc from raising it
SHRINK = 8  # of the layer that goes first
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """title: what is computed. contenders: by name; the first is what the others are compared with.

    asked: of a contender, (time, memory) as the largest share of the first one's; None: nothing is asked.
    """

    title: str
    contenders: dict[str, Callable[[int], Step]]  # of layers with sizes divided by this
    asked: dict[str, tuple[float | None, float | None]]


def _step(model: Callable[..., Tensor], inputs: tuple[Tensor, ...], *, autocast: bool = False) -> Step:
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    context = torch.autocast("cpu", BF16) if autocast else nullcontext()
    gradient: list[Tensor] = []

    def step() -> None:
        for t in (*parameters, *inputs):
            t.grad = None
        with context:
            y = model(*inputs)
        if not gradient:
            gradient.append(torch.randn_like(y))
        y.backward(gradient[0])

    return step


def _rows(shrink: int) -> tuple[Tensor]:
    return (torch.randn(2048 // shrink, 1024 // shrink).requires_grad_(),)


def _mlp(shrink: int) -> nn.Module:
    width, hidden = 1024 // shrink, 4096 // shrink
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))


class Naive(nn.Module):
    """Causal attention as one writes it by hand: scores, mask, softmax, and all of them in memory."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def _heads(shrink: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 8, 2048 // shrink, 64).to(BF16).requires_grad_() for _ in range(3))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _linear(precision: Any) -> Callable[[int], Step]:
    def build(shrink: int) -> Step:
        layer = nn.Linear(1024 // shrink, 4096 // shrink)
        return _step(fusekit.optimize(layer, precision=precision), _rows(shrink))

    return build


# head=True: the layer is the model's output here, which otherwise stays in bf16.
_RECIPES = {name: replace(recipe, head=True) for name, recipe in PRESETS.items()}
_EXACT = replace(_RECIPES["fp8-tensorwise"], accumulation="exact")
FIGURES = {
    "mlp": Figure(
        title="mlp, 2048 × 1024 → 4096 → 1024, bf16",
        contenders={
            "eager autocast": lambda n: _step(_mlp(n), _rows(n), autocast=True),
            "torch.compile": lambda n: _step(torch.compile(_mlp(n), dynamic=False), _rows(n), autocast=True),
            "fusekit": lambda n: _step(fusekit.optimize(_mlp(n), precision="bf16"), _rows(n)),
        },
        asked={"fusekit": (1 / 1.15, 0.75)},
    ),
    "attention": Figure(
        title="causal attention, 8 heads of 2048 × 64, bf16",
        contenders={
            "naive": lambda n: _step(Naive(), _heads(n)),
            "torch's SDPA": lambda n: _step(_sdpa, _heads(n)),
            "fusekit": lambda n: _step(fusekit.optimize(Naive()), _heads(n)),
        },
        asked={"fusekit": (1 / 4, 1 / 10)},
    ),
    "fp8": Figure(
        title="linear, 2048 × 1024 → 4096, emulated FP8",
        contenders={"bf16": _linear("bf16")} | {name: _linear(recipe) for name, recipe in _RECIPES.items()},
        asked={name: (1.35, None) for name in _RECIPES},
    ),
    "exact": Figure(
        title="linear, 2048 × 1024 → 4096, FP8, exact sums",
        contenders={"float32": _linear("keep"), "fp8 exact": _linear(_EXACT)},
        asked={"fp8 exact": (3.0, None)},
    ),
}


def serve(figure: str, contender: str) -> None:
    """Take a step for each line of standard input; print its process time and the peak beyond the start."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build = FIGURES[figure].contenders[contender]
    small = build(SHRINK)
    for _ in range(WARM_UP):
        small()
    step = build(1)
    before = current_memory()
    for number, _ in enumerate(sys.stdin):
        if number == WARM_UP:
            reset_peak()
        watch = Stopwatch()
        step()
        print(watch.lap()[1], peak_memory() - before, flush=True)


class Contender:
    """A process that serves one contender."""

    def __init__(self, figure: str, name: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "benchmarks.cpu_figures", "--serve", figure, name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | (environment or {}),
        )  # fmt: skip
        self.answers: list[tuple[float, int]] = []

    def step(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if len(answer) != 2:
            raise RuntimeError(f"a contender ended with exit code {self.process.wait()}; its error is above")
        self.answers.append((float(answer[0]), int(answer[1])))

    def times(self) -> dict[str, Any]:
        samples = [seconds for seconds, _ in self.answers[WARM_UP:]]
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return {"seconds": middle, "quartiles": [low, high], "samples": samples}


def measure(name: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Cells of one figure, by contender."""
    contenders = {each: Contender(name, each) for each in FIGURES[name].contenders}
    try:
        for _ in track(range(WARM_UP + rounds), description=f"{name:10}", transient=True):
            for contender in contenders.values():
                contender.step()
    finally:
        for contender in contenders.values():
            contender.process.kill()
    return {each: contender.times() | _peak(name, each) for each, contender in contenders.items()}


def _peak(figure: str, name: str) -> dict[str, int]:
    contender = Contender(figure, name, RETURNING)
    try:
        for _ in range(WARM_UP + 1):
            contender.step()
    finally:
        contender.process.kill()
    return {"peak_bytes": contender.answers[-1][1]}


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """(figure, contender, ms, time, asked, MB, memory, asked) of each cell, as text."""
    found: list[tuple[str, ...]] = []
    for name, cells in results["figures"].items():
        figure, base = FIGURES[name], next(iter(cells.values()))
        for place, (each, cell) in enumerate(cells.items()):
            time, memory = figure.asked.get(each, (None, None))
            found.append((
                figure.title if place == 0 else "", each, f"{1e3 * cell['seconds']:.1f}",
                f"{cell['seconds'] / base['seconds']:.2f}", _asked(time), f"{cell['peak_bytes'] / 2**20:.0f}",
                f"{cell['peak_bytes'] / base['peak_bytes']:.2f}", _asked(memory),
            ))  # fmt: skip
    return found


HEADINGS = ("layer", "contender", "ms", "time", "asked", "peak MB", "memory", "asked")


def _asked(share: float | None) -> str:
    return "" if share is None else f"≤ {share:.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_figures", description=__doc__)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)}; default all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.name}/cpu_figures.json of all figures")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(*options.serve)
        return 0
    chosen = options.figures or list(FIGURES)
    if unknown := set(chosen) - set(FIGURES):
        parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(FIGURES)}")
    if options.rounds < 2:
        parser.error("--rounds is 2 at least: quartiles need two samples")
    figures = {name: measure(name, options.rounds) for name in chosen}
    results = {"kind": "cpu_figures", "schema": 1, "environment": environment(), "figures": figures}
    table = Table(*HEADINGS, title="Forward and backward, one thread, process time")
    for row in rows(results):
        table.add_row(*row)
    Console().print(table)
    path = options.out or (RESULTS / "cpu_figures.json" if chosen == list(FIGURES) else None)
    if path is not None:
        write_results(path, results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
