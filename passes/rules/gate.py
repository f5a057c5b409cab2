"""An activation times a second tensor: rows of gated_act, for what no gated_mlp takes whole.

    act(gate) * up,   gate and up of one shape, or halves of one tensor

They stand in front of linear_act's rows: a library's product and one pass over gate and up move fewer bytes
than a product that writes z and act(z), and a multiplication after it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, fx

from fusekit.kernels.launch import on_gpu
from fusekit.passes.pattern import Match, Rule
from fusekit.passes.propagate import tensors_of
from fusekit.passes.rules.linear import Map
from fusekit.passes.rules.mlp import ACTIVATIONS, SQUARED, Alternatives
from fusekit.passes.spelling import spell, value_of

SHAPES = {"gate": "* H", "up": "* H"}
PACKED = {"gate": "* 2*H"}


def pays(node: fx.Node) -> bool:
    """On a CPU eager's two passes are faster. One over blocks that stay in cache was tried: 0.3 to 1.1 of
    their speed, forward and backward (three dtypes, one thread of an AVX2 processor)."""
    return on_gpu(tensors_of(value_of(node))[0])


def finish(match: Match) -> str | None:
    """Refuse a function of one tensor, as x * sigmoid(x), and what does not pay."""
    if match.arguments.get("up") is match.arguments["gate"]:
        return "gate and up are one tensor: their product is an activation"
    return None if pays(match.root) else "on a CPU the two passes it would replace are faster"


def joins_gate(activated: fx.Node) -> bool:
    """Whether all that becomes of a layer's activated output is to gate another tensor of its shape."""
    readers = list(activated.users)
    if len(readers) != 1 or spell(readers[0]).name != "mul" or not pays(activated):
        return False
    shapes = [getattr(value_of(factor), "shape", None) for factor in spell(readers[0]).args[:2]]
    return shapes[0] == shapes[1]


def multiplied(act: Map) -> Callable[..., Tensor]:
    return lambda gate, up: act(gate) * up


def packed(act: Map, up_first: bool) -> Callable[..., Tensor]:
    """chunk and split are spelled as the slices they return."""

    def pattern(gate: Tensor) -> Tensor:
        middle = gate.shape[-1] // 2
        first, second = gate[..., :middle], gate[..., middle:]
        return act(second) * first if up_first else act(first) * second

    return pattern


def _rows(act: str, function: Map, others: Alternatives) -> list[Rule]:
    rows = []
    for up_first in (False, True):
        fixed = {"act": act, "up": None, "up_first": up_first}
        source = f"packed {'up_gate' if up_first else 'gate_up'} gate, {act}"
        rows.append(Rule("gated_act", packed(function, up_first), source, PACKED, fixed, finish, others))
    fixed = {"act": act}
    return [*rows, Rule("gated_act", multiplied(function), f"{act} gate", SHAPES, fixed, finish, others)]


GLU = Rule(
    "gated_act", lambda gate: F.glu(gate, -1), "torch.nn.GLU", PACKED,
    {"act": "sigmoid", "up": None, "up_first": True}, finish,
)  # fmt: skip
RULES = [*(row for act in (*ACTIVATIONS, SQUARED) for row in _rows(*act)), GLU]
