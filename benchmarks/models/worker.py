"""A contender's process: python -m benchmarks.models.worker SPECIFICATION

One training step for each line on standard input, one JSON object on standard output for each. A process of
its own, so that its peak of memory and its caches of compiled code are its own.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import nn

import fusekit
from benchmarks.models.providers import PROVIDERS, Unfit
from benchmarks.models.zoo import ZOO, loss_of
from fusekit.meter import Stopwatch, current_memory, peak_memory, reset_peak
from fusekit.train_config import TrainConfig
from fusekit.trainer import make_optimizer

SEED = 0
LEARNING_RATE = 1e-4


def serve(specification: dict[str, Any]) -> None:
    device = torch.device(specification["device"])
    if device.type == "cpu":
        torch.set_num_threads(1)
    row = ZOO[specification["model"]]
    sizes = row.sizes_on(device, specification["small"])
    before = current_memory(device)
    torch.manual_seed(SEED)
    with device:
        model, batch = row.build(sizes).train(), row.make_batch(sizes, device)
    started = time.perf_counter()
    step = Step(model, batch, specification["provider"], device)
    watch = Stopwatch(device)
    for number, _ in enumerate(sys.stdin):
        watch.lap()
        loss = step()
        wall, cpu = watch.lap()
        answer = {
            "wall": wall,
            "cpu": cpu,
            "loss": loss.item(),
            "peak": peak_memory(device),
            "before": before,
        }
        if number == 0:
            answer |= {"start": time.perf_counter() - started} | step.account()
        tell(answer | {"footprint": _footprint(device)})
        if number == specification["warm_up"] - 1:
            reset_peak(device)


class Step:
    """Forward, backward, clipping and fused AdamW, on the same batch every time.

    The same batch, because then the loss falls fast, and by how much depends on every gradient.
    """

    def __init__(
        self, model: nn.Module, batch: dict[str, torch.Tensor], provider: str, device: torch.device
    ) -> None:
        self.model, self.batch, self.provider, self.device = model, batch, PROVIDERS[provider], device
        self.config = TrainConfig(lr=LEARNING_RATE)
        self.forward = self.provider.wrap(model)
        self.optimizer = make_optimizer(model, self.config, device)

    def __call__(self) -> torch.Tensor:
        with self.provider.autocast(self.device):
            loss = loss_of(self.forward(**self.batch))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def account(self) -> dict[str, Any]:
        """What fusekit fused, in numbers."""
        if self.provider.kind != "fusekit":
            return {}
        report = fusekit.explain(self.model)
        return {
            "sites": len(report.fused),
            "refused": len(report.refused),
            "flops_covered": report.flops_covered,
            "graph_breaks": len(report.graph_breaks),
            "notes": list(report.notes),
        }


def _footprint(device: torch.device) -> int:
    """Bytes that the device cannot give to others."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else current_memory(device)


def tell(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main() -> int:
    try:
        serve(json.loads(sys.argv[1]))
    except KeyboardInterrupt:
        return 130
    except Unfit as reason:
        tell({"skipped": str(reason)})
    except Exception as error:  # the parent shows it in the provider's cell
        first = (str(error).strip() or "no further description").splitlines()[0]
        tell({"failed": f"{type(error).__name__}: {first}"})
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
