"""Libraries that compute attention on a GPU, and which calls each may take.

A library takes a call only where its documentation says that it computes the same function; what it says
nothing of, our own kernel keeps. In particular
    dropout     draws other numbers than Philox does in our backward kernels;
    masks       a row without keys is zero here, and not everywhere;
    causal      is aligned to the first key in ours, to the last in flash-attn, and torch refuses lengths that
                differ: equal lengths are the same either way;
    backward    needs the output and each row's log sum exp, which every library returns, so that our own
                kernels can follow any of them. torch's flash and memory-efficient gradients are summed with
                atomics; cuDNN's are ordered on request only, and torch does not pass it on: it is for those
                who ask for no equal bits (attention_gradient.py).
Whether a library keeps its word on this machine is tried once: attention_trial.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.kernels import attention_packages as packages
from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_packages import width
from fusekit.kernels.op import LOW_PRECISION

aten = torch.ops.aten
Result = tuple[Tensor, Tensor]
Grads = tuple[Tensor, Tensor, Tensor]


class Library(NamedTuple):
    """unfit: None, or why it may not take this call. run: out (B, H, Tq, D) in any strides, and each row's
    natural log sum exp, (B, H, Tq) float32. absent: None, or why it cannot be called at all. gradient: dq,
    dk, dv of dy, q, k, v, out and that log sum exp in any strides; dy and out are (B, Tq, H, D) in memory."""

    name: str
    unfit: Callable[[Tensor, Tensor, Tensor, Form], str | None]
    run: Callable[[Tensor, Tensor, Tensor, Form], Result]
    absent: Callable[[], str | None]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Form], Grads] | None = None


def beyond_libraries(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str | None:
    """What no library computes as `attention` defines it, in a word or two."""
    if form.dropout > 0.0:
        return "dropout"
    if form.sinks is not None:
        return "sinks"
    if form.mask is not None:
        return "boolean mask" if form.mask.dtype == torch.bool else "additive mask"
    if q.dtype not in LOW_PRECISION:
        return "float32"
    if q.shape[-1] != v.shape[-1]:
        return "values of another width"
    if 0 in (q.numel(), k.numel()) or any(x.stride(-1) != 1 for x in (q, k, v)):
        return "strides"
    return None


def _plain(q: Tensor, k: Tensor, v: Tensor, form: Form, most: int) -> str | None:
    if form.softcap is not None:
        return "capped scores"
    if form.window is not None:
        return "window"
    if form.causal and (form.offset != 0 or q.shape[-2] != k.shape[-2]):
        return "causal with an offset" if form.offset else "causal over lengths that differ"
    return width(q, most)


def _ungrouped(q: Tensor, k: Tensor) -> str | None:
    """torch's operator for it wants heads repeated, which costs the memory that sharing saves."""
    return None if q.shape[1] == k.shape[1] else "shared key heads"


def _cudnn_unfit(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str | None:
    return _plain(q, k, v, form, most=128)


def _flash_unfit(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str | None:
    return _plain(q, k, v, form, most=256)


def _efficient_unfit(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str | None:
    return _ungrouped(q, k) or _plain(q, k, v, form, most=256)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Result:
    run = aten._scaled_dot_product_cudnn_attention.default
    out, lse, *_ = run(q, k, v, None, True, 0.0, form.causal, scale=form.scale)
    _lse_dims[0] = lse.ndim
    return out, lse.reshape(q.shape[:-1])  # one more dimension of one


_lse_dims = [3]  # which of the two this build of PyTorch returns, and wants back
# PyTorch keeps cuDNN's backward plans by sizes and strides of q, k and v, the band and dropout, but not by
# strides of out and dy, of which a plan is made as well (ATen/native/cudnn/MHA.cpp, MHAParams): one made for
# another dy would be run, without a word. Ours are always (B, T, H, D), and this no dropout, whose bits are
# not those of 0.0, keeps our plans apart from those of models beside ours. The trial would notice if not.
_NO_DROPOUT = -0.0


def _cudnn_gradient(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, form: Form
) -> Grads:
    """Seed and offset are not read without dropout; cumulative lengths are of packed sequences."""
    run = aten._scaled_dot_product_cudnn_attention_backward.default
    unread = q.new_empty((), dtype=torch.int64)
    dy = dy if dy.data_ptr() % 16 == 0 else dy.clone()  # plans are made for aligned tensors
    lse = lse.unsqueeze(-1) if _lse_dims[0] == 4 else lse
    return run(
        dy, q, k, v, out, lse, unread, unread, None, None, None, q.shape[-2], k.shape[-2], _NO_DROPOUT,
        form.causal, scale=form.scale,
    )  # fmt: skip


def _flash(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Result:
    run = aten._scaled_dot_product_flash_attention.default
    assert q.shape[-1] % 8 == 0, "unfit() says so: torch pads what is no multiple of 8 above this operator"
    out, lse, *_ = run(q, k, v, 0.0, form.causal, scale=form.scale)
    return out, lse[..., : q.shape[-2]]


def _efficient(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Result:
    run = aten._scaled_dot_product_efficient_attention.default
    out, lse, *_ = run(q, k, v, None, True, 0.0, form.causal, scale=form.scale)
    return out, lse[..., : q.shape[-2]]  # padded to whole blocks of queries


def _cudnn_absent() -> str | None:
    if not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    return None if torch.backends.cuda.cudnn_sdp_enabled() else "switched off in torch.backends.cuda"


def _flash_absent() -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch has no flash attention"
    return None if torch.backends.cuda.flash_sdp_enabled() else "switched off in torch.backends.cuda"


def _efficient_absent() -> str | None:
    if not torch.backends.cuda.is_built():
        return "this PyTorch has no CUDA"
    return None if torch.backends.cuda.mem_efficient_sdp_enabled() else "switched off in torch.backends.cuda"


# In the order in which they are preferred where nothing was measured.
LIBRARIES = (
    Library("cuDNN", _cudnn_unfit, _cudnn, _cudnn_absent, _cudnn_gradient),
    Library("flash-attn 4", packages.unfit_4, packages.run_4, packages.absent_4),
    Library("flash-attn 3", packages.unfit, packages.run_3, packages.absent_3),
    Library("flash-attn", packages.unfit, packages.run_2, packages.absent_2),
    Library("SDPA flash", _flash_unfit, _flash, _flash_absent),
    Library("SDPA memory-efficient", _efficient_unfit, _efficient, _efficient_absent),
)
