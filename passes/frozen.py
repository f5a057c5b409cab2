"""When FP8 codes of a weight that takes no gradient serve again: of frozen weights, such as those that LoRA
adapts, and of all weights while no gradients are recorded.

No gradient tells when such a weight changes, as it does for others (weights.py), and a write through `.data`
leaves no trace. So codes serve again only where Recipe.constant_weights promises that there is none, and

  - it is the same Parameter, at the same address, with the same `_version`;
  - it has no `.grad` that an optimizer could still apply, or its updates are known to be seen;
  - a weight that asks for gradients has met no optimizer step since;
  - elements of it are what they were. A CPU compares them at once. Beside a GPU the host would wait for that:
    they are compared on the device, at each optimizer step until one is seen to have left the weight alone,
    then on every CALLS-th call, and the answer is read in a later call. Until a step has left it alone a
    weight is cast after each, so that a teacher that follows its student through `.data` does not lag behind.
    A promise that is broken later is noticed late, said in a warning, and the weight cast on every call from
    then on.

With delayed scales weights are cast anew, as their scales move.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fusekit.kernels.trial import is_capturing

CALLS = 16
SAMPLES = 64  # elements compared


@dataclass
class Held:
    """What is known of a weight whose codes are kept. steps: optimizer steps when its elements were read."""

    elements: Tensor
    steps: int
    proven: bool = False  # an optimizer step has left it alone
    written: bool = False  # through .data, while its codes served
    calls: int = 0  # since the last comparison
    answer: Tensor | None = None  # of a comparison that is on its way
    event: torch.cuda.Event | None = None
    crossed: bool = False  # whether it was asked for after an optimizer step, of codes that did not serve

    def serves(self, parameter: Tensor, steps: int) -> bool:
        """Whether the elements, as far as is known, allow the codes to be used in this call."""
        if compares_at_once(parameter):
            return bool(torch.equal(self.elements, elements_of(parameter)))
        self._read(parameter)
        self.calls += 1
        serves = not self.written and (self.proven or steps == self.steps)
        if self.answer is None and (self.calls >= CALLS if serves else not self.written):
            self._ask(parameter, crossed=not serves)
        return serves

    def renewed(self, parameter: Tensor, steps: int) -> Held:
        """For codes that were made anew of the same weight."""
        elements = elements_of(parameter).clone()
        return replace(self, elements=elements, steps=steps, calls=0)

    def _ask(self, parameter: Tensor, crossed: bool) -> None:
        if is_capturing():
            return
        differ = (self.elements != elements_of(parameter)).any()
        self.answer = torch.empty((), dtype=torch.bool, pin_memory=parameter.is_cuda)
        self.answer.copy_(differ, non_blocking=True)
        if parameter.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()
        self.crossed, self.calls = crossed, 0

    def _read(self, parameter: Tensor) -> None:
        if self.answer is None or is_capturing():
            return
        if self.event is not None and not self.event.query():
            return
        changed, self.answer, self.event = bool(self.answer), None, None
        if self.crossed:
            self.proven |= not changed
        elif changed:
            self.written = True
            warnings.warn(
                f"a weight of {'×'.join(map(str, parameter.shape))} that takes no gradient was written to "
                f"through .data while its FP8 codes were kept, and up to {CALLS} calls or more used the old "
                "ones; it is cast on every call from now on",
                stacklevel=2,
            )


def may_hold(parameter: Tensor, delayed: bool) -> bool:
    """Whether codes of this weight may be kept although no gradient of it is recorded."""
    return not delayed and not parameter.is_inference()


def holds(parameter: Tensor, grad_is_known: bool, steps_passed: bool) -> bool:
    """Whether nothing that is no write through .data can have changed it."""
    if parameter.grad is not None and not grad_is_known:
        return False
    return not (steps_passed and (parameter.requires_grad or parameter.grad is not None))


def compares_at_once(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu"


def elements_of(parameter: Tensor) -> Tensor:
    """About SAMPLES of a weight's elements, of all columns; of a NaN, its pattern."""
    found = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLES) | 1]
    return found.view(torch.int32) if found.dtype == torch.float32 else found
