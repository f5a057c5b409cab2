"""What shapes the scores of an `attention` call beside q, k, v: one record for both devices' kernels.

The band: query i stands at place i + offset among the keys. `causal` lets it see keys up to its own place,
`window` that key and the window - 1 before it. So key j is seen where low <= j - i <= high, with

    high = offset where causal, else none;   low = offset - window + 1 where there is a window, else none.

offset = Tk - Tq aligns the last query with the last key, as a cache needs it; |i - j| <= W is causal with
offset W and window 2 W + 1 (`around`).

ALiBi: slope (key place - query place) is added to the scores of each head, that is slope (j - i - offset);
with `places`, slope places[j], which says the same of padded sequences up to a constant a row.
Documents: query i sees key j only where documents[i] = key_documents[j], whatever the order of the numbers.
Global tokens: where global_queries[i] or global_keys[j], the window does not hold; `causal` holds still, or,
with `global_ahead`, does not hold either. A mask and documents hold for all.
deterministic: gradients of two runs are equal bit by bit; without it a library may sum them
(attention_gradient.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels.attention_span import Span, ends, indices

UNBOUNDED = 1 << 30
GLOBAL = "global tokens beside a window"


# Those of a Form's fields that hold tensors.
TENSORS = (
    "mask", "seed", "sinks", "slopes", "places", "documents", "key_documents", "global_queries", "global_keys"
)  # fmt: skip


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
    global_queries: Tensor | None = None
    global_keys: Tensor | None = None
    global_ahead: bool = False
    deterministic: bool = True

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
        return sum(x is not None for x in given) + (self.dropout > 0.0) + self.has_globals

    @property
    def document_ids(self) -> tuple[Tensor, Tensor] | None:
        """Those of queries and of keys, each (B or 1, length)."""
        if self.documents is None:
            return None
        keys = self.documents if self.key_documents is None else self.key_documents
        return rows_of(self.documents), rows_of(keys)

    @property
    def has_globals(self) -> bool:
        """Whether there are global tokens, and a bound that does not hold for them."""
        given = self.global_queries is not None or self.global_keys is not None
        return given and (self.window is not None or (self.causal and self.global_ahead))

    @property
    def is_by_element(self) -> bool:
        """Whether batch elements may see different keys, a mask aside."""
        flags = (self.global_queries, self.global_keys) if self.has_globals else ()
        return self.documents is not None or any(x is not None and len(rows_of(x)) > 1 for x in flags)

    @property
    def reach(self) -> tuple[int, int]:
        """(low, high) with low <= key - query <= high for the keys that a global query sees."""
        return -UNBOUNDED, UNBOUNDED if self.global_ahead else self.band[1]

    @property
    def band(self) -> tuple[int, int]:
        """(low, high) with low <= key - query <= high for the keys that are seen."""
        return band(self.causal, self.window, self.offset)

    @property
    def is_banded(self) -> bool:
        """Whether there is more to the band than keys up to the query's own index, or nothing."""
        return self.window is not None or (self.causal and (self.offset != 0 or self.has_globals))


def around(before: int, behind: int, offset: int = 0) -> dict[str, Any]:
    """The arguments of `attention` for a window on both sides of each query: `before` keys in front of its
    place, that key, and `behind` keys behind it."""
    return {"causal": True, "window": before + 1 + behind, "offset": offset + behind}


def band(causal: bool, window: int | None, offset: int) -> tuple[int, int]:
    low = -UNBOUNDED if window is None else offset - window + 1
    return low, offset if causal else UNBOUNDED


def dense(
    sizes: tuple[int, int], causal: bool, window: int | None, offset: int, global_queries: Tensor | None,
    global_keys: Tensor | None, global_ahead: bool, device: torch.device,
) -> Tensor:  # fmt: skip
    """Which keys the queries see by their place, (Tq, Tk), or with global tokens (B or 1, 1, Tq, Tk)."""
    low, high = band(causal, window, offset)
    whole = torch.ones(sizes, dtype=torch.bool, device=device)
    seen, reached = whole.tril(high).triu(low), whole.tril(UNBOUNDED if global_ahead else high)
    for flags, dim in ((global_queries, -1), (global_keys, -2)):
        if flags is not None:
            seen = seen | (rows_of(flags).unsqueeze(1).unsqueeze(dim) & reached)
    return seen


def rows_of(x: Tensor) -> Tensor:
    """(length,) as (1, length); (B, length) as it is."""
    return x if x.ndim == 2 else x[None]


def seen(band: tuple[int, int], rows: Span, keys: Span) -> Tensor | None:
    """Which of these keys these queries see, (rows, keys) boolean on the CPU; None for all."""
    low, high = band
    (first_row, last_row), (first_key, last_key) = ends(rows), ends(keys)
    if low <= first_key - (last_row - 1) and last_key - 1 - first_row <= high:
        return None
    distance = indices(keys) - indices(rows)[:, None]
    return (distance >= low) & (distance <= high)


def keys_of(band: tuple[int, int], rows: Span, Tk: int) -> range:
    """The keys that any of these queries sees lie in this range."""
    low, high = band
    first, last = ends(rows)
    start = min(Tk, max(0, first + low))
    return range(start, max(start, min(Tk, last + high)))


def skipped(form: Form, Tq: int, Tk: int, rows: int, keys: int) -> float:
    """The share of blocks of (rows, keys) scores that lie outside of the band."""
    met = 0
    for start in range(0, Tq, rows):
        seen_keys = keys_of(form.band, range(start, min(start + rows, Tq)), Tk)
        met += -(-seen_keys.stop // keys) - seen_keys.start // keys if len(seen_keys) else 0
    return 1.0 - met / max(1, -(-Tq // rows) * -(-Tk // keys))


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
