"""Which linear layers run in FP8 under a recipe, and why the others stay in high precision.

Read off the graph, never off a class: an output layer is one that no other layer follows, a router what
leads to a choice of the largest. What is kept costs little and hurts most: logits and gates decide, and
FP8's 3 bits of mantissa move decisions (DeepSeek-V3, arXiv:2412.19437, section 3.3).
"""

from __future__ import annotations

import fnmatch
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.kernels.recipe import Recipe
from fusekit.passes import cost
from fusekit.passes.normalise import is_view
from fusekit.passes.pattern import Match, New
from fusekit.passes.region import Settings
from fusekit.passes.spelling import spell, value_of

_PRODUCTS = frozenset({"linear", "addmm", "matmul", "baddbmm", "sdpa", "convolution"})
_CHOICES = frozenset({"topk", "sort", "argsort", "argmax", "multinomial", "one_hot"})


def is_layer(match: Match) -> bool:
    """Whether the second operand is a layer's weight and not an activation, as in q @ k.T."""
    weight = match.arguments["weight"]
    node = weight.args[0] if isinstance(weight, New) else weight
    if any(spell(n).name in ("linear", "addmm") for n in match.nodes):
        return True
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    # In a checkpoint's body inputs have lost what they were; Dynamo's name still tells.
    return node.op == "get_attr" or bool(node.meta.get("parameter")) or "parameters" in node.name


def why_kept(match: Match, settings: Settings, *, in_checkpoint: bool = False) -> str | None:
    """Why this layer stays in high precision, as a sentence; None: it runs in FP8.

    in_checkpoint: the graph is a checkpoint's body, whose output is not the model's.
    """
    recipe = settings.recipe
    assert recipe is not None
    if reason := why_wanted(match, settings):
        return reason
    if _leads_to_choice(match.root):
        return "a router: which values are largest is read from its result"
    if not (recipe.head or in_checkpoint) and _is_output_layer(match.root):
        return "an output layer: no other layer reads its result (Recipe(head=True) casts it)"
    x, weight = value_of(match.arguments["x"]), match.arguments["weight"]
    N, K = _weight_shape(weight)
    return cost.why_fp8_does_not_pay(cost.size(x) // max(K, 1), N, K, x, recipe)


def why_wanted(match: Match, settings: Settings) -> str | None:
    """Why the user wants a site, a layer or an attention, in high precision; None: nobody said so."""
    name = module_name(match, settings)
    if any(n.meta.get("full_precision") for n in match.nodes):
        return "autocast(enabled=False) around it keeps it in float32"
    if pattern := next((p for p in settings.keep if _is_inside(name, p)), None):
        return f"the recipe keeps {pattern} in high precision"
    return None


def activation_pays_apart(match: Match, recipe: Recipe) -> bool:
    """Whether the product is so much faster by a library that its activation, one call, is left behind it."""
    work = [node for node in match.nodes if not is_view(node)]
    if work != [product_of(match), match.root]:
        return False
    (N, K), x = weight_shape(match), value_of(match.arguments["x"])
    return cost.fp8_activation_pays_apart(cost.size(x) // max(K, 1), N, K, x, recipe)


def product_of(match: Match) -> fx.Node:
    """The matrix product among the nodes of a layer."""
    return next(node for node in match.nodes if spell(node).name in _PRODUCTS)


def weight_shape(match: Match) -> tuple[int, int]:
    """Output and input features."""
    return _weight_shape(match.arguments["weight"])


def weight_name(match: Match) -> str:
    """The graph input that a layer's weight is made of: in a checkpoint's body too it is named for the
    Parameter."""
    node = match.arguments["weight"]
    node = node.args[0] if isinstance(node, New) else node
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.name


def module_name(match: Match, settings: Settings) -> str:
    """The layer's name in the model, as named_modules has it; "" where no module is around it."""
    products = (node for node in match.nodes if spell(node).name in _PRODUCTS)
    return next(filter(None, (around(node, settings) for node in products)), "")


def around(node: fx.Node, settings: Settings) -> str:
    """The name of the innermost module around a node."""
    for key, (path, _) in reversed((node.meta.get("nn_module_stack") or {}).items()):
        if key in settings.modules:
            return settings.modules[key]
        return str(path).removeprefix("L['self']").lstrip(".")
    return ""


def _is_inside(name: str, pattern: str) -> bool:
    """Whether the pattern names the module or one around it."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def _weight_shape(weight: Any) -> tuple[int, int]:
    if isinstance(weight, New):  # a transpose that the matcher will write
        K, N = value_of(weight.args[0]).shape
    else:
        N, K = value_of(weight).shape
    return cost.hint(N), cost.hint(K)


def _is_output_layer(node: fx.Node) -> bool:
    """No other layer follows, and what meets the result on its way is given or a number: targets, losses.
    What is returned beside it, as features, keys and values or another head's result, does not meet it."""
    after, pending = {node}, [node]
    while pending:
        for reader in pending.pop().users:
            if _is_layer_like(reader):
                return False
            if reader not in after:
                after.add(reader)
                pending.append(reader)
    readers = (reader for reader in after - {node} if reader.op != "output")
    others = {n for reader in readers for n in reader.all_input_nodes} - after
    return len(after) > 1 and all(_is_number(n) or _is_given(n) for n in others)


def _is_number(node: fx.Node) -> bool:
    """Another head's loss, an auxiliary loss: what adds to a loss, and is no residual stream."""
    value = value_of(node)
    return isinstance(value, Tensor) and value.dim() == 0


def _is_given(node: fx.Node) -> bool:
    """Whether no layer is behind a value."""
    seen, pending = {node}, [node]
    while pending:
        current = pending.pop()
        if _is_layer_like(current):
            return False
        pending += [n for n in current.all_input_nodes if n not in seen]
        seen.update(current.all_input_nodes)
    return True


def _is_layer_like(node: fx.Node) -> bool:
    """A product, a norm, a fused site, or a call that may hold one."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    unknown = not isinstance(node.target, torch._ops.OpOverload)
    name = "" if unknown else spell(node).name
    return unknown or "fusion" in node.meta or name in _PRODUCTS or "norm" in name


def _leads_to_choice(node: fx.Node) -> bool:
    """Whether topk and its kin read the result, with no other layer in between."""
    pending, seen = [node], {node}
    while pending:
        for reader in pending.pop().users:
            name = spell(reader).name
            if name in _CHOICES:
                return True
            if reader in seen or reader.op == "output" or _is_layer_like(reader):
                continue
            seen.add(reader)
            pending.append(reader)
    return False
