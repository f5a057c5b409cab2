"""`make gpu`: tests on the GPU, every op and a GPT training step against eager PyTorch and torch.compile.

    python -m benchmarks.gpu --minutes 9

Needs PyTorch with CUDA, Triton and pytest, and no network. Results are written after every measurement to
benchmarks/results/<device>.json, so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.clock import CpuClock, CudaClock
from benchmarks.kernels.cases import cases, measure
from benchmarks.results_file import CHECKOUT, RESULTS, environment, write_results
from fusekit.data import Corpus
from fusekit.gpt import GPT, GPTConfig
from fusekit.meter import Stopwatch, peak_memory, reset_peak
from fusekit.monitor import Monitor
from fusekit.train_config import TrainConfig
from fusekit.trainer import Trainer

TESTS_SHARE = 0.4  # of the time; then the ops, but STEP_SHARE is kept for the training step
STEP_SHARE = 0.3
GPT_2_SMALL = GPTConfig(vocab=50304, context=1024, layers=12, heads=12, width=768)
CONTENDERS = (("eager", "eager"), ("compile", "compile"), ("fusekit", "fusekit"))


class Budget:
    """Seconds left of the minutes given."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60 * minutes
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        return self._end - time.monotonic()


class Suite:
    """The parts of the run and what they found; `results` is on disk after each `keep`."""

    def __init__(self, device: torch.device, path: Path, budget: Budget, console: Console) -> None:
        self.device, self.path, self.budget, self.console = device, path, budget, console
        self.clock = CudaClock() if device.type == "cuda" else CpuClock()
        self.dry = device.type != "cuda"  # to try the suite itself: small shapes, nothing compiled
        self.results: dict[str, Any] = {
            "environment": environment(),
            "ops": [],
            "gpt_step": {},
            "left_out": [],
        }

    def keep(self) -> None:
        write_results(self.path, self.results)

    def run_tests(self, command: list[str]) -> None:
        """pytest in its own process, so that a crash of a kernel leaves the suite alive."""
        limit = TESTS_SHARE * self.budget.seconds
        self.console.print(f"tests, at most {limit:.0f} s: {' '.join(command[1:])}", highlight=False)
        started = time.monotonic()
        try:
            done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=limit)
            code: int | None = done.returncode
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            code, output = None, _text(error.stdout) + _text(error.stderr)
        lines = output.strip().splitlines()
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        self.results["tests"] = {
            "exit_code": code,
            "seconds": time.monotonic() - started,
            "summary": lines[-1] if lines else "",
            "failures": failures,
            "tail": lines[-40:] if code != 0 else [],
        }
        self.keep()
        self.console.print(
            "\n".join([*failures, self.results["tests"]["summary"]]), highlight=False, markup=False
        )

    def run_ops(self, rounds: int) -> None:
        reserve = STEP_SHARE * self.budget.seconds
        for case in cases(self.device, bench=not self.dry):
            label = f"{case.name} {case.sample.name or case.index} {case.dtype}"
            if self.budget.left() < reserve:
                self.results["left_out"].append(label)
                continue
            try:
                result = measure(case, self.clock, rounds=rounds, compiled=not self.dry)
            except Exception as error:  # one op that fails must not hide the others
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                result = {"op": case.name, "sample": label, "error": f"{type(error).__name__}: {first}"}
            self.results["ops"].append(result)
            self.keep()
            self.console.print(f"{label}: {_line(result)}", highlight=False, soft_wrap=True)
            self._release()

    def run_step(self, model: GPTConfig, batch: int, steps: int) -> None:
        """Steps of a GPT, forward to optimizer, in bf16; float32 would be no contest."""
        for name, provider in CONTENDERS:
            if self.budget.left() < 5 or (self.dry and provider == "compile"):
                self.results["left_out"].append(f"gpt_step {name}")
                continue
            try:
                result = self._step(model, provider, batch, steps)
            except Exception as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                result = {"error": f"{type(error).__name__}: {first}"}
            self.results["gpt_step"][name] = result
            self.keep()
            self.console.print(f"gpt_step {name}: {result}", highlight=False, soft_wrap=True)
            self._release()

    def _step(self, sizes: GPTConfig, provider: str, batch: int, steps: int) -> dict[str, Any]:
        torch.manual_seed(0)
        tokens = torch.randint(sizes.vocab, (32 * batch * sizes.context,))
        corpus = Corpus(train=tokens, validation=tokens, vocab=sizes.vocab, digest="random")
        config = TrainConfig(provider=provider, precision="bf16", batch=batch, context=sizes.context, lr=1e-4)
        with tempfile.TemporaryDirectory() as folder:
            quiet = Monitor(1, quiet=True)
            trainer = Trainer(GPT(sizes), corpus, config, Path(folder), device=self.device, monitor=quiet)
        watch, seconds, losses = Stopwatch(self.device), [], []
        for number in range(steps + 2):
            watch.lap()
            loss, _ = trainer.train_step()
            seconds.append(watch.lap()[0])
            losses.append(loss)
            if number == 1:
                reset_peak(self.device)
        step = statistics.median(seconds[2:])
        return {
            "step_seconds": step,
            "tokens_per_second": batch * sizes.context / step,
            "start_seconds": seconds[0] - step,
            "peak_bytes": peak_memory(self.device),
            "first_loss": losses[0].item(),
            "last_loss": losses[-1].item(),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "batch": batch,
            "context": sizes.context,
        }

    def _release(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def failed(self) -> bool:
        broken = any("error" in r for r in [*self.results["ops"], *self.results["gpt_step"].values()])
        return broken or self.results.get("tests", {"exit_code": 0})["exit_code"] != 0


def table(results: dict[str, Any]) -> Table:
    """Times in microseconds; gains are eager's and torch.compile's time over ours."""
    shown = Table(title="µs: fusekit, gain over eager, gain over torch.compile", title_justify="left")
    for heading in ("op", "sample", "dtype"):
        shown.add_column(heading)
    for heading in ("forward", "eager", "compile", "backward", "eager", "compile", "TFLOP/s"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for r in results["ops"]:
        if "error" in r:
            shown.add_row(r["op"], r["sample"], "failed")
            continue
        rate = f"{r['flops_per_second'] / 1e12:.1f}"
        shown.add_row(
            r["op"], r["sample"], r["dtype"], *_gains(r["forward"]), *_gains(r.get("backward")), rate
        )
    for name, r in results["gpt_step"].items():
        if "error" not in r:
            eager = results["gpt_step"].get("eager", {}).get("step_seconds")
            gain = f"{eager / r['step_seconds']:.2f}×" if eager else ""
            peak = f"{r['peak_bytes'] / 2**20:.0f} MB"
            shown.add_row("GPT step", name, peak, f"{1e6 * r['step_seconds']:.0f}", gain)
    return shown


def _gains(times: dict[str, float] | None) -> tuple[str, str, str]:
    if not times:
        return "", "", ""
    gains = [
        f"{times[n] / times['fused']:.2f}×" if n in times and times["fused"] else ""
        for n in ("eager", "compile")
    ]
    return f"{1e6 * times['fused']:.1f}", gains[0], gains[1]


def _line(result: dict[str, Any]) -> str:
    if "error" in result:
        return result["error"]
    parts = []
    for direction in ("forward", "backward"):
        times = result.get(direction, {})
        parts += (
            [f"{direction} " + ", ".join(f"{n} {1e6 * t:.1f}" for n, t in times.items())] if times else []
        )
    return "; ".join(parts) + " µs"


def _text(captured: bytes | str | None) -> str:
    return captured.decode(errors="replace") if isinstance(captured, bytes) else captured or ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default 9)")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the suite itself"
    )
    parser.add_argument("--out", type=Path, help="results file (default benchmarks/results/<device>.json)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement (default 5)")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.rounds < 1:
        parser.error("--minutes is greater than 0 and --rounds at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: PyTorch finds no CUDA GPU here; a CPU has python -m benchmarks.gpt_step",
            file=sys.stderr,
        )
        return 1
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu_dry_run"
    path = options.out or RESULTS / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.json"
    suite = Suite(device, path, Budget(options.minutes), Console(width=None if sys.stdout.isatty() else 140))
    if not options.skip_tests:
        suite.run_tests([sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"])
    suite.run_ops(options.rounds)
    if suite.dry:
        suite.run_step(GPTConfig(vocab=128, context=32, layers=1, heads=2, width=32), batch=2, steps=2)
    else:
        suite.run_step(GPT_2_SMALL, batch=16, steps=10)
    suite.keep()
    suite.console.print(table(suite.results))
    if suite.results["left_out"]:
        suite.console.print(f"{len(suite.results['left_out'])} measurements left out; --minutes gives more")
    suite.console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return 1 if suite.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
