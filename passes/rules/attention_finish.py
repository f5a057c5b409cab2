"""What a match of attention leaves open: its mask taken apart, grouped heads, the seed of its dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fusekit.kernels.launch import on_gpu
from fusekit.passes.affine import Index, Predicate
from fusekit.passes.alibi import alibi_of
from fusekit.passes.bands import band_of, is_band
from fusekit.passes.masks import (
    Mask,
    from_band,
    predicate,
    recover,
    recover_forbidden,
    split_additive,
)
from fusekit.passes.pattern import SEED, Match, New
from fusekit.passes.spelling import spell, value_of

LOWEST = -3e4  # what a model fills in for "forbidden": finfo(float16).min is -65504, many write -1e9
SWALLOWS = -1e30  # added to it, no score below 1e22 is left: finfo.min of float32 and bfloat16

aten = torch.ops.aten


def finish_call(match: Match) -> str | None:
    """F.scaled_dot_product_attention: the mask is boolean or is added."""
    mask = match.arguments.get("mask")
    if mask is not None:
        take = take_boolean if value_of(mask).dtype == torch.bool else _take_added
        if reason := take(match):
            return reason
    return finish(match)


def finish_filled(match: Match) -> str | None:
    """Scores overwritten where the mask forbids: -inf, or so low a number that exp gives zero."""
    return take_boolean(match) or finish(match)


def finish_added(match: Match) -> str | None:
    return _take_added(match) or finish(match)


def finish(match: Match) -> str | None:
    _unfold_repeated_heads(match)
    if take_alibi(match, match.arguments.get("mask")):
        match.become("mask", None)
    dropout = match.arguments.get("dropout", 0.0)
    if dropout:
        if not 0.0 < dropout < 1.0:
            return f"dropout {dropout} keeps nothing"
        if not on_gpu(value_of(match.root)):
            return "dropout is active, and on a CPU eager draws its mask faster than Philox would be computed"
        match.arguments["seed"] = SEED
    return None


def take_boolean(match: Match) -> str | None:
    fill = match.arguments.get("fill", -math.inf)
    mask, node = match.arguments["mask"], match.arguments["mask"]
    if isinstance(mask, New):  # the complement of what the model has
        node = mask.args[0]
        found = recover_forbidden(node) or Mask(False, mask)
    elif value_of(mask).dtype != torch.bool:  # `mask == 0` is forbidden, so `mask != 0` is allowed
        found = _whole(predicate(mask)) or Mask(False, New(aten.ne.Scalar, (mask, 0)))
    else:
        found = recover(mask)
    if fill != -math.inf and not found.leaves_a_key(value_of(node).shape):
        if not match.training and fill <= SWALLOWS:
            _add_filling(match, fill)
            return None
        return f"masked with {fill:g}, not -inf: where a whole row is forbidden, eager shares it out evenly"
    if fill > LOWEST:
        return f"masked with {fill:g}, which a score can come near to"
    replace_mask(match, found)
    return None


def _add_filling(match: Match, fill: float) -> None:
    """What fills, added: a sum with so low a number is that number, so a row without keys is shared out as in
    eager. Only its gradient would be another, that of the scores below."""
    mask = match.arguments["mask"]
    node = mask.args[0] if isinstance(mask, New) else mask
    forbidden = New(aten.eq.Scalar, (node, 0))
    if isinstance(mask, New):
        forbidden = New(aten.ne.Scalar, (node, 0))
    filling = New(aten.mul.Scalar, (New(aten.to.dtype, (forbidden, torch.float32)), fill))
    match.become("mask", filling)


def _whole(allowed: Predicate | None) -> Mask | None:
    """A mask that is a band and nothing else."""
    return from_band(band_of([allowed])) if is_band(allowed) else None


def set_band(match: Match, found: Mask) -> None:
    if found.causal or found.window is not None:
        match.arguments.update(causal=found.causal, window=found.window, offset=found.offset)
    if found.documents is not None:
        match.arguments.update(documents=found.documents.queries, key_documents=found.documents.keys)
    if found.globals is not None:
        queries, keys, ahead = found.globals
        match.arguments.update(global_queries=queries, global_keys=keys, global_ahead=ahead)


def _take_added(match: Match) -> str | None:
    mask = match.arguments["mask"]
    if isinstance(mask, New) or not value_of(mask).is_floating_point():
        return "what is added to the scores is no floating point mask"
    found = split_additive(mask, LOWEST)
    if found is not None:
        replace_mask(match, found)
    return None


def take_alibi(match: Match, bias: Any, index: Index | None = None) -> bool:
    """Give the op slopes where what is added to its scores is ALiBi, and say whether it is."""
    given = match.arguments
    if (
        given.get("sinks") is not None or given.get("slopes") is not None
    ):  # beside a sink a row's constant counts
        return False
    furthest = given.get("offset", 0) if given.get("causal") and not given.get("global_ahead") else None
    precision = value_of(given["q"]).dtype
    found = alibi_of(bias, furthest if isinstance(furthest, int) else None, precision, index)
    if found is None:
        return False
    given.update(slopes=found.slopes, places=found.places)
    return True


def replace_mask(match: Match, found: Mask) -> None:
    set_band(match, found)
    match.become("mask", found.rest)


def _unfold_repeated_heads(match: Match) -> None:
    """Take k and v as they were before their heads were repeated, where both were, equally often."""
    k, v = match.arguments["k"], match.arguments["v"]
    keys, values = _before_repeat(k), _before_repeat(v)
    if keys is None or values is None or keys[1] != values[1]:
        return
    match.become("k", keys[0])
    match.become("v", values[0])


def _before_repeat(node: Any) -> tuple[fx.Node, int] | None:
    """(x, n) where `node` is x with every head n times in a row."""
    if not isinstance(node, fx.Node):
        return None
    name, args = spell(node)
    if name == "repeat_interleave" and len(args) > 2 and isinstance(args[1], int) and args[2] == -3:
        return args[0], args[1]
    chain = [node]
    for wanted in ("reshape", "expand", "unsqueeze"):
        if spell(chain[-1]).name != wanted:
            return None
        chain.append(spell(chain[-1]).args[0])
    shape, wide, _, source = (value_of(n).shape for n in chain)
    if len(wide) != 5 or len(shape) != 4 or len(source) != 4 or spell(chain[2]).args[1] != -3:
        return None
    times = wide[2]
    batch, heads, *rest = source
    fits = [(batch, wide[0]), (heads, wide[1]), (heads * times, shape[1]), *zip(rest, wide[3:], strict=True)]
    if not isinstance(times, int) or not all(statically_known_true(a == b) for a, b in fits):
        return None
    return chain[-1], times


def finishing_capped(finish: Callable[[Match], str | None]) -> Callable[[Match], str | None]:
    """What is divided by in front of tanh is what it is multiplied by behind, or scores would be scaled."""

    def finish_capped(match: Match) -> str | None:
        before, softcap = match.arguments.pop("before"), match.arguments["softcap"]
        if before <= 0.0 or softcap <= 0.0:
            return f"scores capped at {softcap:g} are no capped scores"
        match.arguments["scale"] = match.arguments["scale"] * before * softcap
        return finish(match)

    return finish_capped
