"""The kernel suite: every op against eager PyTorch, torch.compile and other libraries, on the device at hand.

python -m benchmarks                       # or: fusekit bench
python -m benchmarks --compare old.json new.json
python -m benchmarks --tune                # measure configurations of products, and who runs what, here
python -m benchmarks --report results.json # plots and the page anew, without measuring
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import tune, tune_attention, tune_fp8
from benchmarks.device import device_at_hand, slug
from benchmarks.kernels import comparison
from benchmarks.kernels import run as kernel_run
from benchmarks.kernels.cases import MEASURED
from benchmarks.kernels.providers import PROVIDERS, STANDARD
from benchmarks.kernels.rivals import RIVALS
from benchmarks.kernels.suite import Settings
from benchmarks.models.__main__ import OURS as MODEL_PROVIDERS
from benchmarks.report.page import write_report
from benchmarks.results_file import RESULTS, read_kernels, read_results
from benchmarks.traffic.command import compare_traffic

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_FAILURES = 12  # printed; the page lists all


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        if options.compare:
            return _compare(options, console)
        if options.tune:
            return _tune(options, console)
        if options.report:
            return _report(options.report, read_kernels(options.report), console)
        return _measure(options, console)
    except (ValueError, kernel_run.DeviceLost) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: stopped; the same command continues", file=sys.stderr)
        return 130


def _measure(options: argparse.Namespace, console: Console) -> int:
    if not (options.minutes > 0 and options.seconds > 0):
        raise ValueError("--minutes and --seconds are greater than 0")
    device = device_at_hand(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    rivals = tuple(RIVALS) if device.type == "cuda" or options.small else ()
    dtypes = options.dtypes or (["float32", "bfloat16"] if device.type == "cpu" else list(DTYPES))
    settings = Settings(
        device=device,
        ops=tuple(options.ops or MEASURED),
        dtypes=tuple(DTYPES[name] for name in dtypes),
        providers=tuple(options.providers or (*STANDARD, *rivals)),
        minutes=options.minutes,
        seconds=options.seconds,
        small=options.small,
    )
    path = options.out or RESULTS / f"kernels_{slug(device)}.json"
    results = kernel_run.run(settings, path, console, fresh=options.fresh)
    console.print(kernel_run.table(results))
    failures = kernel_run.failures(results)
    for failure in failures[:MOST_FAILURES]:
        console.print(failure, style="red", highlight=False, soft_wrap=True, markup=False)
    for name, reason in results["left_out"].items():
        console.print(f"left out: {name}: {reason}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"results: {path}", highlight=False, soft_wrap=True)
    _report(path, results, console)
    return 1 if any(" fusekit: " in failure for failure in failures) else 0


def _tune(options: argparse.Namespace, console: Console) -> int:
    device = torch.device("cpu") if options.dry else device_at_hand(options.device)
    held = tune.run(device, options.out, console, minutes=options.minutes, only=options.only, dry=options.dry)
    failed = len(tune.failures(held))
    if not options.dry and options.only is None:
        tune_attention.run(device, console)
        tune_fp8.run(device, console)
    console.print(
        f"{len(held['done'])} buckets measured, {len(held['shapes'])} in the table of {held['device']}, "
        f"{failed} candidates failed",
        highlight=False,
    )
    return 1 if failed else 0


def _report(path: Path, results: dict, console: Console) -> int:  # type: ignore[type-arg]
    page = write_report(results, path.with_suffix(""))
    console.print(f"report:  {page}", highlight=False, soft_wrap=True)
    return 0


def _compare(options: argparse.Namespace, console: Console) -> int:
    old, new = map(read_results, options.compare)
    kind = new["kind"]
    if old["kind"] != kind:
        raise ValueError(
            f"{options.compare[0]} is of the suite {old['kind']}, {options.compare[1]} of the suite {kind}: "
            "compare two files of one suite"
        )
    if kind == "traffic":
        return compare_traffic(old, new, console)
    ours = ("fusekit",) if kind == "kernels" else MODEL_PROVIDERS
    providers = tuple(options.providers or ours)
    changes = comparison.compare(old, new, providers=providers, threshold=options.threshold)
    console.print(comparison.table(changes, kind))
    console.print(comparison.drift(old, new), highlight=False)
    console.print(comparison.summary(changes, options.threshold), highlight=False)
    return 1 if comparison.regressions(changes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusekit bench",
        description=(__doc__ or "").splitlines()[0],
        epilog="Other benchmarks: fusekit bench models (training steps of whole models), fusekit bench gpu.",
    )
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU where there is one")
    add("--minutes", type=float, default=5.0, help="time for the whole run (default 5)")
    add("--seconds", type=float, default=Settings.seconds, help="per cell (default %(default)s)")
    add("--ops", nargs="+", choices=list(MEASURED), help="default: all")
    add("--dtypes", nargs="+", choices=list(DTYPES), help="default: float32 bfloat16; on a GPU all three")
    add(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        help=f"default: {' '.join(STANDARD)}, on a GPU rivals too",
    )
    add("--small", action="store_true", help="the tests' shapes, of no meaning: to try the suite itself")
    add("--out", type=Path, help="results file (default benchmarks/results/kernels_<device>.json)")
    add("--fresh", action="store_true", help="do not continue an interrupted run")
    add(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("OLD", "NEW"),
        help="compare results; 1: something is slower",
    )
    add("--threshold", type=float, default=0.05, help="with --compare: smallest change (default 0.05)")
    add("--tune", action="store_true", help="measure matrix products, attention and FP8, write the tables")
    add("--only", help="with --tune: only buckets whose key contains this, such as 'half nt'")
    add("--dry", action="store_true", help="with --tune: predicted times and no GPU, to try it")
    add("--report", type=Path, metavar="RESULTS", help="write plots and page of a results file anew")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
