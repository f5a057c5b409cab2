"""Training step of a 17 M parameter GPT on a CPU: eager float32, bf16 autocast, torch.compile, fusekit.

    python -m benchmarks.gpt_step

Forward, backward, clipping and fused AdamW; one thread; process time, so that a busy machine does not count;
rounds in which the contenders take turns, so that a slow minute hits all of them; medians. Each contender
lives in a process of its own, hence each peak of memory is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.results_file import CHECKOUT, RESULTS, environment, write_results
from fusekit.compare import CONTENDERS
from fusekit.data import Corpus
from fusekit.gpt import GPT, GPTConfig
from fusekit.kernels.linear_cpu import multiplies
from fusekit.meter import current_memory, peak_memory, reset_peak
from fusekit.monitor import Monitor
from fusekit.train_config import TrainConfig
from fusekit.trainer import Trainer

WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is trained; the defaults are the figure's 17.0 M parameters."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256
    vocab: int = 8192
    batch: int = 8
    tied: bool = False

    def model(self) -> GPT:
        sizes = {
            name: getattr(self, name) for name in ("layers", "width", "heads", "context", "vocab", "tied")
        }
        return GPT(GPTConfig(**sizes))


def serve(shape: Shape, provider: str, precision: str) -> None:
    """The contender's process: one step for each line on standard input, one line of JSON for each step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randint(shape.vocab, (64 * shape.context,))
    corpus = Corpus(train=tokens, validation=tokens, vocab=shape.vocab, digest="random")
    config = TrainConfig(provider=provider, precision=precision, batch=shape.batch, context=shape.context)
    before = current_memory()
    started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(shape.model(), corpus, config, Path(folder), monitor=Monitor(1, quiet=True))
    for number, _ in enumerate(sys.stdin):
        if number:
            started = time.perf_counter(), time.process_time()
        loss, _ = trainer.train_step()
        trainer.step += 1
        ended = time.perf_counter(), time.process_time()
        answer = {
            "wall": ended[0] - started[0],
            "cpu": ended[1] - started[1],
            "loss": loss.item(),
            "before": before,
            "peak": peak_memory(),
        }
        print(json.dumps(answer), flush=True)
        if number == WARM_UP - 1:
            reset_peak()


@dataclass
class Contender:
    """A contender's process and what it measured."""

    name: str
    provider: str
    precision: str
    process: subprocess.Popen[str]
    answers: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, name: str, provider: str, precision: str, shape: Shape) -> Contender:
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpt_step",
            "--serve",
            json.dumps([vars(shape), provider, precision]),
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
        )
        return cls(name, provider, precision, process)

    def step(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith("{"):
                self.answers.append(json.loads(line))
                return
        raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}; its message is above")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def result(self) -> dict[str, Any]:
        steady = self.answers[WARM_UP:]
        cpu, wall = ([a[clock] for a in steady] for clock in ("cpu", "wall"))
        return {
            "step_cpu_seconds": statistics.median(cpu),
            "step_cpu_seconds_min": min(cpu),
            "step_wall_seconds": statistics.median(wall),
            "start_wall_seconds": self.answers[0]["wall"] - statistics.median(wall),
            "start_cpu_seconds": self.answers[0]["cpu"] - statistics.median(cpu),
            "peak_bytes": steady[-1]["peak"],
            "peak_with_start_bytes": max(a["peak"] for a in self.answers),
            "before_model_bytes": steady[-1]["before"],
            "last_loss": self.answers[-1]["loss"],
            "steps": len(steady),
        }


def measure(
    shape: Shape, rounds: int, console: Console, contenders: Any = CONTENDERS
) -> dict[str, dict[str, Any]]:
    """Warm every contender up, one after the other; then let them take turns."""
    running: list[Contender] = []
    try:
        for name, provider, precision in contenders:
            console.print(f"starting {name}", highlight=False)
            running.append(Contender.start(name, provider, precision, shape))
            for _ in range(WARM_UP):
                running[-1].step()
        for number in range(rounds):
            for contender in running:
                contender.step()
            last = ", ".join(f"{c.name} {1e3 * c.answers[-1]['cpu']:.0f} ms" for c in running)
            console.print(f"round {number + 1}/{rounds}: {last}", highlight=False, soft_wrap=True)
        return {c.name: c.result() for c in running}
    finally:
        for contender in running:
            contender.stop()


def table(results: dict[str, dict[str, Any]]) -> Table:
    base = next(iter(results.values()))["step_cpu_seconds"]
    shown = Table(title="GPT training step, one CPU thread, process time", title_justify="left")
    for heading in ("", "ms/step", "speed", "peak MB", "start s (wall)"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, r in results.items():
        step = r["step_cpu_seconds"]
        peak, start = r["peak_bytes"] / 2**20, r["start_wall_seconds"]
        shown.add_row(name, f"{1e3 * step:.0f}", f"{base / step:.2f}×", f"{peak:.0f}", f"{start:.1f}")
    return shown


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpt_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each contender (default 9)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_gpt_step.json", help="results file")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of no meaning, to try the benchmark itself"
    )
    parser.add_argument("--only", nargs="*", help="names of contenders, to leave the others out")
    parser.add_argument(
        "--anyway", action="store_true", help="measure even where the CPU has no bf16 products"
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        shape, provider, precision = json.loads(options.serve)
        serve(Shape(**shape), provider, precision)
        return 0
    if not (options.tiny or options.anyway or multiplies(torch.bfloat16)):
        print(
            "gpt_step: this CPU has no bf16 products (AVX512-BF16 or AMX); PyTorch emulates them and a step "
            "takes minutes, which says nothing about CPUs that have them. --anyway measures all the same",
            file=sys.stderr,
        )
        return 1
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    shape = Shape(layers=1, width=32, heads=2, context=32, vocab=128, batch=2) if options.tiny else Shape()
    chosen = [c for c in CONTENDERS if not options.only or c[0] in options.only]
    if not chosen:
        parser.error(f"--only: names are {', '.join(repr(c[0]) for c in CONTENDERS)}")
    console = Console()
    try:
        results = measure(shape, options.rounds, console, chosen)
    except RuntimeError as error:
        print(f"gpt_step: {error}", file=sys.stderr)
        return 1
    described = vars(shape) | {"parameters": sum(p.numel() for p in shape.model().parameters())}
    machine = environment() | {"threads": 1}
    write_results(
        options.out,
        {"environment": machine, "shape": described, "rounds": options.rounds, "results": results},
    )
    console.print(table(results))
    console.print(f"written to {options.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
