"""Letters of a rule's shapes against a graph's sizes: "* K", "Hkv*G", "2*R", "rows" (the product of *)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch.fx.experimental.symbolic_shapes import statically_known_true

PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29)
EIGHT = (
    8  # no pattern has this size of its own: it is the third letter, 7, and one more (a sink beside Tk keys)
)


class Operand(NamedTuple):
    name: str
    words: frozenset[str]
    dims: tuple[str, ...]


def parse(name: str, text: str) -> Operand:
    words = text.split()
    flags = frozenset(w for w in words if w in ("optional", "any", "bool", "int", "float32", "complex"))
    return Operand(name, flags, tuple(w for w in words if w not in flags))


def prime_sizes(operands: list[Operand]) -> dict[str, int]:
    letters: list[str] = []
    for operand in operands:
        for dim in operand.dims:
            named = [f for f in dim.split("*") if not f.isdigit()]
            letters += ["*0", "*1"] if dim in ("*", "rows") else named
    return dict(zip(dict.fromkeys(letters), PRIMES, strict=False))


def product(dim: str, sizes: Mapping[str, Any]) -> Any:
    if dim == "rows":
        return sizes["*0"] * sizes["*1"]
    return math.prod(int(factor) if factor.isdigit() else sizes[factor] for factor in dim.split("*"))


def translate(shape: Sequence[int], ours: dict[str, int], theirs: dict[str, Any]) -> list[Any]:
    """A pattern's shape in the graph's sizes; `theirs["*"]` are the leading dimensions."""
    lead = (ours.get("*0"), ours.get("*1"))
    dims, translated = list(shape), []
    while dims:
        if tuple(dims[:2]) == lead:
            translated += theirs["*"]
            del dims[:2]
            continue
        size, rest = 1, dims.pop(0)
        for letter, prime in ours.items():
            if rest % prime == 0:
                rest //= prime
                size *= math.prod(theirs["*"]) if letter == "*0" else 1 if letter == "*1" else theirs[letter]
        if rest == EIGHT and EIGHT - 1 in ours.values():
            rest = theirs[next(letter for letter, prime in ours.items() if prime == EIGHT - 1)] + 1
        translated.append(size * rest)
    return translated


def unify(operand: Operand, shape: list[Any], sizes: dict[str, Any]) -> str | None:
    """Bind the operand's letters to the sizes of its shape, or say what does not fit."""
    if "any" in operand.words:
        return None
    dims, written = list(operand.dims), " ".join(operand.dims)
    trailing = len(dims) - (dims[0] == "*")
    if len(shape) < trailing or (dims[0] != "*" and len(shape) != trailing):
        return f"{operand.name} has {len(shape)} dimensions where ({written}) is needed"
    if dims[0] == "*":
        lead, shape, dims = shape[: len(shape) - trailing], shape[len(shape) - trailing :], dims[1:]
        known = sizes.setdefault("*", lead)
        if len(known) != len(lead) or not all(map(equal, known, lead)):
            return f"{operand.name} is broadcast: its leading sizes are {tuple(lead)}, not {tuple(known)}"
    for dim, size in zip(dims, shape, strict=True):
        if dim == "rows":
            if not equal(size, math.prod(sizes["*"])):
                return f"{operand.name}: {size} rows, not the product of {tuple(sizes['*'])}"
            continue
        known, _, last = dim.rpartition("*")
        factor = product(known, sizes) if known else 1
        if factor != 1 and not equal(size % factor, 0):
            return f"{operand.name}: {size} is no multiple of {factor}"
        if last.isdigit():
            if not equal(size // factor, int(last)):
                return f"{operand.name}: {size} where {product(dim, sizes)} is needed"
            continue
        if not equal(sizes.setdefault(last, size // factor), size // factor):
            return f"{operand.name}: {last} is {size // factor}, but {sizes[last]} elsewhere"
    return None


def equal(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)
