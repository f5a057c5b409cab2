"""The kernel suite's report: one HTML page with its plots inside, and the plots as PNG files."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from benchmarks.kernels.run import failures, grouped, shown
from benchmarks.report.html import Section, bullets, facts, image, table, write_page
from benchmarks.report.plots import draw

CAPTIONS = {
    "roofline": "Each op against the ceilings measured in the same run",
    "times": "Speed of each provider over eager PyTorch, with its median time",
    "columns": "Memory throughput of the norms over their columns",
    "tokens": "Throughput of attention over the sequence length",
}


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """index.html and the plots, in `folder`; returns the page. Without matplotlib the page has no plots."""
    folder.mkdir(parents=True, exist_ok=True)
    images = "".join(image(path, _caption(path)) for path in draw(results, folder))
    obstacles = [
        f"{name} {p['version'] or ''}: {p['obstacle']}"
        for name, p in results["providers"].items()
        if p["obstacle"]
    ]
    left_out = [f"{name}: {reason}" for name, reason in results["left_out"].items()]
    sections = [
        Section("Machine and ceilings", _facts(results)),
        Section("Plots", images or "<p>No plots: install matplotlib, or nothing was timed.</p>"),
        Section("Every cell", _cells(results)),
        Section("Failures", bullets(failures(results), "bad")),
        Section("Left out", bullets(left_out)),
        Section("Providers not measured", bullets(obstacles)),
    ]
    return write_page(folder / "index.html", f"fusekit kernel suite, {_device(results)}", sections)


def _caption(path: Path) -> str:
    plot, _, dtype = path.stem.partition("_")
    return CAPTIONS.get(plot, plot) + (f", {dtype}" if dtype else "")


def _device(results: dict[str, Any]) -> str:
    machine = results["environment"]
    return str(machine.get("gpu") if machine["device"] == "cuda" else machine.get("cpu"))


def _facts(results: dict[str, Any]) -> str:
    ceilings = results["ceilings"]
    shown_facts = dict(results["environment"])
    shown_facts["copy"] = f"{ceilings['bytes_per_second'] / 1e9:,.1f} GB/s, measured"
    for dtype, rate in ceilings["flops_per_second"].items():
        shown_facts[f"{dtype} product"] = f"{rate / 1e9:,.1f} GFLOP/s, measured"
    shown_facts["clock"] = (
        "CUDA events, cold cache"
        if shown_facts["device"] == "cuda"
        else "process time of one thread, cold cache"
    )
    for name, found in results["providers"].items():
        if not found["obstacle"]:
            shown_facts[name] = found["version"]
    return facts(shown_facts)


def _cells(results: dict[str, Any]) -> str:
    """A row per op, shape, dtype and direction; the quartiles show on hovering."""
    providers = [p for p in results["settings"]["providers"] if not results["providers"][p]["obstacle"]]
    rows = [
        [*map(escape, key), *(_cell(row.get(p)) for p in providers)]
        for key, row in grouped(results["cells"]).items()
    ]
    note = "<p>Median time · GB/s · share of the measured ceiling · error against float64.</p>"
    return note + table(("op", "sample", "dtype", "direction", *providers), rows, text=4)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if "failed" in cell:
        return f'<span class=bad title="{escape(cell["failed"])}">{escape(cell["failed"][:60])}</span>'
    if "seconds" not in cell:
        return f"<span class=faint>{escape(cell.get('skipped', ''))}</span>"
    low, high = (1e6 * q for q in cell["quartiles"])
    title = f"quartiles {low:.1f}–{high:.1f} µs of {len(cell['samples'])} samples"
    rates = f"{cell['bytes_per_second'] / 1e9:.1f} · {cell['share']:.0%} · {cell['error']:.0e}"
    return f'<span title="{title}">{shown(cell)}</span> <span class=faint>{rates}</span>'
