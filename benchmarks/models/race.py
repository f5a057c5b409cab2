"""One model's contenders, started one after the other, then in turns, so that a slow moment meets all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models.cells import cell
from benchmarks.models.contender import Contender, Ended
from benchmarks.models.providers import PROVIDERS, REFERENCE
from fusekit.ceilings import Ceilings
from fusekit.meter import available_memory

WARM_UP = {"cpu": 2, "cuda": 4}  # compiling, allocating, and on a GPU recording of CUDA graphs
MOST_ROUNDS = {"cpu": 9, "cuda": 20}
LEAST_ROUNDS = 3  # of those that run already, kept free when another one starts
PATIENCE = 20.0  # seconds that a step may take at least, however short the time
GRACE = 10.0  # seconds of rounds beyond the end, so that cheap steps are not left with a single one
CONTEXT_BYTES = 1 << 30  # what a process on a GPU takes beside PyTorch's allocations, about


@dataclass
class Race:
    """Contenders of one model until `end`; `cells` by provider is whole at any moment.

    starts: wall seconds from process start to first step, by provider, of models measured before.
    keep: called whenever a cell has changed, with what is going on.
    """

    model: str
    facts: dict[str, Any]
    device: torch.device
    small: bool
    warm: bool
    ceilings: Ceilings
    end: float
    folder: Path
    starts: dict[str, float]
    keep: Callable[[Race, str], None]

    def __post_init__(self) -> None:
        self.cells: dict[str, dict[str, Any]] = {}
        self.running: list[Contender] = []
        self.waiting: list[str] = []
        self.reference: list[float] | None = None
        self.peers: dict[str, list[float]] = {}  # eager's losses, by precision
        self.warm_up = WARM_UP[self.device.type]

    def run(self, providers: Sequence[str]) -> None:
        self.waiting = list(providers)
        try:
            while self.waiting:
                name = self.waiting.pop(0)
                if self.running and not self._room():
                    self._take_turns()
                self._enter(name)
            self._take_turns()
        finally:
            for contender in self.running:
                contender.stop()

    def _enter(self, name: str) -> None:
        """Start a contender and take its first steps, or say why not."""
        needed = self._seconds(name) + LEAST_ROUNDS * sum(c.wall for c in self.running)
        left = self.end - time.monotonic()
        if needed > left:
            self._set(name, {"left_out": self._reason(name, needed, left)})
            return
        contender = self._start(name)
        self.running.append(contender)
        others = [c for c in self.running if c is not contender]
        for number in range(self.warm_up):
            if not self._step(contender, reserved=LEAST_ROUNDS * sum(c.wall for c in others)):
                return
            if number == 0:
                self.starts[name] = max(contender.start_wall, self.starts.get(name, 0.0))
        self._record(contender)
        if LEAST_ROUNDS * contender.wall > max(GRACE, self.end - time.monotonic()):
            self._stop(contender)  # it keeps its single warm step
            self.cells[name]["note"] = "a single step: its rounds did not fit the time"

    def _start(self, name: str) -> Contender:
        folder = self.folder / name.replace(" ", "-")
        return Contender(self.model, name, self.device, small=self.small, warm_up=self.warm_up, folder=folder)

    def _step(self, contender: Contender, reserved: float = 0.0) -> bool:
        """Whether it took another step; if not, its cell says why."""
        try:
            contender.step(max(PATIENCE, self.end - reserved - time.monotonic()))
        except Ended as end:
            self._set(contender.provider, end.cell)
            self._stop(contender)
            return False
        provider = PROVIDERS[contender.provider]
        if provider.kind == "eager":
            self.peers[provider.precision] = [answer["loss"] for answer in contender.answers]
        if contender.provider == REFERENCE:
            self.reference = self.peers[provider.precision]
        return True

    def _take_turns(self) -> None:
        """Rounds of those that run, as many as fit; then their start from a warm cache."""
        reserved = sum(map(self._seconds, self.waiting))
        if self.warm:
            compiled = (c for c in self.running if PROVIDERS[c.provider].kind != "eager")
            reserved += sum(c.start_wall for c in compiled)
        for number in range(MOST_ROUNDS[self.device.type]):
            each = sum(c.wall for c in self.running)
            cheap = number < LEAST_ROUNDS and LEAST_ROUNDS * each < GRACE
            if not cheap and time.monotonic() + each > self.end - reserved:
                break
            self.keep(self, f"round {number + 1}")
            for contender in list(self.running):
                self._step(contender)
        finished = list(self.running)
        for contender in finished:
            self._record(contender)
            self._stop(contender)
        for contender in finished:
            if self.warm and PROVIDERS[contender.provider].kind != "eager":  # which compiles nothing
                self._start_again(contender)

    def _start_again(self, before: Contender) -> None:
        """The start with the compiled code that the first process left in its folder."""
        found = self.cells[before.provider]
        if "seconds" not in found:
            return
        if before.start_wall > self.end - time.monotonic():
            found["note"] = "no time was left for its warm start"
            return
        self.keep(self, f"{before.provider}, warm start")
        contender = self._start(before.provider)
        try:
            contender.step(max(PATIENCE, self.end - time.monotonic()))
            started = contender.answers[0]["start"]
            found["warm_start_seconds"] = max(0.0, started - found["wall_seconds"])
        except Ended as end:
            found["note"] = f"warm start: {end}"
        finally:
            contender.stop()
        self.keep(self, before.provider)

    def _record(self, contender: Contender) -> None:
        provider = PROVIDERS[contender.provider]
        clock = "cpu" if self.device.type == "cpu" else "wall"
        found = cell(
            contender.answers, provider, self.facts, self.ceilings,
            warm_up=self.warm_up, clock=clock, reference=self.reference,
            peer=self.peers.get(provider.precision),
        )  # fmt: skip
        self._set(contender.provider, found)

    def _set(self, name: str, found: dict[str, Any]) -> None:
        self.cells[name] = {"model": self.model, "provider": name} | found
        self.keep(self, name)

    def _stop(self, contender: Contender) -> None:
        contender.stop()
        self.running.remove(contender)

    def _seconds(self, name: str) -> float:
        """About how long its process takes to its first warm step, in wall time."""
        start = self.starts.get(name, PROVIDERS[name].start_seconds[self.device.type])
        return start + self.warm_up * self._step_seconds(name)

    def _step_seconds(self, name: str) -> float:
        """About how long a step takes: as eager float32's, or as the rate of emulated products says."""
        rates, flops = self.ceilings.flops_per_second, self.facts["flops_per_step"]
        if PROVIDERS[name].emulated(self.device):
            return flops / rates["bfloat16"]
        eager = next((c.wall for c in self.running if c.provider == REFERENCE), None)
        return eager or self.cells.get(REFERENCE, {}).get("wall_seconds") or flops / rates["float32"]

    def _reason(self, name: str, needed: float, left: float) -> str:
        text = f"would take about {needed:.0f} s and the model has {max(left, 0.0):.0f} s left"
        step = self._step_seconds(name)
        if PROVIDERS[name].emulated(self.device) and self.warm_up * step > needed / 2:
            text = f"this CPU emulates bf16 products, so that a step takes about {step:.0f} s; {text}"
        return f"{text}; more --minutes include it"

    def _room(self) -> bool:
        """Whether memory holds another contender as large as the largest so far."""
        largest = max(c.answers[-1]["footprint"] for c in self.running)
        largest += CONTEXT_BYTES if self.device.type == "cuda" else 0
        free = available_memory(self.device)
        return free is None or 1.2 * largest < free
