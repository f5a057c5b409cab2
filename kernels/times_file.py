"""What implementations of a call were measured to take on a device, by suite and bucket of shapes.

One file a suite and device in the user's cache folder, <suite>-<device>.json, written by `fusekit bench
--tune` and by `verify` (also `optimize(..., verify=...)`), never by a training step. Times of another
PyTorch, Triton, flash-attn or fusekit do not count.
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
from typing import NamedTuple

import torch

from fusekit.kernels import tape
from fusekit.kernels.config_table import slug
from fusekit.kernels.cpu_library import cache_folder

Times = dict[str, float]  # seconds by implementation
WRONG = float("inf")  # seconds of one whose result differs
OWN = "own kernel"
RUNS = 15


class Choice(NamedTuple):
    """Who runs a call, and why, in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


def fastest(found: Mapping[str, float], able: list[str]) -> Choice | None:
    """Of the own kernel and those that are able, where it was measured whether that is one of them."""
    times = {name: taken for name, taken in found.items() if name in (OWN, *able)}
    if OWN not in times or len(times) == 1:
        return None
    best = min(times, key=times.__getitem__)
    others = (f"{name} {_told(taken)}" for name, taken in times.items() if name != best)
    return Choice(best, f"measured {times[best] * 1e6:.0f} µs, {', '.join(others)}")


def _told(taken: float) -> str:
    return "differs" if taken == WRONG else f"{taken * 1e6:.0f}"


def measured(suite: str, device: torch.device, bucket_key: str) -> Mapping[str, float]:
    """What is known of a bucket; empty where it was not measured on this device and these versions."""
    return _held(suite, device_name(device)).get(bucket_key, {})


def record(suite: str, device: torch.device, bucket_key: str, times: Times) -> Path:
    """Keep the times of a bucket, here and on disk."""
    name = device_name(device)
    held = _held(suite, name)
    held[bucket_key] = times
    path = _path(suite, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"versions": _versions(), "seconds": held}, indent=1, sort_keys=True)
    # Written beside its place and moved there, so that another process never reads half a file.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text + "\n")
    os.replace(file.name, path)
    tape.forget()
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
def _held(suite: str, name: str) -> dict[str, Times]:
    """The file's times; none where it is absent, damaged, or of other versions."""
    try:
        held = json.loads(_path(suite, name).read_text(encoding="utf-8"))
        return dict(held["seconds"]) if held["versions"] == _versions() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _path(suite: str, name: str) -> Path:
    return cache_folder() / f"{suite}-{name}.json"


@functools.cache
def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for package in ("triton", "flash-attn", "flash-attn-3", "flash-attn-4", "fusekit-compiler"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
