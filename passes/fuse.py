"""Put fused ops in the place of the chains that RULES describe, largest first, or say why not.

A match becomes a fusion when the op supports its arguments and gives back the dtype and shape of what it
replaces (fused_call.py); rewrite.py edits the graph.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import fx

from fusekit.kernels import FP8_OPS, OPS
from fusekit.passes import _compat, fp8_attention
from fusekit.passes.canonicalise import bodies, location
from fusekit.passes.checkpoint_masks import lift_masks, sink_masks
from fusekit.passes.cost import hint
from fusekit.passes.fp8_sites import (
    activation_pays_apart,
    around,
    is_layer,
    module_name,
    product_of,
    weight_name,
    weight_shape,
    why_kept,
)
from fusekit.passes.fused_call import (
    as_tuple,
    differs,
    in_order,
    insertion_point,
    operands,
    run_fake,
    tensors,
    value_in,
)
from fusekit.passes.match_report import bytes_saved, is_worth_telling, location_of, sentence
from fusekit.passes.normalise import memory, writes
from fusekit.passes.pattern import SEED, Match, Miss, Rule
from fusekit.passes.region import Fusion, Region
from fusekit.passes.replaced import NotSelfContained, replaced_graph
from fusekit.passes.rewrite import Rewriter
from fusekit.passes.rules import RULES, fp8
from fusekit.passes.rules.gate import joins_gate
from fusekit.passes.search import find
from fusekit.passes.spelling import spell, value_of
from fusekit.passes.strict import refuse_leftovers

ALL_OPS = OPS | FP8_OPS
STAYS = "stays in high precision: "


def fuse(region: Region) -> None:
    """Rewrite the region's graph and the bodies of its checkpoints."""
    sites: dict[str, int] = defaultdict(int)
    sink_masks(region)
    for module in bodies(region.module):
        _Fuser(region, module, sites).run()
    lift_masks(region)
    if region.settings.strict:
        refuse_leftovers(region)


class _Fuser:
    """One graph being rewritten."""

    def __init__(self, region: Region, module: fx.GraphModule, sites: dict[str, int]) -> None:
        self.region, self.module, self.graph, self.sites = region, module, module.graph, sites
        self.rewriter = Rewriter(module.graph, ALL_OPS)
        self.misses: dict[tuple[str, fx.Node], Miss] = {}
        self.writes = writes(self.graph)
        self.training = region.training or _switches_gradients(region)

    def run(self) -> None:
        by_name: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.graph.nodes:
            by_name[spell(node).name].append(node)
        for rule in self.rules():
            for name in rule.traced.root_names:
                for root in by_name.get(name, ()):
                    if root not in self.rewriter.gone:
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
        if found is None or not is_worth_telling(found):
            return
        best = self.misses.get((rule.op, root))
        if best is None or (found.complete, found.progress) > (best.complete, best.progress):
            self.misses[rule.op, root] = found

    def try_fp8(self, match: Match) -> None:
        """A layer to FP8; that it stays is told once, by the row without an activation."""
        settings = self.region.settings
        assert settings.recipe is not None
        if match.rule is not fp8.BARE and self.activates_apart(match):
            return  # left to the row without an activation
        # Delayed scales come with the pass `quantise`, where the layer's weight has slots.
        match.arguments["recipe"] = settings.recipe.current().token()
        in_checkpoint = self.module is not self.region.module
        reason = why_kept(match, settings, in_checkpoint=in_checkpoint)
        if reason is None:
            reason = self.apply(match) if settings.levels is None else self.apply_level(match)
        if reason is not None and match.rule is fp8.BARE:
            layer = product_of(match).meta.get("layer", "")
            told = layer if settings.levels and reason == settings.levels.reason(layer) else ""
            self.region.refuse("linear_fp8", location_of(match), STAYS + reason, layer=told)

    def activates_apart(self, match: Match) -> bool:
        """Whether a layer leaves its activation: to gated_act, or to a pass of its own."""
        settings = self.region.settings
        assert settings.recipe is not None
        gates = self.takes("gated_act") and joins_gate(match.root)
        return gates or (settings.levels is None and activation_pays_apart(match, settings.recipe))

    def apply_level(self, match: Match) -> str | None:
        """A layer at the level its plan gives it; in bf16 a watched one keeps a site of its own."""
        levels, nodes = self.region.settings.levels, {*match.nodes, *match.outputs}
        assert levels is not None
        layer = self.name_layer(match)
        if self.rewriter.gone & nodes:
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
            self.rewriter.gone.update(nodes)
        return levels.reason(layer)

    def name_layer(self, match: Match) -> str:
        """The module's name, or the line; numbered where it multiplies by several weights."""
        name = module_name(match, self.region.settings) or location_of(match)
        weights = self.region.layer_weights.setdefault(name, [])
        own = weight_name(match)
        if own not in weights:
            weights.append(own)
        number = weights.index(own) + 1
        return name if number == 1 else f"{name}#{number}"

    def attention(self, match: Match) -> Match:
        """The match with FP8 products, where the recipe asks for them and the site allows it."""
        recipe = self.region.settings.recipe
        if recipe is None or recipe.attention is None or "attention_fp8" in self.region.config.disable:
            return match
        found = fp8_attention.in_fp8(match, recipe.attention)
        reason = fp8_attention.why_kept(match, found, self.region.settings, self.region.training)
        if reason is None:
            return found
        self.region.refuse("attention_fp8", location_of(match), f"stays in 16 bits: {reason}")
        return match

    def takes(self, op: str) -> bool:
        wanted = self.region.settings.fuse
        return (wanted is None or op in wanted) and op not in self.region.config.disable

    def unsupported(self, match: Match) -> str | None:
        """Why linear_fp8 could not take this layer at any level."""
        op = ALL_OPS["linear_fp8"]
        values = (value_in(a, match.root) for a in in_order(op, match.arguments).values())
        return op.supports(*values)

    def apply(self, match: Match) -> str | None:
        """Rewrite one match; or leave the graph as it was and say why."""
        if self.rewriter.gone & {*match.nodes, *match.outputs}:
            return "part of it is fused already"
        match.training = self.training
        if match.rule.finish is not None and (reason := match.rule.finish(match)):
            return reason
        if match.rule.op == "attention":
            match = self.attention(match)
        if match.rule.op == "attention" and self.region.training and not self.region.settings.deterministic:
            match.arguments["deterministic"] = False
        op = ALL_OPS[match.rule.op]
        before = insertion_point(match)
        late = [node for node in operands(match.arguments) if not node < before]
        if not all(self.may_come_earlier(node, match) for node in late):
            return "an argument is computed only after a result is read"
        if reason := self.overwritten(match, before):
            return reason
        if match.arguments.get("seed") is SEED:
            match.arguments["seed_offset"] = self.rewriter.seeded
        arguments = in_order(op, match.arguments)
        values = {name: value_in(argument, match.root) for name, argument in arguments.items()}
        if reason := op.supports(*values.values()):
            return reason
        results = run_fake(op.fused, values.values(), match.root)
        if reason := differs(match, results):
            return reason
        try:
            eager, inputs = replaced_graph(match, tensors(values), len(as_tuple(results)), self.writes)
        except NotSelfContained as outside:
            return f"the replaced nodes cannot be recomputed alone: {outside}"
        fusion = self.describe(match, values, eager, inputs)
        if self.allowed(fusion):
            for node in late:
                before.prepend(node)
            self.rewriter.insert(fusion, match, arguments, results, before)
            self.rewriter.erase(match)
            self.region.fusions.append(fusion)
        else:
            # What it would have replaced stays whole, and other sites keep their names.
            self.rewriter.gone.update(match.nodes)
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
        for node in set(operands(match.arguments)) - read:
            written = self.writes.get(memory(value_of(node)), ())
            if _read_as_a_view(node, match, read):
                continue  # by the match itself, as its other arguments: what was written before, it sees
            if any(min(node.users) < write < before for write in written):
                return f"{node.name} is written to in place between its reader and this site"
        return None

    def describe(
        self, match: Match, values: dict[str, Any], eager: fx.GraphModule, inputs: tuple[str | None, ...]
    ) -> Fusion:
        op, shown = match.rule.op, tensors(values).values()
        number = self.sites[op]
        self.sites[op] += 1
        return Fusion(
            site=f"{op}_{number}",
            op=op,
            rule=match.rule.source,
            location=location_of(match),
            shapes=tuple(tuple(s if isinstance(s, int) else str(s) for s in t.shape) for t in shown),
            dtype=str(next(iter(shown)).dtype).removeprefix("torch."),
            bytes_saved=bytes_saved(match),
            flops=hint(ALL_OPS[op].flops(*values.values())),
            eager=eager,
            inputs=inputs,
            layer=self.layer_of(match),
            module=around(match.root, self.region.settings),
        )

    def layer_of(self, match: Match) -> str:
        """Of a site that is one layer: its name, where levels are chosen by name."""
        named = [node.meta["layer"] for node in match.nodes if "layer" in node.meta]
        return named[0] if len(named) == 1 and match.rule.op in ("linear_fp8", "linear_act") else ""

    def allowed(self, fusion: Fusion) -> bool:
        fuel = self.region.config.fuel
        enough = fuel is None or len(self.region.fusions) < fuel
        return enough and fusion.site not in self.region.disabled_sites

    def record_misses(self) -> None:
        taken = {root for _, root in self.misses if root in self.rewriter.gone}
        for (op, root), miss in self.misses.items():
            if root not in taken and miss.node not in self.rewriter.gone:
                self.region.refuse(op, location(root), sentence(miss), miss.rule.source)


def _switches_gradients(region: Region) -> bool:
    """Whether gradients are switched on or off anywhere in the region."""
    switch = _compat.set_grad_enabled
    modules = bodies(region.module)
    return any(module.graph.find_nodes(op="call_function", target=switch) for module in modules)


def _read_as_a_view(node: fx.Node, match: Match, read: set[fx.Node]) -> bool:
    """Whether all that the match has of an argument are views of it, as k transposed, and no earlier copy."""
    names = {name for name, value in match.arguments.items() if value is node}
    seen = [n for n, (name, _) in match.stands_for.items() if name in names and n is not node]
    return bool(seen) and all(n in read and memory(value_of(n)) == memory(value_of(node)) for n in seen)
