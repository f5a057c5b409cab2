"""Whole numbers that are held as floating ones, as the distances that ALiBi multiplies: an affine form."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusekit.passes.affine import Affine, Index
from fusekit.passes.index_arithmetic import EXACT, aligned, element, is_written, sliced, unwrapped
from fusekit.passes.spelling import spell, value_of

WHOLE = (torch.float32, torch.float64)  # floating types that count the places of any mask that fits a memory
LONGEST = 1 << 24


def whole_number(node: Any, index: Index) -> Affine | None:
    """An element that is a whole number, also where it is held as a floating one."""
    if not isinstance(node, fx.Node) or is_written(node):
        return None
    if value_of(node).dtype in EXACT:
        value = element(node, index)
        return value if isinstance(value, Affine) else None
    name, args = spell(node)
    if name == "to" and value_of(node).is_floating_point():
        return whole_number(args[0], index)
    if value_of(node).dtype not in WHOLE:
        return None
    if name == "arange":
        return _floating_range(node, args, index)
    if name in ("add", "sub") and (len(args) < 3 or args[2] == 1):
        return _sum(args, index, 1 if name == "add" else -1)
    if name == "neg":
        value = whole_number(args[0], index)
        return None if value is None else value.times(-1)
    inner = unwrapped(node, index) or sliced(node, index)
    return None if inner is None else whole_number(*inner)


def _floating_range(node: fx.Node, args: tuple[Any, ...], index: Index) -> Affine | None:
    overload = node.target._overloadname  # type: ignore[union-attr]
    start = 0 if overload == "default" else args[0]
    step = args[2] if overload == "start_step" else 1
    numbers = [x for x in (start, step) if isinstance(x, (int, float)) and abs(x) < LONGEST and x == int(x)]
    size = value_of(node).shape[0]
    if (
        len(numbers) < 2
        or abs(numbers[1]) != 1
        or not (statically_known_true(size < LONGEST) or _is_symbol(size))
    ):
        return None
    return index[0].times(int(step)).plus(Affine(int(start)))


def _is_symbol(size: Any) -> bool:
    """A symbolic length: scores of 2 ** 24 keys do not fit a memory, so it is shorter."""
    return isinstance(size, torch.SymInt)


def _sum(args: tuple[Any, ...], index: Index, sign: int) -> Affine | None:
    terms: list[Affine | None] = []
    for x in args[:2]:
        if isinstance(x, (int, float)) and abs(x) < LONGEST and x == int(x):
            terms.append(Affine(int(x)))
        else:
            terms.append(whole_number(x, aligned(x, index)) if isinstance(x, fx.Node) else None)
    first, second = terms
    return None if first is None or second is None else first.plus(second, sign)
