"""`fusekit train --compare`: one model, data and seed in eager float32, autocast, torch.compile and fusekit.

Every contender runs in its own process, one after the other. The first decides how many steps fit into the
time; the others train as many. Step times are medians after the warm-up; wall time is what one waits for,
process time over all threads is what is comparable on a busy machine.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fusekit.checkpoint import replace_text
from fusekit.kernels.linear_cpu import multiplies
from fusekit.meter import machine
from fusekit.monitor import Monitor
from fusekit.plots import plot_comparison
from fusekit.train_config import TrainConfig

CONTENDERS = (  # name, provider, precision; the first sets the number of steps
    ("eager float32", "eager", "float32"),
    ("eager bf16", "eager", "bf16"),
    ("torch.compile bf16", "compile", "bf16"),
    ("fusekit bf16", "fusekit", "bf16"),
)
NOTE = (
    "bf16 of eager and torch.compile is torch.autocast; speed: wall time, against the first row; "
    "parity: fused sites that match float64"
)
EMULATED = (
    "this CPU has no bfloat16 matrix instructions: fusekit's bf16 products run in float32, which saves "
    "memory and no time; eager's and torch.compile's run in scalar code"
)
FIXED_SECONDS = 130.0  # four starts, torch.compile, capture, verify: measured on 2 cores
PATIENCE = 1.5  # times the minutes asked for, after which what is not finished is stopped
LEAST_SHARE = 0.1  # of that time, kept for each contender that still waits
COMMAND = ("-m", "fusekit.contender")
HEARTBEAT = 5.0  # seconds of silence after which the user is told what is going on


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared and where the results go."""

    config: TrainConfig
    sizes: dict[str, Any]
    folder: Path
    hf_config: str | None = None
    data: str | None = None
    device: str = "cpu"
    threads: int | None = None
    minutes: float = 4.5

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"--minutes is greater than 0, got {self.minutes}")

    def spec(self, provider: str, precision: str, steps: int, seconds: float | None) -> dict[str, Any]:
        config = replace(self.config, provider=provider, precision=precision, log_every=1)
        return {
            "config": asdict(config),
            "sizes": self.sizes,
            "hf_config": self.hf_config,
            "data": self.data,
            "device": self.device,
            "threads": self.threads,
            "folder": str(self.folder / f"{provider}-{precision}"),
            "cache": str(self.folder),
            "steps": steps,
            "seconds": seconds,
        }


def compare(comparison: Comparison, console: Console | None = None) -> int:
    """Run all contenders, print the table, write report.json and comparison.png.

    Returns 1 where fusekit failed or parity did, 130 after Ctrl-C (what is finished is reported), else 0.
    """
    console = console or Console()
    comparison.folder.mkdir(parents=True, exist_ok=True)
    patience = PATIENCE * 60 * comparison.minutes
    deadline = time.monotonic() + patience
    steps, share = (
        comparison.config.steps,
        max(5.0, (60 * comparison.minutes - FIXED_SECONDS) / len(CONTENDERS)),
    )
    results: list[dict[str, Any]] = []
    interrupted = False
    try:
        for name, provider, precision in CONTENDERS:
            seconds = share if not results else 2 * share  # a slower one may take longer, but not for ever
            waiting = len(CONTENDERS) - len(results) - 1
            limit = deadline - LEAST_SHARE * patience * waiting
            result = _run(name, comparison.spec(provider, precision, steps, seconds), console, limit)
            results.append({"name": name} | result)
            if len(results) == 1 and "steps" in result:
                steps = result["steps"]
    except KeyboardInterrupt:
        interrupted = True
    report = {
        "machine": machine(),
        "config": asdict(comparison.config),
        "sizes": comparison.sizes,
        "hf_config": comparison.hf_config,
        "runs": results,
    }
    replace_text(comparison.folder / "report.json", json.dumps(report, indent=1))
    drawn = plot_comparison(results, comparison.folder / "comparison.png")
    console.print(table(results))
    if comparison.device == "cpu" and not multiplies(torch.bfloat16):
        console.print(EMULATED, highlight=False, soft_wrap=True)
    names = f"report.json{' and comparison.png' * drawn}"
    console.print(f"{names} written to {comparison.folder}", highlight=False, soft_wrap=True)
    if interrupted:
        return 130
    return 0 if results[-1].get("parity") else 1


def _run(name: str, spec: dict[str, Any], console: Console, deadline: float) -> dict[str, Any]:
    """One contender; its summary, or {"error": sentence}."""
    monitor = Monitor(spec["steps"], title=f"{name:18}", console=console)
    errors = Path(spec["folder"]) / "stderr.txt"
    errors.parent.mkdir(parents=True, exist_ok=True)
    with errors.open("w") as stderr, monitor:
        child = subprocess.Popen(
            [sys.executable, "-P", *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(spec))
            child.stdin.close()
            outcome = _follow(child, monitor, deadline)
            code = child.wait()
        finally:
            child.kill()
    if outcome is None:
        outcome = {"error": f"ended with exit code {code}; {errors} holds its last words"}
    if problem := outcome.get("error") or outcome.get("unchecked"):
        console.print(f"{name}: {problem}", highlight=False, soft_wrap=True)
    return outcome


def _follow(child: subprocess.Popen[str], monitor: Monitor, deadline: float) -> dict[str, Any] | None:
    phase, since, outcome = "starting", time.monotonic(), None
    trained: dict[str, Any] | None = None
    for event in _events(child):
        if time.monotonic() > deadline and outcome is None:
            child.kill()
            if trained is not None:
                return trained | {"unchecked": f"no time was left for {phase}; --minutes gives more"}
            return {"error": f"stopped while {phase}: the time is over; --minutes gives more"}
        if event is None:
            monitor.status(f"{phase}, {time.monotonic() - since:.0f} s")
        elif "phase" in event:
            phase, since = event["phase"], time.monotonic()
            monitor.status(phase)
        elif "step" in event:
            phase, since = "training", time.monotonic()
            monitor.show(event)
        elif "trained" in event:
            trained = event["trained"]
        elif "summary" in event:
            outcome = event["summary"]
        elif "error" in event:
            outcome = event
    return outcome


def _events(child: subprocess.Popen[str]) -> Iterator[dict[str, Any] | None]:
    """The child's events as they come, and None after each HEARTBEAT of silence."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=HEARTBEAT)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        if line.startswith("{"):  # anything else is a library talking
            yield json.loads(line)


def table(results: list[dict[str, Any]]) -> Table:
    """One row per contender."""
    shown = Table(title="Same model, data and seed", title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    shown.padding, shown.pad_edge = (0, 1, 0, 0), False
    for heading in ("", "ms/step", "speed", "CPU ms", "peak", "train", "val", "start", "parity"):
        shown.add_column(heading, justify="left" if heading in ("", "parity") else "right", no_wrap=True)
    shown.caption, shown.caption_justify = NOTE, "left"
    measured = next((r for r in results if "parameters" in r), None)
    if measured:
        shown.caption = (
            f"{measured['parameters'] / 1e6:.1f} M parameters, {measured['steps']} steps, "
            f"{measured['threads']} CPU threads; {NOTE}"
        )
    base = results[0].get("step_seconds") if results else None
    for r in results:
        if "error" in r:
            shown.add_row(r["name"], "failed", *[""] * 7)
            continue
        shown.add_row(
            r["name"],
            f"{1e3 * r['step_seconds']:.0f}",
            f"{base / r['step_seconds']:.2f}×" if base else "",
            f"{1e3 * r['step_cpu_seconds']:.0f}",
            f"{r['peak_bytes'] / 2**20:.0f} MB",
            f"{r['train_loss']:.3f}",
            f"{r['validation_loss']:.3f}",
            f"{r['first_step_seconds']:.0f} s",
            parity(r),
        )
    return shown


def parity(result: dict[str, Any]) -> str:
    if "unchecked" in result:
        return "not checked"
    if "parity" not in result:
        return "–"
    return f"ok, {result['sites']}" if result["parity"] else "FAILED"
