"""Calls of `attention` that its decoding kernels take, in every form they have: what is to be compiled.

Samples reach a form or two; here are masks, caps, bands, ALiBi, documents and head sizes, with both sizes of
the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fusekit.kernels.attention import OP
from fusekit.kernels.attention_decode import _join_kernel, _part_kernel
from fusekit.kernels.launch import Launch, record
from fusekit.kernels.op import DTYPES

KEYS = 4096
FEATURES = (64, 128, 256)
KERNELS = (_part_kernel, _join_kernel)
HEADS = ((32, 8, 1), (32, 4, 4))  # of queries, of keys; queries


def launches(target: str) -> Iterator[Launch]:
    """What decoding starts on that architecture; to be called under FakeTensorMode."""
    for dtype in DTYPES:
        for features in FEATURES[: 2 if dtype == torch.float32 else 3]:
            for heads, kv_heads, queries in HEADS:
                q = torch.empty(1, heads, queries, features, dtype=dtype)
                k, v = (torch.empty(1, kv_heads, KEYS, features, dtype=dtype) for _ in range(2))
                for form in _forms(heads, queries, dtype):
                    with record(target) as found:
                        OP.fused(q, k, v, **form)
                    yield from (start for start in found if start.kernel in KERNELS)


def _forms(heads: int, queries: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    window = {"causal": True, "window": 2048, "offset": KEYS - queries}
    padding = torch.empty(1, 1, 1, KEYS, dtype=torch.bool)
    bias = torch.empty(1, heads, queries, KEYS, dtype=dtype)
    yield from ({}, window, {"mask": padding})
    yield {**window, "mask": bias, "softcap": 50.0, "sinks": torch.empty(heads, dtype=dtype)}
    slopes, rows = torch.empty(heads), torch.empty(1, KEYS, dtype=torch.int64)
    yield {**window, "slopes": slopes}
    yield {"slopes": slopes, "places": rows, "mask": padding}
    yield {**window, "slopes": slopes, "places": rows, "mask": bias}
    yield {**window, "documents": rows[:, :queries], "key_documents": rows}
    if dtype == torch.float32:
        yield {"tf32": True}
