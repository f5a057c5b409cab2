"""What attention's forward pass was measured to take on a device, by implementation and bucket of shapes.

One file a device in the user's cache folder, attention-<device>.json, written by `fusekit bench --tune` and
by `verify` (also `optimize(..., verify=...)`), never by a training step. Times of another PyTorch, Triton,
flash-attn or fusekit do not count.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from fusekit.kernels.attention_form import Form
from fusekit.kernels.config_table import bucket, slug
from fusekit.kernels.cpu_library import cache_folder

Times = dict[str, float]  # seconds by implementation
RUNS = 15


def key(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str:
    """The bucket of a call: sizes to the next power of two, and what it is beyond its sizes."""
    B, H, Tq, D = q.shape
    sees = "causal" if form.causal else "full"
    if form.window is not None:
        sees += f" window {bucket(form.window)}"
    if form.softcap is not None:
        sees += " capped"
    dtype = str(q.dtype).removeprefix("torch.")
    shapes = f"{bucket(B * k.shape[1])}x{H // k.shape[1]} heads {bucket(Tq)}x{bucket(k.shape[2])}"
    return f"{dtype} {shapes} features {D}x{v.shape[-1]} {sees}"


def measured(device: torch.device, bucket_key: str) -> Mapping[str, float]:
    """What is known of a bucket; empty where it was not measured on this device and these versions."""
    return _held(device_name(device)).get(bucket_key, {})


def record(device: torch.device, bucket_key: str, times: Times) -> Path:
    """Keep the times of a bucket, here and on disk."""
    name = device_name(device)
    held = _held(name)
    held[bucket_key] = times
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"versions": _versions(), "seconds": held}, indent=1, sort_keys=True)
    # Written beside its place and moved there, so that another process never reads half a file.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text + "\n")
    os.replace(file.name, path)
    return path


def seconds(run: Callable[[], object]) -> float:
    """Median of calls on the GPU, by its own events."""
    taken = []
    for count in range(RUNS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if count >= 3:  # the first compile and fill caches
            taken.append(start.elapsed_time(end) * 1e-3)
    return median(taken)


def device_name(device: torch.device) -> str:
    return slug(torch.cuda.get_device_name(device)) if torch.backends.cuda.is_built() else device.type


def forget() -> None:
    """Read the files again: another process may have measured."""
    _held.cache_clear()


@functools.cache
def _held(name: str) -> dict[str, Times]:
    """The file's times; none where it is absent, damaged, or of other versions."""
    try:
        held = json.loads(_path(name).read_text(encoding="utf-8"))
        return dict(held["seconds"]) if held["versions"] == _versions() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _path(name: str) -> Path:
    return cache_folder() / f"attention-{name}.json"


@functools.cache
def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for package in ("triton", "flash-attn", "fusekit-compiler"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
