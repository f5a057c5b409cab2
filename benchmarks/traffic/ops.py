"""Traffic of every op of the registry, forward and backward: fusekit's kernels against the eager spelling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels.providers import function
from benchmarks.traffic.counting import Counter, Counts, as_on_gpu, count_saved
from benchmarks.traffic.eager_gpu import gpu_norms
from fusekit.kernels import OPS

DTYPES = (torch.bfloat16, torch.float32)


def count_op(fn: Callable[..., Any], args: tuple[Any, ...]) -> Counts:
    """One forward and one backward pass of `fn` on fake tensors."""
    counts = Counts()
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    with as_on_gpu() as launches:
        with Counter(counts.forward, launches), count_saved(counts, ()):
            returned = fn(*args)
        outputs = [t for t in ([returned] if isinstance(returned, Tensor) else returned) if t.requires_grad]
        outputs = [t for t in outputs if t.numel()]
        grads = [torch.empty_like(t) for t in outputs]
        with Counter(counts.backward, launches):
            torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
    return counts


def count_ops() -> Iterator[dict[str, Any]]:
    """A row for each op and sample of real model size."""
    for name, op in OPS.items():
        for dtype in DTYPES:
            with FakeTensorMode():
                for sample in filter(lambda s: s.bench, op.samples("cpu", dtype)):
                    yield _row(name, dtype, sample.name, sample.args)


def _row(name: str, dtype: torch.dtype, sample: str, args: tuple[Any, ...]) -> dict[str, Any]:
    shapes = [list(a.shape) for a in args if isinstance(a, Tensor)]
    row: dict[str, Any] = {
        "op": name,
        "sample": sample,
        "dtype": str(dtype).removeprefix("torch."),
        "shapes": shapes,
    }
    with gpu_norms():
        row["eager"] = count_op(function("eager", name), args).to_dict()
    return row | {"fusekit": count_op(function("fusekit", name), args).to_dict()}
