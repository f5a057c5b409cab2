"""Is a fused result as good as its dtype allows? One answer for tests, `verify` and `bisect`.

    truth = results_and_grads(op.reference, widen(args))  # float64
    eager = results_and_grads(op.reference, args)
    fused = results_and_grads(op.fused, args)
    verdicts = check(fused, eager, truth, dtype=args[0].dtype, terms=longest_sum(args))

What is asked of a result stands in `criterion.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.criterion import Case, Verdict, failed

__all__ = ["Verdict", "check", "deterministic", "longest_sum", "results_and_grads", "widen"]


def results_and_grads(fn: Callable[..., Any], args: tuple[Any, ...], seed: int = 0) -> dict[str, Tensor]:
    """Run fn and its backward pass on private copies of args.

    Args:
        fn: returns a tensor, or a tuple of which some may be None, empty or not differentiable.
        args: tensors that require a gradient are differentiated; copies keep strides and alignment.
        seed: of the random gradients of the outputs. They hold 8 significant bits: the same in every dtype.

    Returns:
        "output" (or "output0", "output1", ... of a tuple), and "grad_i" of args[i]; zeros if fn ignores it.
    """
    args = tuple(_copy(a) if isinstance(a, Tensor) else a for a in args)
    with torch.enable_grad():
        returned = fn(*args)
    if isinstance(returned, Tensor):
        results = {"output": returned}
    else:
        results = {f"output{i}": t for i, t in enumerate(returned) if isinstance(t, Tensor)}
    inputs = {f"grad_{i}": a for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad}
    outputs = [t for t in results.values() if t.requires_grad]
    grads: Sequence[Tensor | None]
    if inputs and outputs:
        grad_outputs = [_grad_output(t, seed + i) for i, t in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, list(inputs.values()), grad_outputs, allow_unused=True)
    else:
        grads = [None] * len(inputs)
    results = {name: t.detach() for name, t in results.items()}
    for (name, a), grad in zip(inputs.items(), grads, strict=True):
        results[name] = torch.zeros_like(a, requires_grad=False) if grad is None else grad
    return results


def widen(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with every floating tensor in float64, strides kept: what truth is computed from."""
    return tuple(
        _copy(a, torch.float64) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )


def longest_sum(args: tuple[Any, ...]) -> int:
    """An upper bound of K for any op on these arguments: the features of a row, or the rows of a gradient."""
    shapes = [a.shape for a in args if isinstance(a, Tensor) and a.ndim]
    return max([1, *(max(shape[-1], math.prod(shape[:-1])) for shape in shapes)])


def deterministic(fn: Callable[..., Any], args: tuple[Any, ...], runs: int = 3) -> bool:
    """Whether outputs and gradients of several runs are equal bit by bit."""
    first = results_and_grads(fn, args)
    again = (results_and_grads(fn, args) for _ in range(runs - 1))
    return all(_same_bits(first[name], other[name]) for other in again for name in first)


def check(
    fused: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    terms: int,
    inherent: bool | str = False,
    tf32: bool = False,
    products: Mapping[str, Tensor] | None = None,
) -> list[Verdict]:
    """Judge every result; see the head of this file.

    Args:
        fused, eager, truth: of `results_and_grads`; truth in float64.
        dtype: what the op computes in; a result may be wider (float32 weights of a bfloat16 norm).
        terms: K, the longest sum behind a result, for instance `longest_sum(args)`.
        inherent: whether the method has a low-precision intermediate; a string is the prefix of the results
            behind one ("grad").
        tf32: matmul operands were cut to TF32, so float32 results are judged by TF32's error.
        products: sum|a||b| for those results that are plain matrix products.

    Returns:
        One verdict per name in truth, in that order.
    """
    verdicts = []
    for name, exact in truth.items():
        if name not in fused or name not in eager:
            verdicts.append(
                failed(name, f"{name} is missing from the {'eager' if name in fused else 'fused'} run")
            )
            continue
        loose = inherent if isinstance(inherent, bool) else name.startswith(inherent)
        case = Case(
            name, fused[name], eager[name], exact, dtype, terms, loose, tf32, (products or {}).get(name)
        )
        verdicts.append(case.verdict())
    return verdicts


def _copy(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A leaf with the values, strides and 16-byte alignment of t, gaps and overlaps included."""
    if t.numel() == 0:
        copy = torch.empty_strided(t.shape, t.stride(), dtype=dtype or t.dtype, device=t.device)
    else:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        offset = t.storage_offset() % 16
        flat = torch.empty(extent + offset, dtype=dtype or t.dtype, device=t.device)
        flat[offset:] = t.detach().as_strided((extent,), (1,), t.storage_offset())
        copy = flat.as_strided(t.shape, t.stride(), offset)
    return copy.detach().requires_grad_(t.requires_grad)


def _grad_output(output: Tensor, seed: int) -> Tensor:
    """Random values that float16, bfloat16, float32 and float64 all hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(output.shape, generator=generator).to(torch.bfloat16)
    grad = torch.where(grad.abs() < 2.0**-14, 0.0, grad)
    return grad.to(device=output.device, dtype=output.dtype)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b))) if a.numel() else True
