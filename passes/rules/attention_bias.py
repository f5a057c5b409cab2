"""What is added to the scores beside a mask: ALiBi, another mask, a bias that is scaled or filled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fusekit.passes.alibi import heads_apart
from fusekit.passes.fused_call import value_in
from fusekit.passes.masks import Mask, recover_additive, split_additive
from fusekit.passes.pattern import Match, New
from fusekit.passes.rules.attention_finish import (
    LOWEST,
    finish,
    finish_added,
    replace_mask,
    take_alibi,
    take_boolean,
)
from fusekit.passes.spelling import value_of

aten = torch.ops.aten


def finish_added_twice(match: Match) -> str | None:
    """(scores + bias) + mask: one of the two may be causal, a window or ALiBi; what is left is one mask."""
    bias, mask = match.arguments.pop("bias"), match.arguments["mask"]
    if any(isinstance(x, New) or not value_of(x).is_floating_point() for x in (bias, mask)):
        return "what is added to the scores is no floating point mask"
    for band, other in ((mask, bias), (bias, mask)):
        found = recover_additive(band, LOWEST)
        if found is not None:
            replace_mask(match, found._replace(rest=other))
            return finish(match)
    for alibi, other in ((bias, mask), (mask, bias)):
        if take_alibi(match, alibi):
            replace_mask(match, Mask(False, other))
            return finish(match)
    match.become("mask", _sum(bias, mask))
    return finish(match)


def _sum(bias: Any, mask: Any) -> New:
    """In float32, as the op adds them."""
    return New(aten.add.Tensor, (New(aten.to.dtype, (bias, torch.float32)), mask))


def finish_added_and_filled(match: Match) -> str | None:
    """(scores + bias) filled where a mask forbids, as MPT; what is no ALiBi and no band is one mask."""
    bias = match.arguments.pop("bias")
    if isinstance(bias, New) or not value_of(bias).is_floating_point():
        return "what is added to the scores is no floating point mask"
    if reason := take_boolean(match):
        return reason
    kept = match.arguments["mask"]
    if not take_alibi(match, bias):
        match.become("mask", bias if kept is None else _filled(bias, kept, match))
    return finish(match)


def _filled(bias: fx.Node, kept: Any, match: Match) -> New:
    if value_in(kept, match.root).dtype != torch.bool:  # what fills, to be added
        return _sum(bias, kept)
    precise = New(aten.to.dtype, (bias, torch.float32))
    return New(aten.masked_fill.Scalar, (precise, New(aten.logical_not.default, (kept,)), -math.inf))


def finish_scaled_bias(match: Match) -> str | None:
    """(products + bias) * scale + mask, as Falcon: a bias of each key beside causal is one row of a mask."""
    bias, mask = match.arguments.pop("bias"), match.arguments["mask"]
    if any(isinstance(x, New) or not value_of(x).is_floating_point() for x in (bias, mask)):
        return "what is added to the scores is no floating point mask"
    scaled = New(aten.mul.Scalar, (New(aten.to.dtype, (bias, torch.float32)), match.arguments["scale"]))
    found = split_additive(mask, LOWEST) or Mask(False, mask)
    replace_mask(match, found)
    match.become("mask", scaled if found.rest is None else _sum(scaled, found.rest))
    return finish(match)


def finish_bloom(match: Match) -> str | None:
    """alibi, (batch * heads, 1, keys), where the products are added to it; and an additive mask."""
    alibi, mask = match.arguments.pop("bias"), match.arguments["mask"]
    if isinstance(alibi, New) or isinstance(mask, New) or not value_of(mask).is_floating_point():
        return "what is added to the scores is no floating point mask"
    unfolded = heads_apart(alibi, value_of(match.arguments["q"]).shape)
    if unfolded is None or not take_alibi(match, *unfolded):
        return "what baddbmm adds to the scores is not ALiBi, slopes of heads times places of keys"
    return finish_added(match)
