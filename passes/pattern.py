"""The matcher: a rule's pattern is a plain function, traced once, looked for in pre-dispatch ATen graphs.

A pattern is written over its op's own arguments. It is traced on small bfloat16 tensors whose sizes are
distinct primes, so every shape in the trace factors back into the rule's letters; numbers the op takes (eps,
scale) enter as magic values and are captured from the graph. A match needs, beyond the structure:

    commutative operands    in either order
    casts                   `x.to(float32)` matches nothing where x is float32 already, but the dtype of every
                            intermediate must be what the pattern computes on tensors of x's dtype
    x * scale               also x / (1 / scale), or nothing (scale 1); dropout also nothing (p 0)
    w.t(), ~mask, k.mT      on a bare argument: also anything else, of which it is the transpose or complement
    shapes                  every intermediate has the shape the pattern gives it
    no escape               only the pattern's outputs are read from outside
    one region              no grad-mode, autocast or in-place boundary inside

`find` returns the match, or the nearest miss: at which node it ended and why.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusekit.passes.normalise import normalise_graph
from fusekit.passes.spelling import Spelling, spell, value_of

PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29)
COMMUTATIVE = frozenset({"add", "mul", "and"})
LAYOUT = frozenset({"to", "reshape", "expand", "transpose", "transpose_last", "unsqueeze", "not"})
ANCHORS = frozenset({"linear", "addmm", "matmul", "layer_norm", "rms_norm", "rsqrt", "softmax", "sdpa"})
INVERTIBLE = {"transpose_last": torch.ops.aten.transpose.int, "not": torch.ops.aten.logical_not.default}
INVERSE_ARGS: dict[str, tuple[int, ...]] = {"transpose_last": (-2, -1), "not": ()}
NEUTRAL = {"mul": 1.0, "dropout": 0.0}
LOW = torch.bfloat16  # stands for "the dtype of the op's first argument" in a trace


SEED = object()
"""An argument that `Rule.finish` sets: the graph's one seed tensor, drawn in front of its first use."""


class New(NamedTuple):
    """A node to be made in front of the fused one: `target(*args)`."""

    target: Any
    args: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Rule:
    """A row: where `pattern` is found, `op` computes the same.

    op: name in the registry.
    pattern: a function over arguments of the op, and numbers that `finish` reads; returns what the op does.
    source: where the spelling is from, for reports and FUSEKIT_DISABLE.
    shapes: per tensor argument its dimensions, "* K" (* is any number of them), products as "Hkv*G". Words in
        front: "optional" may be None, "any" has a shape of its own (a mask), "bool" is of that dtype.
    fixed: arguments of the op that this spelling implies.
    finish: finish(match) completes or changes match.arguments; returns None, or why the site is refused.
    also: other functions of the op's arguments that may stand where the pattern makes the call of that name.
    """

    op: str
    pattern: Callable[..., Any]
    source: str
    shapes: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Match], str | None] | None = None
    also: Mapping[str, tuple[Callable[..., Any], ...]] = field(default_factory=dict)

    @cached_property
    def traced(self) -> Pattern:
        return Pattern(self)


@dataclass(eq=False)
class Match:
    """One place where a rule's pattern was found.

    nodes: what is replaced, in graph order; `outputs` are among them.
    arguments: the op's, as nodes, New nodes and numbers, and what else the pattern captured.
    stands_for: the graph's node for each tensor argument, and the call that makes it of that argument.
    """

    rule: Rule
    outputs: tuple[fx.Node, ...]
    nodes: list[fx.Node]
    arguments: dict[str, Any]
    stands_for: dict[fx.Node, tuple[str, New | None]]

    @property
    def root(self) -> fx.Node:
        return self.outputs[0]


@dataclass(frozen=True)
class Miss:
    """The furthest that a match got: `progress` nodes, then `reason` at `node`.

    complete: all of the structure was there, a check failed.
    anchored: a matmul, norm or softmax is among the nodes.
    """

    rule: Rule
    root: fx.Node
    node: fx.Node
    reason: str
    progress: int
    complete: bool = False
    anchored: bool = False


class _Operand(NamedTuple):
    name: str
    words: frozenset[str]
    dims: tuple[str, ...]


class _State(NamedTuple):
    nodes: dict[fx.Node, fx.Node]
    skipped: dict[fx.Node, fx.Node]
    operands: dict[str, Any]
    captures: dict[str, float]

    def having(self, **changes: dict[Any, Any]) -> _State:
        return self._replace(**{name: {**getattr(self, name), **new} for name, new in changes.items()})


_TRACED: dict[Any, fx.Graph] = {}  # rules share the functions in `also`


class Pattern:
    """A traced pattern: its nodes, its letters and their sizes, the magic numbers that stand for captures."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.operands = [_parse(name, text) for name, text in rule.shapes.items()]
        self.sizes = _sizes(self.operands)
        functions = [rule.pattern, *itertools.chain.from_iterable(rule.also.values())]
        names = dict.fromkeys(
            itertools.chain.from_iterable(inspect.signature(f).parameters for f in functions)
        )
        self.magic = {0.1234567 + 0.01 * i: n for i, n in enumerate(n for n in names if n not in rule.shapes)}
        self.spelled: dict[fx.Node, Spelling] = {}
        self.outputs = self._add(rule.pattern)
        self.own = frozenset(self.spelled)
        self.weight = sum(s.name not in LAYOUT for s in self.spelled.values())
        self.also = {name: [self._add(f)[0] for f in functions] for name, functions in rule.also.items()}

    def _add(self, function: Callable[..., Any]) -> tuple[fx.Node, ...]:
        """Spell the nodes of a function of the op's arguments; returns its output nodes."""
        key = (function, tuple(self.rule.shapes.items()), tuple(self.magic.items()))
        graph = _TRACED.get(key)
        if graph is None:
            graph = _TRACED[key] = self._trace(function)
        self.spelled |= {n: spell(n) for n in graph.nodes if n.op == "call_function"}
        result: Any = graph.output_node().args[0]
        return tuple(result) if isinstance(result, (list, tuple)) else (result,)

    def _trace(self, function: Callable[..., Any]) -> fx.Graph:
        names = list(inspect.signature(function).parameters)
        numbers = {name: value for value, name in self.magic.items()}
        used = [o for o in self.operands if o.name in names]

        def call(*tensors: Tensor) -> Any:
            given = numbers | dict(zip((o.name for o in used), tensors, strict=True))  # type: ignore[arg-type]
            return function(*(given[n] for n in names))

        with FakeTensorMode(), torch.enable_grad():
            traced = make_fx(call, pre_dispatch=True, tracing_mode="fake")(*map(self._example, used))
        normalise_graph(traced)
        for node, operand in zip(traced.graph.find_nodes(op="placeholder"), used, strict=True):
            node.target = operand.name
        return traced.graph

    def _example(self, operand: _Operand) -> Tensor:
        sizes: list[int] = []
        for dim in operand.dims:
            sizes += [self.sizes["*0"], self.sizes["*1"]] if dim == "*" else [_product(dim, self.sizes)]
        return torch.empty(sizes, dtype=torch.bool if "bool" in operand.words else LOW)

    @cached_property
    def root_names(self) -> frozenset[str]:
        """How the root may be spelled; a cast, reshape, scale or dropout at the end may be absent."""
        names, pending = set(), [self.outputs[0]]
        while pending:
            node = pending.pop()
            name, args = self.spelled[node]
            names.add(name)
            pending += self.also.get(name, ()) if node in self.own else ()
            if name in ("to", "reshape", *NEUTRAL):
                pending += [a for a in args if a in self.spelled]
        return frozenset(names)

    def find(self, root: fx.Node) -> Match | Miss | None:
        """The match that ends at `root`, else the nearest miss, else None: even the root is another op."""
        search = _Search(self, root)
        for state in search.node(self.outputs[0], root, _State({}, {}, {}, {})):
            reason = search.check(state)
            if reason is None:
                return search.match(state)
            search.miss = Miss(self.rule, root, root, reason, self.weight, complete=True)
        return search.miss


class _Search:
    """One attempt at one root."""

    def __init__(self, pattern: Pattern, root: fx.Node) -> None:
        self.pattern, self.root = pattern, root
        self.miss: Miss | None = None

    def fail(self, state: _State, at: Any, reason: str) -> None:
        progress = sum(self.pattern.spelled[p].name not in LAYOUT for p in state.nodes)
        if progress and not (self.miss and (self.miss.complete or self.miss.progress >= progress)):
            node = at if isinstance(at, fx.Node) else self.root
            anchored = any(self.pattern.spelled[p].name in ANCHORS for p in state.nodes)
            self.miss = Miss(self.pattern.rule, self.root, node, reason, progress, anchored=anchored)

    def node(self, p: fx.Node, value: Any, state: _State) -> Iterator[_State]:
        """Every way in which graph value `value` can be pattern node `p`."""
        known = state.nodes.get(p, state.skipped.get(p))
        if known is not None:
            if known is value:
                yield state
            else:
                self.fail(
                    state, value, f"two different tensors where one {self.pattern.spelled[p].name} is needed"
                )
            return
        if p.op == "placeholder":
            yield from self.operand(str(p.target), value, state)
            return
        wanted = self.pattern.spelled[p]
        if not isinstance(value, fx.Node):
            return  # a number where a computed tensor belongs: scaling is another function, not a near-match
        there = spell(value)
        if there.name == wanted.name:
            extended = state.having(**{"skipped" if self.is_shared(wanted) else "nodes": {p: value}})
            for ours, theirs in self.orders(wanted, there):
                yield from self.arguments(ours, theirs, value, extended)
        elif wanted.name not in ("to", "reshape", *NEUTRAL, *self.pattern.also):
            self.fail(state, value, f"{there.name} where {wanted.name} is needed")
        yield from self.absent(p, wanted, there, value, state)

    def is_shared(self, wanted: Spelling) -> bool:
        """A transposed or complemented argument may serve many sites: it is read through, not replaced."""
        inner = wanted.args[0]
        return wanted.name in INVERTIBLE and isinstance(inner, fx.Node) and inner.op == "placeholder"

    def orders(self, wanted: Spelling, there: Spelling) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        if len(wanted.args) == len(there.args):
            yield wanted.args, there.args
            if wanted.name in COMMUTATIVE:
                yield wanted.args, there.args[::-1]

    def absent(
        self, p: fx.Node, wanted: Spelling, there: Spelling, value: Any, state: _State
    ) -> Iterator[_State]:
        """The spellings that leave `p` out, or write it as its inverse."""
        if not isinstance(value, fx.Node):
            return
        # Not inside another function itself: one that makes the same call would stand for itself.
        for other in self.pattern.also.get(wanted.name, ()) if p in self.pattern.own else ():
            for found in self.node(other, value, state):
                yield found.having(nodes={p: value})
        if wanted.name in ("to", "reshape"):
            yield from self.node(wanted.args[0], value, state.having(skipped={p: value}))
        elif wanted.name in NEUTRAL and self.captured(wanted.args[1]):
            name = self.pattern.magic[wanted.args[1]]
            if wanted.name == "mul" and there.name == "div" and _is_number(there.args[1]) and there.args[1]:
                state = state.having(nodes={p: value}, captures={name: 1 / there.args[1]})
                yield from self.node(wanted.args[0], there.args[0], state)
            elif there.name != wanted.name and name not in state.captures:
                state = state.having(skipped={p: value}, captures={name: NEUTRAL[wanted.name]})
                yield from self.node(wanted.args[0], value, state)
        elif self.is_shared(wanted) and there.name != wanted.name and isinstance(value_of(value), Tensor):
            inverse = New(INVERTIBLE[wanted.name], (value, *INVERSE_ARGS[wanted.name]))
            yield from self.operand(str(wanted.args[0].target), inverse, state)

    def captured(self, literal: Any) -> bool:
        return isinstance(literal, float) and literal in self.pattern.magic

    def arguments(self, ours: Any, theirs: Any, at: fx.Node, state: _State) -> Iterator[_State]:
        if not ours:
            yield state
            return
        for extended in self.argument(ours[0], theirs[0], at, state):
            yield from self.arguments(ours[1:], theirs[1:], at, extended)

    def argument(self, ours: Any, theirs: Any, at: fx.Node, state: _State) -> Iterator[_State]:
        if isinstance(ours, fx.Node):
            yield from self.node(ours, theirs, state)
        elif isinstance(ours, (list, tuple)):
            if isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
                yield from self.arguments(tuple(ours), tuple(theirs), at, state)
            else:
                self.fail(state, at, f"{theirs} where {list(ours)} is needed")
        elif self.captured(ours):
            name = self.pattern.magic[ours]
            if theirs is not None and not _is_number(theirs):
                self.fail(state, at, f"{name} is computed, not a number known at capture")
            elif name in state.captures and state.captures[name] != theirs:
                self.fail(state, at, f"{name} has two values")
            else:
                yield state.having(captures={name: theirs})
        elif _same_literal(ours, theirs):
            yield state
        else:
            self.fail(state, at, f"{spell(at).name} has {theirs} where {ours} is needed")

    def operand(self, name: str, value: Any, state: _State) -> Iterator[_State]:
        if name in state.operands:
            if state.operands[name] == value:
                yield state
            else:
                self.fail(state, value, f"{name} would have to be two different tensors")
            return
        operand = next(o for o in self.pattern.operands if o.name == name)
        source = value.args[0] if isinstance(value, New) else value
        if isinstance(value_of(source), Tensor) or (value is None and "optional" in operand.words):
            yield state.having(operands={name: value})
        else:
            self.fail(state, value, f"{name} is not a tensor")

    def check(self, state: _State) -> str | None:
        """Why a structural match is no match: shapes, dtypes, regions, escapes."""
        sizes: dict[str, Any] = {}
        for operand in self.pattern.operands:
            if reason := _unify(operand, state.operands.get(operand.name), sizes):
                return reason
        return self.check_intermediates(state, sizes) or self.check_surroundings(state)

    def check_intermediates(self, state: _State, sizes: dict[str, Any]) -> str | None:
        first = state.operands[next(iter(self.pattern.rule.shapes))]
        low = value_of(first.args[0] if isinstance(first, New) else first).dtype
        for p, node in (*state.nodes.items(), *state.skipped.items()):
            ours, theirs = value_of(p), value_of(node)
            wanted = self.pattern.spelled[p]
            if self.is_shared(wanted):
                continue  # its argument is checked, or may have a shape of its own
            name = wanted.name
            expected = low if ours.dtype == LOW else ours.dtype
            fits = theirs.dtype == expected or (name == "softmax" and theirs.dtype in (low, torch.float32))
            # A cast left out does no harm itself: what reads it is checked, and promotes as the cast would.
            if not fits and p not in state.skipped:
                return f"{name} is computed in {_named(theirs.dtype)}, not {_named(expected)}"
            if not self.shape_fits(ours.shape, theirs.shape, sizes):
                return f"{name} has shape {tuple(theirs.shape)}, which the pattern does not give it"
        return None

    def shape_fits(self, ours: torch.Size, theirs: torch.Size, sizes: dict[str, Any]) -> bool:
        expected = _translate(ours, self.pattern.sizes, sizes)
        return len(expected) == len(theirs) and all(map(_equal, expected, theirs))

    def check_surroundings(self, state: _State) -> str | None:
        nodes = set(state.nodes.values())
        if len({n.meta.get("region") for n in nodes}) > 1:
            return "a grad-mode, autocast or in-place boundary lies inside"
        for name, value in state.operands.items():
            if (value.args[0] if isinstance(value, New) else value) in nodes:
                return f"{name} is computed inside the chain itself"
        outputs = {state.nodes.get(p, state.skipped.get(p)) for p in self.pattern.outputs}
        for node in nodes - outputs:
            for user in node.users:
                if user not in nodes:
                    return f"the result of {spell(node).name} is also read by {user.name}"
        return None

    def match(self, state: _State) -> Match:
        outputs = tuple(state.nodes.get(p) or state.skipped[p] for p in self.pattern.outputs)
        arguments = {**state.operands, **state.captures, **self.pattern.rule.fixed}
        stands_for: dict[fx.Node, tuple[str, New | None]] = {}
        for p, node in state.skipped.items():
            wanted = self.pattern.spelled[p]
            if self.is_shared(wanted):
                made = New(INVERTIBLE[wanted.name], (node, *INVERSE_ARGS[wanted.name]))
                stands_for[node] = (str(wanted.args[0].target), made)
        for name, value in state.operands.items():
            if isinstance(value, New):
                stands_for[value.args[0]] = (name, value)
            elif value is not None:
                stands_for[value] = (name, None)
        return Match(self.pattern.rule, outputs, sorted(set(state.nodes.values())), arguments, stands_for)


def _parse(name: str, text: str) -> _Operand:
    words = text.split()
    flags = frozenset(w for w in words if w in ("optional", "any", "bool"))
    return _Operand(name, flags, tuple(w for w in words if w not in flags))


def _sizes(operands: list[_Operand]) -> dict[str, int]:
    letters: list[str] = []
    for operand in operands:
        for dim in operand.dims:
            letters += ["*0", "*1"] if dim == "*" else dim.split("*")
    return dict(zip(dict.fromkeys(letters), PRIMES, strict=False))


def _product(dim: str, sizes: Mapping[str, Any]) -> Any:
    return math.prod(sizes[letter] for letter in dim.split("*"))


def _translate(shape: torch.Size, ours: dict[str, int], theirs: dict[str, Any]) -> list[Any]:
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
        translated.append(size * rest)
    return translated


def _unify(operand: _Operand, value: Any, sizes: dict[str, Any]) -> str | None:
    """Bind the operand's letters to its sizes, or say what does not fit."""
    if value is None or "any" in operand.words:
        return None
    shape = list(value_of(value.args[0] if isinstance(value, New) else value).shape)
    if isinstance(value, New) and value.target is INVERTIBLE["transpose_last"]:
        shape[-2:] = shape[:-3:-1]
    dims, written = list(operand.dims), " ".join(operand.dims)
    trailing = len(dims) - (dims[0] == "*")
    if len(shape) < trailing or (dims[0] != "*" and len(shape) != trailing):
        return f"{operand.name} has {len(shape)} dimensions where ({written}) is needed"
    if dims[0] == "*":
        lead, shape, dims = shape[: len(shape) - trailing], shape[len(shape) - trailing :], dims[1:]
        known = sizes.setdefault("*", lead)
        if len(known) != len(lead) or not all(map(_equal, known, lead)):
            return f"{operand.name} is broadcast: its leading sizes are {tuple(lead)}, not {tuple(known)}"
    for dim, size in zip(dims, shape, strict=True):
        *known_letters, last = dim.split("*")
        factor = math.prod(sizes[letter] for letter in known_letters)
        if factor != 1 and not _equal(size % factor, 0):
            return f"{operand.name}: {size} is no multiple of {factor}"
        if not _equal(sizes.setdefault(last, size // factor), size // factor):
            return f"{operand.name}: {last} is {size // factor}, but {sizes[last]} elsewhere"
    return None


def _equal(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _same_literal(ours: Any, theirs: Any) -> bool:
    if _is_number(ours) and _is_number(theirs):
        return math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-12)
    return type(ours) is type(theirs) and ours == theirs
