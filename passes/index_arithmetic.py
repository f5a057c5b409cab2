"""The element of a tensor at a symbolic index, read from its graph: views, gathers, comparisons.

An integer that is not understood is a `Reading` of its tensor, anything else None; sizes may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusekit.passes.affine import TRUE, ZERO, Affine, Index, Predicate, Reading
from fusekit.passes.spelling import spell, value_of

Value = Affine | Predicate | None
EXACT = (torch.int64, torch.int32)  # dtypes in which an index keeps its value


def is_written(node: fx.Node) -> bool:
    """Whether something writes to the tensor in place, as `mask[:, :prefix] = True`: then the call that made
    it does not say what it holds."""
    return bool(node.meta.get("written"))


def constant(value: Any) -> float | None:
    """The number that fills a tensor, or a number itself."""
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, fx.Node) or is_written(value):
        return None
    name, args = spell(value)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0
    if name in ("ones", "ones_like", "new_ones"):
        return 1
    if name in ("full", "full_like", "scalar_tensor"):
        filling = args[0] if name == "scalar_tensor" else args[1]
        return filling if isinstance(filling, (int, float)) else None
    if name == "new_full":
        return args[2] if isinstance(args[2], (int, float)) else None
    return (
        constant(args[0]) if name in ("to", "expand", "reshape", "unsqueeze", "clone", "contiguous") else None
    )


def aligned(node: fx.Node, index: Index) -> Index:
    """The index into a tensor that broadcasts against one indexed by `index`."""
    shape = value_of(node).shape
    own = index[len(index) - len(shape) :]
    return tuple(ZERO if statically_known_true(size == 1) else i for size, i in zip(shape, own, strict=True))


def element(node: Any, index: Index) -> Value:
    """The element of `node` at `index`; a 0/1 tensor counts as a predicate."""
    if isinstance(node, bool):
        return TRUE if node else None
    if isinstance(node, int):
        return Affine(node)
    if not isinstance(node, fx.Node) or not isinstance(value_of(node), Tensor) or is_written(node):
        return None
    name, args = spell(node)
    reader = _READERS.get(name)
    found = reader(node, args, index) if reader else None
    return read(node, index) if found is None and value_of(node).dtype in EXACT else found


def opposite(node: fx.Node, index: Index) -> Value:
    """What the complement of a boolean `node` says at `index`: of a comparison the other one, which tells
    more than the opposite of what was read where an absolute value is compared."""
    name, args = spell(node)
    if name in _OTHERWISE and not is_written(node):
        return _READERS[_OTHERWISE[name]](node, args, index)
    value = element(node, index)
    return value.opposite() if isinstance(value, Predicate) else None


def read(node: fx.Node, index: Index) -> Affine:
    """The element, as a number that is not known until the model runs."""
    return Affine(0, frozenset({(Reading(node, index), 1)}))


def _operand(node: Any, index: Index) -> Value:
    """An operand that broadcasts; a number of the graph's own, such as the length of a cache, is not read."""
    tensor = isinstance(node, fx.Node) and isinstance(value_of(node), Tensor)
    return element(node, aligned(node, index) if tensor else index)


def _arange(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    overload = node.target._overloadname  # type: ignore[union-attr]
    start = 0 if overload == "default" else args[0]
    step = args[2] if overload == "start_step" else 1
    if type(start) is not int or type(step) is not int or value_of(node).dtype not in EXACT:
        return None  # a narrow type wraps around, a floating one rounds
    return index[0].times(step).plus(Affine(start))


def unwrapped(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """What a view with other dimensions of size one, a repetition or a copy is made of; the index there."""
    name, args = spell(node)
    if name in ("expand", "clone", "contiguous"):
        return args[0], aligned(args[0], index)
    if name == "unsqueeze":
        dim = args[1] % len(index)
        return args[0], index[:dim] + index[dim + 1 :]
    if name in ("squeeze", "reshape"):
        inner = reshaped(node, args[0], index)
        return None if inner is None else (args[0], inner)
    return None


def _unwrap(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    inner = unwrapped(node, index)
    return None if inner is None else element(*inner)


def reshaped(node: fx.Node, source: fx.Node, index: Index) -> Index | None:
    """Only where dimensions of size one come or go."""
    old, new = value_of(source).shape, value_of(node).shape
    kept = [i for i, size in zip(index, new, strict=True) if not statically_known_true(size == 1)]
    sizes = [size for size in new if not statically_known_true(size == 1)]
    before = [size for size in old if not statically_known_true(size == 1)]
    if len(sizes) != len(before) or not all(map(_known_equal, sizes, before)):
        return None
    remaining = iter(kept)
    return tuple(ZERO if statically_known_true(s == 1) else next(remaining) for s in old)


def _known_equal(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _transpose(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    first, second = args[1:3] if len(args) > 2 else (-1, -2)
    swapped = list(index)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return element(args[0], tuple(swapped))


def sliced(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """What a slice with numbers for its start and step is taken of, and the index there."""
    name, args = spell(node)
    if name != "slice":
        return None
    source, dim, (start,), step = args
    if type(start) is not int or type(step) is not int or start < 0:
        return None
    if start and not _start_is_inside(value_of(source).shape[dim], start):
        return None
    dim %= len(index)
    return source, (*index[:dim], index[dim].times(step).plus(Affine(start)), *index[dim + 1 :])


def _slice(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    inner = sliced(node, index)
    return None if inner is None else element(*inner)


def _start_is_inside(size: Any, start: int) -> bool:
    return statically_known_true(size >= start)


def _select(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    _, dim, at = args
    if type(at) is not int or at < 0:
        return None
    dim %= len(index) + 1
    return element(args[0], (*index[:dim], Affine(at), *index[dim:]))


def _gather(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    """x[i, j, ...] with an index tensor for every dimension."""
    source, positions = args
    if not isinstance(source, fx.Node) or len(positions) != value_of(source).dim():
        return None
    found = [_operand(p, index) if isinstance(p, fx.Node) and _is_integer(p) else None for p in positions]
    if any(not isinstance(p, Affine) or not p.never_negative() for p in found):
        return None
    return element(source, aligned(source, tuple(found)))  # type: ignore[arg-type]


def _is_integer(node: fx.Node) -> bool:
    dtype = value_of(node).dtype
    return not dtype.is_floating_point and dtype != torch.bool


def _sum(sign: int) -> Callable[..., Value]:
    def read(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
        if value_of(node).is_floating_point() or (len(args) > 2 and args[2] != 1):
            return None
        left, right = _operand(args[0], index), _operand(args[1], index)
        return left.plus(right, sign) if isinstance(left, Affine) and isinstance(right, Affine) else None

    return read


def _compare(smaller: int, strict: bool) -> Callable[..., Value]:
    """Atoms for args[smaller] <= args[1 - smaller], or < where strict; |x| <= y says it of x and of -x."""

    def read(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
        inner = _absolute(args[smaller])
        low = _operand(args[smaller] if inner is None else inner, index)
        high = _operand(args[1 - smaller], index)
        if not (isinstance(low, Affine) and isinstance(high, Affine)):
            return None
        sides = (low,) if inner is None else (low, low.times(-1))
        return Predicate(frozenset(side.plus(high, -1).plus(Affine(int(strict))) for side in sides))

    return read


def _absolute(node: Any) -> fx.Node | None:
    """What the absolute value is taken of."""
    if not isinstance(node, fx.Node) or is_written(node) or spell(node).name != "abs":
        return None
    inner = spell(node).args[0]
    return inner if isinstance(inner, fx.Node) else None


def _equal(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    left, right = _operand(args[0], index), _operand(args[1], index)
    if isinstance(left, Affine) and isinstance(right, Affine):
        difference = left.plus(right, -1)
        return Predicate(frozenset({difference, difference.times(-1)}))
    return None


def _unequal(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    left, right = _operand(args[0], index), _operand(args[1], index)
    if isinstance(left, Affine) and isinstance(right, Affine):
        difference = left.plus(right, -1)
        if (
            not difference.terms
        ):  # the packed-sequence test: positions that grow by one, unequal to one, is never true
            return TRUE if difference.constant else Predicate(frozenset({Affine(1)}))
        return None
    return left if isinstance(left, Predicate) and right == ZERO else None


def _not(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    value = _operand(args[0], index)
    if isinstance(value, Affine):  # x == 0
        return Predicate(frozenset({value, value.times(-1)}))
    return value.opposite() if isinstance(value, Predicate) else None


def _and(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    left, right = _operand(args[0], index), _operand(args[1], index)
    return left.also(right) if isinstance(left, Predicate) and isinstance(right, Predicate) else None


def _triangle(sign: int) -> Callable[..., Value]:
    """tril keeps column - row <= diagonal, triu keeps row - column <= -diagonal."""

    def read(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
        inside, diagonal = element(args[0], index), args[1]
        if not isinstance(inside, Predicate) or type(diagonal) is not int:
            return None
        offset = index[-1].plus(index[-2], -1).plus(Affine(-diagonal)).times(sign)
        return inside.also(Predicate(frozenset({offset})))

    return read


def _diff(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    """The step of an arithmetic sequence, where what is put in front continues it."""
    source, times, dim, front, behind = args
    if times != 1 or behind is not None or not isinstance(front, fx.Node):
        return None
    dim %= len(index)
    if not statically_known_true(value_of(front).shape[dim] == 1):
        return None

    def at(tensor: fx.Node, position: Affine) -> Value:
        return element(tensor, (*index[:dim], position, *index[dim + 1 :]))

    here, first, before = at(source, Affine(0, frozenset({("step", 1)}))), at(source, ZERO), at(front, ZERO)
    if not (isinstance(here, Affine) and isinstance(first, Affine) and isinstance(before, Affine)):
        return None
    if here.reads() or first.reads() or before.reads():
        return None
    slope = Affine(dict(here.terms).get("step", 0))
    return slope if first.plus(before, -1) == slope else None


def _cumsum(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    """A running count of what never happens is zero."""
    value = element(args[0], index)
    never = isinstance(value, Predicate) and any(not a.terms and a.constant > 0 for a in value.atoms)
    return ZERO if never or value == ZERO else None


def _cast(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    """Whole numbers keep their value in a wide type; truth keeps in any type."""
    value = _operand(args[0], index)
    dtype = value_of(node).dtype
    if isinstance(value, Predicate):
        return value
    if isinstance(value, Affine) and value.reads() and value_of(args[0]).dtype != dtype:
        return None  # an index fits any of them, data may wrap around
    return value if dtype in EXACT else None


def _quotient(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    """Chunks: the index over a number, rounded down."""
    value, divisor = _operand(args[0], index), args[1]
    if not isinstance(value, Affine) or type(divisor) is not int or value_of(node).dtype not in EXACT:
        return None
    return Affine(0, frozenset({(Reading(("floor_divide", divisor), (value,)), 1)}))


def _ones(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    return TRUE if constant(node) == 1 else None


_OTHERWISE = {"le": "gt", "gt": "le", "lt": "ge", "ge": "lt"}  # of whole numbers, which are never NaN
_READERS: dict[str, Callable[[fx.Node, tuple[Any, ...], Index], Value]] = {
    "arange": _arange,
    "unsqueeze": _unwrap,
    "squeeze": _unwrap,
    "reshape": _unwrap,
    "expand": _unwrap,
    "to": _cast,
    "clone": _cast,
    "contiguous": _cast,
    "transpose_last": _transpose,
    "transpose": _transpose,
    "slice": _slice,
    "select": _select,
    "index": _gather,
    "add": _sum(1),
    "sub": _sum(-1),
    "le": _compare(0, strict=False),
    "lt": _compare(0, strict=True),
    "ge": _compare(1, strict=False),
    "gt": _compare(1, strict=True),
    "eq": _equal,
    "ne": _unequal,
    "not": _not,
    "and": _and,
    "tril": _triangle(1),
    "triu": _triangle(-1),
    "ones": _ones,
    "ones_like": _ones,
    "new_ones": _ones,
    "full": _ones,
    "new_full": _ones,
    "full_like": _ones,
    "diff": _diff,
    "cumsum": _cumsum,
    "floor_divide": _quotient,
}
