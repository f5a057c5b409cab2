"""The static lane's page: figures of every build, plots, predicted times, gfx942; all in one file."""

from __future__ import annotations

from html import escape
from pathlib import Path

from benchmarks.report.html import Section, bullets, facts, image, table, write_page
from benchmarks.report.style import seconds
from benchmarks.results_file import environment
from benchmarks.static.build import AMD, Results
from benchmarks.static.plots import Builds, draw
from benchmarks.static.report import Failures, full, obstacle, short
from benchmarks.static.roofline import DEVICES, Prediction, predictions
from benchmarks.static.specialisations import Specialisation

METHOD = """<p>Compiled ahead of time; no kernel ran. <b>Warps/SM</b>: resident at once, by the
architecture's published limits. <b>Cycles</b>: the least an SM needs to issue one iteration of the hot loop
for one block: the longest of one warp's schedule as ptxas fixed it, the four schedulers' slots, and the
transcendental unit; waits for memory and for products are not in it. <b>Bound</b>: cycles of the named unit
for the same iteration. Below 1, the unit can be kept busy; above 1, issuing takes longer than it. Not given
for sm_100, where the encoding of the schedule has not been verified, nor for small test shapes.</p>"""
PREDICTED = """<p>Predicted, not measured: the longer of FLOPs over the peak rate and bytes over the peak
bandwidth. No kernel is faster.</p>"""


def write_report(
    found: dict[str, Specialisation], results: Results, failures: Failures, folder: Path
) -> Path:
    """index.html, and the plots as PNG and SVG, in `folder`; returns the page."""
    builds, times = full(found, results), list(predictions())
    plots = "".join(image(path, caption) for path, caption in draw(builds, times, folder))
    sections = [
        Section("Machine and versions", facts(environment())),
        Section("Failures", bullets((f"triton {v} sm_{a} {k}: {s}" for k, v, a, s in failures), "bad")),
        Section("Plots", plots),
        Section("Builds of real size", METHOD + _builds(found, builds)),
        Section("Predicted times", PREDICTED + _predicted(times)),
        Section("AMD gfx942", _amd(results)),
    ]
    return write_page(folder / "index.html", "fusekit kernels, compiled ahead of time", sections)


def _builds(found: dict[str, Specialisation], builds: Builds) -> str:
    headings = ("kernel", "variant", "target", "registers", "shared", "blocks/SM", "warps/SM", "limited by",
                "cycles", "bound", "ratio", "unit", "instructions in PTX")  # fmt: skip
    rows = []
    for key, version, arch, f in sorted(builds, key=lambda b: (b[0], b[2], b[1])):
        if found[key].bench:
            variant = escape(_variant(found[key]))
            loop = ("", "", "", "")
            if f.get("ratio"):
                loop = (f["cycles"], f["bound"], f"{f['ratio']:.2f}", f["loop"]["limit"])
            mix = ", ".join(f"{n} {name}" for name, n in f["mix"].items())
            rows.append((
                escape(short(key)), f"<span title='{escape(key, quote=True)}'>{variant}</span>",
                f"sm_{arch}, {version}", f["registers"], f"{f['shared']:,}", f["blocks"], f["warps"],
                f["limiter"], *loop, mix,
            ))  # fmt: skip
    return table(headings, rows, text=3)


def _variant(found: Specialisation) -> str:
    """Dtype, tile and options; the whole key shows on hovering."""
    dtype = next((t.removeprefix("*") for t in found.signature.values() if t.startswith("*")), "")
    tile = "×".join(str(v) for k, v in sorted(found.constexprs.items()) if k.startswith("BLOCK_"))
    stages = found.options.get("num_stages")
    return f"{dtype} {tile} w{found.options['num_warps']}" + (f" s{stages}" if stages else "")


def _predicted(times: list[Prediction]) -> str:
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for p in times:
        row = cells.setdefault((p.op, p.sample, p.dtype, p.direction), {})
        row[p.device] = f"{seconds(p.seconds)} <span class=faint>{p.bound}</span>"
    rows = [[*map(escape, key), *(row.get(d, "") for d in DEVICES)] for key, row in cells.items()]
    sources = bullets(f"{name}: {device.source}" for name, device in DEVICES.items())
    return table(("op", "shape", "dtype", "direction", *DEVICES), rows, text=4) + sources


def _amd(results: Results) -> str:
    """No gate: kernels are tuned for NVIDIA's; this says what AMD's compiler makes of them."""
    version, wanted = AMD
    names = ("vgpr", "agpr", "sgpr", "vgpr_spills", "sgpr_spills", "lds", "mfma")
    rows = [
        (escape(key), *(f.get(name, "") for name in names), escape(obstacle(f)))
        for (key, arch), f in sorted(results[version].items(), key=lambda b: b[0][0])
        if arch == wanted
    ]
    headings = ("VGPR", "AGPR", "SGPR", "VGPR spilled", "SGPR spilled", "LDS bytes", "MFMA", "in the way")
    return table(("kernel", *headings), rows)
