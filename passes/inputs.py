"""What a graph takes beside what Dynamo passes: its last inputs, made from others at every call."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class InputCast:
    """Graph input `target` is the captured graph's input `source` cast to `dtype`, once per version."""

    source: int
    target: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class InputOperand:
    """Graph inputs from `target` on are the tensors of fp8_operand of the input `source`, a weight, made once
    per version.

    dtype: of the layers' x. transposed: of the weight's transpose. turned: for gradients too.
    """

    source: int
    target: int
    dtype: torch.dtype
    recipe: str
    transposed: bool
    turned: bool


@dataclass(frozen=True, kw_only=True)
class InputScales:
    """Graph inputs `target` and the next are delayed scale and amax of the layer of the weight `source`."""

    source: int
    target: int
