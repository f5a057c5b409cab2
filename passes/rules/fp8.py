"""Linear layers in FP8, alone or with the activation after them: rows of linear_fp8.

    y = act(x @ weight.T + bias)

They are tried before all others, and only under a recipe: what `fp8_sites` keeps in high precision is left
to the other rows. An mlp becomes two sites and a gated_mlp three, since FP8 needs the largest value of the
hidden features before it can cast any of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fusekit.passes.pattern import Rule
from fusekit.passes.rules.linear import ACTIVATIONS, LINEARS, SHAPES, activated

LAYER = {name: shape for name, shape in SHAPES.items() if name != "residual"}


def _row(function: Callable[..., Tensor], source: str, act: str) -> Rule:
    return Rule("linear_fp8", function, source, LAYER, {"act": act}, also=LINEARS)


BARE = _row(lambda x, weight, bias: F.linear(x, weight, bias), "FP8 linear", "none")
RULES = [
    *(_row(activated(function), f"FP8 linear, {source}", act) for act, source, function in ACTIVATIONS),
    BARE,
]
