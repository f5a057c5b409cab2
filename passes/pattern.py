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

`search.find` looks for one.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fusekit.passes.letters import Operand, parse, prime_sizes, product
from fusekit.passes.normalise import normalise_graph
from fusekit.passes.spelling import Spelling, spell

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
        front: "optional" may be None, "any" has a shape of its own (a mask); "bool", "float32" and "complex"
        are dtypes.
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


_TRACED: dict[Any, fx.Graph] = {}  # rules share the functions in `also`


class Pattern:
    """A traced pattern: its nodes, its letters and their sizes, the magic numbers that stand for captures."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.operands = [parse(name, text) for name, text in rule.shapes.items()]
        self.sizes = prime_sizes(self.operands)
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

    def _example(self, operand: Operand) -> Tensor:
        sizes: list[int] = []
        for dim in operand.dims:
            sizes += [self.sizes["*0"], self.sizes["*1"]] if dim == "*" else [product(dim, self.sizes)]
        kinds = {"bool": torch.bool, "float32": torch.float32, "complex": torch.complex64}
        return torch.empty(sizes, dtype=next((kinds[w] for w in operand.words & {*kinds}), LOW))

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
