"""Builds: which kernel with which Triton for which architecture, compiled in worker processes and kept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.results_file import CHECKOUT
from benchmarks.static import sass
from benchmarks.static.specialisations import Specialisation

FOLDER = Path(__file__).resolve().parent
WORKER = FOLDER / "worker.py"
CACHE = CHECKOUT / ".static"
PYTHONS = {"3.8": Path(sys.executable), "3.6": CHECKOUT / ".venv-triton36" / "bin" / "python"}
TARGETS = (80, 90, 100)
GPU_MACHINE = ("3.6", 90)
AMD = ("3.8", "gfx942")
SHARE = 20

Figures = dict[str, Any]
Results = dict[str, dict[tuple[str, Any], Figures]]  # by Triton, then by key and architecture
Jobs = dict[str, list[dict[str, Any]]]  # by Triton


def plan(specialisations: Iterable[Specialisation], everything: bool = False, amd: bool = False) -> Jobs:
    """The jobs of each Triton; with `amd`, those of gfx942 that samples of real size need, as well."""
    jobs: Jobs = {version: [] for version in PYTHONS}
    specialisations = list(specialisations)
    widest = _widest(specialisations)
    for found in specialisations:
        archs = [arch for arch in TARGETS if f"sm_{arch}" in found.targets]
        pairs: list[tuple[str, Any]] = [(version, arch) for version in PYTHONS for arch in archs]
        builds = [pair for pair in pairs if everything or _planned(found, pair, widest)]
        if amd and found.bench and "sm_80" in found.targets:  # whose tables serve what has none
            builds.append(AMD)
        for version, arch in builds:
            # Reading machine code takes as long as compiling: only where it is real size and understood,
            # and of one Triton.
            loop = found.bench and arch in sass.VERIFIED and (everything or version == GPU_MACHINE[0])
            job = {**dataclasses.asdict(found), "key": found.key, "arch": arch, "loop": loop}
            jobs[version].append(job)
    return jobs


def _planned(found: Specialisation, build: tuple[str, Any], widest: set[str]) -> bool:
    """The GPU machine's pair gets all of real size; others, and odd sizes there, each configuration once."""
    if build == GPU_MACHINE:
        return found.bench or (found.key in widest and "*fp16" not in found.signature.values())
    return found.bench and found.key in widest and "*fp16" not in found.signature.values()


def _widest(specialisations: list[Specialisation]) -> set[str]:
    """Of those that differ in activation, optional tensors and strides only, the one with most tensors;
    none of float16, which is not asked for where these are."""
    groups: dict[tuple[Any, ...], Specialisation] = {}
    for found in (s for s in specialisations if "*fp16" not in s.signature.values()):
        kinds = (bool, int, str) if found.bench else (bool, str)  # odd sizes: whatever their blocks are
        shape = [(k, v) for k, v in found.constexprs.items() if k.isupper() and type(v) in kinds]
        dtype = next(v for v in found.signature.values() if str(v).startswith("*"))
        group = (found.module, found.kernel, found.bench, dtype, found.targets, *map(str, sorted(shape)),
                 *(map(str, sorted(found.options.items())) if found.bench else ()))  # fmt: skip
        if group not in groups or _tensors(found) > _tensors(groups[group]):
            groups[group] = found
    return {found.key for found in groups.values()}


def _tensors(found: Specialisation) -> tuple[int, str]:
    return sum(str(v).startswith("*") for v in found.signature.values()), found.key


def compile_all(jobs: Jobs, advance: Callable[[], None]) -> Results:
    """One process a version, all at a time; `advance` is called after each build."""
    results: Results = {version: {} for version in jobs}
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


def _compiled(version: str, jobs: list[dict[str, Any]]) -> Iterator[Figures]:
    CACHE.mkdir(exist_ok=True)
    fresh = []
    for job in jobs:
        cached = _cache_file(version, job)
        if cached.exists():
            yield json.loads(cached.read_text()) | {"made": fingerprint(version, job)}
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
        yield figures | {"made": fingerprint(version, job)}
    feeder.join()
    if worker.wait() or done < len(fresh):
        raise RuntimeError(f"the compiler process of Triton {version} died at {fresh[done]['key']}")


def _feed(pipe: Any, jobs: list[dict[str, Any]]) -> None:
    with pipe:
        pipe.writelines(json.dumps(job) + "\n" for job in jobs)


def fingerprint(version: str, job: dict[str, Any]) -> str:
    """Of what decides a build's figures: the job, with a hash of the kernel's source, Triton, our readers."""
    decisive = {k: v for k, v in job.items() if k not in ("bench", "targets")}
    text = json.dumps([version, _readers(), decisive], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def changed(jobs: Jobs, recorded: dict[str, Any], today: int) -> Jobs:
    """Without the builds that are recorded as they would be made now, but for one in SHARE, by the day.

    Compiling is deterministic, and what is recorded has passed the gate: only what changed can fail. The
    daily share finds out if that stops being true, of a package that was updated in place, say.
    """
    return {
        version: [job for job in of if _due(version, job, recorded, today)] for version, of in jobs.items()
    }


def _due(version: str, job: dict[str, Any], recorded: dict[str, Any], today: int) -> bool:
    before = recorded.get(job["key"], {}).get(f"triton {version} sm_{job['arch']}", {})
    made = fingerprint(version, job)
    return before.get("made") != made or int(made, 16) % SHARE == today % SHARE


def _cache_file(version: str, job: dict[str, Any]) -> Path:
    return CACHE / f"{fingerprint(version, job)}.json"


@functools.cache
def _readers() -> str:
    code = b"".join((FOLDER / name).read_bytes() for name in ("worker.py", "sass.py", "ptx.py"))
    return hashlib.sha256(code).hexdigest()
