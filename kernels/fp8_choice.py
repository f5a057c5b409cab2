"""Who computes an FP8 product on a GPU, and why: the own kernel, or torch._scaled_mm where it is the fastest.

In this order:

    it does not compute this exactly    the own kernel (fp8_library.unfit)
    measured on this device             the faster one
    not measured                        _scaled_mm from LEAST_SIZE on, on the architectures of DEFAULTS;
                                        the own kernel for scales of 1 x 128 on both sides

It must have passed its trial (fp8_trial.py) on this machine, and where it was measured have agreed with the
own kernel at that size. Nothing is measured in a training step: `measure` is called by `fusekit bench --tune`
and by `verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fusekit.kernels import fp8_gemm, fp8_library, fp8_trial, times_file, trial
from fusekit.kernels.config_table import bucket, target_of
from fusekit.kernels.fp8_cast import cast, empty_operand
from fusekit.kernels.fp8_format import Operand
from fusekit.kernels.fp8_library import LIBRARY, Call
from fusekit.kernels.launch import Plans, capability, recording
from fusekit.kernels.recipe import Recipe
from fusekit.kernels.times_file import OWN, Choice, fastest
from fusekit.kernels.trial import failure

SUITE = "fp8"
# cuBLASLt's FP8 kernels are specialised by warps and load through descriptors, and ours are not.
DEFAULTS = ("sm_90", "sm_100")
LEAST_SIZE = 1024  # of every dimension: below it a product is a few microseconds whoever computes it
# By which two right results of Gaussian operands may differ beyond their rounding: each promoted sum is
# 1.3e-4 from the exact one, each fast one 3e-3 at a contraction of 16384.
SUMS_DIFFER = {"promote128": 4e-4, "fast": 1e-2}
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

_plans = Plans()
_failed: dict[Call, str] = {}  # what the library refused, of a kind that it takes at other sizes


def product(
    a: Operand,
    b: Operand,
    output: Tensor,
    recipe: Recipe,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    contraction: int,
    square: bool = False,
    bias: Tensor | None = None,
    act: str = "none",
    z: Tensor | None = None,
    fast: bool = False,
    maxima: Tensor | None = None,
) -> None:
    """fp8_gemm.product, by whoever is the fastest."""
    if not recording() and recipe.accumulation != "exact" and maxima is None:
        call = Call(
            output.device, capability(output), (output.shape[0], output.shape[1], contraction),
            (*dtypes, output.dtype), recipe.scaling, _accumulation(recipe, fast),
            None if bias is None else bias.dtype, act != "none" or z is not None, output.is_contiguous(),
            square,
        )  # fmt: skip
        if choose(call).name == LIBRARY and _proved(call) and _library_ran(a, b, output, call, bias):
            return
    fp8_gemm.product(
        a, b, output, recipe, dtypes, contraction=contraction, square=square, bias=bias, act=act, z=z,
        fast=fast, maxima=maxima,
    )  # fmt: skip


def choose(call: Call) -> Choice:
    """Who computes this product on a GPU."""
    absent = fp8_library.absent()
    return _plans((call, absent), lambda: _decide(call, absent))


def products(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, recipe: str) -> dict[str, Call]:
    """The FP8 products of a layer; of the tensors only shapes, dtypes and device are looked at."""
    (N, K), M = weight.shape, x.numel() // max(weight.shape[1], 1)
    return calls((M, N, K), x, weight.dtype, Recipe.parse(recipe), None if bias is None else bias.dtype, act)


def calls(
    sizes: tuple[int, int, int], x: Tensor, weight_dtype: torch.dtype, chosen: Recipe,
    bias: torch.dtype | None = None, act: str = "none",
) -> dict[str, Call]:  # fmt: skip
    """The FP8 products of a layer of so many tokens, output and input features on x's device."""
    M, N, K = sizes
    sums, forward, gradient = _accumulation(chosen, False), chosen.forward, chosen.gradient
    blocks = chosen.scaling == "block"
    on = (x.device, capability(x))
    found = {
        "output": Call(
            *on, (M, N, K), (forward, forward, x.dtype), chosen.scaling, _accumulation(chosen, True),
            bias, act != "none", square=blocks,
        ),
        "grad_input": Call(
            *on, (M, K, N), (gradient, forward, x.dtype), chosen.scaling, sums, square=blocks
        ),
        "grad_weight": Call(*on, (N, K, M), (gradient, forward, weight_dtype), chosen.scaling, sums),
    }  # fmt: skip
    return {name: call for name, call in found.items() if getattr(chosen, name)}


def describe(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, recipe: str) -> str:
    """Who computes the products of a layer on its GPU, and why, for a report."""
    chosen = {name: str(choose(call)) for name, call in products(x, weight, bias, act, recipe).items()}
    together: dict[str, list[str]] = {}
    for name, choice in chosen.items():
        together.setdefault(choice, []).append(name)
    if len(together) == 1:
        return next(iter(together))
    return "; ".join(f"{', '.join(names)} by {choice}" for choice, names in together.items())


def measure(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, recipe: str,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Time whoever may compute each product of a layer of these sizes, and keep what was found.

    Operands are Gaussian, whatever x and weight hold. clock: clock(run) -> seconds of a call; None for the
    GPU's own. Returns seconds by name, by product; of products without a choice nothing.
    """
    found = {}
    for name, call in products(x, weight, bias, act, recipe).items():
        if fp8_library.unfit(call) is None and fp8_library.absent() is None and _proved(call):
            found[name] = _times(call, clock or times_file.seconds)
            times_file.record(SUITE, call.device, key(call), found[name])
    if found:
        _plans.held.clear()
    return found


def key(call: Call) -> str:
    """The bucket of a product: sizes to the next power of two, and what it is beyond its sizes."""
    left, right, output = (str(dtype).removeprefix("torch.") for dtype in call.dtypes)
    extra = ("" if call.bias is None else " bias") + (" square" if call.square else "")
    sizes = "x".join(str(bucket(size)) for size in call.sizes)
    return f"{left} {right} to {output} {call.scaling} {call.accumulation}{extra} {sizes}"


def own(a: Operand, b: Operand, output: Tensor, call: Call, bias: Tensor | None = None) -> None:
    """What fp8_library.run computes, by the own kernel."""
    recipe = Recipe(scaling=call.scaling, accumulation=call.accumulation)
    fp8_gemm.product(
        a, b, output, recipe, call.dtypes[:2], contraction=call.sizes[2], bias=bias, square=call.square,
        fast=call.accumulation == "fast",
    )  # fmt: skip


def operands(call: Call) -> tuple[Operand, Operand, Tensor | None]:
    """Gaussian operands of this product, and a bias."""
    recipe = Recipe(scaling=call.scaling)
    made = []
    weights = (False, call.square)
    for rows, dtype, weight in zip(call.sizes[:2], call.dtypes[:2], weights, strict=True):
        values = torch.randn(rows, call.sizes[2], device=call.device, dtype=torch.bfloat16)
        made.append(empty_operand(values, recipe, weight, False))
        cast(values, dtype, recipe, made[-1], None, weight=weight)
    bias = None if call.bias is None else torch.randn(call.sizes[1], device=call.device, dtype=call.bias)
    return made[0], made[1], bias


def _accumulation(recipe: Recipe, output: bool) -> str:
    """How the sums of one product are kept: of "fast" only those of `output`, and none between blocks."""
    promoted = recipe.accumulation == "fast" and (not output or recipe.scaling == "block")
    return "promote128" if promoted else recipe.accumulation


def _decide(call: Call, absent: str | None) -> Choice:
    if reason := fp8_library.unfit(call):
        return Choice(OWN, reason)
    if reason := absent or fp8_trial.outcome(call) or _failed.get(call):
        return Choice(OWN, f"{LIBRARY}: {reason}")
    return fastest(times_file.measured(SUITE, call.device, key(call)), [LIBRARY]) or unmeasured(call)


def unmeasured(call: Call) -> Choice:
    """Who computes what the library may take where nobody has measured it."""
    target = target_of(call.capability)
    if reason := fp8_library.unfit(call):
        return Choice(OWN, reason)
    if target not in DEFAULTS or (call.scaling == "block" and not call.square):
        return Choice(OWN, f"not measured against {LIBRARY}: fusekit bench --tune does")
    if min(call.sizes) < LEAST_SIZE:
        return Choice(OWN, f"a dimension below {LEAST_SIZE}, and not measured")
    return Choice(LIBRARY, f"static default on {target}")


def _times(call: Call, clock: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """Seconds of both; of the library only where it agrees with ours."""
    a, b, bias = operands(call)
    results = [torch.empty(call.sizes[:2], dtype=call.dtypes[2], device=call.device) for _ in range(3)]
    ours, found, again = results
    own(a, b, ours, call, bias)
    ran = all(_library_ran(a, b, output, call, bias) for output in (found, again))
    times = {OWN: clock(partial(own, a, b, ours, call, bias))}
    right = ran and torch.equal(found, again) and differ(found, ours) <= allowed(call)
    times[LIBRARY] = clock(partial(fp8_library.run, a, b, found, call, bias)) if right else times_file.WRONG
    return times


def differ(found: Tensor, ours: Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return float((found.float() - ours.float()).norm() / ours.float().norm())


def allowed(call: Call) -> float:
    """The most by which the library's result may differ from ours."""
    return ROUNDING[call.dtypes[2]] + SUMS_DIFFER[call.accumulation]


def _library_ran(a: Operand, b: Operand, output: Tensor, call: Call, bias: Tensor | None) -> bool:
    """Whether it took the product. What it says no to at this size is ours from here on."""
    try:
        fp8_library.run(a, b, output, call, bias)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        _failed[call] = f"at this size it fails: {failure(error)}"
        _plans.held.clear()
        return False
    return True


def _proved(call: Call) -> bool:
    if not fp8_trial.was_tried(call) and trial.is_capturing():
        return False  # a trial waits for the device, which a CUDA graph must not hold
    if fp8_trial.passes(call, fp8_library.run, own):
        return True
    _plans.held.clear()  # the next call chooses without it
    return False
