"""Put fused ops in the place of the chains that RULES describe, largest first, or say why not.

A match becomes a fusion when the op supports its arguments and gives back the dtype and shape of what it
replaces.
The replaced nodes are erased one by one: dead code elimination keeps random nodes, and both would draw.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from fusekit.kernels import FP8_OPS, OPS
from fusekit.kernels.op import Op
from fusekit.passes.canonicalise import bodies, location
from fusekit.passes.fp8_sites import is_layer, module_name, product_of, weight_shape, why_kept
from fusekit.passes.normalise import is_mutation, is_view, memory, same_meta, same_shape, writes
from fusekit.passes.pattern import LAYOUT, SEED, Match, Miss, New, Rule
from fusekit.passes.region import Fusion, Region
from fusekit.passes.replaced import NotSelfContained, replaced_graph
from fusekit.passes.rules import RULES, fp8
from fusekit.passes.search import find
from fusekit.passes.spelling import spell, value_of

ALL_OPS = OPS | FP8_OPS
SEED_RANGE = 2**62


def fuse(region: Region) -> None:
    """Rewrite the region's graph and the bodies of its checkpoints."""
    sites: dict[str, int] = defaultdict(int)
    for module in bodies(region.module):
        _Fuser(region, module, sites).run()
    if region.settings.strict:
        _refuse_leftovers(region)


class _Fuser:
    """One graph being rewritten."""

    def __init__(self, region: Region, module: fx.GraphModule, sites: dict[str, int]) -> None:
        self.region, self.module, self.graph, self.sites = region, module, module.graph, sites
        self.gone: set[fx.Node] = set()
        self.misses: dict[tuple[str, fx.Node], Miss] = {}
        self.writes = writes(self.graph)
        self.seed: fx.Node | None = None
        self.seeded = 0

    def run(self) -> None:
        by_name: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.graph.nodes:
            by_name[spell(node).name].append(node)
        for rule in self.rules():
            for name in rule.traced.root_names:
                for root in by_name.get(name, ()):
                    if root not in self.gone:
                        self.try_rule(rule, root)
        self.record_misses()
        self.graph.lint()
        self.module.recompile()

    def rules(self) -> list[Rule]:
        wanted, disabled = self.region.settings.fuse, self.region.config.disable
        recipe = self.region.settings.recipe
        active = [
            rule
            for rule in (RULES if recipe is None else [*fp8.RULES, *RULES])
            if rule.op in ALL_OPS
            and (rule.op in FP8_OPS or wanted is None or rule.op in wanted)
            and not {rule.op, rule.source} & disabled
        ]
        # sorted() keeps equals in the order of RULES. FP8 comes first: what it takes no chain can join.
        return sorted(active, key=lambda rule: (rule.op not in FP8_OPS, -rule.traced.size))

    def try_rule(self, rule: Rule, root: fx.Node) -> None:
        found = find(rule.traced, root)
        if rule.op in FP8_OPS:
            if isinstance(found, Match) and is_layer(found):
                self.try_fp8(found)
            return
        if isinstance(found, Match):
            reason = self.apply(found)
            if reason is None:
                return
            found = Miss(rule, root, root, reason, rule.traced.weight, complete=True, anchored=True)
        if found is None or not _worth_telling(found):
            return
        best = self.misses.get((rule.op, root))
        if best is None or (found.complete, found.progress) > (best.complete, best.progress):
            self.misses[rule.op, root] = found

    def try_fp8(self, match: Match) -> None:
        """A layer to FP8; that it stays is told once, by the row without an activation."""
        settings = self.region.settings
        assert settings.recipe is not None
        # Delayed scales come with the pass `quantise`, where the layer's weight has slots.
        match.arguments["recipe"] = replace(settings.recipe, delayed=False).token()
        in_checkpoint = self.module is not self.region.module
        reason = why_kept(match, settings, in_checkpoint=in_checkpoint)
        if reason is None:
            reason = self.apply(match) if settings.levels is None else self.apply_level(match)
        if reason is not None and match.rule is fp8.BARE:
            self.region.refuse("linear_fp8", _location(match), f"stays in high precision: {reason}")

    def apply_level(self, match: Match) -> str | None:
        """A layer at the level its plan gives it; in bf16 a watched one keeps a site of its own."""
        levels, nodes = self.region.settings.levels, {*match.nodes, *match.outputs}
        assert levels is not None
        layer = module_name(match, self.region.settings) or _location(match)
        if self.gone & nodes:
            return None  # decided with its activation
        if reason := self.unsupported(match):
            return reason
        self.region.layers[layer] = weight_shape(match)
        product_of(match).meta["layer"] = layer
        token = levels.token(layer)
        if token is not None:
            match.arguments["recipe"] = token
            return self.apply(match)
        if levels.watched and match.rule is not fp8.BARE and not self.takes("linear_act"):
            return None  # left to the row without an activation
        if levels.watched and match.rule is not fp8.BARE:
            rule = replace(match.rule, op="linear_act")
            arguments = {name: value for name, value in match.arguments.items() if name != "recipe"}
            return self.apply(replace(match, rule=rule, arguments=arguments))
        if levels.watched:
            self.gone.update(nodes)
        return levels.reason(layer)

    def takes(self, op: str) -> bool:
        wanted = self.region.settings.fuse
        return (wanted is None or op in wanted) and op not in self.region.config.disable

    def unsupported(self, match: Match) -> str | None:
        """Why linear_fp8 could not take this layer at any level."""
        op = ALL_OPS["linear_fp8"]
        values = (_value(a, match.root) for a in _in_order(op, match.arguments).values())
        return op.supports(*values)

    def apply(self, match: Match) -> str | None:
        """Rewrite one match; or leave the graph as it was and say why."""
        if self.gone & {*match.nodes, *match.outputs}:
            return "part of it is fused already"
        op = ALL_OPS[match.rule.op]
        if match.rule.finish is not None and (reason := match.rule.finish(match)):
            return reason
        before = _insertion_point(match)
        late = [node for node in _operands(match.arguments) if not node < before]
        if not all(self.may_come_earlier(node, match) for node in late):
            return "an argument is computed only after a result is read"
        if reason := self.overwritten(match, before):
            return reason
        if match.arguments.get("seed") is SEED:
            match.arguments["seed_offset"] = self.seeded
        arguments = _in_order(op, match.arguments)
        values = {name: _value(argument, match.root) for name, argument in arguments.items()}
        if reason := op.supports(*values.values()):
            return reason
        results = _run_fake(op.fused, values.values(), match.root)
        if reason := _differs(match, results):
            return reason
        try:
            eager, inputs = replaced_graph(match, _tensors(values), len(_as_tuple(results)))
        except NotSelfContained as outside:
            return f"the replaced nodes cannot be recomputed alone: {outside}"
        fusion = self.describe(match, values, eager, inputs)
        if self.allowed(fusion):
            for node in late:
                before.prepend(node)
            self.insert(fusion, match, arguments, results, before)
            self.erase(match)
        else:
            self.gone.update(
                match.nodes
            )  # what it would have replaced stays whole, and other sites keep their names
        return None

    def may_come_earlier(self, node: fx.Node, match: Match) -> bool:
        """A weight's cast that stands in front of its own layer may stand in front of another's."""
        spelled = spell(node)
        source = spelled.args[0] if spelled.name == "to" else None
        if not isinstance(source, fx.Node) or source.op != "placeholder":
            return False
        unwritten = not self.writes.get(memory(value_of(source)))
        return unwritten and node.meta.get("region") == match.root.meta.get("region")

    def overwritten(self, match: Match, before: fx.Node) -> str | None:
        """Why an argument is no longer what was read: the match looks through a copy of it, as `~mask`."""
        read = {source for node in match.nodes for source in node.all_input_nodes}
        for node in set(_operands(match.arguments)) - read:
            written = self.writes.get(memory(value_of(node)), ())
            if any(min(node.users) < write < before for write in written):
                return f"{node.name} is written to in place between its reader and this site"
        return None

    def describe(
        self, match: Match, values: dict[str, Any], eager: fx.GraphModule, inputs: tuple[str | None, ...]
    ) -> Fusion:
        op, tensors = match.rule.op, _tensors(values).values()
        number = self.sites[op]
        self.sites[op] += 1
        return Fusion(
            site=f"{op}_{number}",
            op=op,
            rule=match.rule.source,
            location=_location(match),
            shapes=tuple(tuple(s if isinstance(s, int) else str(s) for s in t.shape) for t in tensors),
            dtype=str(next(iter(tensors)).dtype).removeprefix("torch."),
            bytes_saved=_bytes_saved(match),
            flops=_hint(ALL_OPS[op].flops(*values.values())),
            eager=eager,
            inputs=inputs,
            layer=self.layer_of(match),
        )

    def layer_of(self, match: Match) -> str:
        """Of a site that is one layer: its name, where levels are chosen by name."""
        named = [node.meta["layer"] for node in match.nodes if "layer" in node.meta]
        return named[0] if len(named) == 1 and match.rule.op in ("linear_fp8", "linear_act") else ""

    def allowed(self, fusion: Fusion) -> bool:
        fuel = self.region.config.fuel
        enough = fuel is None or len(self.region.fusions) < fuel
        return enough and fusion.site not in self.region.disabled_sites

    def insert(
        self, fusion: Fusion, match: Match, arguments: dict[str, Any], results: Any, before: fx.Node
    ) -> None:
        with self.graph.inserting_before(before):
            made = [self.materialise(argument, match, before) for argument in arguments.values()]
            fused = self.graph.call_function(ALL_OPS[fusion.op].fused, tuple(made))
            parts = [fused]
            if isinstance(results, tuple):
                parts = [
                    self.graph.call_function(operator.getitem, (fused, i)) for i in range(len(match.outputs))
                ]
        _describe_node(fused, match.root, results)
        fused.meta["fusion"] = fusion
        if fusion.layer:
            fused.meta["layer"] = fusion.layer
        fused.meta["fusion_inputs"] = [a for a in fused.args if isinstance(a, fx.Node)]
        for part, output, result in zip(parts, match.outputs, _as_tuple(results), strict=False):
            if part is not fused:
                _describe_node(part, output, result)
            if _layout_shows(output) and not same_shape(value_of(output).stride(), result.stride()):
                part = self.as_contiguous(part, output)
            output.replace_all_uses_with(part)
            if not part.users:  # the sum, where nobody reads it again
                self.graph.erase_node(part)
        self.region.fusions.append(fusion)

    def as_contiguous(self, part: fx.Node, output: fx.Node) -> fx.Node:
        """What the model hands out, in the layout it had."""
        with self.graph.inserting_after(part):
            copied = self.graph.call_function(torch.ops.aten.contiguous.default, (part,))
        _describe_node(copied, output, value_of(output))
        return copied

    def materialise(self, argument: Any, match: Match, before: fx.Node) -> Any:
        if argument is SEED:
            self.seeded += 1
            return self.seed_node(match, before)
        if not isinstance(argument, New):
            return argument
        args = tuple(self.materialise(arg, match, before) for arg in argument.args)
        node = self.graph.call_function(argument.target, args)
        _describe_node(node, match.root, _value(argument, match.root))
        return node

    def seed_node(self, match: Match, before: fx.Node) -> fx.Node:
        """One draw per graph, in front of its first use: random ops before it see the state they did."""
        if self.seed is None:
            device = value_of(match.root).device
            self.seed = self.graph.call_function(
                torch.ops.aten.randint.default, (SEED_RANGE, [1]), {"dtype": torch.int64, "device": device}
            )
            _describe_node(self.seed, match.root, _value(SEED, match.root))
        elif before < self.seed:
            before.prepend(self.seed)
        return self.seed

    def erase(self, match: Match) -> None:
        pending = sorted({*match.nodes, *match.stands_for}, reverse=True)
        replaced = set(match.nodes)
        while pending:
            node = pending.pop(0)
            if node in self.gone or node.users or (node not in replaced and not _is_disposable(node)):
                continue
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            self.gone.add(node)
            pending += sorted(inputs, reverse=True)
        assert replaced <= self.gone, f"{match.rule.source} left {replaced - self.gone} behind"

    def record_misses(self) -> None:
        taken = {root for _, root in self.misses if root in self.gone}
        for (op, root), miss in self.misses.items():
            if root not in taken and miss.node not in self.gone:
                self.region.refuse(op, location(root), _sentence(miss), miss.rule.source)


def _sentence(miss: Miss) -> str:
    """The reason, and the line where the difference is if that is another one than the site's.

    Equal layers give equal sentences, so that a report can count them.
    """
    where = location(miss.node)
    elsewhere = not miss.complete and where and where != location(miss.root)
    return f"{miss.reason} (at {where})" if elsewhere else miss.reason


def _worth_telling(miss: Miss) -> bool:
    """A near-match: all of the structure, or so much of it that the rest was to be expected."""
    return miss.complete or (miss.anchored and 2 * miss.progress > miss.rule.traced.weight)


def _insertion_point(match: Match) -> fx.Node:
    """In front of the first reader of any output, at the latest where the first output was."""
    inside = set(match.nodes)
    readers = [user for output in match.outputs for user in output.users if user not in inside]
    return min([match.root, *readers])


def _operands(arguments: dict[Any, Any]) -> list[fx.Node]:
    nodes: list[fx.Node] = []
    for value in arguments.values():
        if isinstance(value, New):
            nodes += _operands(dict(enumerate(value.args)))
        else:
            fx.node.map_arg(value, nodes.append)
    return nodes


def _in_order(op: Op, arguments: dict[str, Any]) -> dict[str, Any]:
    return {a.name: arguments.get(a.name, a.default_value) for a in op.fused._schema.arguments}


def _value(argument: Any, near: fx.Node) -> Any:
    """The fake value an argument will have once it is a node."""
    if isinstance(argument, New):
        return _run_fake(argument.target, argument.args, near)
    if argument is SEED:
        with value_of(near).fake_mode:
            return torch.empty(1, dtype=torch.int64, device=value_of(near).device)
    return value_of(argument)


def _run_fake(target: Any, arguments: Any, near: fx.Node) -> Any:
    given = [_run_fake(*a, near) if isinstance(a, New) else fx.node.map_arg(a, value_of) for a in arguments]
    with value_of(near).fake_mode, enable_python_dispatcher():
        return target(*given)


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def _tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _differs(match: Match, results: Any) -> str | None:
    for output, result in zip(match.outputs, _as_tuple(results), strict=False):
        old = value_of(output)
        if not same_meta(old, result):
            return f"it returns {_kind(old)}, the op {_kind(result)}"
        moved = not same_shape(old.stride(), result.stride())
        if moved and _layout_shows(output) and not old.is_contiguous():
            return f"strides {tuple(old.stride())} are seen outside, the op's are {tuple(result.stride())}"
    return None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"


def _layout_shows(node: fx.Node) -> bool:
    """Whether the strides reach a graph output or an op that reads or writes memory directly.

    A write counts: whether the reshape it goes through is a view or a copy hangs on the strides.
    """
    for user in node.users:
        if user.op == "output" or user.target in _READ_MEMORY or is_mutation(user):
            return True
        if is_view(user) and _layout_shows(user):
            return True
    return False


_READ_MEMORY = {
    torch.ops.aten.as_strided.default,
    torch.ops.aten.view.dtype,
    torch.ops.aten.view_as_complex.default,
}


def _is_disposable(node: fx.Node) -> bool:
    """Left without readers by a fusion, it may go: no effect, nothing random, not an input."""
    if (
        node.op != "call_function"
        or not isinstance(node.target, torch._ops.OpOverload)
        or "fusion" in node.meta
    ):
        return False
    return not is_mutation(node) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _describe_node(node: fx.Node, like: fx.Node, value: Any) -> None:
    for key in ("stack_trace", "nn_module_stack", "region"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["val"] = value


def _location(match: Match) -> str:
    heavy = [n for n in match.nodes if spell(n).name not in LAYOUT] or [match.root]
    return next(filter(None, map(location, [*heavy, match.root])), "")


def _bytes_saved(match: Match) -> int:
    """Written and read back once each: what the intermediates cost that no longer exist."""
    inner = [n for n in match.nodes if n not in match.outputs and not is_view(n)]
    inner = [n for n in inner if isinstance(value_of(n), Tensor)]  # max gives a pair, whose parts are counted
    return sum(2 * value_of(n).element_size() * _hint(value_of(n).numel()) for n in inner)


def _hint(number: Any) -> int:
    return int(number.node.hint or 0) if isinstance(number, torch.SymInt) else int(number)


_STRICT = {
    "scaled_dot_product_attention": "attention",
    "sdpa": "attention",
    "layer_norm": "add_layer_norm",
    "rms_norm": "add_rms_norm",
}


def _refuse_leftovers(region: Region) -> None:
    """strict: every attention and norm that is left is a refusal, also where no rule came near."""
    known = {(r.op, r.location) for r in region.refusals}
    for module in bodies(region.module):
        for node in module.graph.nodes:
            op = _STRICT.get(spell(node).name)
            if op is not None and (op, location(node)) not in known:
                region.refuse(op, location(node), "no rule fits")
