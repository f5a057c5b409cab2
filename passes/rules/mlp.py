"""Two linear layers around an activation, gated or not: rows of mlp and gated_mlp.

    act(x @ w1.T + b1) @ w2.T + b2 + residual
    (act(x @ w_gate.T + b_gate) * (x @ w_up.T + b_up)) @ w_down.T + b_down

Both are larger than the linear_act they contain, so they come first. Dropout between the layers is part of
the pattern: where it is active the site is refused with that reason, and the first layer becomes linear_act.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.passes.pattern import Match, Rule
from fusekit.passes.rules.linear import LINEARS, Map, erf_gelu, erf_gelu_scaled, fast_gelu, new_gelu
from fusekit.passes.spelling import spell

SHAPES = {
    "x": "* K", "w1": "H K", "b1": "optional H", "w2": "N H", "b2": "optional N", "residual": "* N",
}  # fmt: skip
GATED = {
    "x": "* K", "w_gate": "H K", "w_up": "H K", "w_down": "N H",
    "b_gate": "optional H", "b_up": "optional H", "b_down": "optional N",
}  # fmt: skip
PACKED = {
    "x": "* K", "w_down": "N H", "w_gate": "2*H K", "b_gate": "optional 2*H", "b_down": "optional N",
}  # fmt: skip

Alternatives = dict[str, tuple[Callable[..., Tensor], ...]]

# Name, function, and the other spellings of the call it makes.
ACTIVATIONS: list[tuple[str, Map, Alternatives]] = [
    ("gelu", F.gelu, {"gelu": (erf_gelu, erf_gelu_scaled)}),
    ("gelu_tanh", lambda z: F.gelu(z, approximate="tanh"), {"gelu": (new_gelu, fast_gelu)}),
    ("relu", F.relu, {}),
    ("silu", F.silu, {"silu": (lambda z: z * torch.sigmoid(z),)}),
    ("quick_gelu", lambda z: z * torch.sigmoid(1.702 * z), {}),
    ("tanh", torch.tanh, {}),
    ("sigmoid", torch.sigmoid, {}),
]
SQUARED: tuple[str, Map, Alternatives] = ("relu_squared", lambda z: torch.square(F.relu(z)), {})


ACTIVATED = {"gelu", "relu", "silu", "sigmoid", "tanh", "erf"}


def finish(match: Match) -> str | None:
    """Refuse active dropout on the hidden features, an activation written as a product of one layer with
    itself, and a chain of layers where each has its activation."""
    arguments = match.arguments
    if arguments.get("w_up") is not None and arguments["w_up"] == arguments["w_gate"]:
        return "gate and up have one weight: their product is an activation of one layer"
    dropout = arguments.get("dropout", 0.0)
    if dropout:
        return f"dropout {dropout:g} is active between the two layers"
    if any(spell(reader).name in ACTIVATED for reader in match.root.users):
        return "the second layer has an activation too: each layer is a linear_act"
    return None


def finish_sum(match: Match) -> str | None:
    readers = [r for user in match.root.users for r in (user.users if spell(user).name == "to" else (user,))]
    if any(spell(reader).name in ("layer_norm", "rms_norm", "pow") for reader in readers):
        return "the sum joins the norm that reads it"
    return finish(match)


def layers(act: Map) -> Callable[..., Tensor]:
    return lambda x, w1, b1, w2, b2, dropout: F.linear(
        F.dropout(act(F.linear(x, w1, b1)), dropout, True), w2, b2
    )


def summed(act: Map) -> Callable[..., Tensor]:
    inner = layers(act)
    return lambda x, w1, b1, w2, b2, dropout, residual: inner(x, w1, b1, w2, b2, dropout) + residual


def gated(act: Map) -> Callable[..., Tensor]:
    """LlamaMLP, T5DenseGatedActDense, and their kin."""

    def pattern(
        x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor,
        b_gate: Tensor, b_up: Tensor, b_down: Tensor, dropout: float,
    ) -> Tensor:  # fmt: skip
        h = act(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)
        return F.linear(F.dropout(h, dropout, True), w_down, b_down)

    return pattern


def packed(act: Map, up_first: bool) -> Callable[..., Tensor]:
    """One weight for both, as Phi3MLP; chunk and split are spelled as the slices they return."""

    def pattern(
        x: Tensor, w_gate: Tensor, w_down: Tensor, b_gate: Tensor, b_down: Tensor, dropout: float
    ) -> Tensor:
        z = F.linear(x, w_gate, b_gate)
        middle = z.shape[-1] // 2
        first, second = z[..., :middle], z[..., middle:]
        h = act(second) * first if up_first else act(first) * second
        return F.linear(F.dropout(h, dropout, True), w_down, b_down)

    return pattern


def _mlp_rows(act: str, function: Map, others: Alternatives) -> list[Rule]:
    fixed, also = {"act": act}, {**LINEARS, **others}
    return [
        Rule("mlp", layers(function), f"two linears, {act}", SHAPES, fixed, finish, also),
        Rule("mlp", summed(function), f"two linears, {act}, residual", SHAPES, fixed, finish_sum, also),
    ]


def _gated_rows(act: str, function: Map, others: Alternatives) -> list[Rule]:
    also = {**LINEARS, **others}
    rows = [Rule("gated_mlp", gated(function), f"gate, up, down, {act}", GATED, {"act": act}, finish, also)]
    for up_first in (False, True):
        fixed = {"act": act, "w_up": None, "up_first": up_first}
        order = "up_gate" if up_first else "gate_up"
        rows.append(
            Rule(
                "gated_mlp", packed(function, up_first), f"packed {order}, {act}", PACKED, fixed, finish, also
            )
        )
    return rows


RULES = [
    *(row for act in (*ACTIVATIONS, SQUARED) for row in _mlp_rows(*act)),
    *(row for act in ACTIVATIONS for row in _gated_rows(*act)),
]
