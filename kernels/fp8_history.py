r"""Delayed scaling: a tensor's scale from its largest magnitudes of the last H steps, of all layers at once.

    history[cursor] = amax,   amax = 0,   cursor = cursor + 1 mod H
    scale = largest power of two with max(history) * scale <= largest * 2^-margin

Micikevicius et al. 2022, arXiv:2209.05433, section 3. A layer has three slots: x, weight, gradient. Its
`linear_fp8` reads the three scales and raises the three amax; `update` moves all histories of a model in one
launch, or one call on a CPU, without synchronisation. amax is a running maximum, so micro-batches accumulate
and the second forward pass of a checkpoint changes nothing.

A scale of 0 says that nothing has been seen yet: `linear_fp8` then takes the tensor's own scale, so the first
step of a run is one with current scales, bit for bit.

An amax that is zero, infinite or NaN says nothing about the next step: the slot's history stands still and
its scale stays. So a second optimizer's step, a layer that took no part and a step that overflowed change
nothing.
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
def update_kernel(
    history_ptr, amax_ptr, scale_ptr, cursor_ptr, top_ptr, taken_ptr, skip_ptr, H, BLOCK: tl.constexpr
):
    """One slot a program. amax, scale and history are float32 seen as their integer patterns."""
    slot = tl.program_id(0).to(tl.int64)
    amax, cursor = tl.load(amax_ptr + slot), tl.load(cursor_ptr + slot)
    taken = amax > 0
    if taken_ptr is not None:
        taken = taken & (tl.load(taken_ptr + slot) > 0)
    moves = taken & (amax < 0x7F800000)
    if skip_ptr is not None:
        moves = moves & (tl.load(skip_ptr) == 0)
    places = tl.arange(0, BLOCK)
    history = tl.load(history_ptr + slot * H + places, mask=places < H, other=0)
    largest = tl.max(tl.where(places == cursor, amax, history), axis=0)
    exponent = tl.maximum(largest >> 23, 35) + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = (254 + tl.load(top_ptr + slot) - exponent) << 23
    tl.store(history_ptr + slot * H + cursor, amax, mask=moves)
    tl.store(scale_ptr + slot, scale, mask=moves)
    tl.store(cursor_ptr + slot, (cursor + 1) % H, mask=moves)
    tl.store(amax_ptr + slot, 0, mask=taken)


def update(
    history: Tensor,
    amax: Tensor,
    scale: Tensor,
    cursor: Tensor,
    top: Tensor,
    taken: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """Move the histories by one step, in place, and empty amax.

    Args:
        history: (S, H) float32; amax, scale: (S,) float32; cursor: (S,) int32, the next place.
        top: (S,) int32, the exponent of each slot's largest code, less the margin.
        taken: (S,) int32, 0 where a slot is left alone, its amax included; None: all are taken.
        skip: one float32, not 0 where the step was skipped: amax is emptied and nothing moves.
    """
    S, H = history.shape
    patterns = [t.view(torch.int32) for t in (history, amax, scale)]
    if on_gpu(amax):
        block = triton.next_power_of_2(H)
        launch(update_kernel, (S,), *patterns, cursor, top, taken, skip, H, BLOCK=block, num_warps=4)
        return
    # .data: backward passes that are still to come, of layers that are not taken, have saved views of these.
    places, seen, scales, cursor = (t.data for t in (*patterns, cursor))
    emptied = seen > 0 if taken is None else (seen > 0) & (taken > 0)
    moves = emptied & (seen < _INFINITY)
    if skip is not None:
        moves &= skip == 0
    here = cursor.long()[:, None]
    places.scatter_(1, here, torch.where(moves[:, None], seen[:, None], places.gather(1, here)))
    largest = places.amax(1)
    exponent = (largest >> 23).clamp_(min=_LEAST_FIELD) + ((largest & _MANTISSA) > _THREE_QUARTERS).int()
    scales.copy_(torch.where(moves, (254 + top - exponent) << 23, scales))
    cursor.copy_(torch.where(moves, (cursor + 1) % H, cursor))
    seen.masked_fill_(emptied, 0)


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
        self.scale = torch.zeros(slots, device=device)
        self.amax = torch.zeros(slots, device=device)
        self.history = torch.zeros(slots, length, device=device)
        self.cursor = torch.zeros(slots, dtype=torch.int32, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """`scale` and `amax` of one layer, as linear_fp8 takes them; views of this state."""
        slots = slice(SLOTS * index, SLOTS * (index + 1))
        return self.scale[slots], self.amax[slots]

    def update(
        self,
        group: torch.distributed.ProcessGroup | None = None,
        *,
        taken: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        """Once a step, after the last backward pass.

        Args:
            group: ranks that agree on the largest amax; None: this process alone.
            taken, skip: as of `update` above.
        """
        if group is not None:
            # As integers NaN is the largest; the maximum of floats may drop it.
            torch.distributed.all_reduce(
                self.amax.view(torch.int32), torch.distributed.ReduceOp.MAX, group=group
            )
        update(self.history, self.amax, self.scale, self.cursor, self.top, taken, skip)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds; amax too, for one taken between two micro-batches."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """In place, so that views handed out stay valid."""
        for name in STATE:
            own = getattr(self, name)
            given = state.get(name)
            if not isinstance(given, Tensor) or given.shape != own.shape:
                found = tuple(given.shape) if isinstance(given, Tensor) else "missing"
                raise ValueError(
                    f"DelayedScales: {name} of the checkpoint is {found}, of this model {tuple(own.shape)}; "
                    f"it was written by a model with other layers or another history length"
                )
            own.copy_(given)
