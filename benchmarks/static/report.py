"""The static lane's tables in the terminal."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.static.build import AMD, Figures, Results
from benchmarks.static.gate import derive
from benchmarks.static.occupancy import ARCHITECTURES, WARPS
from benchmarks.static.ptx import TENSOR_CORE
from benchmarks.static.specialisations import Specialisation

Failures = list[tuple[str, str, int, str]]
LDS = 65_536  # bytes a workgroup may have on gfx942; AMD CDNA3 ISA, "LDS"


def short(key: str) -> str:
    """module.kernel, without the words that all share."""
    return key.split("(")[0].replace("_kernels._", ".").replace("._", ".").replace("_kernel", "")


def full(found: dict[str, Specialisation], results: Results) -> list[tuple[str, str, int, Figures]]:
    """Key, Triton, architecture and derived figures of every gated build that compiled."""
    return [
        (key, version, arch, derive(figures, found[key].options["num_warps"]))
        for version, builds in results.items()
        for (key, arch), figures in builds.items()
        if arch in ARCHITECTURES and "error" not in figures
    ]


def table(found: dict[str, Specialisation], results: Results, failures: Failures) -> Table:
    """One line a kernel, architecture and Triton; ranges over its variants."""
    groups: dict[tuple[str, int, str], list[Figures]] = defaultdict(list)
    for key, version, arch, figures in full(found, results):
        groups[short(key), arch, version].append(figures)
    bad: dict[tuple[str, int, str], set[str]] = defaultdict(set)
    for key, version, arch, _ in failures:
        bad[short(key), arch, version].add(key)
        groups.setdefault((short(key), arch, version), [])
    summary = Table(
        "kernel", "sm", "triton", "builds", "regs", "shared", "warps/SM", "by", "tensor cores", "loop", "bad",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left",
        caption=f"warps/SM: of {WARPS}, limited by: (b)locks, (r)egisters, (s)hared or (t)ensor memory, "
        "(w)arps. loop: cycles to issue it over its bound, 1 and less is good",
    )  # fmt: skip
    previous: tuple[str, int] = ("", 0)
    for (kernel, arch, version), group in sorted(groups.items()):
        if previous[0] not in ("", kernel):
            summary.add_section()
        failed = len(bad[kernel, arch, version])
        summary.add_row(
            kernel if kernel != previous[0] else "",
            f"{arch}" if (kernel, arch) != previous else "", version, str(len(group)),
            *(spread([f[name] for f in group]) for name in ("registers", "shared", "warps")),
            limiters(group), products(group), ratios(group), str(failed) if failed else "",
            style="red" if failed else None,
        )  # fmt: skip
        previous = kernel, arch
    return summary


def amd_table(results: Results) -> Table | None:
    """gfx942, or None if it was not compiled. What did not compile is listed with its reason."""
    version, arch = AMD
    groups: dict[str, list[Figures]] = defaultdict(list)
    for (key, built), figures in results[version].items():
        if built == arch:
            groups[short(key)].append(figures)
    if not groups:
        return None
    summary = Table(
        "gfx942, no gate", "builds", "VGPR", "AGPR", "SGPR", "spilled", "LDS", "MFMA", "in the way",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for kernel, group in sorted(groups.items()):
        good = [f for f in group if "error" not in f]
        spilled = [f["vgpr_spills"] + f["sgpr_spills"] for f in good]
        registers = (spread([f[name] for f in good]) for name in ("vgpr", "agpr", "sgpr"))
        mfma = spread([f["mfma"] for f in good if f["products"]])
        reasons = "; ".join(sorted({r for r in map(obstacle, group) if r}))
        lds = spread([f["lds"] for f in good])
        summary.add_row(kernel, str(len(group)), *registers, spread(spilled), lds, mfma, reasons)
    return summary


def obstacle(figures: Figures) -> str:
    """Why a build would not run, or not well, on gfx942."""
    if "error" in figures:
        return " ".join(figures["error"].split())[:90]
    if figures["lds"] > LDS:
        return f"more than {LDS} bytes of LDS"
    if figures["products"] and not figures["mfma"]:
        return "a product without MFMA"
    return "spills" if figures["vgpr_spills"] else ""


def spread(values: list[Any]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"


def limiters(group: list[Figures]) -> str:
    return ",".join(sorted({f["limiter"][0] for f in group}))


def products(group: list[Figures]) -> str:
    """How many tensor-core instructions the variants hold, by kind."""
    counts = {name: [f["mix"][name] for f in group if name in f["mix"]] for name in TENSOR_CORE}
    return ", ".join(f"{spread(found)} {name}" for name, found in counts.items() if found)


def ratios(group: list[Figures]) -> str:
    found = [f["ratio"] for f in group if "ratio" in f]
    return spread([f"{r:.2f}" for r in found]) if found else ""
