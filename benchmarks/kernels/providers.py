"""Who computes an op in the kernel suite: PyTorch, eager and compiled, fusekit, and rival libraries."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.cases import BASELINES, MEASURED
from benchmarks.kernels.rivals import RIVALS, Unfit

OURS = "fusekit"
STANDARD = ("eager", "compile", OURS)
PROVIDERS = (*STANDARD, "compile-max", *RIVALS)
_MODES = {"compile": None, "compile-max": "max-autotune-no-cudagraphs"}


def survey(names: tuple[str, ...], device: torch.device) -> dict[str, dict[str, str | None]]:
    """Per provider its version, and under "obstacle" why it cannot be measured on this device, or None."""
    found: dict[str, dict[str, str | None]] = {}
    for name in names:
        rival = RIVALS.get(name)
        if rival is not None:
            found[name] = {"version": rival.version(), "obstacle": rival.obstacle(device)}
        else:
            found[name] = {"version": torch.__version__, "obstacle": _obstacle(name, device)}
    return found


def _obstacle(name: str, device: torch.device) -> str | None:
    if name in _MODES and device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        return "torch.compile on a CPU needs a C++ compiler: install g++"
    return None


def function(provider: str, op: str) -> Callable[..., Any]:
    """The callable over the op's own arguments.

    Raises:
        Unfit: the provider has nothing for this op.
    """
    if provider == OURS:
        return MEASURED[op].fused
    if provider == "eager":
        return BASELINES.get(op, MEASURED[op].reference)
    if provider in _MODES:
        return _compiled(BASELINES.get(op, MEASURED[op].reference), _MODES[provider])
    if op not in RIVALS[provider].functions:
        raise Unfit(f"{provider} has no counterpart of {op}")
    return RIVALS[provider].functions[op]


def _compiled(fn: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    torch._functorch.config.donated_buffer = False  # the backward pass runs many times over one forward
    return torch.compile(fn, dynamic=False, mode=mode)
