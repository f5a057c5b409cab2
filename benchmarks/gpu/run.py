"""The parts of a run, one process each, within a time budget; what they found is on disk after each."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.gpu import tested
from benchmarks.kernels.run import blame
from benchmarks.results_file import CHECKOUT, environment, write_results

# The most valuable first. A part may take its share of the time that is left, relative to those still to
# come, so what one does not need goes to the others.
PARTS = {"tests": 0.22, "kernels": 0.38, "models": 0.30, "tuning": 0.10}
LEAST_SECONDS = 10.0  # with less a part does not begin: importing PyTorch alone takes several
GRACE_SECONDS = 15.0  # a part looks at its clock between measurements; then it is stopped
CRASHES = 4  # of one part; after each a new process continues behind the measurement that crashed
SCHEMA = 1
LOST_DEVICE = 75  # exit code of a part that left the GPU unusable in its process
SENTENCES = {
    "running": "the run was cut off here; the same command continues",
    "late": "no time was left; more --minutes include it, or run the same command again",
}


@dataclass
class Run:
    """results: per part its status, reason, failures, what was left out and where its file is."""

    folder: Path
    slug: str
    minutes: float
    dry: bool
    fresh: bool
    console: Console
    results: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + 60 * self.minutes
        now = {
            "kind": "gpu",
            "schema": SCHEMA,
            "environment": environment(),
            "dry": self.dry,
            "wheels": {},
            "parts": {},
        }
        self.results = now if self.fresh else _continued(self.path, now)
        self.results["minutes"] = self.minutes

    @property
    def path(self) -> Path:
        return self.folder / f"gpu_{self.slug}.json"

    def file(self, part: str) -> Path:
        return self.folder / (
            f"gpu_{self.slug}.tests.jsonl" if part == "tests" else f"{part}_{self.slug}.json"
        )

    def keep(self) -> None:
        write_results(self.path, self.results)

    def parts(self, names: list[str]) -> None:
        waiting = [name for name in PARTS if name in names]
        for name in list(waiting):
            found = self.results["parts"].get(name, {})
            if found.get("status") == "complete":
                self.say(f"{name}: complete already; --fresh measures anew")
            else:
                self._part(name, self._limit(waiting))
            waiting.remove(name)

    def _limit(self, waiting: list[str]) -> float:
        """Seconds of the first of the parts that are still to come."""
        left = self._end - time.monotonic()
        return left * PARTS[waiting[0]] / sum(PARTS[name] for name in waiting)

    def _part(self, name: str, limit: float) -> None:
        if limit < LEAST_SECONDS:
            self._record(name, {"status": "left out", "reason": SENTENCES["late"]})
            return
        self.say(f"\n{name}, at most {limit:.0f} s")
        self._record(name, {"status": "cut off", "reason": SENTENCES["running"]})
        started = time.monotonic()
        outcome = self._tests(limit) if name == "tests" else self._measured(name, started + limit)
        self._record(name, outcome | {"seconds": round(time.monotonic() - started, 1)})

    def _tests(self, limit: float) -> dict[str, Any]:
        log = self.file("tests")
        obstacle = tested.obstacle()
        if obstacle:
            return {"status": "skipped", "reason": obstacle}
        with log.with_suffix(".log").open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                tested.command(log, dry=self.dry), cwd=CHECKOUT, stdout=output, stderr=subprocess.STDOUT
            )
            code = _wait(process, limit)
        return tested.outcome(log, code, limit)

    def _measured(self, name: str, until: float) -> dict[str, Any]:
        """A part in its own process, begun again behind a measurement that crashed it."""
        fresh = self.fresh
        crashes: list[str] = []
        while True:
            code, found = self._process(name, until, fresh)
            outcome = {"status": "incomplete", "reason": "", "failures": []} | found
            outcome["failures"] = [*crashes, *outcome["failures"]]
            if code is None or (code >= 0 and code != LOST_DEVICE):
                return outcome | _explained(code, found)
            reason = f"the process ended with signal {-code}" if code < 0 else outcome["reason"]
            label = blame(self.file(name), reason) if code < 0 and name == "kernels" else None
            crashes.append(f"{name}{f' at {label}' if label else ''}: {reason}")
            self.say(crashes[-1])
            resumable = code == LOST_DEVICE or label is not None
            if not resumable or len(crashes) == CRASHES or until - time.monotonic() < LEAST_SECONDS:
                return outcome | {"status": "failed", "reason": reason, "failures": crashes}
            fresh = False

    def _process(self, name: str, until: float, fresh: bool) -> tuple[int | None, dict[str, Any]]:
        """Exit code (None: stopped for the time), and the outcome that the process left."""
        with tempfile.TemporaryDirectory() as folder:
            note = Path(folder) / "outcome.json"
            seconds = until - time.monotonic()
            given = {
                "out": str(self.file(name)),
                "note": str(note),
                "until": time.time() + seconds,
                "dry": self.dry,
                "fresh": fresh,
            }
            command = [sys.executable, "-m", "benchmarks.gpu.parts", name, json.dumps(given)]
            code = _wait(subprocess.Popen(command, cwd=CHECKOUT), seconds)
            return code, json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}

    def _record(self, name: str, outcome: dict[str, Any]) -> None:
        path = self.file(name)
        self.results["parts"][name] = outcome | {"file": str(path)}
        self.keep()
        if outcome.get("reason") and outcome["status"] != "cut off":
            self.say(f"{name}: {outcome['status']}: {outcome['reason']}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    @property
    def failed(self) -> bool:
        """Whether fusekit itself failed somewhere; a rival's failure, or a lack of time, is no failure."""
        return any(
            part["status"] == "failed" or part.get("failures") for part in self.results["parts"].values()
        )


def _continued(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The earlier run's parts, if machine, versions, commit and kind of run are the same."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before[name] == now[name] for name in ("kind", "schema", "dry"))
        machines = [{k: v for k, v in r["environment"].items() if k != "date"} for r in (before, now)]
        return now | {"parts": before["parts"]} if same and machines[0] == machines[1] else now
    except (OSError, ValueError, KeyError, TypeError):
        return now


def _explained(code: int | None, found: dict[str, Any]) -> dict[str, Any]:
    if code is None:
        return {"status": "incomplete", "reason": "stopped at its limit; the same command continues"}
    if found:
        return {}
    return {"status": "failed", "reason": f"the process ended with exit code {code}; its message is above"}


def _wait(process: subprocess.Popen[Any], seconds: float) -> int | None:
    """The exit code; None for a process that had to be stopped. An interrupt stops it and goes on."""
    try:
        return process.wait(max(0.0, seconds) + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            _stop(process)


def _stop(process: subprocess.Popen[Any]) -> None:
    process.send_signal(signal.SIGINT)  # pytest then prints its failures so far
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
