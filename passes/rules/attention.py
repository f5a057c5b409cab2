"""Attention, called by name or written out: rows of attention.

    softmax(q k^T * scale + mask) v,   dropout on the probabilities

A pattern finds the chain; attention_finish.py and attention_bias.py read what it leaves open: heads repeated
for grouped-query attention are unfolded, the mask is taken apart, active dropout gets the graph's seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.passes.pattern import Rule
from fusekit.passes.rules.attention_bias import (
    finish_added_and_filled,
    finish_added_twice,
    finish_bloom,
    finish_scaled_bias,
)
from fusekit.passes.rules.attention_finish import (
    finish,
    finish_added,
    finish_call,
    finish_filled,
    finishing_capped,
)

GROUPED = {"k": "B Hkv Tk D", "v": "B Hkv Tk Dv", "q": "B Hkv*G Tq D", "mask": "optional any bool Tq Tk"}
EQUAL = {"q": "B H Tq D", "k": "B H Tk D", "v": "B H Tk Dv", "mask": "any bool Tq Tk"}
ADDED = {**EQUAL, "mask": "any Tq Tk"}
TWICE = {**EQUAL, "bias": "any Tq Tk", "mask": "any Tq Tk"}
ONE_HEAD = {"k": "B 1 Tk D", "v": "B 1 Tk Dv"}  # broadcast to the queries' heads
BLOOM = {**ADDED, "bias": "any B*H 1 Tk"}
SINKS = {"k": "B H Tk D", "v": "B H Tk Dv", "q": "B H Tq D", "sinks": "H"}  # Tk third: letters.EIGHT
UNMASKED = {name: shape for name, shape in EQUAL.items() if name != "mask"}

aten = torch.ops.aten


def called(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, False, scale=scale, enable_gqa=True)


def called_causal(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, None, dropout, True, scale=scale, enable_gqa=True)


Scores = Callable[..., Tensor]


def scaled_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q @ k.transpose(-2, -1)) * scale


def scaled_query(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (q * scale) @ k.transpose(-2, -1)


def attend(scores: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Softmax in float32 or not, cast back or not: in low precision all this is the op's own rounding."""
    return probabilities(scores, v, dropout) @ v


def probabilities(scores: Tensor, v: Tensor, dropout: float) -> Tensor:
    return F.dropout(torch.softmax(scores.to(torch.float32), -1).to(v.dtype), dropout, True)


def written(scores: Scores) -> Callable[..., Tensor]:
    return lambda q, k, v, scale, dropout: attend(scores(q, k, scale), v, dropout)


def filled(scores: Scores) -> Callable[..., Tensor]:
    """masked_fill with the complement of what may be attended to, as nanoGPT's `mask == 0`."""
    return lambda q, k, v, mask, scale, dropout, fill: attend(
        scores(q, k, scale).masked_fill(mask.logical_not(), fill), v, dropout
    )


def chosen(scores: Scores) -> Callable[..., Tensor]:
    return lambda q, k, v, mask, scale, dropout, fill: attend(
        torch.where(mask, scores(q, k, scale), fill), v, dropout
    )


def added(scores: Scores) -> Callable[..., Tensor]:
    return lambda q, k, v, mask, scale, dropout: attend(scores(q, k, scale) + mask, v, dropout)


def capped_scores(q: Tensor, k: Tensor, scale: float, before: float, softcap: float) -> Tensor:
    """softcap * tanh(scores / softcap); what scores are multiplied by in front of tanh is `before`."""
    return torch.tanh(scaled_scores(q, k, scale) * before) * softcap


def attend_with_sinks(scores: Tensor, sinks: Tensor, v: Tensor, dropout: float) -> Tensor:
    """One logit more in each row's softmax, dropped behind it; in either dtype, cast back or not."""
    B, H, Tq, _ = scores.shape
    logits = torch.cat([scores, sinks.reshape(1, H, 1, 1).expand(B, H, Tq, 1)], -1)
    probabilities = torch.softmax(logits - logits.amax(-1, keepdim=True), -1)[..., :-1]
    return F.dropout(probabilities, dropout, True).to(torch.float32).to(v.dtype) @ v


def sunk(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float, dropout: float) -> Tensor:
    return attend_with_sinks(scaled_scores(q, k, scale), sinks, v, dropout)


def added_and_sunk(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scale: float, dropout: float
) -> Tensor:
    return attend_with_sinks(scaled_scores(q, k, scale) + mask, sinks, v, dropout)


def added_and_filled(scores: Scores) -> Callable[..., Tensor]:
    return lambda q, k, v, bias, mask, scale, dropout, fill: attend(
        (scores(q, k, scale) + bias).masked_fill(mask.logical_not(), fill), v, dropout
    )


def bloom(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, scale: float, dropout: float
) -> Tensor:
    """Heads and batch elements in one dimension."""
    B, H, Tq, D = q.shape
    Tk, DV = v.shape[2:]
    keys = k.reshape(B * H, Tk, D).transpose(-1, -2)
    scores = torch.baddbmm(bias, q.reshape(B * H, Tq, D), keys, beta=1.0, alpha=scale)
    p = probabilities(scores.view(B, H, Tq, Tk) + mask, v, dropout)
    return torch.bmm(p.view(B * H, Tq, Tk), v.reshape(B * H, Tk, DV)).view(B, H, Tq, DV)


def added_twice(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, scale: float, dropout: float
) -> Tensor:
    return attend((scaled_scores(q, k, scale) + bias) + mask, v, dropout)


def scaled_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, scale: float, dropout: float
) -> Tensor:
    """Scaled together with the bias, in float32."""
    return attend(((q @ k.transpose(-2, -1)).to(torch.float32) + bias) * scale + mask, v, dropout)


def written_capped(
    q: Tensor, k: Tensor, v: Tensor, scale: float, before: float, softcap: float, dropout: float
) -> Tensor:
    return attend(capped_scores(q, k, scale, before, softcap), v, dropout)


def filled_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor,
    scale: float, before: float, softcap: float, dropout: float, fill: float,
) -> Tensor:  # fmt: skip
    scores = capped_scores(q, k, scale, before, softcap)
    return attend(scores.masked_fill(mask.logical_not(), fill), v, dropout)


def added_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, before: float, softcap: float, dropout: float
) -> Tensor:
    return attend(capped_scores(q, k, scale, before, softcap) + mask, v, dropout)


def _rows(scores: Scores, source: str) -> list[Rule]:
    return [
        Rule("attention", filled(scores), f"{source}, masked_fill", EQUAL, finish=finish_filled),
        Rule("attention", chosen(scores), f"{source}, where", EQUAL, finish=finish_filled),
        Rule("attention", added(scores), f"{source}, added mask", ADDED, finish=finish_added),
        Rule("attention", written(scores), source, UNMASKED, finish=finish),
    ]


_FILLED_TWICE = {**EQUAL, "bias": "any Tq Tk"}
CALL = "F.scaled_dot_product_attention"
CAPPED = "written out, capped"
SUNK = "transformers GptOssAttention"
FALCON = "transformers FalconAttention, ALiBi"
RULES = [
    *_rows(scaled_scores, "written out"),
    *_rows(scaled_query, "written out, scaled query"),
    Rule("attention", added_twice, "written out, added bias and mask", TWICE, finish=finish_added_twice),
    *(
        Rule(
            "attention",
            added_and_filled(scores),
            f"written out{how}, added bias, masked_fill",
            _FILLED_TWICE,
            finish=finish_added_and_filled,
        )
        for scores, how in ((scaled_scores, ""), (scaled_query, ", scaled query"))
    ),
    *(
        Rule(
            "attention", scaled_bias, f"transformers FalconAttention{how}", shapes, finish=finish_scaled_bias
        )
        for shapes, how in ((TWICE, ", ALiBi"), ({**TWICE, **ONE_HEAD}, ", ALiBi, shared keys"))
    ),
    Rule(
        "attention",
        added(scaled_scores),
        "written out, shared keys, added mask",
        {**ADDED, **ONE_HEAD},
        finish=finish_added,
    ),
    Rule("attention", bloom, "transformers BloomAttention", BLOOM, finish=finish_bloom),
    Rule(
        "attention",
        added_and_sunk,
        f"{SUNK}, added mask",
        {**SINKS, "mask": "any Tq Tk"},
        finish=finish_added,
    ),
    Rule("attention", sunk, SUNK, SINKS, finish=finish),
    Rule("attention", filled_capped, f"{CAPPED}, masked_fill", EQUAL, finish=finishing_capped(finish_filled)),
    Rule("attention", added_capped, f"{CAPPED}, added mask", ADDED, finish=finishing_capped(finish_added)),
    Rule("attention", written_capped, CAPPED, UNMASKED, finish=finishing_capped(finish)),
    Rule("attention", called, CALL, GROUPED, {"causal": False}, finish_call),
    Rule("attention", called_causal, f"{CALL}, is_causal", GROUPED, {"causal": True}, finish_call),
]
