"""Measures which configuration of a matrix product is the fastest on this GPU and writes the device's table.

    fusekit bench --tune                       # about 10 minutes; --minutes, --only "half nt"

For each bucket of shapes that training meets, every configuration that the architecture's table offers must
first compute the right product; then those that did are timed. The table is on disk after each bucket, marked
incomplete until the last, and the same command goes on from there. A complete table is measured anew, bucket
by bucket, so that an interrupted refresh leaves whole entries.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from benchmarks.clock import Clock, CudaClock, samples
from benchmarks.results_file import environment, write_results
from benchmarks.tune_products import (
    Operands,
    Problem,
    Product,
    dry_product,
    exact,
    operands,
    result,
    start,
    start_dry,
)
from fusekit.kernels import config_table, gemm
from fusekit.kernels.config_table import Row, Table
from fusekit.kernels.trial import failure

SCHEMA = 1
# (tokens, output features, input features) of a linear, the most valuable first; each gives three products.
LINEARS = (
    (8192, 4096, 4096), (8192, 16384, 4096), (8192, 4096, 16384), (2048, 4096, 1024), (2048, 1024, 4096),
    (16384, 3072, 768), (16384, 768, 3072), (16384, 768, 768), (8192, 2048, 2048), (4096, 8192, 2048),
    (512, 4096, 4096), (512, 1024, 1024), (64, 4096, 4096), (1024, 32768, 1024),
)  # fmt: skip
KINDS = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
COLD_BYTES = 128 << 20  # of operands that calls go round in: more than the L2 cache holds
MOST_COPIES = 4
SECONDS = 0.15  # of timing for one candidate
TOLERANCE = {"half": 1.1, "tf32": 1.0, "ieee": 1.0}  # half: roundings to the dtype; float32: see `wrong`


def problems(linears: Sequence[tuple[int, int, int]] = LINEARS) -> list[Problem]:
    """Each bucket once: the forward product with and without epilogue, and both gradients; then, of layers
    that widen or keep their input, as the first products of a gated layer and as three of one input."""
    found: dict[str, Problem] = {}
    for kind in KINDS:
        for M, N, K in linears:
            for layout, epilogue, sizes in (
                ("nt", "plain", (M, N, K)),
                ("nt", "forward", (M, N, K)),
                ("nn", "plain", (M, K, N)),
                ("nn", "backward", (M, K, N)),
                ("tn", "plain", (N, K, M)),
            ):
                problem = Problem(kind, layout, epilogue, *sizes)
                found.setdefault(problem.key, problem)
    for kind in KINDS:
        for M, N, K in linears:
            for layout, epilogue, sizes in (
                ("nt", "gated", (M, N, K)),
                ("nt", "qkv", (M, N, K)),
                ("nn", "qkv", (M, K, N)),
            ):
                if N >= K:
                    problem = Problem(kind, layout, epilogue, *sizes)
                    found.setdefault(problem.key, problem)
    return list(found.values())


def run(
    device: torch.device,
    path: Path | None,
    console: Console,
    *,
    minutes: float = 10.0,
    only: str | None = None,
    dry: bool = False,
    clock: Clock | None = None,
    product: Product | None = None,
) -> dict[str, Any]:
    """Tune, and return what `path` holds.

    Args:
        device: a CUDA device; a CPU only with `dry`.
        path: the table's file; None for the place where fusekit looks for this device's.
        minutes: of time; buckets that it does not reach are left out, and done by the next run.
        only: text that a bucket's key contains, such as "half nt" or "4096x".
        dry: tiny products by torch.matmul and the predicted times, to try this program without a GPU.
        clock, product: instead of the device's clock and of `gemm.matmul`.

    Raises:
        ValueError: no GPU, minutes not positive, nothing matches `only`, or `path` is of another schema.
    """
    if device.type != "cuda" and not dry:
        raise ValueError("--tune measures on a CUDA GPU and PyTorch finds none here; --dry tries it without")
    if not minutes > 0:
        raise ValueError(f"--minutes is {minutes}; it is greater than 0")
    wanted = [p for p in problems(((64, 48, 32),) if dry else LINEARS) if only is None or only in p.key]
    if not wanted:
        raise ValueError(f"--only {only!r} is in no bucket's key; keys look like {problems()[0].key!r}")
    base = "sm_90" if dry else config_table.target_of(torch.cuda.get_device_capability(device))
    name = "dry" if dry else config_table.slug(torch.cuda.get_device_name(device))
    path = path or config_table.FOLDER / f"{name}.json"
    table = config_table.load(base)
    held = _start(path, name, base, table, device)
    clock = clock or (None if dry else CudaClock())
    product = partial(start_dry if dry else start, product or (dry_product if dry else gemm.matmul))
    end = time.monotonic() + 60 * minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tuning", total=len(wanted))
        for problem in wanted:
            if time.monotonic() > end:
                break
            progress.update(task, description=problem.key)
            if problem.key not in held["done"]:
                _tune(problem, table, device, clock, product, held, console)
                write_results(path, held)
            progress.advance(task)
    left = [p.key for p in wanted if p.key not in held["done"]]
    held["left"] = left
    held["complete"] = not left and only is None
    _drop_unused(held)
    write_results(path, held)
    if left:
        console.print(f"{len(left)} buckets left; the same command goes on with them", highlight=False)
    return held


def failures(held: dict[str, Any]) -> list[str]:
    """Configurations that computed a wrong product or did not run, as sentences."""
    return [
        f"{key}: {label}: {outcome}"
        for key, done in held["done"].items()
        for label, outcome in done["microseconds"].items()
        if isinstance(outcome, str)
    ]


def install(held: dict[str, Any]) -> Path:
    """Write the table where fusekit looks for this device's."""
    path = config_table.FOLDER / f"{held['device']}.json"
    write_results(path, held)
    return path


def _start(path: Path, name: str, base: str, table: Table, device: torch.device) -> dict[str, Any]:
    """What the file holds, buckets to do marked; of an incomplete table none is done twice."""
    held: dict[str, Any] = {"schema": SCHEMA, "device": name, "base": base, "rows": [], "shapes": {}}
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        if held.get("schema") != SCHEMA or held.get("device") != name:
            raise ValueError(
                f"{path} is a table of {held.get('device')}, schema {held.get('schema')}, not of {name}, "
                f"schema {SCHEMA}: move it away, or name another file with --out"
            )
    if held.get("complete", True) or held["environment"].get("triton") != environment()["triton"]:
        held["done"] = {}
    held["environment"] = environment()
    held["sms"] = table.sms
    if device.type == "cuda":
        held["sms"] = torch.cuda.get_device_properties(device).multi_processor_count
    held["complete"] = False
    return held


def _tune(
    problem: Problem,
    table: Table,
    device: torch.device,
    clock: Clock | None,
    product: Product,
    held: dict[str, Any],
    console: Console,
) -> None:
    calls: dict[str, list[Callable[[], Any]]] = {}
    candidates: dict[str, tuple[Row, int]] = {}
    tried: dict[str, Any] = {}
    copies = _copies(problem, device)
    truth = exact(problem, copies[0])
    for row, splits in _candidates(table, problem):
        label = _label(row, splits)
        try:
            product(problem, row, splits, copies[0])
            reason = wrong(result(copies[0]), truth, problem)
        except Exception as error:  # one that fails must not hide the others
            reason = failure(error)
        if reason is not None:
            tried[label] = reason
            console.print(f"{problem.key}: {label}: {reason}", style="red", highlight=False, markup=False)
            continue
        candidates[label] = row, splits
        calls[label] = [partial(product, problem, row, splits, copy) for copy in copies]
    del truth
    if clock is None:
        times = {label: _predicted(problem, table, *candidates[label]) for label in candidates}
    else:
        found, failed = samples(calls, clock, seconds=SECONDS, least=5, most=50)
        tried |= {label: f"{type(error).__name__}: {error}" for label, error in failed.items()}
        times = {label: statistics.median(taken) for label, taken in found.items() if label not in failed}
    tried |= {label: round(1e6 * seconds, 3) for label, seconds in times.items()}
    held["done"][problem.key] = {"shape": [problem.M, problem.N, problem.K], "microseconds": tried}
    held["shapes"].pop(problem.key, None)  # an old winner may be among those that failed
    if times:
        row, splits = candidates[min(times, key=times.__getitem__)]
        held["shapes"][problem.key] = [_index(held["rows"], row), splits]


def _drop_unused(held: dict[str, Any]) -> None:
    """Rows that no bucket refers to any more leave the table."""
    rows, held["rows"] = held["rows"], []
    for entry in held["shapes"].values():
        row = rows[entry[0]]
        if row not in held["rows"]:
            held["rows"].append(row)
        entry[0] = held["rows"].index(row)


def _candidates(table: Table, problem: Problem) -> Iterator[tuple[Row, int]]:
    kind, layout, epilogue, _, _, K = problem
    for row in table.rows:
        if row.serves(kind, layout, epilogue):
            steps = -(-K // row.config.k)
            most = min(config_table.MOST_SPLITS, steps // 8) if epilogue == "plain" else 1
            yield from ((row, splits) for splits in SPLITS if splits <= max(1, most))


def _copies(problem: Problem, device: torch.device) -> list[Operands]:
    dtype = KINDS[problem.kind]
    M, N, K = problem[3:]
    size = (M * K + K * N + M * N) * dtype.itemsize
    count = 1 if device.type == "cpu" else min(MOST_COPIES, max(1, -(-COLD_BYTES // size)))
    return [operands(problem, dtype, device) for _ in range(count)]


def wrong(output: Tensor, exact: Tensor, problem: Problem) -> str | None:
    """None, or how the output misses: more than 1.1 roundings of a 16-bit dtype, 2^-10 of tf32 operands, or
    what float32 accumulation explains; and no row may be much worse than all."""
    difference = (output.to(exact.dtype) - exact).norm(dim=1)
    size = exact.norm(dim=1)
    if not torch.isfinite(output).all():
        return "its result is not finite"
    eps = {"half": 2.0**-20, "tf32": 2.0**-10, "ieee": 2.0**-24 * (problem.K**0.5 + 2)}[problem.kind]
    rounding = (exact.to(output.dtype).to(exact.dtype) - exact).norm(dim=1)
    limit = TOLERANCE[problem.kind] * rounding.norm() + eps * size.norm()
    if difference.norm() > limit:
        error, allowed = float(difference.norm() / size.norm()), float(limit / size.norm())
        return f"its result is wrong: relative error {error:.1e}, {allowed:.1e} allowed"
    if (difference > 1.6 * rounding + 8 * eps * size + 1e-6 * size.mean()).any():
        return f"row {int((difference / size).argmax())} of its result is wrong"
    return None


def _predicted(problem: Problem, table: Table, row: Row, splits: int) -> float:
    return config_table.predict(row, problem.M, problem.N, problem.K, splits, table.sms) * 1e-9


def _label(row: Row, splits: int) -> str:
    c = row.config
    tile = f"{c.kernel} {c.m}x{c.n}x{c.k} warps {c.num_warps} stages {c.num_stages} parts {c.parts}"
    return tile + (" specialised" if c.specialise else "") + (f" splits {splits}" if splits > 1 else "")


def _index(rows: list[dict[str, Any]], row: Row) -> int:
    """Where the row is among those written, appended where it is not."""
    held = config_table.written(row)
    if held not in rows:
        rows.append(held)
    return rows.index(held)
