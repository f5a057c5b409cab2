"""Other libraries' kernels for the registry's ops, each called as its own documentation calls it.

A row is a provider: the package that must be installed, and per op a function over the op's own arguments.
What a library cannot express raises `Unfit` with the reason, which ends up in the cell. Results are checked
against float64 like everyone's, so a row that no longer fits its library shows as an error, never as a time.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.kernels import OPS
from fusekit.kernels.attention_form import Form


class Unfit(Exception):
    """The library has no kernel for these arguments."""


@dataclass(frozen=True)
class Rival:
    """package: the distribution to install ("" for PyTorch's own). functions: by op name."""

    package: str
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def version(self) -> str | None:
        if not self.package:
            return torch.__version__
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def obstacle(self, device: torch.device) -> str | None:
        """Why it cannot be measured here."""
        if device.type != "cuda":
            return "needs a CUDA GPU"
        if self.version() is None:
            return f"not installed: pip install {self.package}"
        return None if self.functions else "has no counterpart of any op of the registry"


def _liger_rms(x, residual, weight, eps, offset=0.0):  # type: ignore[no-untyped-def]
    if weight is None:
        raise Unfit("needs a weight")
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    mode = "gemma"  # one rounding at the end, as the op defines it; "llama" rounds before the weight
    if residual is None:
        return LigerRMSNormFunction.apply(x, weight, eps, offset, mode, False), x.new_empty(0)
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, offset, mode, False)


def _liger_layer_norm(x, residual, weight, bias, eps):  # type: ignore[no-untyped-def]
    if weight is None or bias is None:
        raise Unfit("needs a weight and a bias")
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    h = x if residual is None else x + residual
    return LigerLayerNormFunction.apply(h, weight, bias, eps), h if residual is not None else h.new_empty(0)


def _quack_rms(x, residual, weight, eps, offset=0.0):  # type: ignore[no-untyped-def]
    if offset:
        raise Unfit("has no offset of the weight")
    from quack.rmsnorm import rmsnorm

    if residual is None:
        return rmsnorm(x, weight, eps=eps), x.new_empty(0)
    return rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)


_ATTENTION: Any = OPS["attention"].fused


def _form(q: Tensor, k: Tensor, v: Tensor, *settings: Any, able: tuple[str, ...] = ()) -> Form:
    """The op's arguments by name; those that are none of a library's abilities are `Unfit`."""
    defaults = [argument.default_value for argument in _ATTENTION._schema.arguments[3 + len(settings) :]]
    form = Form(*settings, *defaults)
    if form.mask is not None:
        raise Unfit("measured without a mask only")
    if form.dropout:
        raise Unfit("draws other random numbers than the op")
    if form.tf32 or q.dtype == torch.float32:
        raise Unfit("takes float16 and bfloat16")
    rest = ("window", "softcap", "sinks", "slopes", "places", "documents", "global_queries", "global_keys")
    for name in rest:
        if getattr(form, name) is not None and name not in able:
            raise Unfit(f"has no {name.replace('_', ' ')}")
    return form


def _flash_attention(q, k, v, *settings):  # type: ignore[no-untyped-def]
    form = _form(q, k, v, *settings, able=("window", "softcap", "slopes"))
    aligned = k.shape[-2] - q.shape[-2]
    low, high = (bound - aligned for bound in form.band)
    both_sides = form.causal and form.window is not None and low <= 0 <= high
    if (form.causal or form.slopes is not None) and form.offset != aligned and not both_sides:
        raise Unfit("aligns the last query with the last key")
    if form.slopes is not None and form.offset != aligned:
        raise Unfit("measures distances from the last query at the last key")
    if not form.causal and (form.window is not None or form.slopes is not None):
        raise Unfit("looks both ways from a query without causal, the op does not")
    from flash_attn import flash_attn_func

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = flash_attn_func(
        q, k, v, softmax_scale=form.scale, causal=form.causal and not (both_sides and high),
        window_size=(-1, -1) if form.window is None else (-low, high),
        softcap=form.softcap or 0.0,
        alibi_slopes=None if form.slopes is None else form.slopes.float(),
    )  # fmt: skip
    return out.transpose(1, 2)


def _top_left(form: Form) -> None:
    if form.causal and form.offset:
        raise Unfit("aligns a causal mask at the first key only")


def _xformers_attention(q, k, v, *settings):  # type: ignore[no-untyped-def]
    form = _form(q, k, v, *settings)
    _top_left(form)
    if q.shape[1] != k.shape[1]:
        raise Unfit("grouped queries need repeated keys there")
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    bias = LowerTriangularMask() if form.causal else None
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=form.scale).transpose(1, 2)


def _sdpa_with(backend: str) -> Callable[..., Tensor]:
    def attention(q, k, v, *settings):  # type: ignore[no-untyped-def]
        form = _form(q, k, v, *settings)
        _top_left(form)
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            grouped: Any = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
            return F.scaled_dot_product_attention(q, k, v, is_causal=form.causal, scale=form.scale, **grouped)

    return attention


RIVALS: dict[str, Rival] = {
    "liger-kernel": Rival("liger-kernel", {"add_rms_norm": _liger_rms, "add_layer_norm": _liger_layer_norm}),
    "quack": Rival("quack-kernels", {"add_rms_norm": _quack_rms}),
    "flash-attn": Rival("flash-attn", {"attention": _flash_attention}),
    "cudnn-sdpa": Rival("", {"attention": _sdpa_with("CUDNN_ATTENTION")}),
    "flash-sdpa": Rival("", {"attention": _sdpa_with("FLASH_ATTENTION")}),
    "xformers": Rival("xformers", {"attention": _xformers_attention}),
    "transformer-engine": Rival("transformer-engine"),
    "torchao": Rival("torchao"),
}
