"""Judge a linear layer or an attention in FP8: four questions, since one tolerance wide enough for FP8 would
hide every bug.

R is what the model wrote, in float64, R8 the FP8 op's own definition in float64 (straight-through
gradients of the decoded codes), f the result. |.| is the Frobenius norm, relative to R's.

    reading     the op's formula without FP8 equals R: the graph was not misread
    codes       f against R8, by the criterion of every other op: products, scales and sums are right
    rounding    |f - R| <= 1.05 |R8 - R|, whole and by row and column: no worse than FP8 has to be
    range       |R8 - R| is below four times what FP8 loses of Gaussian data: the values suit the recipe

The gradients behind an activation stand between "codes" and "rounding". Their dz comes from a z that was
rounded to x's dtype, so some dz fall to the other side of an FP8 tie, each a whole FP8 step away from R8:
measured 0.4 |R8 - R|, and 0.6 is allowed. Those steps go both ways, so the projection on R8 is sharp again: a
gradient that is too long or too short as a whole shows there. Few dz scatter: of n, 8 / sqrt(n) more of both
limits is allowed (of 360 layers with 384 to 4096 dz, 7 gradients needed it; a layer of a real model has
millions).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import FP8_OPS
from fusekit.kernels.attention import reference as attention_reference
from fusekit.kernels.linear_act import reference as plain_reference
from fusekit.kernels.parity import Verdict, check, longest_sum, results_and_grads, widen
from fusekit.kernels.recipe import Recipe

READING = 1e-5  # the matcher takes literals that differ by 1e-6
FLOOR = 1.66e-3  # of bfloat16, relative; float32 and float16 results are below it
FLIPPED = 0.6
# Root mean square rounding errors of Gaussian operands; two meet in a product.
LOSS = {torch.float8_e4m3fn: 0.0262, torch.float8_e5m2: 0.053}
IN_RANGE = 4.0
# Of attention's output: four operands, of which q and k meet in an exponent.
ATTENTION_MOST = IN_RANGE * 2 * LOSS[torch.float8_e4m3fn]
SLICE_LENGTH = 16
NAMES = {"output": "output", "grad_0": "grad_input", "grad_1": "grad_weight"}

Results = Mapping[str, Tensor]


def check_attention_fp8(args: tuple[Any, ...], fused: Results, truth: Results) -> list[Verdict]:
    """Verdicts on attention_fp8(*args), three a result. P is rounded behind a sum, whose last bit differs by
    device: all that the op returns stands behind ties of P, as a gradient stands behind an activation's."""
    wide, names = widen(args), [a.name for a in FP8_OPS["attention_fp8"].fused._schema.arguments]
    defined = results_and_grads(FP8_OPS["attention_fp8"].reference, wide)

    def plain(*given: Any) -> Tensor:
        return attention_reference(**{n: x for n, x in zip(names, given, strict=True) if n != "scaling"})

    formula = results_and_grads(plain, wide)
    scatter = 1 + 8 / math.sqrt(max(1, fused["output"].numel()))
    verdicts: list[Verdict] = []
    for name, exact in truth.items():
        verdicts.append(_reading(name, formula[name], exact))
        most = ATTENTION_MOST if name == "output" else None
        verdicts += _rounding(name, fused[name], defined[name], exact, scatter, most)
    return verdicts


def check_fp8(args: tuple[Any, ...], fused: Results, truth: Results) -> list[Verdict]:
    """Verdicts on linear_fp8(*args), two or three a result.

    Args:
        fused, truth: of `results_and_grads`; truth of the replaced nodes in float64.
    """
    op, act = FP8_OPS["linear_fp8"], args[3]
    recipe, dtype = Recipe.parse(args[4]), args[0].dtype
    wide = widen(args)
    defined = results_and_grads(op.reference, wide)
    eager = results_and_grads(op.reference, args)
    formula = results_and_grads(lambda x, w, b: plain_reference(x, w, b, None, act), wide[:3])
    behind = {"grad_0", "grad_1"} if act != "none" else set()
    scatter = 1 + 8 / math.sqrt(max(1, fused["output"].numel()))
    verdicts = check(
        {name: t for name, t in fused.items() if name not in behind}, eager,
        {name: t for name, t in defined.items() if name not in behind},
        dtype=dtype, terms=longest_sum(args), inherent="grad",
    )  # fmt: skip
    for name, exact in truth.items():
        verdicts.append(_reading(name, formula[name], exact))
        apart = scatter if name in behind else 0.0
        verdicts += _rounding(name, fused[name], defined[name], exact, apart, _most(name, recipe))
    return verdicts


def _reading(name: str, formula: Tensor, exact: Tensor) -> Verdict:
    error = _relative(formula - exact, exact)
    reason = "" if error <= READING else f"the replaced nodes compute something else, {error:.2g} away"
    return _verdict(f"{name} as read", error, READING, not reason, reason)


def _rounding(
    name: str, fused: Tensor, defined: Tensor, exact: Tensor, scatter: float, most: float | None
) -> Iterator[Verdict]:
    finite = defined.isfinite() & exact.isfinite()
    f, d, r = (torch.where(finite, t.double(), 0.0) for t in (fused, defined, exact))
    must, ours, apart = (_relative(t, r) for t in (d - r, f - r, f - d))
    if scatter:
        reason = _behind(f - d, d, apart, must, scatter)
        yield _verdict(name, apart, max(must, FLOOR), not reason, reason)
    reason = ""
    if ours > 1.05 * must + 2.5 * FLOOR:
        reason = f"error {ours:.3g}, where rounding to FP8 costs {must:.3g}"
    elif (worst := _worst_slice(f - r, d - r, r)) > max(1.0, scatter):
        reason = f"a row or column is {worst:.3g} times as far off as rounding to FP8 allows"
    elif most is not None and must > most:
        reason = (
            f"FP8 loses {must:.0%} of it on this batch, {most:.0%} is the most; keep the module with "
            f"Recipe(keep=...), or choose finer scales"
        )
    yield _verdict(f"{name} unrounded", ours, max(must, FLOOR), not reason, reason)


def _behind(difference: Tensor, defined: Tensor, apart: float, must: float, scatter: float) -> str:
    """Of a gradient behind an activation."""
    if apart > scatter * FLIPPED * must + 2.5 * FLOOR:
        return f"{apart:.2g} away from FP8's own result, which is {must:.2g} off"
    square = defined.square().sum().item()
    length = (difference * defined).sum().item() / square if square else 0.0
    # One flipped dz moves a whole row or column: so many are independent.
    independent = min(defined.reshape(-1, defined.shape[-1]).shape) if defined.ndim else 1
    if abs(length) > 5 * apart / math.sqrt(independent) + FLOOR:
        return f"too {'long' if length > 0 else 'short'} by {abs(length):.2g} as a whole"
    return ""


def _most(name: str, recipe: Recipe) -> float | None:
    """What FP8 may lose of a product; None for what is no FP8 product."""
    product = NAMES.get(name)
    if product is None or not getattr(recipe, product):
        return None
    other = recipe.forward if product == "output" else recipe.gradient
    return IN_RANGE * math.hypot(LOSS[recipe.forward], LOSS[other])


def _worst_slice(ours: Tensor, must: Tensor, exact: Tensor) -> float:
    """The worst row or column over what it is allowed."""
    if exact.ndim < 2 or not exact.numel():
        return 0.0
    worst = 0.0
    parts = [t.reshape(-1, t.shape[-1]) for t in (ours, must, exact)]
    rms = exact.norm().item() / math.sqrt(exact.numel())
    usual = must.norm().item() / math.sqrt(must.numel())
    for dim in (0, 1):
        length = parts[0].shape[dim]
        if length < SLICE_LENGTH:
            continue
        o, m, r = (t.norm(dim=dim) for t in parts)
        root = math.sqrt(length)
        allowed = 1.5 * torch.maximum(m, torch.minimum(0.06 * r, torch.full_like(r, usual * root)))
        allowed = allowed + 4 * FLOOR * torch.maximum(r, torch.full_like(r, rms * root))
        worst = max(worst, (o / allowed.clamp(min=1e-300)).max().item())
    return worst


def _relative(error: Tensor, exact: Tensor) -> float:
    norm = exact.double().norm().item()
    return error.double().norm().item() / norm if norm else error.double().norm().item()


def _verdict(name: str, error: float, floor: float, ok: bool, reason: str = "") -> Verdict:
    return Verdict(
        name=name, error=error, floor=floor, eager_error=floor, worst_slice=0.0, ok=ok, reason=reason
    )
