"""What the Triton kernels of `attention` read a query, key or head: slopes, places, documents, globals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.kernels.attention_documents import ranges
from fusekit.kernels.attention_form import Form, rows_of
from fusekit.kernels.attention_globals import global_blocks


class Rows(NamedTuple):
    """slopes (B, H); places (B, Tk), documents (B, Tq) and key_documents (B, Tk), each row adjacent; and so
    global_queries (B, Tq) and global_keys (B, Tk), bytes, both or neither."""

    slopes: Tensor | None
    places: Tensor | None
    documents: Tensor | None
    key_documents: Tensor | None
    global_queries: Tensor | None
    global_keys: Tensor | None

    @classmethod
    def of(cls, form: Form, q: Tensor, k: Tensor) -> Rows:
        B = q.shape[0]
        slopes = None if form.slopes is None else rows_of(form.slopes).expand(B, -1)
        given = (form.places, *(form.document_ids or (None, None)), *_globals(form, q, k))
        return cls(slopes, *(_adjacent(x, B) for x in given))

    @property
    def strides(self) -> tuple[int, ...]:
        slopes, *others = self
        first = (0, 0) if slopes is None else slopes.stride()
        return *first, *(0 if x is None else x.stride(0) for x in others)

    def key_ranges(self, block: int) -> Tensor | None:
        """For each block of queries the keys that may be of its documents."""
        if self.documents is None or self.key_documents is None:
            return None
        return ranges(self.documents, self.key_documents, block)

    def query_ranges(self, block: int) -> Tensor | None:
        """For each block of keys the queries that may be of its documents."""
        if self.documents is None or self.key_documents is None:
            return None
        return ranges(self.key_documents, self.documents, block)

    def global_key_blocks(self, block: int) -> Tensor | None:
        return None if self.global_keys is None else global_blocks(self.global_keys, block)

    def global_query_blocks(self, block: int) -> Tensor | None:
        return None if self.global_queries is None else global_blocks(self.global_queries, block)


def _globals(form: Form, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of queries and of keys, one that is not given as zeros: one kernel less to compile."""
    if not form.has_globals:
        return None, None
    given = (form.global_queries, q), (form.global_keys, k)
    none = (x.new_zeros(x.shape[-2], dtype=torch.uint8) if ours is None else ours for ours, x in given)
    queries, keys = (x.view(torch.uint8) for x in none)
    return queries, keys


def _adjacent(x: Tensor | None, B: int) -> Tensor | None:
    if x is None:
        return None
    x = rows_of(x)
    return (x if x.stride(1) == 1 else x.contiguous()).expand(B, -1)
