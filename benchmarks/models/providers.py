"""Who runs a model's training step: rows of data. All get the same model, batch, optimizer and clipping.

bf16 of eager, torch.compile and Liger is torch.autocast; fusekit places its casts itself.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fusekit
from fusekit.kernels.linear_cpu import multiplies


class Unfit(Exception):
    """The provider has nothing for this model."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """kind: who runs the forward pass. options: of torch.compile or fusekit.optimize.

    start_seconds: until the first step is done, by device type, to plan with before anything is measured.
    """

    kind: str
    precision: str = "bf16"
    options: dict[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    start_seconds: dict[str, float] = field(default_factory=lambda: {"cpu": 10.0, "cuda": 20.0})

    @property
    def dtype(self) -> str:
        """In which most products run."""
        return {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}.get(self.precision, self.precision)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.kind == "fusekit" or self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def wrap(self, model: nn.Module) -> Callable[..., Any]:
        """What is called in the model's place.

        Raises:
            Unfit: there is nothing to wrap this model with.
        """
        return _WRAPPERS[self.kind](model, self)

    def emulated(self, device: torch.device) -> bool:
        """Whether PyTorch's own products of this dtype are scalar code here; fusekit's run in float32."""
        own = self.kind != "fusekit" and self.precision == "bf16"
        return own and device.type == "cpu" and not multiplies(torch.bfloat16)

    def obstacle(self, device: torch.device) -> str | None:
        """Why it cannot be measured on this device, as a sentence; None: it can."""
        if device.type not in self.devices:
            return "needs a CUDA GPU"
        if self.kind == "liger" and self.version() is None:
            return "not installed: pip install liger-kernel"
        compiled = self.kind == "compile" or self.options.get("remainder") == "inductor"
        if compiled and device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            return "Inductor on a CPU needs a C++ compiler: install g++"
        return None

    def version(self) -> str | None:
        package = {"fusekit": "fusekit-compiler", "liger": "liger-kernel"}.get(self.kind, "torch")
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None


def _compiled(model: nn.Module, provider: Provider) -> Callable[..., Any]:
    return torch.compile(model, dynamic=False, **provider.options)


def _optimised(model: nn.Module, provider: Provider) -> Callable[..., Any]:
    """keep_logits=False: a training step reads the loss alone."""
    precision = "keep" if provider.precision == "float32" else provider.precision
    return fusekit.optimize(model, precision=precision, keep_logits=False, **provider.options)


def _liger(model: nn.Module, provider: Provider) -> Callable[..., Any]:
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise Unfit(f"liger-kernel has nothing for models of type {kind}")
    _apply_liger_kernel_to_instance(model=model)
    return model


_WRAPPERS: dict[str, Callable[[nn.Module, Provider], Callable[..., Any]]] = {
    "eager": lambda model, provider: model,
    "compile": _compiled,
    "fusekit": _optimised,
    "liger": _liger,
}
_COMPILING = {"cpu": 35.0, "cuda": 60.0}  # about: Inductor writes and builds both directions
_TUNING = {"cpu": 240.0, "cuda": 240.0}
_MAX = {"mode": "max-autotune"}
_INDUCTOR = {"remainder": "inductor"}

REFERENCE = "eager float32"  # its losses are what the others are held against
PROVIDERS: dict[str, Provider] = {
    REFERENCE: Provider(kind="eager", precision="float32"),
    "eager bf16": Provider(kind="eager"),
    "compile float32": Provider(kind="compile", precision="float32", start_seconds=_COMPILING),
    "compile bf16": Provider(kind="compile", start_seconds=_COMPILING),
    "compile-max bf16": Provider(kind="compile", options=_MAX, devices=("cuda",), start_seconds=_TUNING),
    "liger bf16": Provider(kind="liger", devices=("cuda",)),
    "fusekit float32": Provider(kind="fusekit", precision="float32", options={"remainder": "eager"}),
    "fusekit bf16": Provider(kind="fusekit", options={"remainder": "eager"}),
    "fusekit bf16 inductor": Provider(kind="fusekit", options=_INDUCTOR, start_seconds=_COMPILING),
    "fusekit fp8": Provider(kind="fusekit", precision="fp8", start_seconds={"cpu": 10.0, "cuda": 60.0}),
}
# Where the time is short, these are measured first; the rest follows in the order above. Eager bf16's losses
# are what other bf16 ones may also agree with, so it comes early unless a step of it takes a minute.
FIRST = (REFERENCE, "eager bf16", "fusekit bf16", "compile bf16", "fusekit bf16 inductor")


def in_order(names: Iterable[str], device: torch.device) -> list[str]:
    """The order to measure providers in."""
    first = [name for name in FIRST if name != "eager bf16" or not PROVIDERS[name].emulated(device)]
    return sorted(names, key=[*first, *(name for name in PROVIDERS if name not in first)].index)
