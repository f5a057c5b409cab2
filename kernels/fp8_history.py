r"""Delayed scaling: a tensor's scale from its largest magnitudes of the last H steps, of all layers at once.

    history[cursor] = amax,   amax = 0,   cursor = cursor + 1 mod H
    scale = largest power of two with max(history) * scale <= largest * 2^-margin

Micikevicius et al. 2022, arXiv:2209.05433, section 3. A layer has three slots: x, weight, gradient. Its
`linear_fp8` reads the three scales and raises the three amax; `update` moves all histories of a model in one
launch, or one call on a CPU, without synchronisation. amax is a running maximum, so micro-batches accumulate
and the second forward pass of a checkpoint changes nothing.

An amax that is zero, infinite or NaN says nothing about the next step: it leaves an empty place in the
history, and a history of empty places leaves the scale. One overflowing step therefore harms no scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusekit.kernels._triton import tl, triton
from fusekit.kernels.fp8_format import TOP_EXPONENT
from fusekit.kernels.launch import launch, on_gpu
from fusekit.kernels.recipe import Recipe

SLOTS = 3  # x, weight, gradient
STATE = ("scale", "amax", "history", "cursor")

_MANTISSA, _THREE_QUARTERS, _INFINITY = 0x007FFFFF, 0x00600000, 0x7F800000
_LEAST_FIELD = 127 - 92  # of amax: smaller ones count as 2^-92, so that code / scale stays a normal bfloat16


@triton.jit
def update_kernel(history_ptr, amax_ptr, scale_ptr, cursor_ptr, top_ptr, H, BLOCK: tl.constexpr):
    """One slot a program. amax, scale and history are float32 seen as their integer patterns."""
    slot = tl.program_id(0).to(tl.int64)
    amax, cursor = tl.load(amax_ptr + slot), tl.load(cursor_ptr + slot)
    amax = tl.where(amax < 0x7F800000, amax, 0)
    places = tl.arange(0, BLOCK)
    history = tl.load(history_ptr + slot * H + places, mask=places < H, other=0)
    largest = tl.max(tl.where(places == cursor, amax, history), axis=0)
    exponent = tl.maximum(largest >> 23, 35) + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = (254 + tl.load(top_ptr + slot) - exponent) << 23
    tl.store(history_ptr + slot * H + cursor, amax)
    tl.store(scale_ptr + slot, tl.where(largest > 0, scale, tl.load(scale_ptr + slot)))
    tl.store(amax_ptr + slot, 0)
    tl.store(cursor_ptr + slot, (cursor + 1) % H)


def update(history: Tensor, amax: Tensor, scale: Tensor, cursor: Tensor, top: Tensor) -> None:
    """Move every history by one step, in place.

    Args:
        history: (S, H) float32; amax, scale: (S,) float32; cursor: (S,) int32, the next place.
        top: (S,) int32, the exponent of each slot's largest code, less the margin.
    """
    S, H = history.shape
    patterns = [t.view(torch.int32) for t in (history, amax, scale)]
    if on_gpu(amax):
        block = triton.next_power_of_2(H)
        launch(update_kernel, (S,), *patterns, cursor, top, H, BLOCK=block, num_warps=4)
        return
    places, seen, scales = patterns
    seen.masked_fill_(seen >= _INFINITY, 0)
    places.scatter_(1, cursor.long()[:, None], seen[:, None])
    largest = places.amax(1)
    exponent = (largest >> 23).clamp_(min=_LEAST_FIELD) + ((largest & _MANTISSA) > _THREE_QUARTERS).int()
    scales.copy_(torch.where(largest > 0, (254 + top - exponent) << 23, scales))
    amax.zero_()
    cursor.add_(1).remainder_(H)


class DelayedScales:
    """The delayed scales of a model's layers.

    Args:
        recipes: one a layer.
        length: of a history, 1 to 1024 steps.
        margin: bits of headroom above the largest magnitude seen.
        device: of the state.
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        *,
        length: int = 1024,
        margin: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 1 <= length <= 1024:
            raise ValueError(f"DelayedScales: a history of {length} steps is not within 1 to 1024")
        if not 0 <= margin <= 8:
            raise ValueError(f"DelayedScales: a margin of {margin} bits is not within 0 to 8")
        slots = SLOTS * len(recipes)
        dtypes = [dtype for r in recipes for dtype in (r.forward, r.forward, r.gradient)]
        tops = [TOP_EXPONENT[dtype] - margin for dtype in dtypes]
        self.top = torch.tensor(tops, dtype=torch.int32, device=device)
        self.scale = torch.ones(slots, device=device)
        self.amax = torch.zeros(slots, device=device)
        self.history = torch.zeros(slots, length, device=device)
        self.cursor = torch.zeros(slots, dtype=torch.int32, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """`scale` and `amax` of one layer, as linear_fp8 takes them; views of this state."""
        slots = slice(SLOTS * index, SLOTS * (index + 1))
        return self.scale[slots], self.amax[slots]

    def update(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Once a step, after the last backward pass; ranks of `group`, or all, agree on the largest amax."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # As integers NaN is the largest; the maximum of floats may drop it.
            torch.distributed.all_reduce(
                self.amax.view(torch.int32), torch.distributed.ReduceOp.MAX, group=group
            )
        update(self.history, self.amax, self.scale, self.cursor, self.top)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds; amax too, for one taken between two micro-batches."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """In place, so that views handed out stay valid."""
        for name in STATE:
            own = getattr(self, name)
            if name not in state or state[name].shape != own.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(
                    f"DelayedScales: {name} of the checkpoint is {found}, of this model {tuple(own.shape)}; "
                    f"it was written by a model with other layers or another history length"
                )
            own.copy_(state[name])
