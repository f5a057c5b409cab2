"""The tables of README.md and docs/results.md, from the registry and benchmarks/results; tested to be fresh.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import gpu_tables
from benchmarks.cpu_figures import HEADINGS as cpu_figures_headings
from benchmarks.cpu_figures import rows as cpu_figures_rows
from benchmarks.kernels.run import grouped as cells_by_case
from benchmarks.models.providers import REFERENCE
from benchmarks.models.view import grouped, values
from benchmarks.precision_quality import rows as quality_rows
from benchmarks.results_file import CHECKOUT, RESULTS, read_results
from benchmarks.static.large_tiles import LIMIT
from benchmarks.static.large_tiles import tiles as static_large_tiles
from benchmarks.traffic.counting import launches, moved
from fusekit.kernels import OPS
from fusekit.passes.rules import RULES

FILES = (CHECKOUT / "README.md", CHECKOUT / "docs" / "results.md", CHECKOUT / "docs" / "precision.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str) -> str:
    """`text` with every marked block written anew."""
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[3], text)


def ops() -> str:
    sources: dict[str, list[str]] = defaultdict(list)
    for rule in RULES:
        if rule.source not in sources[rule.op]:
            sources[rule.op].append(rule.source)
    rows = [(f"`{name}`", f"`{_arguments(op)}`", len(sources[name])) for name, op in OPS.items()]
    return _table(("op", "arguments", "rules"), rows)


def _arguments(op: Any) -> str:
    return ", ".join(a.name for a in op.fused._schema.arguments)


def cpu_kernels() -> str:
    if not (RESULTS / "kernels_cpu.json").exists():
        return "The kernel suite has not been run on a quiet CPU yet; `fusekit bench` measures it here.\n"
    found = read_results(RESULTS / "kernels_cpu.json", "kernels")
    machine, rows = found["environment"], []
    for key, row in cells_by_case(found["cells"]).items():
        ours, eager = row.get("fusekit", {}), row.get("eager", {})
        times = [_microseconds(row.get(name, {})) for name in ("eager", "compile", "fusekit")]
        gain = (
            f"{eager['seconds'] / ours['seconds']:.2f}×" if "seconds" in eager and "seconds" in ours else ""
        )
        share = f"{ours['share']:.0%}" if "seconds" in ours else ""
        rows.append((f"`{key[0]}`", *key[1:], *times, gain, share))
    title = (
        f"{machine.get('cpu')} ({machine.get('cpu_capability')}), one thread, process time, cold cache, "
        f"medians in µs (torch {machine.get('torch')}, commit {machine.get('commit')}). Gain over eager; "
        "ceiling: the share of it, measured in the same run:\n\n"
    )
    headings = ("op", "sample", "dtype", "", "eager", "torch.compile", "fusekit", "gain", "ceiling")
    return title + _table(headings, rows)


def _microseconds(cell: dict[str, Any]) -> str:
    return f"{1e6 * cell['seconds']:,.0f}" if "seconds" in cell else "failed" if "failed" in cell else ""


def cpu_models() -> str:
    if not (RESULTS / "models_cpu.json").exists():
        return "Training steps have not been measured yet; `fusekit bench models` does.\n"
    return _models(read_results(RESULTS / "models_cpu.json", "models"))


def _models(found: dict[str, Any]) -> str:
    machine, rows = found["environment"], []
    for model, cells in grouped(found).items():
        for name, cell in cells.items():
            if "seconds" in cell or "failed" in cell:
                ms, _, speed, rate, mfu, peak, start, _, loss, sites = (
                    values(cell, cells.get(REFERENCE, {})) if "seconds" in cell else ("failed", *[""] * 9)
                )
                unit = found["models"][model]["unit"]
                rate = f"{rate} {unit}" if rate else ""
                rows.append((model, name, ms, speed, rate, mfu, peak, start, loss, sites))
    title = (
        f"Training step: forward, backward, clipping, fused AdamW. {machine.get('cpu')} "
        f"({machine.get('cpu_capability')}), one thread, process time, medians of contenders in turn "
        f"(torch {machine.get('torch')}, commit {machine.get('commit')}). Loss: largest difference from "
        "eager float32 over the same steps, as a share of its first loss; sites: what fusekit fused:\n\n"
    )
    headings = ("model", "", "ms/step", "speed", "per second", "MFU", "peak MB", "start s", "loss", "sites")
    names = ", ".join(found["left_out"])
    left_out = f"\nLeft out, with the reasons in the results file (mostly time): {names}.\n" if names else ""
    return title + _table(headings, rows) + left_out


def cpu_figures() -> str:
    found = _load("cpu_figures.json")
    if found is None:
        return "Layers have not been measured yet; `python -m benchmarks.cpu_figures` does.\n"
    machine = found["environment"]
    title = (
        f"Forward and backward. {machine.get('cpu')} ({machine.get('cpu_capability')}), one thread, process "
        f"time, medians of contenders in turn (torch {machine.get('torch')}, commit {machine.get('commit')})."
        " Time and memory are shares of the first contender's; asked: what the project set itself:\n\n"
    )
    return title + _table(cpu_figures_headings, cpu_figures_rows(found))


def _described(table: Callable[[], gpu_tables.Described]) -> str:
    if not (RESULTS / "gpu_h100.json").exists():
        return "A GPU has not been measured yet; `make gpu` does.\n"
    title, headings, rows = table()
    return title + _table(headings, rows)


def static() -> str:
    found = _load("static.json")
    if found is None:
        return "The static lane's record has not been written yet.\n"
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, builds in found["kernels"].items():
        groups[key.split("(")[0]] += builds.values()
    rows = [
        (
            f"`{kernel}`",
            len(group),
            max(f["registers"] for f in group),
            f"{max(f['shared'] for f in group):,}",
            _range([str(f["warps"]) for f in sorted(group, key=lambda f: f["warps"])]),
            _range([f"{r:.2f}" for r in sorted(f["ratio"] for f in group if "ratio" in f)]),
        )
        for kernel, group in sorted(groups.items())
    ]
    title = (
        "Ahead-of-time builds of the shipped kernel configurations for sm_80, sm_90 and sm_100, Triton 3.6 "
        "and 3.8; no spills and no serialised wgmma in any (the gate of `python -m benchmarks.static`). "
        "Loop: cycles to issue an iteration of the hot loop over those of the unit that bounds it (products "
        "or memory), on sm_80 and sm_90, not measured:\n\n"
    )
    headers = ("kernel", "builds", "registers, most", "shared memory, most bytes", "warps per SM", "loop")
    return title + _table(headers, rows)


def large_tiles() -> str:
    found = _load("static.json")
    if found is None:
        return "The static lane's record has not been written yet.\n"
    rows = [
        (f"`{t.kernel}`", t.operands, t.tile, t.stages, t.builds, t.spills, t.wgmma, t.cycles, t.bound,
         f"{t.ratio:.2f}")
        for t in static_large_tiles(found["kernels"])
    ]  # fmt: skip
    title = (
        "Products by large tiles on sm_90 (accumulators of 128×128 and more), Triton 3.6: the most cycles "
        "that issuing a step of K takes an SM, over all layouts and epilogues, beside the tensor cores' "
        f"cycles for it. The static lane fails above {LIMIT}, not measured:\n\n"
    )
    headers = (
        "kernel",
        "operands",
        "tile",
        "stages",
        "builds",
        "spills",
        "wgmma",
        "cycles",
        "bound",
        "ratio",
    )
    return title + _table(headers, rows)


def _range(shown: list[str]) -> str:
    return "–".join(dict.fromkeys((shown[0], shown[-1]))) if shown else ""


def traffic() -> str:
    found = _load("traffic.json")
    if found is None:
        return "The norm kernels' traffic has not been counted yet.\n"
    rows = [
        (name, f"{r['rows']}×{r['columns']}", f"{r['counted']:,}", f"{r['minimum']:,}", f"{r['ratio']:.3f}")
        for name, r in found["norms"].items()
    ]
    title = (
        "Bytes the norm kernels move in bfloat16, counted, against the least that any kernel could move:\n\n"
    )
    return title + _table(("kernel", "shape", "counted", "minimum", "ratio"), rows)


def model_traffic() -> str:
    found = _load("traffic.json")
    if found is None:
        return "The traffic of training steps has not been counted yet.\n"
    title = (
        "What a GPU would move in a forward and backward pass, counted on a CPU (a lower bound: each kernel "
        "reads its inputs and writes its outputs once; fusekit's remainder runs eagerly):\n\n"
    )
    return title + _counted(found["models"], lambda row: row["model"])


def op_traffic() -> str:
    found = _load("traffic.json")
    if found is None:
        return "The traffic of the ops has not been counted yet.\n"
    title = "The same count for each op, forward and backward, against what one would write in PyTorch:\n\n"
    return title + _counted(found["ops"], lambda row: f"`{row['op']}` {row['sample']} {row['dtype']}")


def _counted(rows: list[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> str:
    lines = []
    for row in rows:
        contenders = {key: value for key, value in row.items() if isinstance(value, dict)}
        base = moved(next(iter(contenders.values())))
        for number, (contender, r) in enumerate(contenders.items()):
            bytes_ = moved(r)
            lines.append(
                (
                    "" if number else name(row),
                    contender,
                    f"{bytes_ / 1e6:,.1f}",
                    f"{bytes_ / base:.2f}×",
                    launches(r),
                    f"{r['saved_bytes'] / 1e6:,.1f}",
                )
            )
    return _table(("", "", "MB moved", "of the first", "launches", "MB saved for backward"), lines)


def quality() -> str:
    if not (RESULTS / "precision_quality.json").exists():
        return "The quality experiment has not been run yet.\n"
    found = read_results(RESULTS / "precision_quality.json", "quality")
    sizes = found["settings"]["sizes"]
    title = (
        f"GPT of {sizes['layers']} layers, width {sizes['width']}, {found['settings']['steps']} steps on "
        f"CPython's documentation; validation loss against bf16 of the same seed and batches, mean with "
        f"Student's 95 % interval (one thread, emulated; pairs of one machine):\n\n"
    )
    headings = ("recipe", "seeds", "gap to bf16", "sd of the gap", "one-sided 95 % bound", "CPU, commit")
    return title + _table(headings, quality_rows(found))


def launch_path() -> str:
    found = _load("launch_path.json")
    if found is None:
        return "The launch path has not been measured yet.\n"
    machine, rows, earlier = found["environment"], [], found.get("earlier")
    for name, op in found["ops"].items():
        kernels = f"{op['forward_kernels']}, {op['backward_kernels']}" if op["forward_kernels"] else ""
        times = [op, *([earlier["ops"][name]] if earlier else [])]
        shown = (f"{t[direction]:.0f}" for t in times for direction in ("forward", "backward"))
        rows.append((f"`{name}`", kernels, *shown))
    title = (
        f"Host µs of a call and of its backward pass, {found['where']} ({machine.get('cpu')}, one thread, "
        f"torch {machine.get('torch')}, Triton {machine.get('triton')}, commit {machine.get('commit')}):\n\n"
    )
    before = (f"forward at {earlier['commit']}", f"backward at {earlier['commit']}") if earlier else ()
    return title + _table(("op", "kernels", "forward", "backward", *before), rows)


TABLES: dict[str, Callable[[], str]] = {
    "ops": ops,
    "cpu_kernels": cpu_kernels,
    "cpu_models": cpu_models,
    "cpu_figures": cpu_figures,
    "gpu_steps": partial(_described, gpu_tables.steps),
    "gpu_host": partial(_described, gpu_tables.host),
    "launch_path": launch_path,
    "gpu_loss": partial(_described, gpu_tables.loss),
    "gpu_attention": partial(_described, gpu_tables.attention),
    "gpu_fp8": partial(_described, gpu_tables.fp8_layers),
    "gpu_fp8_sums": partial(_described, gpu_tables.fp8_sums),
    "gpu_products": partial(_described, gpu_tables.products),
    "quality": quality,
    "static": static,
    "large_tiles": large_tiles,
    "traffic": traffic,
    "model_traffic": model_traffic,
    "op_traffic": op_traffic,
}


def _load(name: str) -> Any:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def _table(headers: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def main() -> int:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        fresh = updated(text)
        path.write_text(fresh, encoding="utf-8")
        print(f"{path.relative_to(CHECKOUT)} {'is fresh' if fresh == text else 'updated'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
