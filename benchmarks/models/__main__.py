"""The model suite: training steps of whole models in eager PyTorch, torch.compile, Liger and fusekit.

python -m benchmarks.models                # or: fusekit bench models
python -m benchmarks.models --compare old.json new.json
python -m benchmarks.models --report results.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.device import device_at_hand, slug
from benchmarks.kernels import comparison
from benchmarks.models.providers import PROVIDERS
from benchmarks.models.run import Settings, run
from benchmarks.models.view import failures, remarks, table
from benchmarks.models.zoo import ZOO
from benchmarks.report.model_page import write_report
from benchmarks.results_file import RESULTS, read_results

OURS = tuple(name for name, row in PROVIDERS.items() if row.kind == "fusekit")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        if options.compare:
            return _compare(options, console)
        if options.report:
            return _report(options.report, console)
        return _measure(options, console)
    except ValueError as error:
        print(f"bench models: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench models: stopped; the same command continues", file=sys.stderr)
        return 130


def _measure(options: argparse.Namespace, console: Console) -> int:
    settings = Settings(
        device=device_at_hand(options.device),
        models=tuple(options.models or ()),
        providers=tuple(options.providers or ()),
        minutes=options.minutes,
        small=options.small,
        warm=options.warm,
    )
    path = options.out or RESULTS / f"models_{slug(settings.device)}.json"
    results = run(settings, path, console, fresh=options.fresh)
    console.print(table(results))
    for failure in failures(results):
        console.print(failure, style="red", highlight=False, soft_wrap=True, markup=False)
    for remark in remarks(results):
        console.print(remark, highlight=False, soft_wrap=True, markup=False)
    console.print(f"results: {path}", highlight=False, soft_wrap=True)
    _report(path, console)
    return 1 if any(" fusekit " in failure for failure in failures(results)) else 0


def _report(path: Path, console: Console) -> int:
    page = write_report(read_results(path, "models"), path.with_suffix(""))
    console.print(f"report:  {page}", highlight=False, soft_wrap=True)
    return 0


def _compare(options: argparse.Namespace, console: Console) -> int:
    old, new = (read_results(path, "models") for path in options.compare)
    providers = tuple(options.providers or OURS)
    changes = comparison.compare(old, new, providers=providers, threshold=options.threshold)
    console.print(comparison.table(changes, "models"))
    console.print(comparison.drift(old, new), highlight=False)
    console.print(comparison.summary(changes, options.threshold), highlight=False)
    return 1 if comparison.regressions(changes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusekit bench models",
        description=(__doc__ or "").splitlines()[0],
        epilog=f"Models: {', '.join(ZOO)}. Providers: {', '.join(PROVIDERS)}.",
    )
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU where there is one")
    add("--minutes", type=float, default=5.0, help="time for the whole run (default 5)")
    add("--models", nargs="+", metavar="MODEL", help="default: all that have sizes for the device")
    add("--providers", nargs="+", metavar="PROVIDER", help="default: all; eager float32 always runs")
    add(
        "--warm",
        action=argparse.BooleanOptionalAction,
        help="also starts from a warm cache; default: on a GPU",
    )
    add("--small", action="store_true", help="models of no meaning, to try the suite itself")
    add("--out", type=Path, help="results file (default benchmarks/results/models_<device>.json)")
    add("--fresh", action="store_true", help="do not continue an interrupted run")
    add("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="1: something is slower")
    add("--threshold", type=float, default=0.05, help="with --compare: smallest change (default 0.05)")
    add("--report", type=Path, metavar="RESULTS", help="write plots and page of a results file anew")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
