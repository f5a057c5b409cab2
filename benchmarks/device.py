"""The device that a benchmark runs on, and its name in file names."""

from __future__ import annotations

import re

import torch


def device_at_hand(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" as a device; auto is a GPU where there is one.

    Raises:
        ValueError: cuda, and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA GPU here; `fusekit doctor` says what it finds")
    return torch.device(name)


def slug(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
