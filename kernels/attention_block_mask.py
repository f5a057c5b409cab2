"""What a block of `attention` scores is masked with on a CPU, or has added: mask, band, documents, ALiBi.

Only a block's part of any of them is ever in memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusekit.kernels.attention_form import Form, keys_of, rows_of, seen


def key_range(form: Form, b: int | None, rows: range, Tk: int) -> range:
    """The keys that any of these queries of batch element b (None: of any) sees lie in this range."""
    keys = keys_of(form, rows, Tk)
    if form.document_ids is None or not len(keys):
        return keys
    ours, theirs = (_of(ids, b) for ids in form.document_ids)
    low, high = ours[:, rows.start : rows.stop].aminmax(dim=1, keepdim=True)
    theirs = theirs[:, keys.start : keys.stop]
    found = ((theirs >= low) & (theirs <= high)).any(0).nonzero()
    if not len(found):
        return range(keys.start, keys.start)
    return range(keys.start + int(found[0]), keys.start + int(found[-1]) + 1)


def block_mask(form: Form, b: int | None, rows: range, keys: range) -> Tensor | None:
    """What these scores of batch element b (None: of all) are masked with: None, a boolean tensor that
    broadcasts to (B, H, rows, keys), or one that is added."""
    inside = _both(seen(form, rows, keys), _same_document(form, b, rows, keys))
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


def _part(form: Form, b: int | None, rows: range, keys: range) -> Tensor | None:
    """The block's part of the given mask."""
    mask = form.mask
    if mask is None:
        return None
    mask = _of(mask, b) if mask.ndim == 4 else mask
    if mask.ndim > 1 and mask.shape[-2] > 1:
        mask = mask[..., rows.start : rows.stop, :]
    return mask[..., keys.start : keys.stop] if mask.ndim and mask.shape[-1] > 1 else mask


def _same_document(form: Form, b: int | None, rows: range, keys: range) -> Tensor | None:
    """(B or 1, 1, rows, keys); None where all of them are of one document."""
    if form.document_ids is None:
        return None
    ours, theirs = (_of(ids, b) for ids in form.document_ids)
    ours, theirs = ours[:, rows.start : rows.stop], theirs[:, keys.start : keys.stop]
    same = ours[:, None, :, None] == theirs[:, None, None, :]
    return None if bool(same.all()) else same


def _by_place(form: Form, b: int | None, rows: range, keys: range) -> Tensor | None:
    """ALiBi in float32: (B or 1, H, rows, keys), with the rows as one where places are given."""
    if form.slopes is None:
        return None
    slopes = _of(rows_of(form.slopes), b).to(torch.float32)[..., None, None]
    if form.places is not None:
        places = _of(rows_of(form.places), b)[:, None, None, keys.start : keys.stop]
        return slopes * places.to(torch.float32)
    distance = torch.arange(keys.start, keys.stop) - torch.arange(rows.start, rows.stop)[:, None]
    return slopes * (distance - form.offset).to(torch.float32)
