"""What `explain` returns: every site that was fused, every one that was not and why, the share covered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from fusekit.passes.region import Fusion, Refusal
from fusekit.precision_report import summary, table

WIDTH = 128  # columns of a table turned into text; a terminal's own width is used when printing to one


@dataclass(frozen=True, kw_only=True)
class Report:
    """The account of one optimised model.

    fused, refused: one entry per site, over all captured graphs.
    flops_covered, bytes_covered: shares 0..1 of the captured graphs' forward FLOPs and memory traffic.
    graphs: captured graphs (train, eval and other guards each make one).
    graph_breaks: causes, as sentences, that split the model into several graphs.
    precision: of precision="auto", one entry a product of a layer: level, reason, statistics, flips.
    notes: what the pipeline has to say beyond sites (Inductor fell back, TF32 without a GPU, ...).
    """

    fused: tuple[Fusion, ...] = ()
    refused: tuple[Refusal, ...] = ()
    flops_covered: float = 0.0
    bytes_covered: float = 0.0
    graphs: int = 0
    graph_breaks: tuple[str, ...] = ()
    precision: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "graphs": self.graphs,
            "flops_covered": self.flops_covered,
            "bytes_covered": self.bytes_covered,
            "fused": [_fusion_to_dict(f) for f in self.fused],
            "refused": [
                {"op": r.op, "rule": r.rule, "location": r.location, "reason": r.reason} for r in self.refused
            ],
            "graph_breaks": list(self.graph_breaks),
            "precision": list(self.precision),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        if not self.graphs:
            lines = ["Nothing captured yet: call the model once, or pass example_inputs to fusekit.optimize."]
            return "\n".join([*lines, *self.notes, *self.graph_breaks])
        parts = [
            f"{self.graphs} graph{'s' * (self.graphs != 1)}, "
            f"{len(self.fused)} site{'s' * (len(self.fused) != 1)} fused, {len(self.refused)} refused; "
            f"{self.flops_covered:.0%} of FLOPs and {self.bytes_covered:.0%} of bytes covered"
        ]
        if self.fused:
            parts.append(_fused_table(self.fused))
        if self.refused:
            parts.append(_refused_table(self.refused))
        if self.precision:
            parts += [summary(self.precision), render(table(self.precision))]
        parts += [f"graph break: {cause}" for cause in self.graph_breaks]
        parts += [f"note: {note}" for note in self.notes]
        return "\n".join(parts)


def render(table: Table) -> str:
    """The table as plain text."""
    buffer = StringIO()
    Console(file=buffer, width=WIDTH, color_system=None).print(table)
    return buffer.getvalue().rstrip()


def format_shapes(shapes: Sequence[Sequence[int | str]]) -> str:
    return " ".join("×".join(str(size) for size in shape) or "scalar" for shape in shapes)


def format_ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


def _fusion_to_dict(f: Fusion) -> dict[str, Any]:
    return {
        "site": f.site,
        "op": f.op,
        "rule": f.rule,
        "location": f.location,
        "layer": f.layer,
        "shapes": [list(shape) for shape in f.shapes],
        "dtype": f.dtype,
        "implementation": f.implementation,
        "estimated_gain": f.estimated_gain,
        "measured_gain": f.measured_gain,
        "bytes_saved": f.bytes_saved,
        "flops": f.flops,
    }


def _fused_table(fused: Sequence[Fusion]) -> str:
    """Layers repeat: equal sites share a row."""
    rows: Counter[tuple[str, ...]] = Counter()
    for f in fused:
        gain = f"{format_ratio(f.estimated_gain)} / {format_ratio(f.measured_gain)}"
        rows[(f.op, f.rule, f.location, format_shapes(f.shapes), f.dtype, f.implementation, gain)] += 1
    table = Table(title="Fused", title_justify="left")
    table.add_column("sites", justify="right", no_wrap=True)
    for header in ("op", "rule", "where", "shapes", "dtype", "runs on"):
        table.add_column(header, overflow="fold")
    table.add_column("gain est. / meas.", justify="right", no_wrap=True)
    for row, count in rows.items():
        table.add_row(str(count), *row)
    return render(table)


def _refused_table(refused: Sequence[Refusal]) -> str:
    rows = Counter((r.op, r.location, r.reason) for r in refused)
    table = Table(title="Refused", title_justify="left")
    table.add_column("sites", justify="right", no_wrap=True)
    for header in ("op", "where", "reason"):
        table.add_column(header, overflow="fold")
    for row, count in rows.items():
        table.add_row(str(count), *row)
    return render(table)
