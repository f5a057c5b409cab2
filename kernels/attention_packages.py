"""flash-attn's packages, 2, 3 and 4, where they are installed: the forward pass of attention.

All three take (B, T, H, D), share heads as ours do, align the last query with the last key and a window with
both, and return the natural log sum exp, (B, H, T) float32, where asked:
    2   window_size (-1, -1) is none; return_attn_probs=True returns (out, lse, probabilities)
    3   the same; return_attn_probs=True returns (out, lse). Before August 2025 it had no such argument
    4   window_size (None, None) is none; return_lse=True returns (out, lse), and may come to return more
Of 3 and 4 this was read in their sources (Dao-AILab/flash-attention: hopper/flash_attn_interface.py at
01afd16, flash_attn/cute/interface.py at 004b1a2), and neither was at hand to be run. Whether it holds is
tried on the machine (attention_trial.py): where it does not, they compute nothing.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from fusekit.kernels.attention_form import Form

Result = tuple[Tensor, Tensor]


def width(q: Tensor, most: int) -> str | None:
    features = q.shape[-1]
    return f"heads of {features} features" if features % 8 or features > most else None


def unfit(q: Tensor, k: Tensor, v: Tensor, form: Form, most: int = 256) -> str | None:
    """Why flash-attn does not compute this call as `attention` defines it."""
    aligned = form.offset == k.shape[-2] - q.shape[-2]
    if form.is_banded and not (form.causal and aligned):
        return "a window around its queries" if not form.causal else "an offset that is not the cache's"
    if form.causal and not aligned:
        return "causal over lengths that differ"
    if form.causal and q.shape[-2] > k.shape[-2]:
        return "queries before the first key"
    return width(q, most)


def unfit_4(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str | None:
    return unfit(q, k, v, form, most=128)


def run_2(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Result:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    out, lse, _ = flash_attn_func(
        *_rows_first(q, k, v), softmax_scale=form.scale, causal=form.causal, window_size=_window(form, -1),
        softcap=form.softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def run_3(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Result:
    from flash_attn_interface import flash_attn_func  # type: ignore[import-not-found]

    out, lse = flash_attn_func(
        *_rows_first(q, k, v), softmax_scale=form.scale, causal=form.causal, window_size=_window(form, -1),
        softcap=form.softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def run_4(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Result:
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    out, lse, *_ = flash_attn_func(
        *_rows_first(q, k, v), softmax_scale=form.scale, causal=form.causal, window_size=_window(form, None),
        softcap=form.softcap or 0.0, return_lse=True,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def _rows_first(*heads: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in heads]


def _window(form: Form, unbounded: int | None) -> tuple[int | None, int | None]:
    """Keys to the left of a query and to the right; what is causal is said apart."""
    return (unbounded, unbounded) if form.window is None else (form.window - 1, 0)


@functools.cache
def absent_2() -> str | None:
    return _absent("flash-attn", "flash_attn", "__init__.py")  # 4 alone is a folder without one


@functools.cache
def absent_3() -> str | None:
    return _absent("flash-attn 3", "flash_attn_interface", "")


@functools.cache
def absent_4() -> str | None:
    return _absent("flash-attn 4", "flash_attn", "cute")


def _absent(name: str, module: str, part: str) -> str | None:
    """Looked for without being imported, which takes seconds and needs a GPU."""
    if not torch.backends.cuda.is_built():
        return "this PyTorch has no CUDA"
    spec = importlib.util.find_spec(module)
    folders = [] if spec is None else spec.submodule_search_locations or [""]
    found = any(not part or (Path(folder) / part).exists() for folder in folders)
    return None if found else f"{name} is not installed"
