"""Which arguments `attention_fp8` takes: None, or a sentence that says what does not fit."""

from __future__ import annotations

from torch import Tensor

from fusekit.kernels import attention_supports
from fusekit.kernels.recipe import ATTENTIONS

MULTIPLE = 16  # features: tensor cores take FP8 rows that are 16 bytes apart


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    offset: int = 0,
    documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    scaling: str = "head",
) -> str | None:
    """None, or why attention_fp8 does not run on these arguments."""
    if scaling not in ATTENTIONS:
        return f"scaling {scaling!r} is none of {', '.join(ATTENTIONS)}"
    form = (None, causal, scale, 0.0, None, 0, False, window, offset, None, None, None, None)
    if reason := attention_supports.supports(q, k, v, *form, documents, key_documents):
        return reason
    features = (q.shape[-1], v.shape[-1])
    if any(n % MULTIPLE for n in features):
        return f"heads of {features[0]} and {features[1]} features: FP8 needs multiples of {MULTIPLE}"
    return None
