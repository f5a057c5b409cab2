"""What attention of few queries costs on a GPU, where a program a head leaves most multiprocessors idle.

A program draws no more than one multiprocessor's part of the memory's bandwidth. PyTorch's flash kernel
splits the keys of a head among programs, as our decoding kernels do; its memory-efficient kernel, which takes
masks and float32, does not, and neither does our ordinary one. None of this was measured: `verify` does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from fusekit.kernels.attention_choice import DECODING
from fusekit.kernels.attention_decode import MOST_QUERIES, multiprocessors
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.op import LOW_PRECISION
from fusekit.passes.cost import Cost, hint


def eager_cost(node: fx.Node, cost: Cost) -> Cost:
    """The cost of a node that is replaced, by the part of the GPU that it keeps busy."""
    if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
        return cost
    q, _, _, *rest = node.args
    value = q.meta["val"]  # type: ignore[union-attr]
    mask = rest[0] if rest else node.kwargs.get("attn_mask")
    splits = mask is None and value.dtype in LOW_PRECISION
    return cost if splits else replace(cost, seconds=cost.seconds / _busy(value))


def fused_seconds(q: Tensor, implementation: str, seconds: float, start: float) -> float:
    """Seconds of a site of `attention` by who runs it, as a report names them; start: of a kernel.

    Parts are joined by a second kernel.
    """
    return seconds + start if implementation.startswith(DECODING) else seconds / _busy(q)


def _busy(q: Tensor) -> float:
    """The share of a GPU that a kernel keeps busy which gives all queries of a head to one program."""
    B, H, Tq = (hint(n) for n in q.shape[:3])
    if not on_gpu(q) or Tq > MOST_QUERIES:
        return 1.0
    return min(1.0, max(1, B * H) / multiprocessors(q))
