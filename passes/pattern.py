"""The matcher: a rule's pattern is a plain function, traced once, looked for in pre-dispatch ATen graphs.

A pattern is written over its op's own arguments. It is traced on small bfloat16 tensors whose sizes are
distinct primes, so every shape in the trace factors back into the rule's letters; numbers the op takes (eps,
scale) enter as magic values and are captured from the graph. A match needs, beyond the structure:

    commutative operands    in either order
    casts                   `x.to(float32)` matches nothing where x is float32 already, but the dtype of every
                            intermediate must be what the pattern computes on tensors of x's dtype
    x * scale               also x / (1 / scale), or nothing (scale 1); dropout also nothing (p 0)
    w.t(), ~mask, k.mT      on a bare argument: also anything else, of which it is the transpose or complement
    a tensor read twice     also two equal casts of one tensor, as autocast makes one for each reader
    shapes                  every intermediate has the shape the pattern gives it
    no escape               only the pattern's outputs are read from outside
    one region              no grad-mode, autocast or in-place boundary inside
    several outputs         one that the first does not depend on is looked for around the arguments that both
                            read, within the module that made the first

`search.find` looks for one.
"""

from __future__ import annotations

import inspect
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
LAYOUT = frozenset(
    {
        "to",
        "reshape",
        "expand",
        "transpose",
        "transpose_last",
        "unsqueeze",
        "not",
        "halves",
        "half",
        "getitem",
    }
)
ANCHORS = frozenset({"linear", "addmm", "matmul", "layer_norm", "rms_norm", "rsqrt", "softmax", "sdpa"})
INVERTIBLE = {"transpose_last": torch.ops.aten.transpose.int, "not": torch.ops.aten.logical_not.default}
INVERSE_ARGS: dict[str, tuple[int, ...]] = {"transpose_last": (-2, -1), "not": ()}
NEUTRAL = {"mul": 1.0, "dropout": 0.0}
_WORDS = {"bool": torch.bool, "int": torch.int64, "float32": torch.float32, "complex": torch.complex64}
LOW = torch.bfloat16  # stands for "the dtype of the op's first argument" in a trace


SEED = object()
"""An argument that `Rule.finish` sets: the graph's one seed tensor, drawn in front of its first use."""


class New(NamedTuple):
    """A node to be made in front of the fused one: `target(*args)`; args may be such nodes."""

    target: Any
    args: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Rule:
    """A row: where `pattern` is found, `op` computes the same.

    op: name in the registry.
    pattern: a function over arguments of the op, and numbers that `finish` reads; returns what the op does.
    source: where the spelling is from, for reports and FUSEKIT_DISABLE.
    shapes: per tensor argument its dimensions, "* K" (* is any number of them, "rows" their product),
        products as "Hkv*G". Words in front: "optional" may be None, "any" has a shape of its own (a mask);
        "bool", "int", "float32" and "complex" are dtypes.
    fixed: arguments of the op that this spelling implies.
    finish: finish(match) completes or changes match.arguments; returns None, or why the site is refused.
    also: other functions of the arguments of a call, which may stand where the pattern makes the call of
        that name.
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
    training: whether gradients may be asked for.
    """

    rule: Rule
    outputs: tuple[fx.Node, ...]
    nodes: list[fx.Node]
    arguments: dict[str, Any]
    stands_for: dict[fx.Node, tuple[str, New | None]]
    training: bool = True

    @property
    def root(self) -> fx.Node:
        return self.outputs[0]

    def become(self, name: str, argument: Any) -> None:
        """Give the op another argument of this name: what stood for the last, also as its complement or
        transpose, stands for none any more."""
        if argument is self.arguments.get(name):
            return
        self.arguments[name] = argument
        self.stands_for = {node: made for node, made in self.stands_for.items() if made[0] != name}
        if isinstance(argument, fx.Node):
            self.stands_for[argument] = (name, None)


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


_TRACED: dict[Any, fx.GraphModule] = {}  # rules share the functions in `also`


class Pattern:
    """A traced pattern: its nodes, its letters and their sizes, the magic numbers that stand for captures.

    heavy: its nodes beyond layout, without other spellings of a call; weight: how many. size: those of its
        longest spelling, linears counting one; of outputs that do not depend on each other, those of one.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.operands = [parse(name, text) for name, text in rule.shapes.items()]
        self.sizes = prime_sizes(self.operands)
        names = list(inspect.signature(rule.pattern).parameters)
        self.magic = {0.1234567 + 0.01 * i: n for i, n in enumerate(n for n in names if n not in rule.shapes)}
        graph = self._trace(names)
        self.spelled = _spell_calls(graph)
        self.heavy = frozenset(node for node, s in self.spelled.items() if s.name not in LAYOUT)
        self.weight = len(self.heavy)
        result: Any = graph.output_node().args[0]
        self.outputs: tuple[fx.Node, ...] = tuple(result) if isinstance(result, (list, tuple)) else (result,)
        self.also = {
            node: [_graft(node, function) for function in rule.also[spelling.name]]
            for node, spelling in self.spelled.items()
            if spelling.name in rule.also
        }
        self.spelled = _spell_calls(graph)
        longest = self.weight + sum(
            max(_count(node, other) for other in others) - 1
            for node, others in self.also.items()
            if self.spelled[node].name not in ANCHORS
        )
        beneath = _beneath(self.outputs[0])
        self.size = longest // (1 + sum(output not in beneath for output in self.outputs))

    def _trace(self, names: list[str]) -> fx.Graph:
        numbers = {name: value for value, name in self.magic.items()}
        used = [o for o in self.operands if o.name in names]

        def call(*tensors: Tensor) -> Any:
            given = numbers | dict(zip((o.name for o in used), tensors, strict=True))  # type: ignore[arg-type]
            return self.rule.pattern(*(given[n] for n in names))

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
        return torch.empty(sizes, dtype=next((_WORDS[w] for w in operand.words if w in _WORDS), LOW))

    @cached_property
    def root_names(self) -> frozenset[str]:
        return self.names_of(self.outputs[0])

    def names_of(self, output: fx.Node) -> frozenset[str]:
        """How an output may be spelled; a cast, reshape, scale or dropout at the end may be absent."""
        names, pending = set(), [output]
        while pending:
            node = pending.pop()
            name, args = self.spelled[node]
            names.add(name)
            pending += self.also.get(node, ())
            if name in ("to", "reshape", *NEUTRAL):
                pending += [a for a in args if a in self.spelled]
        return frozenset(names)


def _beneath(node: fx.Node) -> set[fx.Node]:
    """The node, and all that it depends on."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _spell_calls(graph: fx.Graph) -> dict[fx.Node, Spelling]:
    return {n: spell(n) for n in graph.nodes if n.op == "call_function"}


def _count(node: fx.Node, other: fx.Node) -> int:
    """How many nodes beyond layout stand for the call where it is written as `other`."""
    seen: set[fx.Node] = set()
    pending = [other]
    while pending:
        found = pending.pop()
        if found not in seen and found not in node.all_input_nodes:
            seen.add(found)
            pending += found.all_input_nodes
    return sum(spell(n).name not in LAYOUT for n in seen)


def _graft(node: fx.Node, function: Callable[..., Any]) -> fx.Node:
    """Put function(arguments of the call) in front of the call; returns its result, which nobody reads."""
    given = [a for a in node.args[: len(inspect.signature(function).parameters)] if isinstance(a, fx.Node)]
    values = [value.meta["val"] for value in given]
    key = (function, *(tuple(value.shape) for value in values))
    if key not in _TRACED:
        with FakeTensorMode(), torch.enable_grad():
            examples = [torch.empty(value.shape, dtype=value.dtype) for value in values]
            traced = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*examples)
        normalise_graph(traced)
        _TRACED[key] = traced
    graph = _TRACED[key].graph
    with node.graph.inserting_before(node):
        result = node.graph.graph_copy(
            graph, dict(zip(graph.find_nodes(op="placeholder"), given, strict=True))
        )
    assert isinstance(result, fx.Node)
    return result
