"""Who computes attention on a GPU, and why: own kernels, or a library where it is the fastest.

Both passes are chosen here, each for itself: what the backward pass needs, the output and the log sum exp, is
the same whoever ran. That it may be a library's has to be asked for: attention_gradient.py. In this order:

    few queries and many keys           the decoding kernels, forward
    no library computes this exactly    the own kernel
    measured on this device             the fastest of those that do
    not measured                        DEFAULTS, from published figures, else the own kernel

A library must have passed its trial (attention_trial.py) on this machine. Nothing is measured in a training
step: `measure` is called by `fusekit bench --tune` and by `verify`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusekit.kernels import (
    attention_adapter,
    attention_blocked,
    attention_decode,
    attention_launch,
    attention_native,
    attention_tail,
    attention_times,
    attention_trial,
    tape,
    times_file,
    trial,
)
from fusekit.kernels.attention_form import GLOBAL, Form, skipped
from fusekit.kernels.attention_libraries import LIBRARIES, Library, beyond_libraries
from fusekit.kernels.config_table import target_of
from fusekit.kernels.launch import Plans, capability, on_gpu, recording
from fusekit.kernels.times_file import OWN, Choice, Times, fastest

DECODING = "own decoding kernel"
# Published forward figures (H100, 512 to 16384 tokens, 64 and 128 features): cuDNN before a Triton kernel and
# FlashAttention-2; its backward pass was measured there before ours. Of other architectures, of flash-attn
# there and of short lengths nothing is known.
DEFAULTS = {"sm_90": ("cuDNN",)}
LEAST_LENGTH = 512
# The fields of a form that are dealt with here; one that is set and unknown stays with the own kernel.
KNOWN = frozenset(
    [
        "mask", "causal", "scale", "dropout", "seed", "seed_offset", "tf32", "window", "offset", "softcap",
        "sinks", "deterministic",
    ]
)  # fmt: skip


class _Forced(threading.local):
    """On the thread of a trial: the library that computes, whatever it may take."""

    library: Library | None = None


_plans, _forced = Plans(), _Forced()


def forward(
    q: Tensor, k: Tensor, v: Tensor, form: Form, tail: int = attention_tail.NONE
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, Tq, DV) in (B, Tq, H, DV) memory, stats as attention_kernels.py defines them, and what
    attention_tail.py keeps of out."""
    library = _forced.library
    if library is None and _decodes(q, k, v, form):
        return attention_decode.forward(q, k, v, form, tail)
    if library is None and not recording():
        library = named(choose(q, k, v, form).name)
        if library is not None and not proved(library, q, k, v, form):
            library = None
    if library is None:
        return attention_launch.forward(q, k, v, form, tail)
    return *attention_adapter.forward(library, q, k, v, form), attention_tail.of_library(q, v, tail)


def choose(q: Tensor, k: Tensor, v: Tensor, form: Form, backward: bool = False) -> Choice:
    """Who runs this call on a GPU; of the tensors only shapes, strides, dtypes and device are looked at."""
    if not backward and _decodes(q, k, v, form):
        return Choice(DECODING, "few queries, their keys in parts")
    absent = tuple(library.absent() for library in libraries(backward))
    settings = tuple(value.dtype if isinstance(value, Tensor) else value for value in form)
    strides = tuple(x.stride(-1) == 1 for x in (q, k, v))
    call = (q.dtype, q.device, q.shape, k.shape, v.shape, strides, settings, absent, backward)
    return _plans(call, lambda: _decide(q, k, v, form, absent, backward))


def state() -> tuple[Any, ...]:
    """What decides, besides a call's arguments, who computes it; measured times aside."""
    cuda = torch.backends.cuda
    switches = cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    return _forced.library, torch.are_deterministic_algorithms_enabled(), *switches


def describe(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str:
    """Who runs this call on its device, and why, for a report."""
    if not on_gpu(q):
        return f"CPU {attention_native.path(q, k, v, form)}" + _skips(q, k, form, attention_blocked.ROWS, 1)
    chosen = choose(q, k, v, form)
    own = chosen.name == OWN
    return f"{chosen}{_skips(q, k, form, *attention_launch.tile(q, v, form))}" if own else str(chosen)


def _skips(q: Tensor, k: Tensor, form: Form, rows: int, keys: int) -> str:
    """What a window leaves out, in words; beside global tokens it depends on where those are."""
    if form.window is None or form.has_globals:
        return ""
    share = skipped(form, q.shape[-2], k.shape[-2], rows, keys)
    return f", {share:.0%} of key blocks skipped" if share >= 0.01 else ""


def measure(
    q: Tensor, k: Tensor, v: Tensor, form: Form, clock: Callable[[Callable[[], object]], float] | None = None
) -> Times:
    """Time the own kernel and every library that may take this call, and keep what was found.

    clock: clock(run) -> seconds of a call; None for the GPU's own. Returns seconds by name; empty where there
    is no choice.
    """
    able = [] if _decodes(q, k, v, form) else able_to(q, k, v, form)
    if not able:
        return {}
    clock = clock or times_file.seconds
    trains = any(x.requires_grad for x in (q, k, v))
    tail = attention_tail.IF_OWN if trains else attention_tail.NONE
    with torch.no_grad():
        times = {OWN: clock(partial(attention_launch.forward, q, k, v, form, tail))}
        times |= {
            library.name: clock(partial(attention_adapter.forward, library, q, k, v, form))
            for library in able
        }
    keep(times, q, k, v, form)
    return times


def able_to(q: Tensor, k: Tensor, v: Tensor, form: Form, backward: bool = False) -> list[Library]:
    """The libraries that may compute this call and passed their trial, now or before."""
    if exclusive(q, k, v, form) is not None:
        return []
    able = [x for x in libraries(backward) if x.absent() is None and x.unfit(q, k, v, form) is None]
    return [library for library in able if proved(library, q, k, v, form, backward)]


def keep(times: Times, q: Tensor, k: Tensor, v: Tensor, form: Form, backward: bool = False) -> None:
    """Let later calls choose by these times."""
    attention_times.record(q.device, attention_times.key(q, k, v, form, backward), times)
    _plans.held.clear()


def _decide(
    q: Tensor, k: Tensor, v: Tensor, form: Form, absent: tuple[str | None, ...], backward: bool
) -> Choice:
    unfit, offered = exclusive(q, k, v, form), libraries(backward)
    reasons = [unfit or library.unfit(q, k, v, form) for library in offered]
    if all(reasons):
        return Choice(OWN, next(filter(None, reasons), ""))
    able, refused = [], ""
    for library, reason, missing in zip(offered, reasons, absent, strict=True):
        if reason is not None:
            continue
        why = missing or attention_trial.outcome(
            attention_trial.kind_of(library.name, q, k, v, form, backward)
        )
        if why is None:
            able.append(library.name)
        refused = refused or f"{library.name}: {why}"
    if not able:
        return Choice(OWN, refused)
    found = attention_times.measured(q.device, attention_times.key(q, k, v, form, backward))
    return fastest(found, able) or _default(q, k, able)


def _default(q: Tensor, k: Tensor, able: list[str]) -> Choice:
    target = target_of(capability(q))
    default = next((name for name in DEFAULTS.get(target, ()) if name in able), None)
    if default is None:
        return Choice(OWN, f"not measured against {', '.join(able)}: fusekit bench --tune does")
    if min(q.shape[-2], k.shape[-2]) < LEAST_LENGTH:
        return Choice(OWN, f"fewer than {LEAST_LENGTH} tokens, and not measured")
    return Choice(default, f"static default on {target}")


def _decodes(q: Tensor, k: Tensor, v: Tensor, form: Form) -> bool:
    few = q.shape[-2] <= attention_decode.MOST_QUERIES  # asked first: every training step comes by here
    return few and _unknown(form, attention_decode.FIELDS) is None and attention_decode.takes(q, k, v, form)


def exclusive(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str | None:
    """Why nobody but the own kernel computes this."""
    return _unknown(form) or beyond_libraries(q, k, v, form)


def _unknown(form: Form, known: frozenset[str] = frozenset()) -> str | None:
    if form.has_globals:
        return GLOBAL
    given = form._asdict().items()
    strange = (name for name, value in given if value is not None and value is not False)
    return next((name for name in strange if name not in KNOWN and name not in known), None)


def libraries(backward: bool) -> tuple[Library, ...]:
    return tuple(x for x in LIBRARIES if x.gradient is not None) if backward else LIBRARIES


def named(name: str) -> Library | None:
    return next((library for library in LIBRARIES if library.name == name), None)


def proved(library: Library, q: Tensor, k: Tensor, v: Tensor, form: Form, backward: bool = False) -> bool:
    """Whether it passed its trial, which is held here where it was not yet."""
    kind = attention_trial.kind_of(library.name, q, k, v, form, backward)
    if not attention_trial.was_tried(kind) and trial.is_capturing():
        return False  # a trial waits for the device, which a CUDA graph must not hold
    run = partial(attention_adapter.both, library) if backward else partial(_forcing, library)
    if attention_trial.passes(kind, run, _reference):
        return True
    _plans.held.clear()  # the next call chooses without it
    return False


def give_up(q: Tensor, k: Tensor, v: Tensor, form: Form, reason: str, backward: bool) -> None:
    """Let no library compute calls of this kind any more: one failed where its trial does not look."""
    for library in libraries(backward):
        attention_trial.lose(attention_trial.kind_of(library.name, q, k, v, form, backward), reason)
    _plans.held.clear()
    tape.forget()


def _forcing(library: Library, *args: object) -> Tensor:
    with forced(library):
        return torch.ops.fusekit.attention(*args)


def _reference(*args: object) -> Tensor:
    from fusekit.kernels.attention import reference  # which imports this module

    return reference(*args)  # type: ignore[arg-type]


@contextlib.contextmanager
def forced(library: Library) -> Iterator[None]:
    """Have this library compute on this thread, whatever it may take."""
    before, _forced.library = _forced.library, library
    try:
        yield
    finally:
        _forced.library = before
