"""What a build must be, on its own and beside the record."""

from __future__ import annotations

from typing import Any

from benchmarks.static import large_tiles
from benchmarks.static.build import Figures, Results
from benchmarks.static.occupancy import ARCHITECTURES, MUFU_PER_CYCLE, PARTITIONS, occupancy, round_up
from benchmarks.static.ptx import TENSOR_CORE
from benchmarks.static.specialisations import Specialisation

# Compiling is deterministic, so nothing here is noise. What ptxas does with one more live register or another
# order of two loads moves a loop by a percent or two; a lost overlap or a layout conversion costs tens.
LOOP_TOLERANCE = 1.05


def derive(figures: Figures, warps: int) -> Figures:
    """Occupancy, and the loop's cycles beside its bound, added to what the compiler said.

    cycles: the least an SM needs for one iteration of one block: the longest of one warp's schedule, the
    slots of four schedulers that issue one instruction a cycle, and the transcendental unit.
    bound: cycles of the tensor cores (or float32 lanes, or the SM's share of the memory's bandwidth) for it.
    """
    arch = figures["arch"]
    columns = figures.get("tensor_columns", 0)
    found = occupancy(arch, figures["registers"], figures["shared"], warps, columns)
    extra: Figures = found._asdict()
    if loop := figures.get("loop"):
        chip = ARCHITECTURES[arch]
        rate = chip.bytes_per_cycle if loop["limit"] == "memory" else chip.flops[loop["limit"]]
        issue = loop["instructions"] * warps / PARTITIONS
        cycles = max(loop["stalls"], issue, loop["mufu"] * warps * 32 / MUFU_PER_CYCLE)
        bound = loop["amount"] / rate
        extra |= {"cycles": round(cycles), "bound": round(bound), "ratio": round(cycles / bound, 3)}
    return figures | extra


def gate(figures: Figures, warps: int, recorded: Figures | None = None) -> list[str]:
    """What is wrong with one build, as sentences; none is a pass."""
    if "error" in figures:
        return [f"does not compile: {figures['error']}"]
    figures = derive(figures, warps)
    return [*_wrong(figures, warps), *(_worse(figures, recorded) if recorded else ())]


def _wrong(figures: Figures, warps: int) -> list[str]:
    wrong = []
    if figures["spills"]:
        wrong.append(f"spills {figures['spills']} bytes of registers")
    if figures["advisories"]:
        wrong.append(f"wgmma is serialised ({', '.join(figures['advisories'])})")
    if not figures["tensor_cores"]:
        wrong.append("tl.dot of 16-bit or FP8 values does not use tensor cores of that kind")
    if not figures.get("promoted", True):
        wrong.append("sums of FP8 products stay in the tensor core instead of float32 registers")
    if lost := figures.get("lost_casts"):
        wrong.append(f"reads {lost} halves of registers that nothing wrote: ptxas lost casts to FP8")
    if figures["shared"] > (limit := ARCHITECTURES[figures["arch"]].shared_per_block):
        wrong.append(f"needs {figures['shared']} bytes of shared memory, {limit} exist")
    elif not figures["blocks"]:
        needed = {"registers": f"{figures['registers']} registers for {32 * warps} threads"}
        wrong.append(f"needs {needed.get(figures['limiter'], figures['limiter'])}: it cannot be launched")
    return wrong


def _worse(figures: Figures, recorded: Figures) -> list[str]:
    """Registers are allocated by 8 a thread and shared memory by 128 bytes: less than that is no loss."""
    worse = []
    for name, unit in (("registers", 8), ("shared", 128)):
        if round_up(figures[name], unit) > round_up(recorded[name], unit):
            shown = "bytes of shared memory" if name == "shared" else name
            worse.append(f"uses {figures[name]} {shown}, {recorded[name]} are recorded")
    if figures["warps"] < recorded["warps"]:
        worse.append(
            f"{figures['warps']} warps fit on an SM, limited by {figures['limiter']}; "
            f"{recorded['warps']} are recorded"
        )
    for name in TENSOR_CORE:
        now, before = figures["mix"].get(name, 0), recorded["mix"].get(name, 0)
        if now < before:
            worse.append(f"{now} {name} instructions, {before} are recorded: is a product off tensor cores?")
    if recorded.get("ratio") and figures.get("ratio", 0.0) > recorded["ratio"] * LOOP_TOLERANCE:
        worse.append(
            f"the hot loop takes {figures['ratio']:.2f} of its bound ({figures['cycles']} cycles for "
            f"{figures['bound']}), {recorded['ratio']:.2f} is recorded"
        )
    return worse


def judge(
    specialisations: dict[str, Specialisation], results: Results, recorded: dict[str, Any]
) -> list[tuple[str, str, int, str]]:
    """Every failure: key, Triton, architecture, sentence. AMD's builds are a report and never fail."""
    failures = []
    for version, found in results.items():
        for (key, arch), figures in found.items():
            if arch not in ARCHITECTURES:
                continue
            before = recorded.get(key, {}).get(f"triton {version} sm_{arch}")
            specialisation = specialisations[key]
            warps = specialisation.options["num_warps"]
            sentences = gate(figures, warps, before)
            if "error" not in figures:
                sentences += large_tiles.wrong(derive(figures, warps), specialisation.constexprs)
            failures += [(key, version, arch, sentence) for sentence in sentences]
    return failures
