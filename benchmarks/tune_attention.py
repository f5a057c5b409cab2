"""Measures who computes attention's passes the fastest on this GPU, for shapes that training meets.

Part of `fusekit bench --tune`; what is found is kept in the user's cache folder (kernels/attention_times.py).
Nothing is measured where the own kernel is the only one that computes a call exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from torch import Tensor

from fusekit.kernels import attention

Clock = Callable[[Callable[[], object]], float]
# (batch, heads, key heads, tokens, features): small GPT, BERT, ViT; Llama's sizes, short and long.
SHAPES = (
    (8, 12, 12, 1024, 64), (16, 12, 12, 512, 64), (32, 12, 12, 256, 64), (4, 16, 16, 2048, 64),
    (4, 32, 8, 2048, 128), (1, 32, 8, 8192, 128), (2, 32, 32, 4096, 128), (8, 16, 8, 1024, 128),
    (2, 8, 4, 2048, 256),
)  # fmt: skip


def run(
    device: torch.device,
    console: Console,
    *,
    minutes: float = 3.0,
    shapes: tuple[tuple[int, int, int, int, int], ...] = SHAPES,
    clock: Clock | None = None,
) -> dict[str, dict[str, float]]:
    """Seconds by implementation, by name of the call; empty for calls without a choice.

    Args:
        device: a CUDA device.
        minutes: of time; calls that it does not reach are left out.
        clock: instead of the device's own.
    """
    end, found = time.monotonic() + 60 * minutes, {}
    for name, (q, k, v), causal in _calls(device, shapes):
        if time.monotonic() > end:
            console.print("attention: the time was over, some shapes are left", highlight=False)
            break
        found[name] = times = attention.measure(q, k, v, None, causal, deterministic=False, clock=clock)
        if times:
            fastest_first = sorted(times.items(), key=lambda pair: pair[1])
            told = ", ".join(f"{who} {seconds * 1e6:.0f} µs" for who, seconds in fastest_first)
            console.print(f"attention {name}: {told}", highlight=False)
    return found


def _calls(
    device: torch.device, shapes: tuple[tuple[int, int, int, int, int], ...]
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor], bool]]:
    for dtype in (torch.bfloat16, torch.float16):
        for B, H, kv_heads, T, D in shapes:
            q, k, v = (
                torch.randn(B, T, heads, D, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
                for heads in (H, kv_heads, kv_heads)
            )
            for causal in (True, False):
                sees = "causal" if causal else "full"
                name = f"{str(dtype).removeprefix('torch.')} {B}x{H}/{kv_heads}x{T}x{D} {sees}"
                yield name, (q, k, v), causal
