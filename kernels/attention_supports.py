"""Which arguments `attention` takes: None, or a sentence that says what does not fit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusekit.kernels.attention_form import UNBOUNDED
from fusekit.kernels.op import DTYPES, not_runnable

MAX_FEATURES = 256
IDS = (torch.int32, torch.int64)
PLACES = (torch.int32, torch.int64, torch.float32)


def supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    seed_offset: int = 0,
    tf32: bool = False,
    window: int | None = None,
    offset: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    places: Tensor | None = None,
    documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    global_queries: Tensor | None = None,
    global_keys: Tensor | None = None,
    global_ahead: bool = False,
    deterministic: bool = True,
) -> str | None:
    """None, or why these arguments cannot be fused."""
    if not (q.ndim == k.ndim == v.ndim == 4):
        return f"q, k, v have {q.ndim}, {k.ndim}, {v.ndim} dimensions, not (batch, heads, length, features)"
    if not (q.dtype == k.dtype == v.dtype):
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype"
    (B, H, _, D), (_, kv_heads, Tk, _), DV = q.shape, k.shape, v.shape[-1]
    if k.shape[0] != B or v.shape[0] != B or k.shape[-1] != D or v.shape[1] != kv_heads or v.shape[2] != Tk:
        return f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)} differ in batch, length or features"
    if kv_heads < 1 or H % kv_heads:
        return f"{H} query heads are no multiple of {kv_heads} key heads"
    if D < 1 or DV < 1 or D > MAX_FEATURES or DV > MAX_FEATURES:
        return f"heads of {max(D, DV)} features are outside 1 to {MAX_FEATURES}"
    if not 0.0 <= dropout < 1.0:
        return f"dropout {dropout} is not in [0, 1)"
    if dropout and not _is_seed(seed, q.device):
        return "dropout needs a seed, one int64 element on the device of q"
    return (
        _form_unfit(q, window, offset, softcap, sinks)
        or _mask_unfit(q, k, mask)
        or _slopes_unfit(q, k, slopes, places)
        or _documents_unfit(q, k, documents, key_documents)
        or _globals_unfit(q, k, global_queries, global_keys, global_ahead)
        or not_runnable(q, k, v)
    )


def _is_seed(seed: Tensor | None, device: torch.device) -> bool:
    return seed is not None and seed.dtype == torch.int64 and seed.numel() == 1 and seed.device == device


def _form_unfit(
    q: Tensor, window: int | None, offset: int, softcap: float | None, sinks: Tensor | None
) -> str | None:
    if window is not None and not 0 < window < UNBOUNDED:
        return f"a window of {window} keys is outside 1 to {UNBOUNDED - 1}"
    if isinstance(offset, int) and abs(offset) >= UNBOUNDED:
        return f"an offset of {offset} places is outside {1 - UNBOUNDED} to {UNBOUNDED - 1}"
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        return f"scores capped at {softcap}: a cap is a positive number"
    if sinks is None:
        return None
    if sinks.shape != (q.shape[1],) or sinks.dtype not in DTYPES:
        return f"sinks {_shape(sinks)} of {sinks.dtype}: one floating number for each of {q.shape[1]} heads"
    return _elsewhere(q, sinks)


def _mask_unfit(q: Tensor, k: Tensor, mask: Tensor | None) -> str | None:
    if mask is None:
        return None
    if mask.dtype not in (torch.bool, torch.float32, torch.float16, torch.bfloat16):
        return f"a mask is boolean or floating, not {str(mask.dtype).removeprefix('torch.')}"
    if reason := _elsewhere(q, mask):
        return reason
    scores = (*q.shape[:-1], k.shape[-2])
    fits = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.ndim > 4 or any(size != 1 and size != wanted for size, wanted in fits):
        return f"mask {_shape(mask)} does not broadcast to the scores {tuple(scores)}"
    return None


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _slopes_unfit(q: Tensor, k: Tensor, slopes: Tensor | None, places: Tensor | None) -> str | None:
    if slopes is None:
        return None if places is None else "places of keys are multiplied by slopes, and there are none"
    B, H = q.shape[:2]
    if slopes.shape not in ((H,), (B, H)) or slopes.dtype not in DTYPES:
        return f"slopes {_shape(slopes)} of {_name(slopes)}: one floating number for each of {H} heads"
    if slopes.requires_grad:
        return "slopes have no gradient: detach them, or add slopes * distance as a mask, which has one"
    if places is not None and (reason := _not_a_row(q, k.shape[2], places, "places", PLACES)):
        return reason
    return _elsewhere(q, slopes)


def _documents_unfit(q: Tensor, k: Tensor, documents: Tensor | None, keys: Tensor | None) -> str | None:
    if documents is None:
        return None if keys is None else "key_documents are compared with documents, and there are none"
    if keys is None and q.shape[2] != k.shape[2]:
        return f"{k.shape[2]} keys for {q.shape[2]} queries: say of which documents they are, key_documents"
    return _not_a_row(q, q.shape[2], documents, "documents", IDS) or (
        None if keys is None else _not_a_row(q, k.shape[2], keys, "key_documents", IDS)
    )


def _globals_unfit(
    q: Tensor, k: Tensor, queries: Tensor | None, keys: Tensor | None, ahead: bool
) -> str | None:
    if queries is None and keys is None:
        return "global_ahead says how far global tokens reach, and there are none" if ahead else None
    return (
        None if queries is None else _not_a_row(q, q.shape[2], queries, "global_queries", (torch.bool,))
    ) or (None if keys is None else _not_a_row(q, k.shape[2], keys, "global_keys", (torch.bool,)))


def _not_a_row(q: Tensor, T: int, x: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if x.shape not in ((T,), (1, T), (q.shape[0], T)):
        return f"{name} {_shape(x)} are neither ({T},) nor ({q.shape[0]}, {T})"
    if x.dtype not in dtypes:
        return f"{name} are {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {_name(x)}"
    return _elsewhere(q, x)


def _elsewhere(q: Tensor, x: Tensor) -> str | None:
    return None if x.device == q.device else f"tensors are on different devices: {q.device} and {x.device}"


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
