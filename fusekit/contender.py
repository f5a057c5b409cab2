"""One run of a comparison, in its own process so that its peak memory is its own: python -m fusekit.contender

Reads a specification as JSON from its standard input and writes one JSON event per line to standard output:
{"phase": text} while it prepares, the trainer's records, {"trained": ...} before a check that may take longer
than there is time, and {"summary": ...} as the last.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from fusekit.data import load_corpus
from fusekit.meter import current_memory, peak_memory, reset_peak
from fusekit.models import build_model
from fusekit.monitor import Monitor
from fusekit.train_config import TrainConfig
from fusekit.trainer import Trainer

COMPILE_SECONDS = 60.0
WARM_UP = 3  # steps that compile, fill caches and allocate; left out of medians and peaks


class Contender(Trainer):
    """A trainer that keeps no checkpoint, measures after the warm-up, and stops when its time is over."""

    seconds_allowed = math.inf

    def prepare(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.peak_whole = 0
        self.watch = self._watch

    def save(self) -> None:
        """Nothing: a comparison is not continued."""

    def _watch(self, record: dict[str, Any]) -> None:
        tell(record)
        if "loss" not in record:
            return
        self.records.append(record)
        if len(self.records) == WARM_UP:
            self.peak_whole = peak_memory(self.device)
            reset_peak(self.device)
        spent = sum(r["seconds"] for r in self.records[1:])  # the first step compiles
        if (
            spent > self.seconds_allowed
            or self.records[0]["seconds"] > 2 * self.seconds_allowed + COMPILE_SECONDS
        ):
            self.last_step = self.step


def tell(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Train as the specification says; returns the summary."""
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    config, device, folder = TrainConfig(**spec["config"]), torch.device(spec["device"]), Path(spec["folder"])
    tell({"phase": "reading and tokenising"})
    vocab = spec["sizes"]["vocab"]
    corpus = load_corpus(spec["data"], vocab=vocab, context=config.context, folder=Path(spec["cache"]))
    torch.manual_seed(config.seed)
    before = current_memory(device)
    model = build_model(spec["sizes"], spec["hf_config"])
    trainer = Contender(
        model, corpus, config, folder, device=device, monitor=Monitor(1, quiet=True), stop_after=spec["steps"]
    )
    trainer.prepare()
    trainer.seconds_allowed = spec["seconds"] or math.inf
    tell({"phase": {"compile": "compiling", "fusekit": "capturing"}.get(config.provider, "first step")})
    trainer.fit()
    summary = _summary(trainer) | {"memory_before_bytes": before}
    if config.provider == "fusekit":
        tell({"trained": summary})
        tell({"phase": "verifying every fused site against float64"})
        summary |= certify(trainer)
    return summary


def _summary(trainer: Contender) -> dict[str, Any]:
    steady = trainer.records[WARM_UP:] or trainer.records
    losses = [record["loss"] for record in trainer.records]
    return {
        "steps": trainer.step,
        "step_seconds": statistics.median(record["seconds"] for record in steady),
        "step_cpu_seconds": statistics.median(record["cpu_seconds"] for record in steady),
        "first_step_seconds": trainer.records[0]["seconds"],
        "peak_bytes": peak_memory(trainer.device),
        "peak_with_start_bytes": max(trainer.peak_whole, peak_memory(trainer.device)),
        "train_loss": statistics.fmean(losses[-5:]),
        "validation_loss": trainer.validation_loss,
        "losses": losses,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


def certify(trainer: Trainer) -> dict[str, Any]:
    """The parity certificate on a batch of the run, and the account of what was fused."""
    import fusekit

    batch = tuple(t.to(trainer.device) for t in trainer.batches.next())
    certificate = fusekit.verify(trainer.model, *batch)
    sites = certificate.to_dict()["sites"]
    return {
        "parity": certificate.ok,
        "sites": len(sites),
        "certificate": certificate.to_dict(),
        "explained": fusekit.explain(trainer.model).to_dict(),
    }


def main() -> int:
    try:
        tell({"summary": run(json.load(sys.stdin))})
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        tell({"error": f"{type(error).__name__}: {first}"})
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
