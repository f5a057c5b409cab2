"""Which attentions have FP8 products under a recipe that asks, and why the others stay in 16 bits."""

from __future__ import annotations

from dataclasses import replace

from fusekit.kernels import FP8_OPS, OPS
from fusekit.kernels.attention_decode import MOST_QUERIES
from fusekit.passes import cost
from fusekit.passes.fp8_sites import why_wanted
from fusekit.passes.fused_call import in_order, value_in
from fusekit.passes.pattern import Match
from fusekit.passes.region import Settings

# What the op does not have, as a report names it; any other argument of attention's by its own name.
ABSENT = {
    "softcap": "capped scores", "sinks": "sinks", "slopes": "ALiBi", "dropout": "dropout", "mask": "a mask",
    "global_queries": "global tokens", "global_keys": "global tokens",
}  # fmt: skip
ELSEWHERE = {"tf32", "seed", "seed_offset"}  # about products that are no longer made, and of dropout alone


def _names() -> set[str]:
    return {argument.name for argument in FP8_OPS["attention_fp8"].fused._schema.arguments}


def _absent(match: Match) -> str | None:
    """What the match says that the op cannot: nothing that attention knows is ever left out in silence."""
    kept = _names() | ELSEWHERE
    for argument in OPS["attention"].fused._schema.arguments:
        given = match.arguments.get(argument.name)
        if argument.name not in kept and given is not None and given != argument.default_value:
            return ABSENT.get(argument.name, argument.name)
    return None


def in_fp8(match: Match, scaling: str) -> Match:
    """A finished match of `attention` as one of `attention_fp8`."""
    names = _names()
    arguments = {name: value for name, value in match.arguments.items() if name in names}
    rule = replace(match.rule, op="attention_fp8")
    return replace(match, rule=rule, arguments=arguments | {"scaling": scaling})


def why_kept(match: Match, found: Match, settings: Settings, training: bool) -> str | None:
    """Why a match of `attention` stays as it is, as a sentence; None: it becomes `found`, of in_fp8."""
    if reason := why_wanted(match, settings):
        return reason
    if words := _absent(match):
        return f"FP8 attention has no form with {words}"
    op = FP8_OPS["attention_fp8"]
    values = {name: value_in(a, match.root) for name, a in in_order(op, found.arguments).items()}
    if reason := op.supports(*values.values()):
        return reason
    q, k, v = (values[name] for name in "qkv")
    queries, keys = (cost.hint(x.shape[-2]) for x in (q, k))
    if queries <= MOST_QUERIES and queries < keys:
        return f"{queries} queries of {keys} keys: decoding reads each key once, and so would a cast"
    flops = cost.hint(op.flops(*values.values()))
    packed = values["documents"] is not None
    return cost.why_fp8_attention_does_not_pay(q, k, v, flops, values["scaling"], training, packed)
