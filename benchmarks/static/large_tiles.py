"""Products by large tiles on sm_90: cycles of a step of K beside the issue bound of the tensor cores.

The bound is the step's FLOPs over the dense rate of an SM (16-bit 4096, tf32 2048, 8-bit 8192 a cycle). A
loop whose schedule takes more than LIMIT of it cannot keep the tensor cores busy: the static lane fails it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import style
from benchmarks.results_file import RESULTS
from fusekit.plots import INK

ARCH = 90
LEAST_ELEMENTS = 128 * 128  # of an accumulator
LIMIT = 1.15
UNITS = {"half": "16-bit", "tf32": "tf32", "fp8": "8-bit"}
_CONSTANT = re.compile(r"(BLOCK_[MNK]|num_stages)=(\d+)")


class Tile(NamedTuple):
    """One tile of one kernel: the most cycles of its builds, their bound, and their fewest instructions."""

    kernel: str
    operands: str
    tile: str
    stages: int
    builds: int
    cycles: int
    bound: int
    spills: int
    wgmma: int

    @property
    def ratio(self) -> float:
        return self.cycles / self.bound


def is_large(constants: Mapping[str, Any]) -> bool:
    """Whether these are the blocks of a matrix product of the class; attention has no BLOCK_K.

    FP8 codes that are decoded to 16 bits, and scales of a block of K, are work of their own beside the
    products: those kernels are held to their own recorded ratio alone.
    """
    if constants.get("NATIVE") is False or constants.get("SCALING") in ("block", "mx"):
        return False
    sizes = [constants.get(f"BLOCK_{letter}") for letter in "MNK"]
    return all(type(size) is int for size in sizes) and sizes[0] * sizes[1] >= LEAST_ELEMENTS  # type: ignore


def wrong(figures: Mapping[str, Any], constants: Mapping[str, Any]) -> list[str]:
    """What the gate says of a build whose figures were derived; nothing of other kernels."""
    if figures["arch"] != ARCH or not is_large(constants):
        return []
    found = []
    if _unit(figures) in UNITS and figures["ratio"] > LIMIT:
        found.append(
            f"a step of K takes {figures['cycles']} cycles to issue and the tensor cores {figures['bound']}: "
            f"{figures['ratio']:.2f} of the bound, {LIMIT} is the limit of large tiles"
        )
    if not figures["mix"].get("wgmma"):
        found.append("a large tile without wgmma")
    return found


def _unit(figures: Mapping[str, Any]) -> str:
    return str((figures.get("loop") or {}).get("limit", ""))


def _constants(key: str) -> dict[str, Any]:
    """The numbers of a key that make a tile, and what sets FP8 products apart."""
    found: dict[str, Any] = {name: int(value) for name, value in _CONSTANT.findall(key)}
    if "NATIVE=false" in key:
        found["NATIVE"] = False
    if scaling := re.search(r'SCALING="(\w+)"', key):
        found["SCALING"] = scaling.group(1)
    return found


def tiles(kernels: Mapping[str, Any]) -> list[Tile]:
    """From the record, slowest first within a kernel and a dtype."""
    groups: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for key, builds in kernels.items():
        constants = _constants(key)
        if not is_large(constants):
            continue
        for name, figures in builds.items():
            if name.endswith(f"sm_{ARCH}") and figures.get("loop") in UNITS:
                kernel, operands = key.split("(", 1)
                tile = "×".join(str(constants[f"BLOCK_{letter}"]) for letter in "MNK")
                kind = operands.split(",", 1)[0].removeprefix("*")
                group = (kernel, kind, tile, constants.get("num_stages", 0))
                groups.setdefault(group, []).append(figures)
    return [_summary(group, found) for group, found in sorted(groups.items())]


def _summary(group: tuple[str, str, str, int], found: list[dict[str, Any]]) -> Tile:
    slowest = max(found, key=lambda figures: figures["ratio"])
    return Tile(
        *group, builds=len(found), cycles=slowest["cycles"], bound=slowest["bound"],
        spills=max(f["spills"] for f in found), wgmma=min(f["mix"].get("wgmma", 0) for f in found),
    )  # fmt: skip


def draw(kernels: Mapping[str, Any], folder: Path = RESULTS) -> Path | None:
    """A bar a tile: its schedule over its bound, and the limit; None without matplotlib or without tiles."""
    found = tiles(kernels)
    if not found or not style.can_draw():
        return None
    labels = [f"{_brief(t.kernel)}, {t.operands} {t.tile}, {t.stages} stages" for t in found]
    figure, axes = style.figure(10, 1.2 + 0.3 * len(found))
    panel = axes[0][0]
    panel.barh(range(len(found)), [t.ratio for t in found], color=style.COLOURS["fusekit"], height=0.6)
    for height, tile in enumerate(found):
        text = f"{tile.cycles} of {tile.bound} cycles"
        panel.annotate(text, (tile.ratio + 0.01, height), va="center", fontsize=8, color=INK)
    for value, dashes in ((1.0, "-"), (LIMIT, "--")):
        panel.axvline(value, color=INK, linewidth=1, linestyle=dashes)
    panel.set_yticks(range(len(labels)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.25)
    style.finish(
        panel, ylabel="", title="", grid="x",
        xlabel=f"sm_{ARCH}: cycles to issue a step of K over the tensor cores' for it (dashed: the limit)",
    )  # fmt: skip
    return style.save(figure, folder, "static_large_tiles")


def _brief(kernel: str) -> str:
    return kernel.replace("_kernels.", ".").removesuffix("_kernel")
