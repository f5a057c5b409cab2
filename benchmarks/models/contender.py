"""The suite's side of a contender's process: start it, ask for steps, stop it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import CHECKOUT

COMMAND = ("-m", "benchmarks.models.worker")
DYING_SECONDS = 10.0


class Ended(Exception):
    """It takes no further step. cell: what its cell shows, "failed", "skipped" or "left_out"."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.cell = {kind: sentence}


class Contender:
    """One provider's process and its answers, one for each step.

    Args:
        folder: its own; the caches of compiled code are there, and what it wrote to standard error.
    """

    def __init__(
        self, model: str, provider: str, device: torch.device, *, small: bool, warm_up: int, folder: Path
    ) -> None:
        self.provider, self.warm_up, self.folder = provider, warm_up, folder
        self.answers: list[dict[str, Any]] = []
        self.started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        specification = {"model": model, "provider": provider, "device": str(device)}
        text = json.dumps(specification | {"small": small, "warm_up": warm_up})
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *COMMAND, text],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=CHECKOUT,
                env=os.environ | _environment(device, folder),
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def step(self, seconds: float) -> None:
        """One more step within so much wall time.

        Raises:
            Ended: it failed, died, has nothing for this model, or took too long.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are in the queue
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise Ended("left_out", self._late(seconds)) from None
            if line is None:
                raise Ended("failed", self._death())
            if not line.startswith("{"):
                continue  # a library talking
            answer = json.loads(line)
            for kind in ("failed", "skipped"):
                if kind in answer:
                    raise Ended(kind, answer[kind])
            if not self.answers:
                self.start_wall = time.monotonic() - self.started
            self.answers.append(answer)
            return

    @property
    def wall(self) -> float:
        """Seconds of its last step, as one waits for them."""
        return self.answers[-1]["wall"]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def _errors(self) -> Path:
        return self.folder / "stderr.txt"

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _late(self, seconds: float) -> str:
        step = ("first", "second", "third")[min(2, len(self.answers))]
        if len(self.answers) > 2:
            step = "next"
        return f"its {step} step was not done after {seconds:.0f} s; more --minutes wait longer"

    def _death(self) -> str:
        try:
            code = self._process.wait(timeout=DYING_SECONDS)
        except subprocess.TimeoutExpired:
            return "its process closed its output and went on"
        words = self._errors.read_text(errors="replace").strip().splitlines()
        return f"its process ended with exit code {code}" + (f": {words[-1].strip()}" if words else "")


def _environment(device: torch.device, folder: Path) -> dict[str, str]:
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    settings = {name: str((folder / part).absolute()) for name, part in caches.items()}
    settings |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    return settings | ({"OMP_NUM_THREADS": "1"} if device.type == "cpu" else {})
