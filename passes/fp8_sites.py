"""Which linear layers run in FP8 under a recipe, and why the others stay in high precision.

Read off the graph, never off a class: a head is what leads to the output or the loss and nowhere else, a
router what leads to a choice of the largest. What is kept costs little and hurts most: logits and gates decide,
and FP8's 3 bits of mantissa move decisions (DeepSeek-V3, arXiv:2412.19437, section 3.3).
"""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import fx

from fusekit.passes import cost
from fusekit.passes.dtype_policy import Policy, policy_of
from fusekit.passes.pattern import Match, New
from fusekit.passes.region import Settings
from fusekit.passes.spelling import spell, value_of

_PRODUCTS = frozenset({"linear", "addmm", "matmul", "baddbmm", "sdpa", "convolution"})
_CHOICES = frozenset({"topk", "sort", "argsort", "argmax", "multinomial", "one_hot"})
_LOSSES = ("loss", "softmax", "kl_div", "logsumexp")
_ENDS_QUIETLY = (Policy.FLOW, Policy.MOVE, Policy.CAST)


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


def why_kept(match: Match, settings: Settings) -> str | None:
    """Why this layer stays in high precision, as a sentence; None: it runs in FP8."""
    recipe = settings.recipe
    assert recipe is not None
    name = module_name(match, settings)
    if any(n.meta.get("full_precision") for n in match.nodes):
        return "autocast(enabled=False) around it keeps it in float32"
    if pattern := next((p for p in settings.keep if _is_inside(name, p)), None):
        return f"the recipe keeps {pattern} in high precision"
    if not recipe.head and _ends_in_output_or_loss(match.root):
        return "an output layer: only the model's output or loss reads it (Recipe(head=True) casts it)"
    if _leads_to_choice(match.root):
        return "a router: which values are largest is read from its result"
    x, weight = value_of(match.arguments["x"]), match.arguments["weight"]
    N, K = _weight_shape(weight)
    return cost.why_fp8_does_not_pay(cost.size(x) // max(K, 1), N, K, x)


def module_name(match: Match, settings: Settings) -> str:
    """The layer's name in the model, as named_modules has it; "" where no module is around it."""
    for node in match.nodes:
        if spell(node).name not in _PRODUCTS:
            continue
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


def _ends_in_output_or_loss(node: fx.Node) -> bool:
    """Every reader leads to the graph's output or a loss, and takes no second tensor on the way."""
    return bool(node.users) and all(_ends(user, node) for user in node.users)


def _ends(reader: fx.Node, source: fx.Node) -> bool:
    name = spell(reader).name
    if reader.op == "output" or any(word in name for word in _LOSSES):
        return True
    if policy_of(reader, torch.bfloat16) not in _ENDS_QUIETLY or name in _PRODUCTS:
        return False
    return set(reader.all_input_nodes) == {source} and _ends_in_output_or_loss(reader)


def _leads_to_choice(node: fx.Node) -> bool:
    """Whether topk and its kin read the result, with no other layer in between."""
    pending, seen = [node], {node}
    while pending:
        for reader in pending.pop().users:
            name = spell(reader).name
            if name in _CHOICES:
                return True
            if reader in seen or reader.op == "output" or name in _PRODUCTS or _is_fused(reader):
                continue
            seen.add(reader)
            pending.append(reader)
    return False


def _is_fused(node: fx.Node) -> bool:
    return "fusion" in node.meta
