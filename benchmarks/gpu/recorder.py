"""A pytest plugin: a line of JSON for each test as it ends, so that a run that is killed keeps them.

pytest -p benchmarks.gpu.recorder --record tests.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if (
            report.when == "call" or report.outcome != "passed"
        ):  # a setup that fails or skips is the test's end
            self._write(report.nodeid, report.outcome, report.duration, _message(report))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", 0.0, _message(report))

    def _write(self, test: str, outcome: str, seconds: float, message: str) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 4), "message": message}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _message(report: Any) -> str:
    """The error in one line; "" for a test that passed."""
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr or "")
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--record", type=Path, help="file for one line of JSON per test")


def pytest_configure(config: Any) -> None:
    if config.getoption("--record") and not hasattr(
        config, "workerinput"
    ):  # xdist's workers report to the first
        config.pluginmanager.register(Recorder(config.getoption("--record")), "fusekit-recorder")
