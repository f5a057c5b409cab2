"""Three linear layers of one input, as in front of attention: the row of qkv_linear.

Each must be its own result: what has an activation or a residual sum joins that (linear_act) and comes first.
Which of them is the query does not matter; k and v may be narrower. The three are looked for in one module:
a decoder's cross-attentions all read one encoder's output, and belong to their own layers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fusekit.passes.pattern import Rule
from fusekit.passes.rules.linear import LINEARS

SHAPES = {
    "x": "* K", "w_q": "NQ K", "w_k": "NK K", "w_v": "NV K",
    "b_q": "optional NQ", "b_k": "optional NK", "b_v": "optional NV",
}  # fmt: skip


def projections(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, b_q: Tensor, b_k: Tensor, b_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return F.linear(x, w_q, b_q), F.linear(x, w_k, b_k), F.linear(x, w_v, b_v)


RULES = [Rule("qkv_linear", projections, "three linears of one input", SHAPES, also=LINEARS)]
