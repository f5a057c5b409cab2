"""Calls of attention that keep no tail (kernels/attention_tail.py): without gradients, and behind a library.

Samples are called as a training step calls our own kernels. Here is what else is started: the forward kernels
in evaluation, and the backward kernels where a library ran the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import attention, attention_choice, attention_fp8, attention_tail
from fusekit.kernels.launch import Launch, record
from fusekit.kernels.op import LOW_PRECISION


def launches(target: str) -> Iterator[tuple[Launch, bool]]:
    """What they start on that architecture, and whether for a sample of real size; under FakeTensorMode."""
    for op in (attention.OP, attention_fp8.OP):
        for dtype in LOW_PRECISION:
            for sample in sorted(op.samples("cpu", dtype), key=lambda sample: not sample.bench):
                with record(target) as found:
                    with torch.no_grad():
                        op.fused(*sample.args)
                    if op is attention.OP:
                        _behind_a_library(*sample.args)
                yield from ((start, sample.bench) for start in found)


def _behind_a_library(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> None:
    form = attention._settings(q, k, v, *settings)
    libraries = attention_choice.libraries(backward=False)
    unfit = attention_choice.exclusive(q, k, v, form)
    if unfit is not None or all(library.unfit(q, k, v, form) is not None for library in libraries):
        return
    q, k, v = (x.detach() for x in (q, k, v))
    out, stats, none = torch.ops.fusekit.attention_forward(q, k, v, attention_tail.NONE, *form)
    torch.ops.fusekit.attention_backward(out, q, k, v, out, stats, none, False, *form)
