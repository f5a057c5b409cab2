"""What attention's passes were measured to take on a device, by implementation and bucket of shapes.

The file is attention-<device>.json: times_file.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fusekit.kernels import times_file
from fusekit.kernels.attention_form import Form
from fusekit.kernels.config_table import bucket
from fusekit.kernels.times_file import Times

SUITE = "attention"


def key(q: Tensor, k: Tensor, v: Tensor, form: Form, backward: bool = False) -> str:
    """The bucket of a call: sizes to the next power of two, and what it is beyond its sizes."""
    B, H, Tq, D = q.shape
    sees = "causal" if form.causal else "full"
    if form.window is not None:
        sees += f" window {bucket(form.window)}"
    if form.softcap is not None:
        sees += " capped"
    dtype = str(q.dtype).removeprefix("torch.")
    shapes = f"{bucket(B * k.shape[1])}x{H // k.shape[1]} heads {bucket(Tq)}x{bucket(k.shape[2])}"
    return f"{dtype} {shapes} features {D}x{v.shape[-1]} {sees}{' backward' * backward}"


def measured(device: torch.device, bucket_key: str) -> Mapping[str, float]:
    return times_file.measured(SUITE, device, bucket_key)


def record(device: torch.device, bucket_key: str, times: Times) -> Path:
    return times_file.record(SUITE, device, bucket_key, times)
