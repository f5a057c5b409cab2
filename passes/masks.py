"""Attention masks back from index arithmetic: which part of a mask is `key <= query`, and what is left of it.

Models build masks with arange, comparisons and `&`; Hugging Face does so even where none is needed, because
it cannot look at data while being captured. A mask is read as a predicate over (batch, head, query, key):
index arithmetic is followed through views and gathers as affine forms, comparisons of those become atoms, and
everything else stays a tensor. Only what is proved is dropped: an atom that is `key - query <= 0` itself, and
atoms that are constant and true. A wrong proof would train another model without a sound, so there is no
guessing here: whatever is not understood keeps its tensor. Sizes may be symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusekit.passes.spelling import spell, value_of

QUERY, KEY = "query", "key"


@dataclass(frozen=True)
class Affine:
    """constant + sum of coefficient * variable, over whole numbers."""

    constant: int
    terms: frozenset[tuple[str, int]] = frozenset()

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        sums = dict(self.terms)
        for name, coefficient in other.terms:
            sums[name] = sums.get(name, 0) + factor * coefficient
        return Affine(
            self.constant + factor * other.constant, frozenset((n, c) for n, c in sums.items() if c)
        )

    def times(self, factor: int) -> Affine:
        return Affine(0).plus(self, factor)

    def never_negative(self) -> bool:
        return self.constant >= 0 and all(coefficient >= 0 for _, coefficient in self.terms)


@dataclass(frozen=True)
class Predicate:
    """All of: `atom <= 0` for each atom. No atoms: true everywhere."""

    atoms: frozenset[Affine] = frozenset()

    def also(self, other: Predicate) -> Predicate:
        return Predicate(self.atoms | other.atoms)

    def opposite(self) -> Predicate | None:
        """not (a <= 0) is 1 - a <= 0; the opposite of several atoms at once is no conjunction."""
        if len(self.atoms) != 1:
            return None
        (atom,) = self.atoms
        return Predicate(frozenset({Affine(1).plus(atom, -1)}))


TRUE = Predicate()
CAUSAL = Predicate(frozenset({Affine(0, frozenset({(KEY, 1), (QUERY, -1)}))}))
Value = Affine | Predicate | None
Index = tuple[Affine, ...]
_ZERO = Affine(0)


class Mask(NamedTuple):
    """A mask as (key <= query, where `causal`) and `rest`; rest None is true everywhere."""

    causal: bool
    rest: fx.Node | None


def recover(mask: fx.Node) -> Mask:
    """Take a boolean mask (True may attend; its last two dimensions are query and key) apart."""
    parts = [(part, predicate(part)) for part in _conjuncts(mask)]
    if any(_is_written(part) for part, _ in parts):  # it may hold something else by now
        return Mask(False, mask)
    causal = any(p == CAUSAL for _, p in parts)
    rest = [part for part, p in parts if p is None or p not in (CAUSAL, TRUE)]
    if not rest:
        return Mask(causal, None)
    if len(rest) == 1:
        return Mask(causal, rest[0])
    return Mask(False, mask)  # several tensors are left: joining them again would cost what it saves


def recover_additive(mask: fx.Node, lowest: float) -> Mask | None:
    """Read a mask that is added to the scores: 0 where a key may be attended to, at most `lowest` elsewhere.

    Returns None where it is not such a mask made of index arithmetic alone: with every key of some row
    forbidden, adding -1e9 and forbidding differ, so only a mask known in full may be replaced.
    """
    allowed = _additive_predicate(mask, lowest)
    if allowed == CAUSAL:
        return Mask(True, None)
    return Mask(False, None) if allowed == TRUE else None


def predicate(mask: fx.Node) -> Predicate | None:
    """What a mask says about (query, key), None where it is not made of index arithmetic alone."""
    value = _value(mask, _aligned(mask, _variables(value_of(mask).dim())))
    return _simplified(value) if isinstance(value, Predicate) else None


def _variables(rank: int) -> Index:
    names = [*(f"dim{-i}" for i in range(rank, 2, -1)), QUERY, KEY][-rank:] if rank else []
    return tuple(Affine(0, frozenset({(name, 1)})) for name in names)


def _simplified(found: Predicate) -> Predicate | None:
    """Without the atoms that are constant and true; None where one is false everywhere."""
    if any(not atom.terms and atom.constant > 0 for atom in found.atoms):
        return None
    return Predicate(frozenset(atom for atom in found.atoms if atom.terms))


def _conjuncts(node: fx.Node) -> list[fx.Node]:
    name, args = spell(node)
    if name != "and" or _is_written(node):
        return [node]
    if all(isinstance(a, fx.Node) and value_of(a).dtype == torch.bool for a in args):
        return [part for a in args for part in _conjuncts(a)]
    return [node]


def _is_written(node: fx.Node) -> bool:
    """Whether something writes to the tensor in place, as `mask[:, :prefix] = True`: then the call that made
    it does not say what it holds."""
    return bool(node.meta.get("written"))


def _additive_predicate(node: fx.Node, lowest: float) -> Predicate | None:
    if _is_written(node):
        return None
    name, args = spell(node)
    index = _aligned(node, _variables(value_of(node).dim()))
    allowed: Value
    if name in ("to", "clone", "contiguous"):
        return _additive_predicate(args[0], lowest) if _keeps_infinity(node) else None
    if name == "masked_fill" and _is_low(args[2], lowest) and _constant(args[0]) == 0:
        forbidden = _value(args[1], _aligned(args[1], index))
        allowed = forbidden.opposite() if isinstance(forbidden, Predicate) else None
    elif name == "where" and _constant(args[1]) == 0 and _is_low(_constant(args[2]), lowest):
        allowed = _value(args[0], _aligned(args[0], index))
    elif name == "triu" and _is_low(_constant(args[0]), lowest) and isinstance(args[1], int):
        allowed = Predicate(frozenset({index[-1].plus(index[-2], -1).plus(Affine(1 - args[1]))}))
    else:
        return None
    return _simplified(allowed) if isinstance(allowed, Predicate) else None


def _keeps_infinity(node: fx.Node) -> bool:
    return value_of(node).is_floating_point()


def _is_low(value: Any, lowest: float) -> bool:
    return isinstance(value, (int, float)) and value <= lowest


def _constant(value: Any) -> float | None:
    """The number that fills a tensor, or a number itself."""
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, fx.Node) or _is_written(value):
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
        _constant(args[0])
        if name in ("to", "expand", "reshape", "unsqueeze", "clone", "contiguous")
        else None
    )


def _aligned(node: fx.Node, index: Index) -> Index:
    """The index into a tensor that broadcasts against one indexed by `index`."""
    shape = value_of(node).shape
    own = index[len(index) - len(shape) :]
    return tuple(_ZERO if statically_known_true(size == 1) else i for size, i in zip(shape, own, strict=True))


def _value(node: Any, index: Index) -> Value:
    """The element of `node` at `index`; a 0/1 tensor counts as a predicate."""
    if isinstance(node, bool):
        return TRUE if node else None
    if isinstance(node, int):
        return Affine(node)
    if not isinstance(node, fx.Node) or not isinstance(value_of(node), Tensor) or _is_written(node):
        return None
    name, args = spell(node)
    reader = _READERS.get(name)
    return reader(node, args, index) if reader else None


def _operand(node: Any, index: Index) -> Value:
    return _value(node, _aligned(node, index)) if isinstance(node, fx.Node) else _value(node, index)


def _arange(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    overload = node.target._overloadname  # type: ignore[union-attr]
    start = 0 if overload == "default" else args[0]
    step = args[2] if overload == "start_step" else 1
    if type(start) is not int or type(step) is not int or value_of(node).is_floating_point():
        return None
    return index[0].times(step).plus(Affine(start))


def _unsqueeze(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    dim = args[1] % len(index)
    return _value(args[0], index[:dim] + index[dim + 1 :])


def _reshape(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    """Only where dimensions of size one come or go."""
    old, new = value_of(args[0]).shape, value_of(node).shape
    kept = [i for i, size in zip(index, new, strict=True) if not statically_known_true(size == 1)]
    sizes = [size for size in new if not statically_known_true(size == 1)]
    before = [size for size in old if not statically_known_true(size == 1)]
    if len(sizes) != len(before) or not all(map(_known_equal, sizes, before)):
        return None
    remaining = iter(kept)
    return _value(args[0], tuple(_ZERO if statically_known_true(s == 1) else next(remaining) for s in old))


def _known_equal(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _transpose(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    first, second = args[1:3] if len(args) > 2 else (-1, -2)
    swapped = list(index)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return _value(args[0], tuple(swapped))


def _slice(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    _, dim, start, _, step = args
    start = 0 if start is None else start
    if type(start) is not int or type(step) is not int or start < 0:
        return None
    if start and not _start_is_inside(value_of(args[0]).shape[dim], start):
        return None
    dim %= len(index)
    return _value(args[0], (*index[:dim], index[dim].times(step).plus(Affine(start)), *index[dim + 1 :]))


def _start_is_inside(size: Any, start: int) -> bool:
    return statically_known_true(size >= start)


def _select(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    _, dim, at = args
    if type(at) is not int or at < 0:
        return None
    dim %= len(index) + 1
    return _value(args[0], (*index[:dim], Affine(at), *index[dim:]))


def _gather(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    """x[i, j, ...] with an index tensor for every dimension."""
    source, positions = args
    if not isinstance(source, fx.Node) or len(positions) != value_of(source).dim():
        return None
    found = [_operand(p, index) if isinstance(p, fx.Node) and _is_integer(p) else None for p in positions]
    if any(not isinstance(p, Affine) or not p.never_negative() for p in found):
        return None
    return _value(source, _aligned(source, tuple(found)))  # type: ignore[arg-type]


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
    """Atoms for args[smaller] <= args[1 - smaller], or < where strict."""

    def read(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
        low, high = _operand(args[smaller], index), _operand(args[1 - smaller], index)
        if not (isinstance(low, Affine) and isinstance(high, Affine)):
            return None
        return Predicate(frozenset({low.plus(high, -1).plus(Affine(int(strict)))}))

    return read


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
    return left if isinstance(left, Predicate) and right == _ZERO else None


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
        inside, diagonal = _value(args[0], index), args[1]
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
        return _value(tensor, (*index[:dim], position, *index[dim + 1 :]))

    here, first, before = at(source, Affine(0, frozenset({("step", 1)}))), at(source, _ZERO), at(front, _ZERO)
    if not (isinstance(here, Affine) and isinstance(first, Affine) and isinstance(before, Affine)):
        return None
    slope = Affine(dict(here.terms).get("step", 0))
    return slope if first.plus(before, -1) == slope else None


def _cumsum(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    """A running count of what never happens is zero."""
    value = _value(args[0], index)
    never = isinstance(value, Predicate) and any(not a.terms and a.constant > 0 for a in value.atoms)
    return _ZERO if never or value == _ZERO else None


def _cast(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    """Whole numbers keep their value in a wide type; truth keeps in any type."""
    value = _operand(args[0], index)
    dtype = value_of(node).dtype
    if isinstance(value, Predicate):
        return value
    return value if dtype in (torch.int64, torch.int32) else None


def _ones(node: fx.Node, args: tuple[Any, ...], index: Index) -> Value:
    return TRUE if _constant(node) == 1 else None


_READERS: dict[str, Callable[[fx.Node, tuple[Any, ...], Index], Value]] = {
    "arange": _arange,
    "unsqueeze": _unsqueeze,
    "squeeze": _reshape,
    "reshape": _reshape,
    "expand": lambda node, args, index: _operand(args[0], index),
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
}
