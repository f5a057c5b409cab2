"""Everything that a machine with a GPU can tell, in one command and a given time.

python -m benchmarks.gpu --minutes 9       # or: make gpu; WHEELS=folder make gpu
python -m benchmarks.gpu --dry             # on a CPU, with shapes of no meaning: to try the command itself

Needs PyTorch with CUDA, Triton and rich, and no network. Each part is a process of its own, so a kernel that
crashes costs its own measurement and no more. Results are on disk after every measurement; the same command
continues where a run was cut off, and skips what is complete.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.gpu.run import PARTS, Run
from benchmarks.gpu.summary import show
from benchmarks.gpu.wheels import install
from benchmarks.results_file import CHECKOUT, RESULTS
from fusekit.gpu_check import remark


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if not options.minutes > 0:
        print(f"benchmarks.gpu: --minutes is greater than 0, got {options.minutes:g}", file=sys.stderr)
        return 2
    if not options.dry and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: PyTorch finds no CUDA GPU here. `fusekit bench` measures a CPU, --dry tries "
            "this command, and `fusekit doctor` says what is missing",
            file=sys.stderr,
        )
        return 1
    console = Console(width=None if sys.stdout.isatty() else 150)
    name = "dry" if options.dry else torch.cuda.get_device_name()
    run = Run(
        folder=options.out or (CHECKOUT / "runs" / "gpu_dry" if options.dry else RESULTS),
        slug=re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"),
        minutes=options.minutes,
        dry=options.dry,
        fresh=options.fresh,
        console=console,
    )
    doubt = None if options.dry else remark()
    for sentence in (doubt, *_wheels(options.wheels, run)):
        if sentence:
            console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    try:
        run.parts(options.parts)
    except KeyboardInterrupt:
        show(run.results, console)
        print("benchmarks.gpu: stopped; the same command continues", file=sys.stderr)
        return 130
    show(run.results, console)
    console.print(f"overview: {run.path}", highlight=False, soft_wrap=True)
    return 1 if run.failed else 0


def _wheels(folder: Path | None, run: Run) -> list[str]:
    if folder is None:
        return []
    run.results["wheels"] = install(folder)
    run.keep()
    return [f"{name}: {outcome}" for name, outcome in run.results["wheels"].items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="time for everything (default 9)")
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all, in this order")
    add("--wheels", type=Path, help="folder of pure-Python wheels of rivals, installed first")
    add(
        "--out", type=Path, help="folder of the results (default benchmarks/results; runs/gpu_dry with --dry)"
    )
    add("--fresh", action="store_true", help="measure anew what an earlier run has completed or begun")
    add("--dry", action="store_true", help="a CPU and small shapes, to try the command itself")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the part under way, too
    raise SystemExit(main())
