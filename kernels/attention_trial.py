"""Does a library compute attention here as it says? Tried once a process, device and kind of call.

On a small call of the kind, results and gradients (which our own backward kernels make from the library's
output and log sum exp) are held to the criterion of every op, against float64, and two runs must be equal bit
by bit. A log sum exp in another unit, a mask with another corner or heads shared in another order would train
another model without a sound; a trial costs milliseconds. It runs on a thread of its own: whatever is set on
the caller's (autograd's state, autocast, a tracing mode) must not decide its outcome.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels.attention_form import Form
from fusekit.kernels.parity import check, deterministic, longest_sum, results_and_grads, widen

LENGTH = 200  # no multiple of a block; two blocks of every library's
Kind = tuple[Any, ...]

_outcomes: dict[Kind, str | None] = {}


def kind_of(library: str, q: Tensor, k: Tensor, v: Tensor, form: Form) -> Kind:
    """What a library's code paths differ by; sizes of a batch and lengths do not."""
    group = q.shape[1] // k.shape[1]
    window = form.window is not None and min(form.window, LENGTH // 2)
    return (
        library, q.device, q.dtype, q.shape[-1], group, form.causal, window, q.shape[-2] == k.shape[-2],
        form.softcap,
    )  # fmt: skip


def outcome(kind: Kind) -> str | None:
    """Why a library lost its trial; None: it passed, or was not tried."""
    return _outcomes.get(kind)


def was_tried(kind: Kind) -> bool:
    return kind in _outcomes


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
        with _on(kind[1]):
            return _judged(kind, fused, reference)
    except Exception as error:  # whatever it is, the library cannot be used
        text = str(error).strip().splitlines()
        return f"on a small call it fails: {type(error).__name__}: {text[0] if text else 'no message'}"


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A thread begins on the first GPU, whatever its starter's is."""
    with_cuda = device.type == "cuda" and torch.backends.cuda.is_built()
    return torch.cuda.device(device) if with_cuda else contextlib.nullcontext()


def _judged(kind: Kind, fused: Callable[..., Tensor], reference: Callable[..., Tensor]) -> str | None:
    args = _arguments(kind)
    eager, truth = results_and_grads(reference, args), results_and_grads(reference, widen(args))
    results = results_and_grads(fused, args)
    verdicts = check(results, eager, truth, dtype=kind[2], terms=longest_sum(args), inherent=True)
    if wrong := next((v for v in verdicts if not v.ok), None):
        return f"on a small call its {wrong.name.replace('_', ' ')} is wrong: {wrong.reason}"
    return None if deterministic(fused, args, runs=2) else "two runs of it differ"


def _arguments(kind: Kind) -> tuple[Any, ...]:
    """q, k, v and what follows in the schema of `attention`, from a generator of its own."""
    _, device, dtype, features, group, causal, window, square, softcap = kind
    generator = torch.Generator().manual_seed(0)

    def heads(length: int, count: int) -> Tensor:
        x = torch.randn(2, length, count, features, generator=generator)
        return x.to(device, dtype).transpose(1, 2).requires_grad_()

    keys = LENGTH if square else LENGTH + 57
    offset = keys - LENGTH if causal or window else 0
    q, k, v = heads(LENGTH, 2 * group), heads(keys, 2), heads(keys, 2)
    return q, k, v, None, causal, None, 0.0, None, 0, False, window or None, offset, softcap
