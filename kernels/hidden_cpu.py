"""Hidden features of mlp and gated_mlp on a CPU, and gated_act: h = act(gate) * up, and its derivatives.

Over float32 blocks of rows in ATen operators; over whole bfloat16 tensors by the library of cpu_library.py,
one pass each, where it is built and knows the activation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels import cpu_library
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.hidden_form import parts, stores_hidden

COMPILED = cpu_library.ACTIVATIONS[:4]  # those whose derivative reads z
SUMS = 64  # partial column sums, added up in this order whatever the threads


def activate(z: list[Tensor], act: str, form: str, in_place: bool) -> Tensor:
    """h of float32 z; in the gate's memory, or in memory of its own."""
    gate, up = parts(z, form)
    out = gate if in_place else torch.empty(gate.shape)
    if act != "none":
        ACTIVATIONS[act].cpu(gate, out)
    elif not in_place:
        out = gate
    if up is None:
        return out
    return out.mul_(up) if out is not gate or in_place else out * up


def derive(saved: list[Tensor], dh: Tensor | None, act: str, form: str) -> tuple[Tensor, list[Tensor]]:
    """h, and dz of each weight, of a float32 block; dh is scratch, and so is what is not in x's dtype."""
    if stores_hidden(act, form):
        return saved[0], [] if dh is None else [ACTIVATIONS[act].cpu_backward(dh, saved[0], dh)]
    gate, up = parts(saved, form)
    h = activate([gate], act, "plain", in_place=False)
    if dh is None:
        return h if up is None else h * up, []
    if up is None:
        ACTIVATIONS[act].cpu_backward(dh, gate, dh)
        return h, [dh]
    dzs = [torch.empty_like(t) for t in saved]
    dgate, dup = parts(dzs, form)
    assert dup is not None
    torch.mul(dh, h, out=dup)
    torch.mul(dh, up, out=dgate)
    if act != "none":
        ACTIVATIONS[act].cpu_backward(dgate, gate, dgate)
    return (h * up if h is gate else h.mul_(up)), dzs


def compiled(act: str, dtype: torch.dtype) -> bool:
    """Whether the library has this pass."""
    return act in COMPILED and dtype == torch.bfloat16 and cpu_library.available()


def activate_whole(z: list[Tensor], act: str, form: str, h: Tensor) -> None:
    """Write h (M, H), contiguous, of all rows at once; where `compiled` says so."""
    gate, up = parts(z, form)
    cpu_library.call(
        "hidden_forward", cpu_library.ACTIVATIONS.index(act), gate, up, h, *h.shape, gate.stride(0)
    )


def derive_whole(
    z: list[Tensor], dh: Tensor, act: str, rescale: float, dzs: list[Tensor], sums: list[Tensor]
) -> None:
    """Write dzs of z, which is gate, or gate and up, their float32 column sums, and h over dh.

    Args:
        z, dzs: (M, H), all with the same distance between rows. A gate without up is rescale times z[0].
        dh: (M, H), contiguous.
        sums: (H,) float32 each.
    """
    gate, up = z if len(z) == 2 else (z[0], None)
    dgate, dup = dzs if len(z) == 2 else (dzs[0], None)
    (M, H), count = dh.shape, max(1, min(SUMS, dh.shape[0]))
    partial = dh.new_zeros((len(z), count, H), dtype=torch.float32)
    cpu_library.call(
        "hidden_backward", cpu_library.ACTIVATIONS.index(act), dh, gate, up, dh, dgate, dup,
        partial[0], None if up is None else partial[1], M, H, gate.stride(0), rescale, count,
    )  # fmt: skip
    for total, each in zip(sums, partial.sum(1), strict=True):
        total.copy_(each)
