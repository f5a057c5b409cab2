r"""Which configuration a matrix product runs with: shipped tables, no tuning at run time.

`configs/sm_80.json`, `sm_90.json` and `sm_100.json` hold the configurations that compile clean for an
architecture with Triton 3.6 and 3.8, each with the cycles that one step of its loop costs a multiprocessor.
For a shape the one with the least predicted time is taken. `configs/<device>.json`, written by
`fusekit bench --tune`, adds what was measured on that device: the best configuration of each shape bucket.

A row is a configuration and what it serves:
    kind        half (float16, bfloat16), tf32 or ieee (float32 with and without tensor cores)
    layouts     two letters, a then b: n where rows are contiguous, t where columns are; s for any strides
    epilogues   plain, forward, backward, dropout: what rides on the product, by the registers it takes;
                qkv: three products of one input (qkv_kernels.py); gated: two side by side (gated_gemm.py)
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent / "configs"
ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY_OF_ALL = 101_376  # bytes: sm_86, sm_89 and sm_120 have no more
SMALLEST_BUCKET, LARGEST_BUCKET = 16, 16_384

# The prediction, in cycles of a multiprocessor of an H100: what a tile costs besides its loop, what a split
# adds, and the bytes a cycle that reach one multiprocessor from the L2 cache, and all from memory.
TILE_CYCLES = 1_000
EPILOGUE_CYCLES = 0.1  # an element
SPLIT_CYCLES = 4_000
L2_BYTES = 48
MEMORY_BYTES = 1_900
MOST_SPLITS = 16


class Config(NamedTuple):
    """How one product is computed; `kernel` is "tile", "persistent" or "gated", `parts` those of the
    epilogue."""

    kernel: str
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    parts: int = 1
    specialise: bool = False


@dataclass(frozen=True)
class Row:
    """One configuration and what it serves.

    cycles: of a multiprocessor, for one program's step of BLOCK_K: its FLOPs at the tensor cores' rate or,
        where they are more, the cycles in which a scheduler issues its warps' instructions (by cuxray).
    resident: programs that fit a multiprocessor at once.
    """

    kind: str
    layouts: tuple[str, ...]
    epilogues: tuple[str, ...]
    config: Config
    cycles: float
    resident: int = 1

    def serves(self, kind: str, layout: str, epilogue: str) -> bool:
        return kind == self.kind and layout in self.layouts and epilogue in self.epilogues


@dataclass(frozen=True)
class Table:
    """device: the file's name. sms: multiprocessors. shapes: measured, bucket to configuration and splits."""

    device: str
    sms: int
    rows: tuple[Row, ...]
    shapes: dict[str, tuple[Config, int]]


def target_of(capability: tuple[int, int]) -> str:
    """The architecture whose table serves a device: its own, or the one whose kernels it runs as they are."""
    major, minor = capability
    if (major, minor) in ((9, 0), (10, 0), (10, 3)):
        return f"sm_{major}0"
    return "sm_80"  # also sm_120: the instructions and the shared memory of sm_89


@functools.cache
def load(name: str) -> Table:
    """The table of that file. A device's own adds to the rows of its architecture, `base`, those it chose."""
    held = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    own = [_row(row) for row in held["rows"]]
    base = load(held["base"]) if "base" in held else Table(name, held["sms"], (), {})
    shapes = {key: (own[index].config, splits) for key, (index, splits) in held.get("shapes", {}).items()}
    rows = (*base.rows, *(row for row in own if row not in base.rows))
    return Table(name, held["sms"], rows, shapes)


def _row(held: dict[str, Any]) -> Row:
    return Row(
        kind=held["kind"],
        layouts=tuple(held["layouts"]),
        epilogues=tuple(held["epilogues"]),
        config=Config(**held["config"]),
        cycles=held["cycles"],
        resident=held["resident"],
    )


def written(row: Row) -> dict[str, Any]:
    """The row as a table's file holds it."""
    return {
        "kind": row.kind,
        "layouts": list(row.layouts),
        "epilogues": list(row.epilogues),
        "config": row.config._asdict(),
        "cycles": row.cycles,
        "resident": row.resident,
    }


def architecture(name: str) -> str:
    """The architecture of a table: its own name, or its base's."""
    held = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return str(held.get("base", name))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@functools.cache
def for_device(index: int) -> Table:
    """The table of a CUDA device: its own where it was measured, else that of its architecture."""
    if not torch.backends.cuda.is_built():  # kernels run from their IR on a CPU: the sanitizer lane
        return load("sm_90")
    name = slug(torch.cuda.get_device_name(index))
    if (FOLDER / f"{name}.json").exists():
        return load(name)
    found = load(target_of(torch.cuda.get_device_capability(index)))
    sms = getattr(torch.cuda.get_device_properties(index), "multi_processor_count", found.sms)
    return Table(name, sms, found.rows, found.shapes)


def bucket(size: int) -> int:
    """The next power of two, within bounds: shapes of one bucket share a measured configuration."""
    return min(max(1 << (size - 1).bit_length(), SMALLEST_BUCKET), LARGEST_BUCKET) if size > 0 else 0


def shape_key(kind: str, layout: str, epilogue: str, M: int, N: int, K: int) -> str:
    return f"{kind} {layout} {epilogue} {bucket(M)}x{bucket(N)}x{bucket(K)}"


def choose(
    table: Table, kind: str, layout: str, epilogue: str, M: int, N: int, K: int, splittable: bool
) -> tuple[Config, int]:
    """The configuration and the number of splits of K for one product.

    Raises:
        LookupError: no row serves it: the table is damaged.
    """
    measured = table.shapes.get(shape_key(kind, layout, epilogue, M, N, K))
    if measured is not None and (splittable or measured[1] == 1):
        return measured
    best: tuple[float, Config, int] | None = None
    for row in table.rows:
        if row.serves(kind, layout, epilogue):
            for splits in _splits(row.config, K) if splittable else (1,):
                cycles = predict(row, M, N, K, splits, table.sms)
                if best is None or cycles < best[0]:
                    best = cycles, row.config, splits
    if best is None:
        raise LookupError(f"{table.device}.json has no configuration for {kind} {layout} {epilogue}")
    return best[1:]


def _splits(config: Config, K: int) -> list[int]:
    """1, 2, 3, ... as long as each split has 8 steps of its own."""
    steps = _up(K, config.k)
    return list(range(1, max(1, min(MOST_SPLITS, steps // 8)) + 1))


def predict(row: Row, M: int, N: int, K: int, splits: int, sms: int) -> float:
    """Cycles of a multiprocessor until the product is done; to compare configurations, not to boast with."""
    config = row.config
    tiles = _up(M, config.m) * _up(N, config.n) * splits
    steps = _up(_up(K, config.k), splits)
    size = 2 if row.kind == "half" else 4
    columns = 2 * config.n if config.kernel == "gated" else config.n  # of two weights
    loop = max(row.cycles, (config.m + columns) * config.k * size / L2_BYTES)
    # Where several programs share a multiprocessor, one's epilogue hides behind another's loop.
    around = (TILE_CYCLES + EPILOGUE_CYCLES * config.m * config.n) / row.resident
    cycles = _up(tiles, sms) * (steps * loop + around)
    if splits > 1:
        cycles += SPLIT_CYCLES + (2 * splits + 1) * 4 * M * N / MEMORY_BYTES
    return cycles


def _up(size: int, block: int) -> int:
    return -(-size // block)
