"""Dynamic loss scaling for fp16, without the host ever waiting for the device.

    scaler = LossScaler()
    scaler.scale(loss).backward()                       # every micro-batch of the window
    scaler.unscale_(optimizer)                          # optional: to clip or to look at gradients
    norm = clip_grad_norm_(model.parameters(), 1.0)
    scaler.require_finite(optimizer, norm)              # optional: a norm that overflowed skips the step too
    scaler.step(optimizer)
    scaler.update()

Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740. The calls, their order and their
numbers are those of torch.amp.GradScaler, and its state_dict can be loaded. Beyond it: the scale stays within
[floor, ceiling] (2^-149 would back off to 0, and 0 never grows again), and `skipped` counts skipped updates
on the device. A schedule indexed by `step - scaler.skipped` stands still while steps are skipped:

    rates = torch.tensor([schedule(i) for i in range(steps)], device=device)
    optimizer.param_groups[0]["lr"] = rates.take(step - scaler.skipped)  # fused optimizers take a tensor

Fused optimizers (AdamW(fused=True) and its kin) read scale and overflow on the device and leave weights,
moments and step counts alone where a gradient overflowed: no sync. Any other optimizer counts its steps on
the host, so `step` reads the one overflow flag there, as GradScaler does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusekit.gradients import multiply_gradients
from fusekit.passes.delayed import step_skipped

FLOOR, CEILING = 2.0**-24, 2.0**24
STATE = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


@dataclass
class _Window:
    """One optimizer between two updates. found: per device 1.0 where a gradient is not finite, else 0.0."""

    stage: str = "ready"  # then "unscaled", then "stepped"
    found: dict[torch.device, Tensor] = field(default_factory=dict)


class LossScaler:
    """Scales a loss so that fp16 gradients do not flush to zero, and skips steps whose gradients overflowed.

    Args:
        device: where the scale lives; None: with the first tensor that is scaled.
        init_scale, growth_factor, backoff_factor, growth_interval: the scale is multiplied by growth_factor
            after so many updates in a row without overflow, by backoff_factor after each with one.
        enabled: False makes every method hand its argument through.
        floor, ceiling: the scale's range.

    Raises:
        ValueError: an argument that cannot work.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        floor: float = FLOOR,
        ceiling: float = CEILING,
    ) -> None:
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval, self.floor, self.ceiling = growth_interval, floor, ceiling
        self._check_numbers(init_scale)
        self._enabled = enabled
        self._initial = (float(init_scale), 0, 0)  # scale, growth tracker, skipped
        self._device = None if device is None else torch.device(device)
        self._scale: Tensor | None = None
        self._windows: dict[Optimizer, _Window] = {}

    def _check_numbers(self, scale: float) -> None:
        numbers = {"init_scale": scale} | {
            name: getattr(self, name) for name in ("growth_factor", "backoff_factor", "floor", "ceiling")
        }
        for name, value in numbers.items():
            if not isinstance(value, (int, float)):
                raise ValueError(f"LossScaler: {name} is a number, got {value!r}")
        if not self.growth_factor > 1.0:
            raise ValueError(f"LossScaler: growth_factor is above 1, got {self.growth_factor}")
        if not 0.0 < self.backoff_factor < 1.0:
            raise ValueError(f"LossScaler: backoff_factor is between 0 and 1, got {self.backoff_factor}")
        if not isinstance(self.growth_interval, int) or self.growth_interval < 1:
            raise ValueError(
                f"LossScaler: growth_interval is at least 1, a whole number, got {self.growth_interval}"
            )
        if not (0.0 < self.floor <= scale <= self.ceiling and math.isfinite(scale)):
            raise ValueError(
                f"LossScaler: the scale lies between floor {self.floor:g} (above 0) and ceiling "
                f"{self.ceiling:g}, got {scale:g}"
            )

    @property
    def skipped(self) -> Tensor:
        """How many updates found an overflow: a scalar on the device, read without waiting for it."""
        return torch.tensor(self._initial[2]) if self._scale is None else self._skipped

    def is_enabled(self) -> bool:
        return self._enabled

    def get_scale(self) -> float:
        """The scale as a number, 1.0 where disabled. Waits for the device: for logs."""
        if not self._enabled:
            return 1.0
        return self._initial[0] if self._scale is None else self._scale.item()

    def scale(self, outputs: Any) -> Any:
        """A tensor, or an iterable of tensors however nested, times the scale."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            return outputs * self._start(outputs.device).to(outputs.device, non_blocking=True)
        if isinstance(outputs, (list, tuple)):
            scaled = [self.scale(output) for output in outputs]
            return type(outputs)(*scaled) if hasattr(outputs, "_fields") else type(outputs)(scaled)
        if isinstance(outputs, Iterable) and not isinstance(outputs, (str, Mapping)):
            return map(self.scale, outputs)
        raise ValueError(f"LossScaler.scale takes tensors, and got a {type(outputs).__name__}")

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, in place, and note whether all are finite.

        Call it once a window, after the last micro-batch.

        Raises:
            ValueError: a gradient is float16: its parameter has to be float32.
            RuntimeError: called twice, after `step`, or before anything was scaled.
        """
        if not self._enabled:
            return
        scale, window = self._started("unscale_"), self._window(optimizer)
        if window.stage != "ready":
            done = "unscale_ was called before" if window.stage == "unscaled" else "step was called"
            raise RuntimeError(
                f"LossScaler.unscale_: {done} for this optimizer since the last update(); gradients are "
                f"divided once, after the last micro-batch and before step"
            )
        # In float64, as GradScaler does: a fast float32 division may round 1/scale the other way.
        window.found = multiply_gradients(optimizer, scale.double().reciprocal().float(), refuse_fp16=True)
        window.stage = "unscaled"

    def require_finite(self, optimizer: Optimizer, value: Tensor) -> None:
        """Skip this optimizer's step also where `value` (a gradient norm) is infinite or NaN."""
        if not self._enabled:
            return
        window = self._window(optimizer)
        if window.stage != "unscaled":
            raise RuntimeError(
                "LossScaler.require_finite comes after unscale_ and before step: a norm of scaled gradients "
                "says nothing"
            )
        bad = (~value.detach().isfinite()).any().float()
        found = window.found.get(bad.device)
        window.found[bad.device] = bad if found is None else torch.maximum(found, bad)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """optimizer.step(*args, **kwargs), unless a gradient is infinite or NaN: then nothing changes.

        Raises:
            RuntimeError: called twice, with a closure, without any gradient, or before anything was scaled.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if args or "closure" in kwargs:
            raise RuntimeError(
                "LossScaler.step takes no closure: it would compute gradients after they were unscaled"
            )
        scale, window = self._started("step"), self._window(optimizer)
        if window.stage == "stepped":
            raise RuntimeError("LossScaler.step was called for this optimizer since the last update()")
        on_device = getattr(optimizer, "_step_supports_amp_scaling", False)
        divided = window.stage == "unscaled"
        if on_device and not divided:  # the optimizer's kernel divides: only look
            window.found = multiply_gradients(optimizer, torch.ones_like(scale), refuse_fp16=False)
        elif not divided:
            self.unscale_(optimizer)
        if not window.found:
            del self._windows[optimizer]
            raise RuntimeError(
                "LossScaler.step: no parameter of this optimizer has a gradient; call "
                "scaler.scale(loss).backward() first, and leave out optimizers that take no part"
            )
        window.stage = "stepped"
        if on_device:
            return _step_on_device(optimizer, None if divided else scale, self._found([window]), kwargs)
        if self._found([window]).item():
            step_skipped(optimizer)
            return None
        return optimizer.step(**kwargs)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Once a window, after every `step`: grow or back off; or set the scale.

        Raises:
            RuntimeError: no gradient was looked at since the last update.
        """
        if not self._enabled:
            return
        scale = self._started("update")
        if new_scale is not None:
            _give(scale, new_scale)
        else:
            windows = [window for window in self._windows.values() if window.found]
            if not windows:
                raise RuntimeError(
                    "LossScaler.update: no optimizer was unscaled or stepped since the last update(); it is "
                    "called once per optimizer step, not once per micro-batch"
                )
            found = self._found(windows)
            torch._amp_update_scale_(
                scale, self._tracker, found, self.growth_factor, self.backoff_factor, self.growth_interval
            )
            self._skipped += (found != 0).to(self._skipped.dtype)
        scale.clamp_(self.floor, self.ceiling)
        self._windows = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint; call it after `update`. Empty where disabled."""
        if not self._enabled:
            return {}
        tracker, skipped = self._initial[1:]
        if self._scale is not None:
            tracker, skipped = int(self._tracker.item()), int(self._skipped.item())
        numbers = (self.get_scale(), self.growth_factor, self.backoff_factor, self.growth_interval, tracker)
        return dict(zip(STATE, numbers, strict=True)) | {"skipped": skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, this class's or torch.amp.GradScaler's; nothing where disabled.

        Raises:
            RuntimeError: the state is of a disabled scaler, or of something else.
        """
        if not self._enabled:
            return
        if missing := [name for name in STATE if name not in state]:
            whose = f"it lacks {', '.join(missing)}" if state else "it is empty, as of a disabled scaler"
            raise RuntimeError(f"LossScaler.load_state_dict: this is no state of a loss scaler: {whose}")
        self.growth_factor, self.backoff_factor = state["growth_factor"], state["backoff_factor"]
        self.growth_interval = state["growth_interval"]
        scale = min(max(float(state["scale"]), self.floor), self.ceiling)
        self._initial = (scale, int(state["_growth_tracker"]), int(state.get("skipped", 0)))
        if self._scale is not None:
            for tensor, value in zip((self._scale, self._tracker, self._skipped), self._initial, strict=True):
                tensor.fill_(value)

    def _start(self, device: torch.device) -> Tensor:
        if self._scale is None:
            device = self._device or device
            self._scale = torch.full((), self._initial[0], dtype=torch.float32, device=device)
            self._tracker = torch.full((), self._initial[1], dtype=torch.int32, device=device)
            self._skipped = torch.full((), self._initial[2], dtype=torch.int64, device=device)
        return self._scale

    def _started(self, what: str) -> Tensor:
        if self._scale is None:
            raise RuntimeError(
                f"LossScaler.{what}: no loss was scaled yet; call scaler.scale(loss).backward() first"
            )
        return self._scale

    def _window(self, optimizer: Optimizer) -> _Window:
        return self._windows.setdefault(optimizer, _Window())

    def _found(self, windows: list[_Window]) -> Tensor:
        """One flag for all windows and devices, where the scale is."""
        assert self._scale is not None
        device = self._scale.device
        flags = [flag.to(device, non_blocking=True) for window in windows for flag in window.found.values()]
        return flags[0] if len(flags) == 1 else torch.stack(flags).amax()


def _step_on_device(
    optimizer: Any, grad_scale: Tensor | None, found: Tensor, kwargs: Mapping[str, Any]
) -> Any:
    """The contract of torch's fused optimizers: two attributes during the step."""
    own = getattr(optimizer, "grad_scale", None)
    optimizer.grad_scale = own if grad_scale is None else grad_scale if own is None else grad_scale * own
    optimizer.found_inf = found
    try:
        return optimizer.step(**kwargs)
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def _give(scale: Tensor, new: float | Tensor) -> None:
    if isinstance(new, Tensor):
        if new.numel() != 1 or new.requires_grad:
            raise ValueError("LossScaler.update: a new scale is one number that needs no gradient")
        scale.copy_(new.detach().reshape(()), non_blocking=True)
    elif new > 0.0 and math.isfinite(new):
        scale.fill_(new)
    else:
        raise ValueError(f"LossScaler.update: a new scale is positive and finite, got {new}")
