"""What the Triton kernels of `attention` read a number a query or a key: slopes, places, documents."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusekit.kernels.attention_documents import ranges
from fusekit.kernels.attention_form import Form, rows_of


class Rows(NamedTuple):
    """slopes (B, H); places (B, Tk), documents (B, Tq) and key_documents (B, Tk), each row adjacent."""

    slopes: Tensor | None
    places: Tensor | None
    documents: Tensor | None
    key_documents: Tensor | None

    @classmethod
    def of(cls, form: Form, B: int) -> Rows:
        slopes = None if form.slopes is None else rows_of(form.slopes).expand(B, -1)
        documents, key_documents = form.document_ids or (None, None)
        return cls(slopes, _adjacent(form.places, B), _adjacent(documents, B), _adjacent(key_documents, B))

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


def _adjacent(x: Tensor | None, B: int) -> Tensor | None:
    if x is None:
        return None
    x = rows_of(x)
    return (x if x.stride(1) == 1 else x.contiguous()).expand(B, -1)
