"""What a case has to do, whoever does it: FLOPs and the least bytes, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels.cases import Case, gradients_of

# FLOPs of the backward pass over the forward pass's: two products for one; attention recomputes its scores.
BACKWARD_FLOPS = {"attention": 2.5, "attention_fp8": 2.5}


@dataclass(frozen=True)
class Work:
    """flops: of one call. moved: bytes, every input and output once."""

    flops: int
    moved: int


def work(case: Case) -> dict[str, Work]:
    """By direction. Backward reads inputs and the outputs' gradients, and writes the inputs' gradients."""
    tensors = [a for a in case.sample.args if isinstance(a, Tensor)]
    inputs, outputs = sum(map(_bytes, tensors)), _output_bytes(case)
    flops = case.op.flops(*case.sample.args)
    found = {"forward": Work(flops, inputs + outputs)}
    grads = sum(_bytes(t) for t in tensors if t.requires_grad)
    if grads:
        backward = int(flops * BACKWARD_FLOPS.get(case.name, 2.0))
        direction = gradients_of(case.name)
        both = flops if direction == "training" else 0
        found[direction] = Work(both + backward, inputs + outputs + grads)
    return found


def _output_bytes(case: Case) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        returned: Any = case.op.fused(
            *(mode.from_tensor(a.detach()) if isinstance(a, Tensor) else a for a in case.sample.args)
        )
    return sum(map(_bytes, returned if isinstance(returned, tuple) else (returned,)))


def _bytes(t: Tensor) -> int:
    """Of memory: an expanded dimension is there once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * t.element_size()
