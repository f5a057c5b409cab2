"""What no pass may change, checked between passes (FUSEKIT_VERIFY=1, and in the tests).

Every node knows its value; the outputs keep shape, dtype, strides and aliasing; no write to an input appears
or disappears; surviving random ops keep their order; checkpointed bodies obey the same; every graph lints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.passes.canonicalise import bodies
from fusekit.passes.region import Region


class InvariantError(RuntimeError):
    """A pass broke what every pass must keep: a bug of fusekit's, never the user's."""


class Snapshot:
    """The facts about a region that the next pass must leave alone."""

    def __init__(self, region: Region) -> None:
        self._outputs = _outputs(region.module)
        self._aliases = _aliases(region.module)
        self._mutations = _mutations(region.module)
        self._random = _random_ops(region.module)

    def check(self, region: Region, *, after: str) -> None:
        """Compare with what `region` is now.

        Raises:
            InvariantError: naming the pass `after` and the first difference.
        """

        def read(outputs: list[str]) -> list[str]:
            return [text for i, text in enumerate(outputs) if i not in region.unread]

        def expect(what: str, before: Any, now: Any) -> None:
            if before != now:
                raise InvariantError(
                    f"pass {after!r} changed {what} of graph {region.index}: {before} became {now}"
                )

        for body in bodies(region.module):
            body.graph.lint()
            for node in body.graph.nodes:
                if _lacks_value(body, node):
                    raise InvariantError(
                        f"pass {after!r} left node {node.name} of graph {region.index} without a value"
                    )
        expect("the outputs", read(self._outputs), read(_outputs(region.module)))
        expect("which outputs share memory", read(self._aliases), read(_aliases(region.module)))
        expect("the mutations", self._mutations, _mutations(region.module))
        survivors = _random_ops(region.module)
        order = [op for op in self._random if op in survivors]
        expect("the order of random ops", order, [op for op in survivors if op in order])


def _lacks_value(body: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "output" or "val" in node.meta:
        return False
    is_submodule = node.op == "get_attr" and isinstance(
        getattr(body, str(node.target), None), torch.nn.Module
    )
    return not is_submodule


def _output_values(module: fx.GraphModule) -> list[Any]:
    (output,) = module.graph.find_nodes(op="output")
    flat = torch.utils._pytree.tree_leaves(output.args[0])
    return [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in flat]


def _outputs(module: fx.GraphModule) -> list[str]:
    """Each output as text: comparing symbolic sizes themselves would put guards on the user's shapes."""
    return [
        f"{value.dtype} {tuple(map(str, value.shape))} strides {tuple(map(str, value.stride()))}"
        if isinstance(value, Tensor)
        else str(value)
        for value in _output_values(module)
    ]


def _aliases(module: fx.GraphModule) -> list[str]:
    """For each output, the first input or output that shares its memory; by name, as passes add inputs."""
    inputs = [(node.name, node.meta.get("val")) for node in module.graph.find_nodes(op="placeholder")]
    outputs = [(f"output {position}", value) for position, value in enumerate(_output_values(module))]
    owners: dict[int, str] = {}
    shared = []
    for name, value in inputs + outputs:
        storage = value.untyped_storage()._cdata if isinstance(value, Tensor) else None
        shared.append(name if storage is None else owners.setdefault(storage, name))
    return shared[len(inputs) :]


def _calls(module: fx.GraphModule) -> Iterator[fx.Node]:
    for body in bodies(module):
        yield from (node for node in body.graph.nodes if node.op == "call_function")


def _mutations(module: fx.GraphModule) -> dict[str, int]:
    """How often each graph input is written to, by its name."""
    counts: dict[str, int] = {}
    for node in _calls(module):
        for argument in _written(node):
            base = _base(argument)
            if base.op == "placeholder" and not base.meta.get("added"):  # amax of ours is written to
                counts[base.name] = counts.get(base.name, 0) + 1
    return counts


def _written(node: fx.Node) -> list[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    written = []
    for position, argument in enumerate(schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            written.append(value)
    return written


def _base(node: fx.Node) -> fx.Node:
    """The input that a node is a view of, by the fakes' storage; the node itself where there is none."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return node
    for placeholder in node.graph.find_nodes(op="placeholder"):
        candidate = placeholder.meta.get("val")
        if (
            isinstance(candidate, Tensor)
            and candidate.untyped_storage()._cdata == value.untyped_storage()._cdata
        ):
            return placeholder
    return node


def _random_ops(module: fx.GraphModule) -> list[str]:
    return [
        node.name
        for node in _calls(module)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
