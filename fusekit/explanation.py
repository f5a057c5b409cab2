"""`explain`: the account of an optimised model."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fusekit.passes.fuse import STAYS
from fusekit.passes.price import coverage, name_implementations
from fusekit.passes.region import Levels, Refusal
from fusekit.report import Report
from fusekit.session import session


def explain(model: nn.Module) -> Report:
    """What was fused, what was refused and why, and the share of work covered, over all captured graphs.

    Raises:
        ValueError: the model is not optimised.
    """
    opened = session(model)
    regions = [captured.region for captured in opened.regions]
    for region in regions:
        name_implementations(region)
    shares = [coverage(region) for region in regions]
    notes = [note for region in regions for note in region.notes]
    notes += [f"{f.location or 'a part of the model'} runs eagerly: {f.reason}" for f in opened.failures]
    if opened.precision and opened.precision.why_not_live:
        notes.append(f"precision auto: {opened.precision.why_not_live}")
    levels = opened.precision.levels() if opened.precision else None
    return Report(
        fused=tuple(fusion for region in regions for fusion in region.fusions),
        refused=tuple(
            _current(r, levels) for c in opened.regions for r in (*c.region.refusals, *c.reverted.values())
        ),
        flops_covered=_mean([flops for flops, _ in shares]),
        bytes_covered=_mean([bytes_ for _, bytes_ in shares]),
        graphs=len(regions),
        graph_breaks=tuple(opened.graph_breaks),
        precision=tuple(opened.precision.plan.rows()) if opened.precision else (),
        notes=tuple(dict.fromkeys(notes)),
    )


def _current(refusal: Refusal, levels: Levels | None) -> Refusal:
    """With the reason as it is now: a graph is built again for other levels, and not for other reasons."""
    if levels is None or not refusal.layer or levels.token(refusal.layer) is not None:
        return refusal
    return replace(refusal, reason=STAYS + levels.reason(refusal.layer))


def _mean(shares: list[float]) -> float:
    return sum(shares) / len(shares) if shares else 0.0
