"""The head of a language model and its loss: rows of linear_cross_entropy.

    loss = cross_entropy(x @ weight.T + bias, targets)

The logits may be read by nobody else: the op never has them. Where a model returns them too, the promise
`keep_logits=False` takes them out of its result first (passes/logits.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.passes.pattern import Match, Rule
from fusekit.passes.rules.linear import matmul, matmul_add
from fusekit.passes.spelling import filled, spell

SHAPES = {"x": "* K", "weight": "V K", "bias": "optional V", "targets": "int rows"}
REDUCTIONS = {1: "mean", 2: "sum"}  # 0, "none", gives no scalar: its shape does not match


def flat_then_float32(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """nanoGPT, and most loops: logits.view(-1, V), cast by autocast or by hand, or not at all."""
    logits = F.linear(x, weight, bias).reshape(-1, weight.shape[0])
    return F.cross_entropy(logits.to(torch.float32), targets)


def float32_then_flat(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """transformers ForCausalLMLoss: upcast, labels shifted by padding, then flat."""
    logits = F.linear(x, weight, bias).to(torch.float32)
    return F.cross_entropy(logits.reshape(-1, weight.shape[0]), targets)


def settings(match: Match) -> str | None:
    """Read what the call says beside its tensors, or refuse it."""
    loss = next(node for node in match.nodes if spell(node).name == "cross_entropy_loss")
    _, _, class_weights, reduction, ignore_index, label_smoothing = filled(loss)
    if class_weights is not None:
        return "cross_entropy has a weight for each class"
    match.arguments |= {
        "reduction": REDUCTIONS[reduction],
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
    }
    return None


def _row(function: Callable[..., Tensor], source: str) -> Rule:
    return Rule(
        "linear_cross_entropy", function, source, SHAPES, finish=settings,
        also={"linear": (matmul_add, matmul)},
    )  # fmt: skip


RULES = [
    _row(flat_then_float32, "nanoGPT linear, cross entropy"),
    _row(float32_then_flat, "transformers ForCausalLMLoss"),
]
