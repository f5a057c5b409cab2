"""The model suite's report: one HTML page with its plots inside, and the plots as PNG and SVG files."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from benchmarks.models.providers import REFERENCE
from benchmarks.models.view import HEADINGS, failures, grouped, remarks, title, values
from benchmarks.report.html import Section, bullets, facts, image, table, write_page
from benchmarks.report.model_plots import draw

READING = (
    "Forward, backward, clipping and fused AdamW on random data; contenders take turns, each in a process "
    "of its own. MFU: the eager model's FLOPs (attention counted whole) over the step time, as a share of "
    "the measured product rate of the provider's dtype or of float32, whichever is faster. Start: until "
    "the first step is done, less a step, with empty caches; warm: with the compiled code of the first "
    "process. Loss: the largest difference from eager float32 over the same steps, as a share of its "
    "first loss. Sites: what fusekit fused."
)
NO_PLOTS = "<p>No plots: install matplotlib, or nothing was timed.</p>"


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """index.html and the plots, in `folder`; returns the page. Without matplotlib the page has no plots."""
    plots = draw(results, folder)
    captions = {model: f"{model}: step time and peak memory of each provider" for model in plots}
    images = "".join(image(path, captions[model]) for model, path in plots.items())
    obstacles = {name: p["obstacle"] for name, p in results["providers"].items() if p["obstacle"]}
    sections = [
        Section("Plots", images or NO_PLOTS),
        Section("Every contender", f"<p>{title(results)}. {READING}</p>" + _cells(results)),
        Section("Failures", bullets(failures(results), "bad")),
        Section("Remarks", bullets(remarks(results))),
        Section("Providers not measured", bullets(f"{name}: {why}" for name, why in obstacles.items())),
        Section("Models", _models(results)),
        Section("Machine", _machine(results)),
    ]
    return write_page(folder / "index.html", "fusekit model suite", sections)


def _machine(results: dict[str, Any]) -> str:
    ceilings = results["ceilings"]
    found = dict(results["environment"])
    found["copy"] = f"{ceilings['bytes_per_second'] / 1e9:,.1f} GB/s, measured"
    for dtype, rate in ceilings["flops_per_second"].items():
        found[f"{dtype} product"] = f"{rate / 1e9:,.1f} GFLOP/s, measured"
    return facts(found)


def _models(results: dict[str, Any]) -> str:
    rows = [
        (
            escape(name),
            escape(", ".join(f"{k} {v}" for k, v in model["sizes"].items())),
            f"{model['parameters'] / 1e6:,.1f} M",
            f"{model['flops_per_step'] / 1e9:,.1f} GFLOP",
        )
        for name, model in results["models"].items()
    ]
    return table(("model", "sizes", "parameters", "a step"), rows, text=2)


def _cells(results: dict[str, Any]) -> str:
    rows = []
    for model, cells in grouped(results).items():
        for name, cell in cells.items():
            shown = values(cell, cells.get(REFERENCE, {}))
            missing = [""] * (len(HEADINGS) - 1 - len(shown))
            rows.append([escape(text) for text in (model, name, *shown, *missing)])
    return table(("model", *HEADINGS), rows, text=2)
