"""Gradients of an optimizer, multiplied in place and looked at in the same pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


def multiply_gradients(
    optimizer: Optimizer, factor: Tensor, *, refuse_fp16: bool
) -> dict[torch.device, Tensor]:
    """Multiply all gradients by the scalar `factor`; per device 1.0 where one is infinite or NaN, else 0.0.

    Gradients that are DTensors have the flag reduced over their mesh by torch.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if parameter.grad is not None:
            values = _values(parameter, refuse_fp16)
            groups.setdefault((values.device, values.dtype), []).append(values)
    found = {device: torch.zeros((), device=device) for device, _ in groups}
    factors = {device: factor.to(device, non_blocking=True) for device in found}
    with torch.no_grad():
        for (device, _), gradients in groups.items():
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, found[device], factors[device])
    return found


def _values(parameter: Tensor, refuse_fp16: bool) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if refuse_fp16 and gradient.dtype == torch.float16:
        raise ValueError(
            f"LossScaler: the gradient of a parameter {tuple(parameter.shape)} is float16 and would overflow "
            f"where it is divided: keep float32 parameters (model.float()) and let autocast or "
            f'fusekit.optimize(precision="fp16") cast them'
        )
    if not gradient.is_sparse:
        return gradient
    if gradient.dtype == torch.float16:  # duplicate indices add up to an overflow only here
        parameter.grad = gradient = gradient.coalesce()
    return gradient._values()
