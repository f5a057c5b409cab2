"""Measures who computes FP8 products the fastest on this GPU, for layers that training meets.

Part of `fusekit bench --tune`; what is found is kept in the user's cache folder (kernels/times_file.py).
Nothing is measured where the own kernel is the only one that computes a product exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from rich.console import Console

from fusekit.kernels import fp8_choice

Clock = Callable[[Callable[[], object]], float]
# (tokens, input features, output features) of Llama's layers, from 1B to 8B.
LAYERS = (
    (8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (8192, 2048, 2048), (8192, 2048, 8192),
    (8192, 8192, 2048), (16384, 8192, 8192),
)  # fmt: skip
RECIPES = ("fp8-tensorwise", "fp8-rowwise", "fp8-block")  # delayed scales are the first's products


def run(
    device: torch.device,
    console: Console,
    *,
    minutes: float = 1.0,
    layers: tuple[tuple[int, int, int], ...] = LAYERS,
    clock: Clock | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds by implementation, by product, by name of the layer.

    Args:
        device: a CUDA device.
        minutes: of time; layers that it does not reach are left out.
        clock: instead of the device's own.
    """
    end = time.monotonic() + 60 * minutes
    found: dict[str, dict[str, dict[str, float]]] = {}
    for tokens, width, features in layers:
        for recipe in RECIPES:
            if time.monotonic() > end:
                console.print("FP8 products: the time was over, some layers are left", highlight=False)
                return found
            x = torch.empty(tokens, width, device=device, dtype=torch.bfloat16)
            weight = torch.empty(features, width, device=device)
            name = f"{recipe} {tokens}x{width}x{features}"
            found[name] = fp8_choice.measure(x, weight, None, "none", recipe, clock)
            for product, times in found[name].items():
                fastest_first = sorted(times.items(), key=lambda pair: pair[1])
                told = ", ".join(f"{who} {seconds * 1e6:.0f} µs" for who, seconds in fastest_first)
                console.print(f"{name} {product}: {told}", highlight=False)
    return found
