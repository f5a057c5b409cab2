"""The static lane: every kernel that ships compiles for sm_80, sm_90 and sm_100, and compiles well.

`python -m benchmarks.static`. Triton compiles ahead of time without a GPU. Two versions do, because the GPU
machine's makes other code than the newest: this Python's, and that of `.venv-triton36`. Asked of each build:

    no spilled registers; no "wgmma serialized" from ptxas; tensor cores wherever tl.dot multiplies 16-bit
    values; shared memory within the architecture's; registers within a multiprocessor's; and registers not
    worse than recorded in benchmarks/results/static.json, which `--record` writes.

Kernels that samples of real model size need are compiled for every pair of Triton and architecture; those
that only the small odd samples of the tests need, for the GPU machine's pair; float16, for which tiles are
those of bfloat16, for that pair at real model size. `--all` compiles everything for every pair.
Figures are kept in .static/ by the hash of the kernel's source, so a second run compiles only what changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.static.specialisations import Specialisation, collect

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = ROOT / "benchmarks" / "static" / "worker.py"
RECORD = ROOT / "benchmarks" / "results" / "static.json"
CACHE = ROOT / ".static"

PYTHONS = {"3.8": Path(sys.executable), "3.6": ROOT / ".venv-triton36" / "bin" / "python"}
ARCHITECTURES = (80, 90, 100)
GPU_MACHINE = ("3.6", 90)
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a program may have
REGISTER_FILE = 65_536  # of a multiprocessor, allocated by 8 a thread

Figures = dict[str, Any]


def gate(figures: Figures, warps: int, recorded: Figures | None = None) -> list[str]:
    """What is wrong with one compiled kernel, as sentences; none is a pass."""
    if "error" in figures:
        return [f"does not compile: {figures['error']}"]
    wrong = []
    if figures["spills"]:
        wrong.append(f"spills {figures['spills']} bytes of registers")
    if figures["advisories"]:
        wrong.append(f"wgmma is serialised ({', '.join(figures['advisories'])})")
    if not figures["tensor_cores"]:
        wrong.append("tl.dot of 16-bit values does not use tensor cores")
    if figures["shared"] > (limit := SHARED_MEMORY[figures["arch"]]):
        wrong.append(f"needs {figures['shared']} bytes of shared memory, {limit} exist")
    if _granules(figures["registers"]) * 32 * warps > REGISTER_FILE:
        wrong.append(
            f"needs {figures['registers']} registers for {32 * warps} threads: it cannot be launched"
        )
    if recorded and _granules(figures["registers"]) > _granules(recorded["registers"]):
        wrong.append(f"uses {figures['registers']} registers, {recorded['registers']} are recorded")
    return wrong


def _granules(registers: int) -> int:
    return -(-registers // 8) * 8


def plan(specialisations: Iterable[Specialisation], everything: bool) -> dict[str, list[dict[str, Any]]]:
    """The jobs of each Triton."""
    jobs: dict[str, list[dict[str, Any]]] = {version: [] for version in PYTHONS}
    for specialisation in specialisations:
        for version in PYTHONS:
            for arch in ARCHITECTURES:
                if f"sm_{arch}" not in specialisation.targets:
                    continue
                if everything or _planned(specialisation, (version, arch) == GPU_MACHINE):
                    job = {**dataclasses.asdict(specialisation), "key": specialisation.key, "arch": arch}
                    jobs[version].append(job)
    return jobs


def _planned(specialisation: Specialisation, gpu_machine: bool) -> bool:
    if "*fp16" in specialisation.signature.values():
        return specialisation.bench and gpu_machine
    return specialisation.bench or gpu_machine


def compile_all(
    jobs: dict[str, list[dict[str, Any]]], advance: Callable[[], None]
) -> dict[str, dict[tuple[str, int], Figures]]:
    """Figures by Triton, then by key and architecture: one process a version, both at a time."""
    results: dict[str, dict[tuple[str, int], Figures]] = {version: {} for version in jobs}
    failures: list[str] = []

    def run(version: str) -> None:
        try:
            for figures in _compiled(version, jobs[version]):
                results[version][figures["key"], figures["arch"]] = figures
                advance()
        except RuntimeError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=run, args=(version,)) for version in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise SystemExit("\n".join(failures))
    return results


def _compiled(version: str, jobs: list[dict[str, Any]]) -> Iterable[Figures]:
    fresh = []
    for job in jobs:
        cached = _cache_file(version, job)
        if cached.exists():
            yield json.loads(cached.read_text())
        else:
            fresh.append(job)
    if not fresh:
        return
    worker = subprocess.Popen(
        [str(PYTHONS[version]), str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdin and worker.stdout
    feeder = threading.Thread(target=_feed, args=(worker.stdin, fresh))
    feeder.start()
    done = 0
    for job, line in zip(fresh, worker.stdout, strict=False):
        figures, done = json.loads(line), done + 1
        if "error" not in figures:
            _cache_file(version, job).write_text(line)
        yield figures
    feeder.join()
    if worker.wait() or done < len(fresh):
        raise RuntimeError(f"the compiler process of Triton {version} died at {fresh[done]['key']}")


def _feed(pipe: Any, jobs: list[dict[str, Any]]) -> None:
    with pipe:
        pipe.writelines(json.dumps(job) + "\n" for job in jobs)


def _cache_file(version: str, job: dict[str, Any]) -> Path:
    """Named by what decides the figures: the job, which holds a hash of the kernel's source, and Triton."""
    text = json.dumps(
        [version, _worker(), {k: v for k, v in job.items() if k not in ("bench", "targets")}], sort_keys=True
    )
    return CACHE / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


@functools.cache
def _worker() -> str:
    return hashlib.sha256(WORKER.read_bytes()).hexdigest()


def judge(
    specialisations: dict[str, Specialisation],
    results: dict[str, dict[tuple[str, int], Figures]],
    recorded: dict[str, Any],
) -> list[tuple[str, str, int, str]]:
    """Every failure: key, Triton, architecture, sentence."""
    failures = []
    for version, found in results.items():
        for (key, arch), figures in found.items():
            before = recorded.get(key, {}).get(f"triton {version} sm_{arch}")
            for sentence in gate(figures, specialisations[key].options["num_warps"], before):
                failures.append((key, version, arch, sentence))
    return failures


def to_record(results: dict[str, dict[tuple[str, int], Figures]]) -> dict[str, Any]:
    """What results/static.json holds: registers and shared memory by kernel, Triton and architecture."""
    record: dict[str, Any] = {}
    for version, found in results.items():
        for (key, arch), figures in found.items():
            if "error" not in figures:
                entry = {name: figures[name] for name in ("registers", "shared")}
                record.setdefault(key, {})[f"triton {version} sm_{arch}"] = entry
    return {key: record[key] for key in sorted(record)}


def table(
    results: dict[str, dict[tuple[str, int], Figures]], failures: list[tuple[str, str, int, str]]
) -> Table:
    """One line a kernel, Triton and architecture."""
    summary = Table("kernel", "triton", "sm", "variants", "registers", "shared memory", "failures")
    groups: dict[tuple[str, str, int], list[Figures]] = {}
    for version, found in results.items():
        for (key, arch), figures in found.items():
            groups.setdefault((key.split("(")[0], version, arch), []).append(figures)
    for (kernel, version, arch), group in sorted(groups.items()):
        good = [f for f in group if "error" not in f]
        ranges = [_range([f[name] for f in good]) for name in ("registers", "shared")]
        bad = len({f[0] for f in failures if f[0].startswith(f"{kernel}(") and f[1:3] == (version, arch)})
        style = "red" if bad else None
        summary.add_row(kernel, version, str(arch), str(len(group)), *ranges, str(bad), style=style)
    return summary


def _range(values: list[int]) -> str:
    return f"{min(values)}-{max(values)}" if values else "-"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--all", action="store_true", help="every kernel for every Triton and architecture")
    parser.add_argument(
        "--record", action="store_true", help="write benchmarks/results/static.json if all pass"
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    options = parser.parse_args()
    if not PYTHONS["3.6"].exists():
        print(
            "the static lane needs a second environment with Triton 3.6: make .venv-triton36/ready",
            file=sys.stderr,
        )
        return 2
    CACHE.mkdir(exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 150)
    with console.status("collecting kernels"):
        found = {key: s for key, s in collect().items() if options.kernel in key.split("(")[0]}
    jobs = plan(found.values(), options.all)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(map(len, jobs.values())))
        results = compile_all(jobs, lambda: progress.advance(task))
    recorded = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    failures = judge(found, results, {} if options.record else recorded)
    console.print(table(results, failures))
    for key, version, arch, sentence in failures:
        console.print(f"[red]FAILED[/] triton {version} sm_{arch} {key}\n       {sentence}", highlight=False)
    if options.record and not failures:
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(to_record(results), indent=1) + "\n")
    count = sum(map(len, results.values()))
    console.print(f"static: {len(found)} kernels, {count} builds, {len(failures)} failures")
    return 1 if failures else 0
