"""Low-precision copies of float32 Parameters, made once per update and not once per micro-batch.

A stale copy would train on old weights without a word, so a copy is reused only where nothing can have
written to its parameter. `Parameter._version` alone cannot tell: `p.data.add_()` and fused optimizers leave
it as it was. A copy is reused only if all of these hold:

  - the same Parameter, at the same address, with the same `_version`, and no `torch.optim` optimizer has
    stepped;
  - gradients are being recorded, and the parameter takes part: inference casts on every call;
  - its updates are known to be seen: an optimizer's step or a new `_version` has ended an earlier window. A
    loop that writes to `p.data` by hand never gets here, and casts on every call;
  - an accumulation window is open: `p.grad` is the tensor it was, untouched or added to by one backward pass,
    or the new one that the first backward pass after `zero_grad()` makes;
  - on the CPU, a few elements compare equal. On a GPU the comparison would stall the device: there, `p.data`
    written *between the micro-batches of one window*, with `p.grad` left alone, is the one change that goes
    unseen.

Every call gets a fresh alias of the copy. Refreshing writes in place where nobody holds the copy, and into
new memory where an unfinished autograd graph does, as eager would keep the old weights of a linear's
backward alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from fusekit.passes.region import InputCast

SAMPLES = 16  # elements compared per parameter on the CPU

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_pre_hook(_count_step)  # a step that raises half way has written as well
register_optimizer_step_post_hook(_count_step)


@dataclass
class _Copy:
    """One parameter's copy and the state it was made in."""

    low: Tensor
    parameter: weakref.ref[Tensor]
    address: int = 0
    version: int = -1
    steps: int = -1
    grad: weakref.ref[Tensor] | None = None
    grad_version: int = 0
    updates_seen: bool = False
    sample: Tensor | None = None
    idle_users: int = 0


class WeightCache:
    """The copies of one captured graph, by graph input. Dropping it frees them."""

    def __init__(self) -> None:
        self.copies: dict[int, _Copy] = {}
        self.sampled = True  # compare elements, where that does not stall a device
        self.refreshed = 0  # casts made so far, for tests and reports


def cast_parameters(
    args: Sequence[Any], input_casts: Sequence[InputCast], cache: WeightCache
) -> tuple[Any, ...]:
    """The graph's inputs: `args`, followed by a low-precision copy for each of `input_casts`.

    Gradients of a copy arrive at its parameter in the parameter's dtype.
    """
    if not input_casts:
        return tuple(args)
    lows: dict[int, Tensor] = {}
    stale: list[InputCast] = []
    for cast in input_casts:
        parameter, copy = args[cast.source], cache.copies.get(cast.target)
        recorded = torch.is_grad_enabled() and parameter.requires_grad
        if recorded and copy is not None and _is_fresh(copy, parameter, cache.sampled):
            _open_window(copy, parameter)
            lows[cast.target] = copy.low
        else:
            stale.append(cast)
    lows.update(_refresh(args, stale, cache))
    extended = list(args)
    for cast in sorted(input_casts, key=lambda c: c.target):
        assert cast.target == len(extended), "copies are the graph's last inputs"
        extended.append(_CastParameter.apply(args[cast.source], lows[cast.target]))
    return tuple(extended)


class _CastParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, low: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return low.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_output.to(ctx.dtype), None


def _is_fresh(copy: _Copy, parameter: Tensor, sampled: bool) -> bool:
    return (
        copy.parameter() is parameter
        and copy.address == parameter.data_ptr()
        and copy.version == parameter._version
        and copy.steps == _optimizer_steps
        and copy.low.shape == parameter.shape
        and _in_window(copy, parameter.grad)
        and not (sampled and _sample_differs(copy, parameter))
    )


def _in_window(copy: _Copy, grad: Tensor | None) -> bool:
    if grad is None or not copy.updates_seen:
        return False
    if copy.grad is None:
        return grad._version == 0
    return copy.grad() is grad and grad._version - copy.grad_version in (0, 1)


def _open_window(copy: _Copy, parameter: Tensor) -> None:
    grad = parameter.grad
    copy.grad = None if grad is None else weakref.ref(grad)
    copy.grad_version = 0 if grad is None else grad._version


def _refresh(args: Sequence[Any], stale: Sequence[InputCast], cache: WeightCache) -> dict[int, Tensor]:
    """Cast all stale parameters in one multi-tensor copy."""
    lows: dict[int, Tensor] = {}
    for cast in stale:
        parameter, copy = args[cast.source], cache.copies.get(cast.target)
        kept = torch.is_grad_enabled() and parameter.requires_grad
        if kept and copy is not None and _can_overwrite(copy, parameter):
            lows[cast.target] = copy.low
        else:
            lows[cast.target] = torch.empty_like(parameter, dtype=cast.dtype, requires_grad=False)
        if kept:
            cache.copies[cast.target] = _record(copy, parameter, lows[cast.target])
    if stale:
        with torch.no_grad():
            torch._foreach_copy_(list(lows.values()), [args[cast.source] for cast in stale])
    cache.refreshed += len(stale)
    return lows


def _record(copy: _Copy | None, parameter: Tensor, low: Tensor) -> _Copy:
    seen = (
        copy is not None
        and copy.parameter() is parameter
        and (copy.updates_seen or copy.steps != _optimizer_steps or copy.version != parameter._version)
    )
    idle = copy.idle_users if copy is not None and copy.low is low else _users(low)
    new = _Copy(low, weakref.ref(parameter), parameter.data_ptr(), parameter._version, _optimizer_steps)
    new.updates_seen, new.sample, new.idle_users = seen, _sample(parameter), idle
    _open_window(new, parameter)
    return new


def _can_overwrite(copy: _Copy, parameter: Tensor) -> bool:
    same_kind = copy.low.shape == parameter.shape and copy.low.device == parameter.device
    return same_kind and copy.low.stride() == parameter.stride() and _users(copy.low) <= copy.idle_users


def _users(low: Tensor) -> int:
    """How many tensors share the memory, those that an autograd graph saved included."""
    return torch._C._storage_Use_Count(low.untyped_storage()._cdata)


def _sample(parameter: Tensor) -> Tensor | None:
    if parameter.device.type != "cpu":
        return None
    return _elements(parameter).clone()


def _sample_differs(copy: _Copy, parameter: Tensor) -> bool:
    return copy.sample is not None and not torch.equal(copy.sample, _elements(parameter))


def _elements(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLES)]
