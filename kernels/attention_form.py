"""What shapes the scores of an `attention` call beside q, k, v: one record for both devices' kernels.

The band: query i stands at place i + offset among the keys. `causal` lets it see keys up to its own place,
`window` that key and the window - 1 before it. So key j is seen where low <= j - i <= high, with

    high = offset where causal, else none;   low = offset - window + 1 where there is a window, else none.

offset = Tk - Tq aligns the last query with the last key, as a cache needs it; |i - j| <= W is causal with
offset W and window 2 W + 1.

ALiBi: slope (key place - query place) is added to the scores of each head, that is slope (j - i - offset);
with `places`, slope places[j], which says the same of padded sequences up to a constant a row.
Documents: query i sees key j only where documents[i] = key_documents[j], whatever the order of the numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

UNBOUNDED = 1 << 30


# Those of a Form's fields that hold tensors.
TENSORS = ("mask", "seed", "sinks", "slopes", "places", "documents", "key_documents")


class Form(NamedTuple):
    """The arguments of `attention` after q, k, v, in the order of its schema; scale is filled in."""

    mask: Tensor | None
    causal: bool
    scale: float
    dropout: float
    seed: Tensor | None
    seed_offset: int
    tf32: bool
    window: int | None
    offset: int
    softcap: float | None
    sinks: Tensor | None
    slopes: Tensor | None = None
    places: Tensor | None = None
    documents: Tensor | None = None
    key_documents: Tensor | None = None

    def without_tensors(self) -> Form:
        nothing: dict[str, Any] = dict.fromkeys(TENSORS)
        return self._replace(**nothing)

    @property
    def is_plain(self) -> bool:
        """Whether a mask, dropout and keys up to the query's own index are all there may be."""
        rest = (self.softcap, self.sinks, self.slopes, self.documents)
        return not self.is_banded and all(given is None for given in rest)

    @property
    def demands(self) -> int:
        """How many things beyond a band take registers in a kernel."""
        given = (self.mask, self.softcap, self.slopes, self.documents)
        return sum(x is not None for x in given) + (self.dropout > 0.0)

    @property
    def document_ids(self) -> tuple[Tensor, Tensor] | None:
        """Those of queries and of keys, each (B or 1, length)."""
        if self.documents is None:
            return None
        keys = self.documents if self.key_documents is None else self.key_documents
        return rows_of(self.documents), rows_of(keys)

    @property
    def band(self) -> tuple[int, int]:
        """(low, high) with low <= key - query <= high for the keys that are seen."""
        return band(self.causal, self.window, self.offset)

    @property
    def is_banded(self) -> bool:
        """Whether there is more to the band than keys up to the query's own index, or nothing."""
        return self.window is not None or (self.causal and self.offset != 0)


def band(causal: bool, window: int | None, offset: int) -> tuple[int, int]:
    low = -UNBOUNDED if window is None else offset - window + 1
    return low, offset if causal else UNBOUNDED


def rows_of(x: Tensor) -> Tensor:
    """(length,) as (1, length); (B, length) as it is."""
    return x if x.ndim == 2 else x[None]


def seen(form: Form, rows: range, keys: range) -> Tensor | None:
    """Which of these keys these queries see, (rows, keys) boolean on the CPU; None for all."""
    low, high = form.band
    furthest, nearest = keys.stop - 1 - rows.start, keys.start - (rows.stop - 1)
    if low <= nearest and furthest <= high:
        return None
    distance = torch.arange(keys.start, keys.stop) - torch.arange(rows.start, rows.stop)[:, None]
    return (distance >= low) & (distance <= high)


def keys_of(form: Form, rows: range, Tk: int) -> range:
    """The keys that any of these queries sees lie in this range."""
    low, high = form.band
    start = max(0, rows.start + low)
    return range(start, max(start, min(Tk, rows.stop + high)))


def pairs(causal: bool, window: int | None, offset: int, Tq: int, Tk: int) -> int:
    """How many scores are needed; sizes may be symbolic."""
    if causal and offset == 0:
        square = min(Tq, Tk)
        count = Tq * Tk - (square * (square - 1) // 2 + square * (Tk - square))
    elif causal:
        corner = max(0, Tk - 1 - offset)  # keys beyond the first query's place
        hidden = min(corner, Tq)
        count = Tq * Tk - (hidden * corner - hidden * (hidden - 1) // 2)
    else:
        count = Tq * Tk
    return count if window is None else min(count, Tq * window)
