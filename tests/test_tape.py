"""Ops played from their tapes: the same kernels of the same addresses, and another tape for another kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusekit.kernels import OPS, tape, tape_watch
from fusekit.kernels._triton import HAS_TRITON
from tests.tape_checks import Machine, a_gpu

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
DTYPES = (torch.bfloat16, torch.float32)


def fresh(x: Any) -> Any:
    """A copy in memory of its own, laid out and aligned alike."""
    if not isinstance(x, Tensor):
        return [fresh(item) for item in x] if isinstance(x, list) else x
    memory = x.untyped_storage().nbytes() // x.element_size()
    copy = torch.empty(memory, dtype=x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())
    with torch.no_grad():
        copy.copy_(x)
    return copy.requires_grad_(x.requires_grad)


def results_of(op: Any, args: Any) -> list[Tensor]:
    """Results and gradients of one call."""
    returned = op.fused(*args)
    results = list(returned) if isinstance(returned, tuple) else [returned]
    wanted = [y for y in results if y.requires_grad]
    if wanted:
        inputs = [x for x in tape_watch.tensors_in(args) if x.requires_grad]
        grads = torch.autograd.grad(wanted, inputs, [torch.ones_like(y) for y in wanted], allow_unused=True)
        results += [g for g in grads if g is not None]
    return results


def does(machine: Machine, op: Any, args: Any, played: bool) -> Any:
    """What a call does, and how its results lie."""
    with machine.logging(args, played) as log:
        results = results_of(op, args)
        log.alive += results
        return log.entries, [log.where(x) for x in results]


def tapes() -> int:
    return sum(len(taped.tapes) for taped in tape._every)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_a_tape_does_what_the_op_does(name: str, dtype: torch.dtype) -> None:
    """Same starts and operators, in order, of the same memory, though every tensor is another one."""
    op, played = OPS[name], 0
    for sample in op.samples("cpu", dtype):
        if sample.bench:
            continue
        with a_gpu() as machine:
            for _ in range(2):
                results_of(op, sample.args)
            played += tapes()
            args = [fresh(x) for x in sample.args]
            assert does(machine, op, args, True) == does(machine, op, args, False), sample.name
    assert played
