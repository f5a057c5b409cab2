"""torch._scaled_mm (cuBLASLt, for some scales CUTLASS) as the one who computes an FP8 product.

It takes a product only where it computes the same function with sums kept the same way:
    promote128   use_fast_accum=False: on Ada and Hopper a new chain of the tensor core every 128 of the
                 contraction, their results added in float32, by recordings of both (mmaemu, which
                 tests/test_fp8_choice.py runs); Blackwell's accumulator is float32
    fast         use_fast_accum=True
    fp32         never: the narrow accumulator takes part in either
Scales of blocks leave sums no choice: each 128 of the contraction is added in float32, times its scales. It
takes them on Hopper alone, 1 x 128 by 128 x 128 and 1 x 128 by 1 x 128, the former with columns that 128
divides. Scales of 1 x 128 lie as ours do, one step of the contraction after the other; those of 128 x 128 are
copied, 1 float of 16384 weights, so that the steps of a group of columns follow each other, padded to 4.
Codes are as our kernels have them, (rows, contraction), contiguous, padded to 128 by zeros: row-major times
column-major, as it asks. It has no activation, rounds a bias to the output's dtype and adds none in float32.
Whether it keeps its word on this machine is tried once: fp8_trial.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fusekit.kernels.fp8_format import BLOCK_GROUP, Operand

LIBRARY = "_scaled_mm"
MULTIPLE = 16  # of columns of the output; with scales of blocks of its rows too, whose scales are aligned so
STEPS = 4  # of the contraction: a multiple of so many scales of 128 x 128 follow each other
ACCUMULATIONS = ("promote128", "fast")

aten = torch.ops.aten
SCALING = getattr(torch.nn.functional, "ScalingType", None)  # how an operand is scaled, by name


class Call(NamedTuple):
    """A product by what decides who computes it; it may be a key.

    sizes: M, N and the contraction. dtypes: of a's and b's codes, then of the output. accumulation: of this
    product; of a recipe's "fast" only `output` is. bias: its dtype. epilogue: whether an activation follows
    or a pre-activation is stored. contiguous: the output's rows follow each other. square: b is a weight of
    block scaling, in groups of 128 x 128.
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
    square: bool = False


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
    if call.scaling not in ("tensor", "row", "block"):
        return f"{call.scaling} scales"
    if call.scaling == "block" and (reason := _unfit_for_blocks(call)):
        return reason
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


def _unfit_for_blocks(call: Call) -> str | None:
    M, N, _ = call.sizes
    if call.capability[0] != 9:
        return "block scales on another GPU than Hopper"
    if SCALING is None or not hasattr(aten, "_scaled_mm_v2"):
        return "block scales, which this PyTorch does not take"
    if M % MULTIPLE:
        return f"block scales of rows that {MULTIPLE} does not divide"
    if call.square and N % BLOCK_GROUP:
        return f"block scales of columns that {BLOCK_GROUP} does not divide"
    return None


def run(a: Operand, b: Operand, output: Tensor, call: Call, bias: Tensor | None = None) -> None:
    """output = A B^T + bias from the operands of fp8_cast.py."""
    left, right = a.codes.view(call.dtypes[0]), b.codes.view(call.dtypes[1])
    if call.scaling == "block":
        return _run_blocks(left, right, a.inverse, b.inverse, output, call, bias)
    inverses = a.inverse, b.inverse
    if call.scaling == "row":
        inverses = a.inverse.view(-1, 1), b.inverse.view(1, -1)
    aten._scaled_mm.out(
        left, right.t(), *inverses, bias, None, call.dtypes[2], call.accumulation == "fast", out=output
    )


def _run_blocks(
    left: Tensor, right: Tensor, a_inverse: Tensor, b_inverse: Tensor, output: Tensor, call: Call,
    bias: Tensor | None,
) -> None:  # fmt: skip
    """The scaling of each operand by name: of shapes, by which _scaled_mm tells it, padded steps are none."""
    missing = -b_inverse.shape[0] % STEPS
    assert SCALING is not None, "unfit otherwise"
    b_type, b_scales = SCALING.BlockWise1x128, b_inverse.t()
    if call.square:
        padded = b_inverse if missing == 0 else pad(b_inverse, (0, 0, 0, missing))
        b_type, b_scales = SCALING.BlockWise128x128, padded.t().contiguous().t()
    aten._scaled_mm_v2.out(
        left, right.t(), [a_inverse.t()], [SCALING.BlockWise1x128.value], [], [b_scales], [b_type.value],
        [], bias, call.dtypes[2], out=output,
    )  # fmt: skip
