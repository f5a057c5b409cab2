"""Does a library compute attention here as it says? Tried once a process, device and kind of call.

On a small call of the kind, results and gradients (which our own backward kernels make from the library's
output and log sum exp) are held to the criterion of every op, against float64, and two runs must be equal bit
by bit. A library's backward pass has a trial more, of both its passes, in which two runs are held to the
criterion and bits may differ. A log sum exp in another unit, a mask with another corner or heads shared in
another order would train another model without a sound; a trial costs milliseconds. It runs on a thread of
its own: whatever is set on the caller's (autograd's state, autocast, a tracing mode) must not decide it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels.attention_form import Form
from fusekit.kernels.parity import check, deterministic, longest_sum, results_and_grads, widen
from fusekit.kernels.trial import failure

LENGTH = 200  # no multiple of a block; two blocks of every library's


class Kind(NamedTuple):
    """What a library's code paths differ by; sizes of a batch and lengths do not."""

    library: str
    device: torch.device
    dtype: torch.dtype
    features: int
    group: int
    causal: bool
    window: int | bool
    square: bool
    softcap: float | None
    backward: bool


_outcomes: dict[Kind, str | None] = {}


def kind_of(library: str, q: Tensor, k: Tensor, v: Tensor, form: Form, backward: bool = False) -> Kind:
    """The kind of this call; backward: of its backward pass, which the library computes as well."""
    group = q.shape[1] // k.shape[1]
    window = form.window is not None and min(form.window, LENGTH // 2)
    return Kind(
        library, q.device, q.dtype, q.shape[-1], group, form.causal, window, q.shape[-2] == k.shape[-2],
        form.softcap, backward,
    )  # fmt: skip


def outcome(kind: Kind) -> str | None:
    """Why a library lost its trial; None: it passed, or was not tried."""
    return _outcomes.get(kind)


def was_tried(kind: Kind) -> bool:
    return kind in _outcomes


def was_passed(kind: Kind) -> bool:
    return _outcomes.get(kind, "not tried") is None


def lose(kind: Kind, reason: str) -> None:
    """Whatever its trial said."""
    _outcomes[kind] = reason


def passes(kind: Kind, fused: Callable[..., Tensor], reference: Callable[..., Tensor]) -> bool:
    """Whether it passed, now or before.

    fused, reference: of the arguments of `attention`; fused must run the library.
    """
    if kind not in _outcomes:
        found: list[str | None] = ["the trial did not end"]
        thread = threading.Thread(target=lambda: found.__setitem__(0, _try(kind, fused, reference)))
        thread.start()
        thread.join()
        _outcomes[kind] = found[0]
    return _outcomes[kind] is None


def _try(kind: Kind, fused: Callable[..., Tensor], reference: Callable[..., Tensor]) -> str | None:
    try:
        with _on(kind.device):
            return _judged(kind, fused, reference)
    except Exception as error:  # whatever it is, the library cannot be used
        return f"on a small call it fails: {failure(error)}"


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A thread begins on the first GPU, whatever its starter's is."""
    with_cuda = device.type == "cuda" and torch.backends.cuda.is_built()
    return torch.cuda.device(device) if with_cuda else contextlib.nullcontext()


def _judged(kind: Kind, fused: Callable[..., Tensor], reference: Callable[..., Tensor]) -> str | None:
    args = _arguments(kind)
    eager, truth = results_and_grads(reference, args), results_and_grads(reference, widen(args))
    for _ in range(2 if kind.backward else 1):
        results = results_and_grads(fused, args)
        verdicts = check(results, eager, truth, dtype=kind.dtype, terms=longest_sum(args), inherent=True)
        if wrong := next((v for v in verdicts if not v.ok), None):
            return f"on a small call its {wrong.name.replace('_', ' ')} is wrong: {wrong.reason}"
    return None if kind.backward or deterministic(fused, args, runs=2) else "two runs of it differ"


def _arguments(kind: Kind) -> tuple[Any, ...]:
    """q, k, v and what follows in the schema of `attention`, from a generator of its own."""
    _, device, dtype, features, group, causal, window, square, softcap, _ = kind
    generator = torch.Generator().manual_seed(0)

    def heads(length: int, count: int) -> Tensor:
        x = torch.randn(2, length, count, features, generator=generator)
        return x.to(device, dtype).transpose(1, 2).requires_grad_()

    keys = LENGTH if square else LENGTH + 57
    offset = keys - LENGTH if causal or window else 0
    q, k, v = heads(LENGTH, 2 * group), heads(keys, 2), heads(keys, 2)
    return q, k, v, None, causal, None, 0.0, None, 0, False, window or None, offset, softcap
