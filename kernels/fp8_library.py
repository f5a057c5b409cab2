"""torch._scaled_mm (cuBLASLt, for some scales CUTLASS) as the one who computes an FP8 product.

It takes a product only where it computes the same function with sums kept the same way:
    promote128   use_fast_accum=False: on Ada and Hopper a new chain of the tensor core every 128 of the
                 contraction, their results added in float32, by recordings of both (mmaemu, which
                 tests/test_fp8_choice.py runs); Blackwell's accumulator is float32
    fast         use_fast_accum=True
    fp32         never: the narrow accumulator takes part in either
Codes are as our kernels have them, (rows, contraction), contiguous, padded to 128 by zeros: row-major times
column-major, as it asks. It has no activation, rounds a bias to the output's dtype and adds none in float32.
Whether it keeps its word on this machine is tried once: fp8_trial.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.kernels.fp8_format import Operand

LIBRARY = "_scaled_mm"
MULTIPLE = 16  # of columns of the output
ACCUMULATIONS = ("promote128", "fast")

aten = torch.ops.aten


class Call(NamedTuple):
    """A product by what decides who computes it; it may be a key.

    sizes: M, N and the contraction. dtypes: of a's and b's codes, then of the output. accumulation: of this
    product; of a recipe's "fast" only `output` is. bias: its dtype. epilogue: whether an activation follows
    or a pre-activation is stored. contiguous: the output's rows follow each other.
    """

    device: torch.device
    capability: tuple[int, int]
    sizes: tuple[int, int, int]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    scaling: str
    accumulation: str
    bias: torch.dtype | None = None
    epilogue: bool = False
    contiguous: bool = True


def absent() -> str | None:
    """Why torch._scaled_mm can not be called at all."""
    if not torch.backends.cuda.is_built() or torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    return None if hasattr(aten, "_scaled_mm") else "this PyTorch has none"


def unfit(call: Call) -> str | None:
    """None, or why it may not take this product, in a word or two."""
    _, right, output = call.dtypes
    if call.capability < (8, 9):
        return "no FP8 tensor cores"
    if call.scaling not in ("tensor", "row"):
        return f"{call.scaling} scales"
    if call.scaling == "row" and call.capability < (9, 0):
        return "row scales before Hopper"
    if call.accumulation not in ACCUMULATIONS:
        return f"{call.accumulation} sums"
    if call.epilogue:
        return "an activation"
    if call.bias is not None and (call.bias != output or output == torch.float32):
        return "a float32 bias"
    if right == torch.float8_e5m2:
        return "e5m2 on the right"
    if call.sizes[1] % MULTIPLE:
        return f"columns that {MULTIPLE} does not divide"
    return None if call.contiguous and all(call.sizes) else "strides"


def run(a: Operand, b: Operand, output: Tensor, call: Call, bias: Tensor | None = None) -> None:
    """output = A B^T + bias from the operands of fp8_cast.py."""
    left, right = a.codes.view(call.dtypes[0]), b.codes.view(call.dtypes[1])
    inverses = a.inverse, b.inverse
    if call.scaling == "row":
        inverses = a.inverse.view(-1, 1), b.inverse.view(1, -1)
    aten._scaled_mm.out(
        left, right.t(), *inverses, bias, None, call.dtypes[2], call.accumulation == "fast", out=output
    )
