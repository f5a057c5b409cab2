"""The static lane: every kernel that ships compiles for sm_80, sm_90 and sm_100, and compiles well.

`python -m benchmarks.static`. Triton compiles ahead of time without a GPU. Two versions do, because the GPU
machine's makes other code than the newest: this Python's, and that of `.venv-triton36`. Asked of each build:

    no spilled registers; no "wgmma serialized" from ptxas; tensor cores wherever tl.dot multiplies 16-bit
    values; registers and shared memory with which it can be launched; and beside the record,
    benchmarks/results/static.json: registers, shared memory, occupancy, tensor-core instructions and the hot
    loop's cycles against its bound are not worse. `--record` writes the record, in which builds that are
    recorded as they would be made now stay. Of products by large tiles on sm_90 the loop's cycles are at most
    1.15 of the tensor cores' bound, record or not.

Kernels that samples of real model size and the tables' configurations need are compiled for the GPU machine's
pair of Triton and architecture, and each configuration once, with the most tensors, for every other pair; of
those that only the small odd samples of the tests need, one of each kind for the GPU machine's pair; float16,
for which tiles are those of bfloat16, for that pair at real size. `--all` compiles everything for every pair,
and for AMD's gfx942, which is shown but fails nothing. `--report` draws what was found.

The record holds a fingerprint of each build: the kernel's source and all it calls, its configuration, Triton
and architecture, and the code that reads the figures. A build whose fingerprint is recorded has passed this
gate as it is now, and is not made again, except for a twentieth of them each day; `--fresh` makes all. What
is made is kept in .static/ as well.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.results_file import RESULTS
from benchmarks.static import large_tiles, record
from benchmarks.static.build import PYTHONS, Jobs, Results, changed, compile_all, plan
from benchmarks.static.gate import judge
from benchmarks.static.report import amd_table, table
from benchmarks.static.specialisations import collect


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if not PYTHONS["3.6"].exists():
        print(
            "the static lane needs a second environment with Triton 3.6: make .venv-triton36/ready",
            file=sys.stderr,
        )
        return 2
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        recorded = record.read()
    except ValueError as error:
        if not options.record:
            print(error, file=sys.stderr)
            return 2
        recorded = {}
    with console.status("collecting kernels"):
        found = {key: s for key, s in collect().items() if options.kernel in key.split("(")[0]}
    jobs = plan(found.values(), options.all, amd=options.all or options.report is not None)
    planned, count_planned = jobs, sum(map(len, jobs.values()))
    if not (options.all or options.fresh or options.report):
        jobs = changed(jobs, recorded, datetime.date.today().toordinal())
    results = _compile(console, jobs)
    failures = judge(found, results, {} if options.record else recorded)
    console.print(table(found, results, failures))
    if amd := amd_table(results):
        console.print(amd)
    for key, version, arch, sentence in failures:
        console.print(f"[red]FAILED[/] triton {version} sm_{arch} {key}\n       {sentence}", highlight=False)
    if options.record and not failures:
        record.write(record.joined(record.to_record(found, results), recorded, planned))
        large_tiles.draw(record.read())
    if options.report is not None:
        from benchmarks.static.page import write_report

        console.print(f"report: {write_report(found, results, failures, options.report)}", highlight=False)
    count = sum(map(len, results.values()))
    console.print(
        f"static: {len(found)} kernels, {count_planned} builds: {count} made, "
        f"{count_planned - count} recorded as they are now; {len(failures)} failures"
    )
    return 1 if failures else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--all", action="store_true", help="every kernel for every Triton and architecture")
    parser.add_argument(
        "--record", action="store_true", help="write benchmarks/results/static.json if all pass"
    )
    parser.add_argument("--fresh", action="store_true", help="make recorded builds again as well")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--report", nargs="?", type=Path, const=RESULTS / "static", metavar="FOLDER",
        help="gfx942 too, then page, plots and predicted times in FOLDER (benchmarks/results/static)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.record and (options.kernel or options.all):
        parser.error("--record writes what make static compiles: leave out --kernel and --all")
    return options


def _compile(console: Console, jobs: Jobs) -> Results:
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(map(len, jobs.values())))
        return compile_all(jobs, lambda: progress.advance(task))
