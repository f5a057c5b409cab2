"""What a Triton kernel does with each of its pointers, read from its source: loads, stores, or both.

The syntax tree of the kernel, and of the functions it calls, is walked with, for every variable, the set of
parameters it may point into. A branch is taken where the launch's constants say so; where they say nothing,
both are.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fusekit.kernels.launch import Launch

Sources = frozenset[str]  # parameters that a value may be an address in
NONE: Sources = frozenset()
UNKNOWN = object()  # a value that only the running kernel has
POINTER = object()  # a tensor: not None, and nothing else is known


class Roles(NamedTuple):
    """Names of the parameters that a kernel loads through, and stores through."""

    read: Sources
    written: Sources


def named_arguments(start: Launch) -> dict[str, Any]:
    """A launch's arguments by the kernel's parameters."""
    runtime = iter(start.args)
    names = [parameter.name for parameter in start.kernel.params]
    return {name: start.meta[name] if name in start.meta else next(runtime) for name in names}


def roles(start: Launch) -> Roles:
    """What this launch does with its tensors."""
    known = {name: POINTER if isinstance(value, Tensor) else value
             for name, value in named_arguments(start).items()}  # fmt: skip
    return _roles(start.kernel, tuple(known.items()))


@functools.cache
def _roles(kernel: Any, known: tuple[tuple[str, Any], ...]) -> Roles:
    walk = _Walk(kernel.fn.__globals__)
    names = [name for name, _ in known]
    walk.call(kernel.fn, [frozenset({name}) for name in names], {}, dict(known))
    return Roles(frozenset(walk.read), frozenset(walk.written))


@functools.cache
def _definition(fn: Any) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    return definition


@dataclass
class _Walk:
    """One function's body; loads and stores are collected by the kernel's parameters.

    names: globals of the function's module. constants: variables whose value is known.
    """

    names: dict[str, Any]
    read: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    variables: dict[str, Sources] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    returned: Sources = NONE

    def call(
        self, fn: Any, positional: list[Sources], named: dict[str, Sources], constants: dict[str, Any]
    ) -> Sources:
        definition = _definition(fn)
        inner = _Walk(fn.__globals__, self.read, self.written)
        parameters = [a.arg for a in definition.args.args]
        inner.variables = dict(zip(parameters, positional, strict=False)) | named
        inner.constants = constants
        for _ in range(2):  # the second time with what a loop's end hands to its start
            inner.body(definition.body)
        return inner.returned

    def body(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.If):
            found = self.value(node.test)
            if found is UNKNOWN or found:
                self.body(node.body)
            if found is UNKNOWN or not found:
                self.body(node.orelse)
        elif isinstance(node, ast.For | ast.While):
            self.sources(node.iter if isinstance(node, ast.For) else node.test)
            self.body(node.body)
        elif isinstance(node, ast.Assign):
            found = self.sources(node.value)
            for target in node.targets:
                self.assign(target, node.value, found)
        elif isinstance(node, ast.AugAssign):
            self.assign(node.target, None, self.sources(node.target) | self.sources(node.value))
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, node.value, self.sources(node.value))
        elif isinstance(node, ast.Return) and node.value is not None:
            self.returned |= self.sources(node.value)
        elif isinstance(node, ast.Expr):
            self.sources(node.value)

    def assign(self, target: ast.expr, value: ast.expr | None, found: Sources) -> None:
        if isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) else [None] * len(target.elts)
            for part, own in zip(target.elts, values, strict=True):
                self.assign(part, own, found if own is None else self.sources(own))
        elif isinstance(target, ast.Name):
            self.variables[target.id] = self.variables.get(target.id, NONE) | found
            self.constants[target.id] = UNKNOWN if value is None else self.value(value)

    def value(self, node: ast.expr) -> Any:
        """Of an expression over constants, without calls."""
        called = any(isinstance(n, ast.Call | ast.Attribute) for n in ast.walk(node))
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        known = {name: self.constants[name] for name in names if name in self.constants}
        if called or len(known) < len(names) or UNKNOWN in known.values():
            return UNKNOWN
        try:
            return eval(compile(ast.Expression(node), "", "eval"), {}, known)
        except Exception:  # an operation that constants do not have
            return UNKNOWN

    def sources(self, node: ast.AST) -> Sources:
        if isinstance(node, ast.Name):
            return self.variables.get(node.id, NONE)
        if isinstance(node, ast.Compare):
            return NONE
        if isinstance(node, ast.Attribute):
            return NONE if node.attr == "dtype" else self.sources(node.value)
        if isinstance(node, ast.IfExp) and (found := self.value(node.test)) is not UNKNOWN:
            return self.sources(node.body if found else node.orelse)
        if isinstance(node, ast.Call):
            return self.result(node)
        return _union(self.sources(child) for child in ast.iter_child_nodes(node))

    def result(self, node: ast.Call) -> Sources:
        positional = [self.sources(argument) for argument in node.args]
        named = {k.arg: self.sources(k.value) for k in node.keywords if k.arg}
        everything = _union([*positional, *named.values()])
        function = node.func
        if isinstance(function, ast.Name):
            fn = getattr(self.names.get(function.id), "fn", None)
            return everything if fn is None else self.call(fn, positional, named, self.passed(fn, node))
        if not isinstance(function, ast.Attribute):
            return NONE
        owner = self.sources(function.value)
        address = owner or (positional[0] if positional else NONE)  # descriptor.load(), tl.load(address)
        changes = function.attr.startswith("atomic_")
        if function.attr in ("load", "gather") or changes:
            self.read |= address
        if function.attr in ("store", "scatter") or changes:
            self.written |= address
        if function.attr in ("load", "store") or changes:
            return NONE  # values, not addresses
        module = self.names.get(function.value.id) if isinstance(function.value, ast.Name) else None
        fn = getattr(getattr(module, function.attr, None), "fn", None)
        if fn is not None and not fn.__module__.startswith("triton"):
            return self.call(fn, positional, named, self.passed(fn, node))
        return owner | everything

    def passed(self, fn: Any, node: ast.Call) -> dict[str, Any]:
        """The called function's parameters whose values are known."""
        parameters = [a.arg for a in _definition(fn).args.args]
        found = dict(zip(parameters, map(self.value, node.args), strict=False))
        return found | {k.arg: self.value(k.value) for k in node.keywords if k.arg}


def _union(found: Iterable[Sources]) -> Sources:
    return frozenset().union(*found)
