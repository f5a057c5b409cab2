"""A contender's answers as a cell of the results: times, rates, memory, and whether its losses are right."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.models.providers import Provider
from fusekit.ceilings import Ceilings

# A loss may differ by a rounding of its scale plus a share of what was learned so far. The rounding is one of
# the dtype's for 16 and 8 bits (logits are stored in it), some of a long sum's for float32. The share is for
# what AdamW makes of small differences; a missing or wrong gradient changes what is learned by far more. A
# gradient that is off by a constant factor is invisible to AdamW: the parity tests see that.
# Measured, 12 steps of the small models on a CPU: eager bf16 and fusekit bf16 within 1.1e-4 of the loss, with
# batch normalisation (ResNet) within 2.8e-3, which is 0.72 of a rounding. In ResNet-50 itself eager bf16 is
# 8.8e-3 away from the first float32 loss, and fusekit bf16 1e-4 from eager bf16's. So a loss may also be as
# close to that of eager in its own precision.
ROUNDING = {"float32": 1e-5, "bf16": 2**-8, "fp8": 2**-4}
LEARNED_SHARE = {"float32": 0.05, "bf16": 0.1, "fp8": 0.2}


def cell(
    answers: Sequence[dict[str, Any]],
    provider: Provider,
    facts: dict[str, Any],
    ceilings: Ceilings,
    *,
    warm_up: int,
    clock: str,
    reference: Sequence[float] | None,
    peer: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What a contender measured.

    Args:
        answers: one per step; the first `warm_up` are not timed, unless there is no other: then the last is.
        facts: of the model, as `zoo.described` gives them.
        clock: "cpu" or "wall", the time that counts.
        reference: losses of the same steps in eager float32; None: they are not known.
        peer: those of eager in the provider's precision, where they are known.
    """
    losses = [answer["loss"] for answer in answers]
    found: dict[str, Any] = {"losses": [loss if math.isfinite(loss) else None for loss in losses]}
    found |= {name: answers[0][name] for name in ("sites", "refused", "flops_covered") if name in answers[0]}
    found |= _judged(losses, provider.precision, reference, peer)
    if "failed" in found:
        return found
    steady = list(answers[warm_up:]) or [answers[-1]]
    samples = [answer[clock] for answer in steady]
    wall = statistics.median(answer["wall"] for answer in steady)
    seconds = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    # An emulated dtype is multiplied in a wider one, so the fastest of those counts.
    wider = {provider.dtype, "float32"} | ({"bfloat16"} if provider.precision == "fp8" else set())
    ceiling = max(sorted(wider), key=lambda name: ceilings.flops_per_second.get(name, 0.0))
    return found | {
        "seconds": seconds,
        "quartiles": [low, high],
        "samples": [float(f"{value:.5g}") for value in samples],
        "wall_seconds": wall,
        "units_per_second": facts["units_per_step"] / seconds,
        "mfu": facts["flops_per_step"] / seconds / ceilings.flops_per_second[ceiling],
        "ceiling": ceiling,
        "peak_bytes": steady[-1]["peak"],
        "before_model_bytes": answers[0]["before"],
        "start_seconds": max(0.0, answers[0]["start"] - wall),  # on a busy machine a step may take longer
    }


def _judged(
    losses: Sequence[float],
    precision: str,
    reference: Sequence[float] | None,
    peer: Sequence[float] | None,
) -> dict[str, Any]:
    if reference is None:
        return {"loss_error": None}
    pairs = list(zip(losses, reference, strict=False))
    scale = abs(reference[0]) or 1.0
    errors = [abs(a - b) / scale if math.isfinite(a) else math.inf for a, b in pairs]
    for step, (ours, theirs) in enumerate(pairs):
        if _agrees(losses, reference, step, precision):
            continue
        if peer is not None and step < len(peer) and _agrees(losses, peer, step, precision):
            continue
        beside = "" if peer is None or step >= len(peer) else f", and eager {precision} {peer[step]:.5g}"
        return {
            "failed": f"wrong losses: {ours:.5g} at step {step + 1}, where eager float32 has {theirs:.5g}"
            f"{beside}; {_allowed(reference, step, precision):.1g} is the most they may differ"
        }
    return {"loss_error": max(errors), "losses_compared": len(pairs)}


def _agrees(losses: Sequence[float], others: Sequence[float], step: int, precision: str) -> bool:
    return abs(losses[step] - others[step]) <= _allowed(others, step, precision)


def _allowed(others: Sequence[float], step: int, precision: str) -> float:
    learned = abs(others[0] - others[step])
    return ROUNDING[precision] * abs(others[0]) + LEARNED_SHARE[precision] * learned
