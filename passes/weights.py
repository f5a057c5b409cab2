"""Low-precision copies of float32 Parameters, made once per update and not once per micro-batch: cast to 16
bits, or quantised to FP8 in the layouts that a layer's products take.

A stale copy would train on old weights without a word, so a copy is reused only where nothing can have
written to its parameter. `Parameter._version` alone cannot tell: `p.data.add_()` and fused optimizers leave
it as it was. A copy is reused only if all of these hold:

  - the same Parameter, at the same address, with the same `_version`, and no `torch.optim` optimizer has
    stepped;
  - gradients are being recorded, and the parameter takes part: inference casts on every call. FP8 codes have
    rules of their own there: frozen.py;
  - its updates are known to be seen: an optimizer's step or a new `_version` has ended an earlier window. A
    loop that writes to `p.data` by hand never gets here, and casts on every call;
  - an accumulation window is open: `p.grad` is the tensor it was, untouched or added to by one backward pass,
    or the new one that the first backward pass after `zero_grad()` makes;
  - on the CPU, a few elements compare equal. On a GPU the comparison would stall the device: there, `p.data`
    written *between the micro-batches of one window*, with `p.grad` left alone, is the one change that goes
    unseen.

Every call gets a fresh alias of a cast copy. Refreshing writes in place where nobody holds the copy, and into
new memory where an unfinished autograd graph does, as eager would keep the old weights of a linear's
backward alive. A quantised copy carries no gradient, is handed out as it is, and is never written to again.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fusekit.kernels.fp8_operand import fp8_operand
from fusekit.kernels.library import Function
from fusekit.kernels.linear_fp8_cpu import WEIGHT
from fusekit.kernels.recipe import Recipe
from fusekit.passes import _compat
from fusekit.passes.delayed import ModelScales
from fusekit.passes.frozen import Held, elements_of, holds, may_hold
from fusekit.passes.inputs import InputCast, InputOperand, InputScales

Copied = InputCast | InputOperand

SAMPLES = 16  # elements compared per parameter on the CPU

_optimizer_steps = 0


@_compat.untraced
def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_pre_hook(_count_step)  # a step that raises half way has written as well
register_optimizer_step_post_hook(_count_step)


@dataclass(slots=True)
class _Copy:
    """One parameter's copy, of one or more tensors, and the state it was made in."""

    parts: tuple[Tensor, ...]
    shape: torch.Size
    parameter: weakref.ref[Tensor]
    address: int = 0
    version: int = -1
    steps: int = -1
    grad: weakref.ref[Tensor] | None = None
    grad_version: int = 0
    updates_seen: bool = False
    sample: Tensor | None = None
    idle_users: int = 0
    held: Held | None = None  # of codes that serve without a window

    @property
    def low(self) -> Tensor:
        return self.parts[0]


class WeightCache:
    """The copies of one captured graph, by graph input. Dropping it frees them."""

    def __init__(self) -> None:
        self.copies: dict[int, _Copy] = {}
        self.sampled = True  # compare elements, where that does not stall a device
        self.refreshed = 0  # casts made so far, for tests and reports
        self.holds = False  # codes of weights that take no gradient: Recipe.constant_weights


def cast_parameters(
    args: Sequence[Any],
    input_casts: Sequence[Copied | InputScales],
    cache: WeightCache,
    scales: ModelScales | None = None,
) -> tuple[Any, ...]:
    """The graph's inputs: `args`, followed by what each of `input_casts` stands for.

    Gradients of a cast copy arrive at its parameter in the parameter's dtype; those of a quantised one do not
    pass through the copy.
    """
    if not input_casts:
        return tuple(args)
    lows: dict[int, tuple[Tensor, ...]] = {}
    stale: list[Copied] = []
    for cast in input_casts:
        if isinstance(cast, InputScales):
            assert scales is not None, "delayed scales belong to a model"
            lows[cast.target] = scales.layer(args[cast.source])
            continue
        parameter, copy = args[cast.source], cache.copies.get(cast.target)
        recorded = torch.is_grad_enabled() and parameter.requires_grad
        if copy is not None and (
            _is_fresh(copy, parameter, cache.sampled) if recorded else _is_held(copy, parameter)
        ):
            _open_window(copy, parameter)
            lows[cast.target] = copy.parts
        else:
            stale.append(cast)
    lows.update(_refresh(args, stale, cache, scales))
    extended = list(args)
    for cast in sorted(input_casts, key=lambda c: c.target):
        assert cast.target == len(extended), "copies are the graph's last inputs"
        if isinstance(cast, InputOperand) and cast.transposed and torch.is_grad_enabled():
            extended[cast.source] = _LaidOut.apply(extended[cast.source])
        if isinstance(cast, InputCast):
            extended.append(_CastParameter.apply(args[cast.source], lows[cast.target][0]))
        else:
            extended += lows[cast.target]
    return tuple(extended)


class _CastParameter(Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, low: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return low.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_output.to(ctx.dtype), None


class _LaidOut(Function):
    """The gradient of a transposed weight comes transposed. Autograd would copy it, which counts as a write
    to it; copied here it is as new as any other, and the window stays open."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return grad_output.contiguous()


def _is_fresh(copy: _Copy, parameter: Tensor, sampled: bool) -> bool:
    return (
        copy.parameter() is parameter
        and copy.address == parameter.data_ptr()
        and copy.version == parameter._version
        and copy.steps == _optimizer_steps
        and copy.shape == parameter.shape
        and _in_window(copy, parameter.grad)
        and not (sampled and _sample_differs(copy, parameter))
    )


def _is_held(copy: _Copy, parameter: Tensor) -> bool:
    """Whether codes of a weight that takes no gradient in this call are still its own."""
    return (
        copy.held is not None
        and copy.parameter() is parameter
        and copy.address == parameter.data_ptr()
        and copy.version == parameter._version
        and copy.shape == parameter.shape
        and holds(parameter, copy.updates_seen, copy.steps != _optimizer_steps)
        and copy.held.serves(parameter, _optimizer_steps)
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


def _refresh(
    args: Sequence[Any], stale: Sequence[Copied], cache: WeightCache, scales: ModelScales | None
) -> dict[int, tuple[Tensor, ...]]:
    """Make new copies: all casts in one multi-tensor copy, and quantise weights one by one."""
    made: dict[int, tuple[Tensor, ...]] = {}
    casts = [cast for cast in stale if isinstance(cast, InputCast)]
    paused = scales is not None and scales.paused  # a copy that gathered no amax must not serve training
    for cast in stale:
        parameter, copy = args[cast.source], cache.copies.get(cast.target)
        kept = torch.is_grad_enabled() and parameter.requires_grad and not paused
        held = False
        if isinstance(cast, InputOperand) and cache.holds and not kept:
            held = may_hold(parameter, _delayed(cast))
        if isinstance(cast, InputOperand):
            made[cast.target] = _quantise(cast, parameter, scales)
        elif kept and copy is not None and _can_overwrite(copy, parameter):
            made[cast.target] = copy.parts
        else:
            made[cast.target] = (torch.empty_like(parameter, dtype=cast.dtype, requires_grad=False),)
        if kept or held:
            cache.copies[cast.target] = new = _record(copy, parameter, made[cast.target])
            new.held = _held(copy, parameter) if held else None
    if casts:
        with torch.no_grad():
            lows = [made[cast.target][0] for cast in casts]
            torch._foreach_copy_(lows, [args[cast.source] for cast in casts])
    cache.refreshed += len(stale)
    return made


def _delayed(cast: InputOperand) -> bool:
    return Recipe.parse(cast.recipe).delayed


def _quantise(cast: InputOperand, parameter: Tensor, scales: ModelScales | None) -> tuple[Tensor, ...]:
    scale, amax = scales.layer(parameter) if scales is not None and _delayed(cast) else (None, None)
    with torch.inference_mode(False), torch.no_grad():  # codes may serve under another mode
        weight = parameter.t() if cast.transposed else parameter.detach()
        return fp8_operand(weight, cast.recipe, WEIGHT, cast.dtype, True, cast.turned, scale, amax)


def _held(copy: _Copy | None, parameter: Tensor) -> Held:
    if copy is None or copy.held is None or copy.parameter() is not parameter:
        return Held(elements_of(parameter).clone(), _optimizer_steps)
    return copy.held.renewed(parameter, _optimizer_steps)


def _record(copy: _Copy | None, parameter: Tensor, parts: tuple[Tensor, ...]) -> _Copy:
    """What is known of the copy now; the same record where it was written to in place."""
    known = copy is not None and copy.parameter() is parameter
    seen = copy is not None and known and (
        copy.updates_seen or copy.steps != _optimizer_steps or copy.version != parameter._version
    )  # fmt: skip
    if copy is None or not known or copy.parts is not parts:
        idle = copy.idle_users if copy is not None and copy.parts is parts else _users(parts[0])
        copy = _Copy(parts, parameter.shape, weakref.ref(parameter), idle_users=idle)
    copy.address, copy.version, copy.steps = parameter.data_ptr(), parameter._version, _optimizer_steps
    copy.updates_seen, copy.sample = seen, _sample(parameter)
    _open_window(copy, parameter)
    return copy


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
