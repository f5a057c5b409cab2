"""Indices of one side of a block of scores: a range, of which tensors give views, or any, ascending."""

from __future__ import annotations

import torch
from torch import Tensor

Span = range | Tensor


def indices(span: Span) -> Tensor:
    return span if isinstance(span, Tensor) else torch.arange(span.start, span.stop)


def ends(span: Span) -> tuple[int, int]:
    """The first index and the one behind the last, of at least one."""
    return (int(span[0]), int(span[-1]) + 1) if isinstance(span, Tensor) else (span.start, span.stop)


def part(x: Tensor, dim: int, span: Span) -> Tensor:
    if isinstance(span, Tensor):
        return x.index_select(dim, span)
    return x.narrow(dim, span.start, len(span))


def write(x: Tensor, dim: int, span: Span, values: Tensor) -> None:
    if isinstance(span, Tensor):
        x.index_copy_(dim, span, values.to(x.dtype))
    else:
        part(x, dim, span).copy_(values)


def add(x: Tensor, dim: int, span: Span, values: Tensor) -> None:
    if isinstance(span, Tensor):
        x.index_add_(dim, span, values.to(x.dtype))
    else:
        part(x, dim, span).add_(values)


def chosen(flags: Tensor, within: range) -> Tensor:
    """Those of the indices within a range whose flag (length,) is set."""
    return flags[within.start : within.stop].nonzero()[:, 0] + within.start


def split(flags: Tensor | None, length: int, step: int) -> list[tuple[Span, bool]]:
    """Blocks of up to `step` indices: first those whose flag is not set, then those whose flag is."""
    blocks = [range(start, min(start + step, length)) for start in range(0, length, step)]
    if flags is None:
        return [(block, False) for block in blocks]
    others = [chosen(~flags, block) for block in blocks]
    found: list[tuple[Span, bool]] = [
        (block if len(left) == len(block) else left, False)
        for block, left in zip(blocks, others, strict=True)
        if len(left)
    ]
    return found + [(few, True) for few in chosen(flags, range(length)).split(step) if len(few)]
