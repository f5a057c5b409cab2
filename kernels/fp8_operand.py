r"""An operand of linear_fp8, quantised once however many layers read it.

    operand = fp8_operand(x, ...)              of the input of q, k and v; of a weight, once an update
    q = linear_fp8(x, ..., x_operand=operand)

An operand is four tensors: codes and inverse scales as the product `output` takes them, and as the gradients
do, contracted along the other dimension. A GPU keeps codes of 8 bits, the second layout transposed
(fp8_cast.py). A CPU keeps the values behind Q, in a dtype that holds them and in x's own orientation
(linear_fp8_cpu.py): there the two layouts differ only where their groups do, and inverse scales are kept of
delayed scaling alone, as a record of the scale that was used. What is absent has one dimension, no element.

No gradient passes here: linear_fp8 hands it to x itself, straight through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels import linear_fp8_cpu
from fusekit.kernels.fp8_cast import cast, empty_operand
from fusekit.kernels.fp8_format import Operand
from fusekit.kernels.launch import on_gpu, recording
from fusekit.kernels.library import define
from fusekit.kernels.linear_act import _rows
from fusekit.kernels.recipe import Recipe

PARTS = 4


class Quantised(NamedTuple):
    """codes, inverse: for `output`; turned, turned_inverse: for the gradient that contracts the other way."""

    codes: Tensor
    inverse: Tensor
    turned: Tensor
    turned_inverse: Tensor


def read(
    operand: Sequence[Tensor] | None, recipe: Recipe, which: int
) -> tuple[Operand | None, Operand | None]:
    """Both layouts of an operand as linear_fp8 was given it, each None where it is absent."""
    if not operand:
        return None, None
    held = Quantised(*operand)
    plain = Operand(held.codes, held.inverse) if held.codes.dim() == 2 else None
    turned = Operand(held.turned, held.turned_inverse) if held.turned.dim() == 2 else None
    if turned is None and not on_gpu(held.codes) and linear_fp8_cpu.one_layout(recipe, which):
        turned = plain
    return plain, turned


def why_not(operand: Sequence[Tensor] | None, x: Tensor) -> str | None:
    """Why these tensors are no operand made of x."""
    if not operand:
        return None
    if len(operand) != PARTS:
        return f"an operand is the {PARTS} tensors of fp8_operand, and {len(operand)} came"
    if any(t.device != x.device for t in operand):
        return f"an operand is on {operand[0].device} and the tensor it stands for on {x.device}"
    rows = math.prod(x.shape[:-1])
    if operand[0].dim() == 2 and operand[0].shape[0] != rows:
        return f"the operand has {operand[0].shape[0]} rows and the tensor it stands for {rows}"
    return None


def _layouts(rows: Tensor, recipe: Recipe, which: int, plain: bool, turned: bool) -> tuple[bool, bool]:
    if turned and not on_gpu(rows) and linear_fp8_cpu.one_layout(recipe, which):
        return True, False
    return plain, turned


def _like(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Laid out as fp8_cpu.through_fp8 does."""
    if rows.stride(1) != 1 and rows.stride(0) == 1:
        return rows.new_empty((rows.shape[1], rows.shape[0]), dtype=dtype).t()
    return rows.new_empty(rows.shape, dtype=dtype)


def _empty(
    x: Tensor, recipe: str, which: int, dtype: torch.dtype, plain: bool, turned: bool, scale: Tensor | None,
    amax: Tensor | None, maxima: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    chosen, rows, weight = Recipe.parse(recipe), _rows(x), which == linear_fp8_cpu.WEIGHT
    found: list[Tensor] = []
    for wanted, transposed in zip(_layouts(rows, chosen, which, plain, turned), (False, True), strict=True):
        if not wanted:
            found += [x.new_empty((0,), dtype=torch.float32), x.new_empty((0,), dtype=torch.float32)]
        elif on_gpu(x):
            found += empty_operand(rows, chosen, weight, transposed)
        else:
            kept = (1, 1) if chosen.delayed and scale is not None else (0,)
            found += [
                _like(rows, linear_fp8_cpu.operand_dtype(dtype, chosen)),
                x.new_empty(kept, dtype=torch.float32),
            ]
    return found[0], found[1], found[2], found[3]


def _known(maxima: Tensor | None, rows: Tensor, recipe: Recipe) -> tuple[Tensor | None, Tensor | None]:
    """Of all of the tensor, or of its rows and of its columns."""
    if maxima is None or recipe.scaling == "tensor":
        return maxima, None
    columns = rows.shape[1]
    return (maxima[:-columns] if maxima.shape[0] > columns else None), maxima[-columns:]


def _run(
    x: Tensor, recipe: str, which: int, dtype: torch.dtype, plain: bool, turned: bool, scale: Tensor | None,
    amax: Tensor | None, maxima: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    chosen, rows = Recipe.parse(recipe), _rows(x)
    results = Quantised(*_empty(x, recipe, which, dtype, plain, turned, scale, amax))
    layouts = _layouts(rows, chosen, which, plain, turned)
    if on_gpu(x):
        if rows.numel() or recording():
            held = (Operand(*results[:2]), Operand(*results[2:]))
            own = scale[which : which + 1] if scale is not None and chosen.delayed else None
            largest = None if amax is None else amax[which : which + 1]
            given = [operand if wanted else None for operand, wanted in zip(held, layouts, strict=True)]
            weight = which == linear_fp8_cpu.WEIGHT
            known = _known(maxima, rows, chosen)
            cast(rows, chosen.forward, chosen, *given, weight=weight, scale=own, amax=largest, known=known)
        return results
    made = list(results)
    for position, (wanted, transposed) in enumerate(zip(layouts, (False, True), strict=True)):
        if wanted:
            inverse = made[2 * position + 1]
            made[2 * position] = linear_fp8_cpu.through_fp8(
                rows, chosen, which, transposed, scale, amax,
                linear_fp8_cpu.operand_dtype(dtype, chosen), inverse if inverse.numel() else None,
            )  # fmt: skip
    return made[0], made[1], made[2], made[3]


_SCHEMA = (
    "(Tensor x, str recipe, int which, ScalarType dtype, bool plain, bool turned, Tensor? scale,"
    " Tensor(a!)? amax, Tensor? maxima=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
_quantise = define("fp8_quantise" + _SCHEMA, _run, _empty)


def _detached(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _quantise(x.detach(), *rest)


# which: 0 of x, 1 of a weight. dtype: of the layer's x. plain, turned: the layouts that are wanted. scale and
# amax: (3,), of the layer, as linear_fp8 takes them. maxima: of x; with scales of rows, of its columns, or of
# its rows and its columns: norm_fp8.py, fp8_maxima.py. A GPU then reads x once less.
fp8_operand = define("fp8_operand" + _SCHEMA, _run, _empty, autograd=_detached)
