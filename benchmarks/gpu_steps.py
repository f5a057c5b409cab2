"""Training steps of whole models on a GPU, as a loop runs them: the host does not wait for a step to end.

    python -m benchmarks.gpu_steps --out gpu_steps.json [--models "GPT-2 124M"] [--providers "fusekit bf16"]

For each model and provider, in one process: steps whose loss is read (what a loop that logs every step
pays), then as many in a row (what the others pay), their peak of memory, and the losses, which must fall
alike. The model suite (`fusekit bench models`) takes turns, in processes of their own; this is what a few
minutes on a GPU allow. The file is written after each provider; one that fails is a cell with the reason.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.models.providers import PROVIDERS
from benchmarks.models.worker import SEED, Step
from benchmarks.models.zoo import ZOO
from benchmarks.results_file import environment, write_results
from fusekit.kernels.trial import failure
from fusekit.meter import Stopwatch, peak_memory, reset_peak

CHOSEN = ("eager bf16", "compile bf16", "fusekit bf16")
WARM_UP, STEPS = 5, 10


def measure(model: str, provider: str, device: torch.device, steps: int = STEPS) -> dict[str, Any]:
    """Milliseconds a step, waited for and not; the host's share; peak bytes; every loss.

    On a CPU sizes are small and nothing means anything: to try this.
    """
    row, small = ZOO[model], device.type == "cpu"
    sizes = row.sizes_on(device, small)
    torch._dynamo.reset()
    torch.manual_seed(SEED)
    with device:
        built, batch = row.build(sizes).train(), row.make_batch(sizes, device)
    watch = Stopwatch(device)
    step = Step(built, batch, provider, device)
    losses = [step().item()]
    start = watch.lap()[0]
    losses += [step().item() for _ in range(WARM_UP - 1)]
    reset_peak(device)
    waited, host = [], []
    for _ in range(steps):
        watch.lap()
        started = time.perf_counter()
        loss = step()
        host.append(time.perf_counter() - started)
        losses.append(loss.item())
        waited.append(watch.lap()[0])
    last = [step() for _ in range(steps)]
    in_a_row = watch.lap()[0] / steps
    losses += [loss.item() for loss in last]
    return {
        "waited_ms": 1e3 * statistics.median(waited), "in_a_row_ms": 1e3 * in_a_row,
        "host_ms": 1e3 * statistics.median(host), "peak_bytes": peak_memory(device), "start_seconds": start,
        "units_per_second": row.units(sizes) / in_a_row, "losses": losses, **step.account(),
    }  # fmt: skip


def table(results: dict[str, Any]) -> Table:
    view = Table(
        title=f"ms a step on {results['environment'].get('gpu', 'a CPU, of no meaning')}",
        title_justify="left",
    )
    for heading in ("model", "provider", "in a row", "loss read", "host", "peak MB", "start s", "last loss"):
        view.add_column(heading, justify="left" if heading in ("model", "provider") else "right")
    for cell in results["cells"]:
        names = (cell["model"], cell["provider"])
        if "failed" in cell:
            view.add_row(*names, cell["failed"], style="red")
            continue
        times = (f"{cell[k]:.1f}" for k in ("in_a_row_ms", "waited_ms", "host_ms"))
        rest = f"{cell['peak_bytes'] / 1e6:,.0f}", f"{cell['start_seconds']:.0f}", f"{cell['losses'][-1]:.4f}"
        view.add_row(*names, *times, *rest)
    return view


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_steps", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(ZOO), default=["GPT-2 124M"])
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(CHOSEN))
    parser.add_argument("--out", type=Path, default=None, help="a JSON file; none is written by default")
    parser.add_argument("--dry", action="store_true", help="a CPU and small models, to try this")
    options = parser.parse_args(arguments)
    console = Console(width=120)
    if not options.dry and not torch.cuda.is_available():
        console.print("this measures a CUDA GPU and PyTorch finds none here; --dry tries it without")
        return 2
    device = torch.device("cpu" if options.dry else "cuda")
    held = {"kind": "gpu_steps", "environment": environment(), "dry": options.dry}
    results: dict[str, Any] = held | {"cells": []}
    for model in options.models:
        for provider in options.providers:
            try:
                found = measure(model, provider, device, 2 if options.dry else STEPS)
            except Exception as error:  # the others go on
                found = {"failed": failure(error)}
            results["cells"].append({"model": model, "provider": provider} | found)
            if options.out is not None:
                write_results(options.out, results)
            gc.collect()
            torch.cuda.empty_cache()
    console.print(table(results))
    return int(any("failed" in cell for cell in results["cells"]))


if __name__ == "__main__":
    sys.exit(main())
