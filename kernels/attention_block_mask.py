"""What a block of `attention` scores is masked with on a CPU, or has added: mask, band, documents, ALiBi; and
which keys a block of queries meets.

Only a block's part of any of them is ever in memory. Where tokens are global, a block of other queries meets
the keys of its window and the global keys, gathered; global queries are blocks of their own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusekit.kernels.attention_form import Form, keys_of, rows_of, seen
from fusekit.kernels.attention_span import Span, chosen, indices, part, split


def row_blocks(form: Form, b: int | None, Tq: int, step: int) -> list[tuple[Span, bool]]:
    """Blocks of queries of batch element b (None: of any), and whether they are of global ones."""
    given = form.global_queries if form.has_globals else None
    return split(None if given is None else _flags(given, b), Tq, step)


def key_span(form: Form, b: int | None, rows: Span, is_global: bool, Tk: int) -> Span:
    """The keys that any of these queries of batch element b (None: of any) sees are among these."""
    near = keys_of(form.reach if is_global else form.band, rows, Tk)
    keys: Span = near
    if form.has_globals and form.global_keys is not None and not is_global:
        reached = keys_of(form.reach, rows, Tk)
        found = chosen(_flags(form.global_keys, b), reached)
        beyond = found[(found < near.start) | (found >= near.stop)]
        if len(beyond):
            keys = torch.cat((indices(near), beyond)).sort().values
    return keys if form.document_ids is None or not len(keys) else _of_documents(form, b, rows, keys)


def _of_documents(form: Form, b: int | None, rows: Span, keys: Span) -> Span:
    assert form.document_ids is not None
    ours, theirs = (_of(ids, b) for ids in form.document_ids)
    low, high = part(ours, 1, rows).aminmax(dim=1, keepdim=True)
    theirs = part(theirs, 1, keys)
    found = ((theirs >= low) & (theirs <= high)).any(0).nonzero()[:, 0]
    if isinstance(keys, Tensor):
        return keys[found]
    if not len(found):
        return range(keys.start, keys.start)
    return range(keys.start + int(found[0]), keys.start + int(found[-1]) + 1)


def block_mask(form: Form, b: int | None, rows: Span, keys: Span) -> Tensor | None:
    """What these scores of batch element b (None: of all) are masked with: None, a boolean tensor that
    broadcasts to (B, H, rows, keys), or one that is added."""
    inside = _both(_near(form, b, rows, keys), _same_document(form, b, rows, keys))
    added = _sum(_part(form, b, rows, keys), _by_place(form, b, rows, keys))
    if added is None or inside is None:
        return inside if added is None else added
    return added & inside if added.dtype == torch.bool else torch.where(inside, added, -math.inf)


def _both(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x & y


def _sum(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if mask is None or bias is None:
        return bias if mask is None else mask
    return torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else bias + mask


def _of(x: Tensor, b: int | None) -> Tensor:
    """One batch element of something (B or 1, ...), or all."""
    return x if b is None or x.shape[0] == 1 else x[b : b + 1]


def _flags(x: Tensor, b: int | None) -> Tensor:
    """(length,) of one batch element, or of all where they are the same."""
    return _of(rows_of(x), b)[0]


def _near(form: Form, b: int | None, rows: Span, keys: Span) -> Tensor | None:
    """The band, and what global tokens see beyond it: (rows, keys) or (B or 1, 1, rows, keys)."""
    near = seen(form.band, rows, keys)
    if near is None or not form.has_globals:
        return near
    far = seen(form.reach, rows, keys)
    for given, span, dim in ((form.global_queries, rows, -1), (form.global_keys, keys, -2)):
        if given is not None:
            flags = part(_of(rows_of(given), b), 1, span).unsqueeze(1).unsqueeze(dim)
            near = near | (flags if far is None else flags & far)
    return near


def _part(form: Form, b: int | None, rows: Span, keys: Span) -> Tensor | None:
    """The block's part of the given mask."""
    mask = form.mask
    if mask is None:
        return None
    mask = _of(mask, b) if mask.ndim == 4 else mask
    if mask.ndim > 1 and mask.shape[-2] > 1:
        mask = part(mask, -2, rows)
    return part(mask, -1, keys) if mask.ndim and mask.shape[-1] > 1 else mask


def _same_document(form: Form, b: int | None, rows: Span, keys: Span) -> Tensor | None:
    """(B or 1, 1, rows, keys); None where all of them are of one document."""
    if form.document_ids is None:
        return None
    ours, theirs = (_of(ids, b) for ids in form.document_ids)
    ours, theirs = part(ours, 1, rows), part(theirs, 1, keys)
    same = ours[:, None, :, None] == theirs[:, None, None, :]
    return None if bool(same.all()) else same


def _by_place(form: Form, b: int | None, rows: Span, keys: Span) -> Tensor | None:
    """ALiBi in float32: (B or 1, H, rows, keys), with the rows as one where places are given."""
    if form.slopes is None:
        return None
    slopes = _of(rows_of(form.slopes), b).to(torch.float32)[..., None, None]
    if form.places is not None:
        own = part(_of(rows_of(form.places), b), 1, keys)[:, None, None]
        return slopes * own.to(torch.float32)
    distance = indices(keys) - indices(rows)[:, None]
    return slopes * (distance - form.offset).to(torch.float32)
