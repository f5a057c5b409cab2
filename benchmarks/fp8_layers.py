"""What FP8 gains on this GPU: whole layers against bf16, and where the time goes.

    python -m benchmarks.fp8_layers --minutes 4 --out fp8_layers.json

For each layer and preset: linear_fp8 forward, and forward with backward, all casts included, beside the bf16
layer of PyTorch; then the casts alone, and each of the three products by the own kernel and by
torch._scaled_mm. Once for each contraction: the error of each way to keep sums, against float64 sums of the
same codes. What fails is a cell with the reason, and the others go on. The file is written after each layer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fp8_cells import Bench
from benchmarks.results_file import write_results
from fusekit.kernels.trial import failure

LAYERS = ((8192, 4096, 16384), (8192, 16384, 4096), (8192, 4096, 4096), (16384, 8192, 8192))
DRY_LAYERS = ((32, 48, 64),)  # tokens, input features, output features
CONTRACTIONS, DRY_CONTRACTIONS = (4096, 16384), (256,)


def tables(results: dict[str, Any]) -> list[Table]:
    times = Table("layer", "preset", "", "ms", "TFLOP/s", title="FP8 layers: tokens x in x out")
    for name, cell in results["cells"].items():
        layer, preset, what = name.split(" ", 2)
        shown = (f"{cell['seconds'] * 1e3:.3f}", f"{cell['tflops']:.0f}") if "seconds" in cell else ("", "")
        times.add_row(layer, preset, what, *shown, style="red" if "failed" in cell else None)
    errors = Table("sums", "relative error", "bias", title="Against float64 sums of the same codes")
    for name, cell in results["errors"].items():
        shown = (f"{cell['relative']:.2e}", f"{cell['bias']:+.2e}") if "relative" in cell else ("failed", "")
        errors.add_row(name, *shown)
    return [times, errors]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_layers", description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0, help="layers that it does not reach are left")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file; none is written by default")
    parser.add_argument("--dry", action="store_true", help="tiny layers, to try this without a GPU")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}; it is greater than 0")
    console = Console(width=120)
    if not options.dry and not torch.cuda.is_available():
        console.print("this measures a CUDA GPU and PyTorch finds none here; --dry tries it without")
        return 2
    torch.manual_seed(0)
    bench, end = Bench(options.dry, console), time.monotonic() + 60 * options.minutes
    parts: list[tuple[Callable[..., None], tuple[int, ...]]] = []
    parts += [(bench.accumulation, (K,)) for K in (DRY_CONTRACTIONS if options.dry else CONTRACTIONS)]
    parts += [(bench.layer, sizes) for sizes in (DRY_LAYERS if options.dry else LAYERS)]
    for part, sizes in parts:
        if time.monotonic() > end:
            console.print(f"the time was over: {part.__name__} {sizes} is left", highlight=False)
            continue
        try:
            part(*sizes)
        except Exception as error:  # such as one that is out of memory: the others go on
            bench.fail(f"{'x'.join(map(str, sizes))} all of it", failure(error))
        if options.out is not None:
            write_results(options.out, bench.results())
    for table in tables(bench.results()):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
