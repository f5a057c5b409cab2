"""Does torch._scaled_mm compute an FP8 product here as ours does? Tried once a process, device and kind.

On a small product with a contraction of 4096 its error against float64 sums of the same codes must be our own
kernel's or the rounding of the output: for values of both signs, and for values of one sign, where sums that
are never promoted lose 5 % and promoted ones 5e-4. NaN inverse scales must make what they belong to NaN, and
sums that the dtype does not hold infinite: a loss scaler lives by that. Two runs must be equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.fp8_format import BLOCK_GROUP, Operand, spread
from fusekit.kernels.fp8_library import Call
from fusekit.kernels.recipe import LARGEST
from fusekit.kernels.trial import failure

SIZES = (48, 32, 4096)  # several of cuBLAS's smallest tiles, and a contraction that shows how sums are kept
BLOCK_SIZES = (144, 256, 4224)  # several groups of columns, and steps that 4 does not divide
MARGIN = 1.25  # of our own error, or of the rounding to the output's dtype
ROWS_WITH_NAN = slice(3, 5)
Run = Callable[[Operand, Operand, Tensor, Call, Tensor | None], None]
Kind = tuple[Any, ...]

_outcomes: dict[Kind, str | None] = {}


def kind_of(call: Call) -> Kind:
    """What a library's code paths differ by; sizes are measured, and compared where they are."""
    return call.device, call.dtypes, call.scaling, call.accumulation, call.bias, call.square


def outcome(call: Call) -> str | None:
    """Why it lost its trial; None: it passed, or was not tried."""
    return _outcomes.get(kind_of(call))


def was_tried(call: Call) -> bool:
    return kind_of(call) in _outcomes


def outcomes() -> dict[str, str | None]:
    """What trials there were, by kind in words; None: passed."""
    return {" ".join(map(str, kind)): why for kind, why in _outcomes.items()}


def passes(call: Call, library: Run, own: Run) -> bool:
    """Whether it passed, now or before."""
    kind = kind_of(call)
    if kind not in _outcomes:
        try:
            with torch.no_grad():
                sizes = BLOCK_SIZES if call.scaling == "block" else SIZES
                _outcomes[kind] = _judged(call._replace(sizes=sizes), library, own)
        except Exception as error:  # whatever it is, the library cannot be used
            _outcomes[kind] = f"on a small product it fails: {failure(error)}"
    return _outcomes[kind] is None


def _judged(call: Call, library: Run, own: Run) -> str | None:
    for signs in ("one sign", "both signs"):
        a, b, bias = _operands(call, signs == "one sign")
        exact = _value(a, call.dtypes[0]) @ _value(b, call.dtypes[1]).t()
        exact = exact if bias is None else exact + bias.double()
        found, again, ours = (_result(run, a, b, call, bias) for run in (library, library, own))
        error, limit = _error(found, exact), max(_error(ours, exact), _error(exact.to(found.dtype), exact))
        if not error <= MARGIN * limit:
            return f"on a small product of {signs} its error is {error:.2g} and ours {limit:.2g}"
        if not torch.equal(found, again):
            return "two runs of it differ"
    if call.scaling == "block":  # steps overflow one by one, and infinities of both signs would be NaN
        a, b, bias = _operands(call, True)
    unit = Operand(b.codes, torch.ones_like(b.inverse))
    for name, left in (("NaN", _with_nan(a, call)), ("infinite", _too_large(a))):
        found, ours = (_result(run, left, unit, call, bias) for run in (library, own))
        if not torch.equal(*(t.where(~t.isfinite(), 0.0).nan_to_num(2.0, 1.0, -1.0) for t in (found, ours))):
            return f"what must be {name} is not"
    return None


def _operands(call: Call, one_sign: bool) -> tuple[Operand, Operand, Tensor | None]:
    """Codes of Gaussian values, inverse scales that are powers of two, and a bias."""
    generator = torch.Generator().manual_seed(0)
    operands: list[Operand] = []
    for rows, dtype in zip(call.sizes[:2], call.dtypes[:2], strict=True):
        values = torch.randn(rows, call.sizes[2], generator=generator) * 60
        values = (values.abs() if one_sign else values).clamp(-LARGEST[dtype], LARGEST[dtype])
        groups = _groups(call, len(operands))
        exponents = torch.randint(-9, -3, groups, generator=generator)
        codes = values.to(dtype).view(torch.uint8)
        operands.append(Operand(codes.to(call.device), exponents.float().exp2().to(call.device)))
    bias = None
    if call.bias is not None:
        bias = torch.randn(call.sizes[1], generator=generator).to(call.device, call.bias)
    return operands[0], operands[1], bias


def _groups(call: Call, side: int) -> tuple[int, int]:
    """Inverse scales of an operand, group-major: steps of the contraction, groups of rows."""
    rows = call.sizes[side]
    if call.scaling != "block":
        return 1, rows if call.scaling == "row" else 1
    return -(-call.sizes[2] // BLOCK_GROUP), -(-rows // BLOCK_GROUP) if side and call.square else rows


def _value(operand: Operand, dtype: torch.dtype) -> Tensor:
    codes, inverse = operand.codes.view(dtype).double(), operand.inverse.double().t()
    group = tuple(-(-size // groups) for size, groups in zip(codes.shape, inverse.shape, strict=True))
    return codes * spread(inverse, (group[0], group[1]), (codes.shape[0], codes.shape[1]))


def _result(run: Run, a: Operand, b: Operand, call: Call, bias: Tensor | None) -> Tensor:
    output = a.codes.new_empty(call.sizes[:2], dtype=call.dtypes[2])
    run(a, b, output, call, bias)
    return output


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _with_nan(operand: Operand, call: Call) -> Operand:
    inverse = operand.inverse.clone()
    inverse[:, slice(None) if call.scaling == "tensor" else ROWS_WITH_NAN] = torch.nan
    return Operand(operand.codes, inverse)


def _too_large(operand: Operand) -> Operand:
    """Inverse scales that take sums from 256 on out of the range of every dtype."""
    return Operand(operand.codes, torch.full_like(operand.inverse, 2.0**120))
