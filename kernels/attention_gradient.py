"""The backward pass of attention on a GPU: our own kernels, or a library where equal bits are not asked for.

Our own sum in a fixed order. Libraries are faster by not doing so: where form.deterministic is False one may
compute dq, dk and dv of what it may compute forward, once it passed a trial of both passes, by measurement or
by a static default as attention_choice.py has it. With torch.use_deterministic_algorithms none does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fusekit.kernels import (
    attention_adapter,
    attention_choice,
    attention_launch,
    attention_tail,
    attention_trial,
    times_file,
)
from fusekit.kernels.attention_form import Form
from fusekit.kernels.launch import on_gpu, recording
from fusekit.kernels.times_file import OWN, Choice, Times

ORDERED = Choice(OWN, "torch.use_deterministic_algorithms is on")
Grads = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, tail: Tensor, form: Form,
    bias_grad: bool,
) -> Grads:  # fmt: skip
    """dq, dk, dv, the gradients of an additive mask and of sinks, as attention_launch.backward."""
    if not form.deterministic and not recording():
        name = choose(q, k, v, form).name
        library = attention_choice.named(name)
        kind = attention_trial.kind_of(name, q, k, v, form, backward=True)
        if library is not None and attention_trial.was_passed(kind):
            return *attention_adapter.backward(library, dy, q, k, v, out, stats, form), None, None
    return attention_launch.backward(dy, q, k, v, out, stats, tail, form, bias_grad)


def prepare(q: Tensor, k: Tensor, v: Tensor, form: Form) -> None:
    """In the forward pass: hold the trial of who would compute the backward pass. Autograd has one thread a
    GPU, on which a trial, a backward pass itself, would wait for the one that waits for it."""
    if form.deterministic or recording():
        return
    library = attention_choice.named(choose(q, k, v, form).name)
    if library is not None:
        attention_choice.proved(library, q, k, v, form, backward=True)


def choose(q: Tensor, k: Tensor, v: Tensor, form: Form) -> Choice:
    """Who runs the backward pass of this call on a GPU, and why."""
    if torch.are_deterministic_algorithms_enabled():
        return ORDERED
    return attention_choice.choose(q, k, v, form, backward=True)


def describe(q: Tensor, k: Tensor, v: Tensor, form: Form) -> str:
    """Who runs this call on its device, and why, for a report; of both passes where there is a choice."""
    forward = attention_choice.describe(q, k, v, form)
    if form.deterministic or not on_gpu(q):
        return forward
    first, second = attention_choice.choose(q, k, v, form), choose(q, k, v, form)
    if second.name == OWN or first.name != second.name:
        return f"{forward}; backward {second}"
    if first.reason == second.reason:
        return f"forward and backward: {first}"
    return f"forward and backward: {first}; backward {second.reason}"


def retreat(q: Tensor, k: Tensor, v: Tensor, form: Form, reason: str) -> str:
    """Give up the libraries for calls of this kind; returns which computed this one until now, if any did."""
    if not on_gpu(q):
        return ""
    passes = (False,) if form.deterministic else (False, True)
    chosen = (attention_choice.choose(q, k, v, form, backward) for backward in passes)
    left = dict.fromkeys(choice.name for choice in chosen if attention_choice.named(choice.name) is not None)
    if left:
        for backward in passes:
            attention_choice.give_up(q, k, v, form, f"verify: {reason}", backward)
    return " and ".join(left)


def measure(
    q: Tensor, k: Tensor, v: Tensor, form: Form, clock: Callable[[Callable[[], object]], float] | None = None
) -> Times:
    """Time the backward pass of whoever may compute it, as attention_choice.measure does the forward pass."""
    able = [] if form.deterministic else attention_choice.able_to(q, k, v, form, backward=True)
    if not able:
        return {}
    clock = clock or times_file.seconds
    with torch.no_grad():
        out, stats, tail = attention_launch.forward(q, k, v, form, attention_tail.IF_OWN)
        call = torch.randn_like(out), q, k, v, out, stats
        times = {OWN: clock(partial(attention_launch.backward, *call, tail, form, False))}
        times |= {x.name: clock(partial(attention_adapter.backward, x, *call, form)) for x in able}
    attention_choice.keep(times, q, k, v, form, backward=True)
    return {f"{name} backward": seconds for name, seconds in times.items()}
