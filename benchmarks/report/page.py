"""The kernel suite's report: one HTML page with its plots inside, and the plots as PNG files."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.kernels.run import failures, grouped, shown
from benchmarks.report.plots import draw

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #33383f; margin: 2rem auto;
       max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
img { max-width: 100%; display: block; margin: 1rem 0 }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d9dde3; text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.text, th.text { text-align: left }
.bad { color: #b3261e } .faint { color: #8a929c } ul { padding-left: 1.2rem }
"""


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """index.html and the plots, in `folder`; returns the page. Without matplotlib the page has no plots."""
    folder.mkdir(parents=True, exist_ok=True)
    images = "".join(_image(path) for path in draw(results, folder))
    sections = [
        f"<h1>fusekit kernel suite, {escape(_device(results))}</h1>",
        _facts(results),
        "<h2>Plots</h2>" + (images or "<p>No plots: install matplotlib, or nothing was timed.</p>"),
        "<h2>Every cell</h2>" + _cells(results),
        _list("Failures", failures(results), "bad"),
        _list("Left out", [f"{name}: {reason}" for name, reason in results["left_out"].items()]),
        _list("Providers not measured", [
            f"{name} {p['version'] or ''}: {p['obstacle']}"
            for name, p in results["providers"].items() if p["obstacle"]
        ]),
    ]  # fmt: skip
    page = folder / "index.html"
    head = f"<meta charset=utf-8><title>fusekit kernels</title><style>{STYLE}</style>"
    page.write_text(f"<!doctype html><html lang=en>{head}{''.join(sections)}</html>\n", encoding="utf-8")
    return page


def _device(results: dict[str, Any]) -> str:
    machine = results["environment"]
    return str(machine.get("gpu") if machine["device"] == "cuda" else machine.get("cpu"))


def _facts(results: dict[str, Any]) -> str:
    ceilings = results["ceilings"]
    facts = {k: v for k, v in results["environment"].items() if v is not None}
    facts["copy"] = f"{ceilings['bytes_per_second'] / 1e9:,.1f} GB/s, measured"
    for dtype, rate in ceilings["flops_per_second"].items():
        facts[f"{dtype} product"] = f"{rate / 1e9:,.1f} GFLOP/s, measured"
    facts["clock"] = (
        "CUDA events, cold cache" if facts["device"] == "cuda" else "one thread, process time, cold cache"
    )
    for name, found in results["providers"].items():
        if not found["obstacle"]:
            facts[name] = found["version"]
    return _table(("", ""), [[escape(str(k)), escape(str(v))] for k, v in facts.items()], text=2)


def _cells(results: dict[str, Any]) -> str:
    """A row per op, shape, dtype and direction; the quartiles show on hovering."""
    providers = [p for p in results["settings"]["providers"] if not results["providers"][p]["obstacle"]]
    rows = [
        [*map(escape, key), *(_cell(row.get(p)) for p in providers)]
        for key, row in grouped(results["cells"]).items()
    ]
    note = "<p>Median time · GB/s · share of the measured ceiling · error against float64.</p>"
    return note + _table(("op", "sample", "dtype", "direction", *providers), rows, text=4)


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


def _table(headings: tuple[str, ...], rows: list[list[str]], text: int) -> str:
    def line(tag: str, values: Any) -> str:
        cells = (f"<{tag}{' class=text' if i < text else ''}>{v}</{tag}>" for i, v in enumerate(values))
        return f"<tr>{''.join(cells)}</tr>"

    head = line("th", headings) if any(headings) else ""
    return f"<div class=wide><table>{head}{''.join(line('td', row) for row in rows)}</table></div>"


def _list(title: str, entries: list[str], style: str = "") -> str:
    items = "".join(f"<li class='{style}'>{escape(entry)}</li>" for entry in entries)
    return f"<h2>{title}</h2><ul>{items}</ul>" if entries else ""


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'
