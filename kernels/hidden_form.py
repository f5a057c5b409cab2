"""The hidden features of mlp, gated_mlp and gated_act: where gate and up are, and what of them is saved."""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels.activations import ACTIVATIONS

PACKED = ("gate_up", "up_gate")  # both in one weight, in this order


def parts(z: list[Tensor], form: str) -> tuple[Tensor, Tensor | None]:
    """What is activated, and what multiplies it, as views of the first products' results (..., H or 2 H)."""
    if form == "plain":
        return z[0], None
    if form == "gated":
        return z[0], z[1]
    first, second = z[0].tensor_split(2, -1)
    return (first, second) if form == "gate_up" else (second, first)


def gated_form(second: Tensor | None, up_first: bool) -> str:
    """The form of two tensors, or of one that holds both."""
    if second is not None:
        return "gated"
    return "up_gate" if up_first else "gate_up"


def stores_hidden(act: str, form: str) -> bool:
    """Whether h is what is saved: backward reads nothing else."""
    return form == "plain" and (act == "none" or ACTIVATIONS[act].from_output)


def z_scale(dtype: torch.dtype, form: str) -> float:
    """What plain z is saved times.

    Near zero gelu(z) and silu(z) are z/2 and a little more, and z/2 of a 16-bit z needs no rounding: computed
    again from z itself, h would always be rounded to that side, which biases w_out's gradient, as it does
    eager's.
    """
    return 2.0**-0.5 if form == "plain" and dtype != torch.float32 else 1.0
