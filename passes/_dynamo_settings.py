"""Dynamo's configuration while one of our frames is compiled; like _compat.py, which gives it out, it may
reach into torch's private parts, and nothing else of fusekit does."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def dynamo_settings() -> Iterator[None]:
    """Dynamo's configuration while one of our frames is compiled, and only then.

    specialize_float: attention scales and norm epsilons stay literals of the graph and do not become inputs.
    warning_once: transformers' log-once calls are GPT-2's and gradient checkpointing's only graph break.
    allow_rnn: an LSTM is one node, left alone; without it, its frame and all beside it would stay eager.
    requires_grad_() of an intermediate, which adapters call on a frozen embedding's output: Dynamo breaks the
        frame where it reaches a result, as AOTAutograd would drop it there. Our graphs call it.
    recorded outputs: transformers installs hooks for router logits and hidden states in the first call that
        asks for them, under a lock, at which the frame would break for good. Called while Dynamo traces.
    """
    from torch._dynamo import config

    settings: dict[str, Any] = {"specialize_float": True}
    if hasattr(config, "allow_rnn"):
        settings["allow_rnn"] = True
    warning_once = getattr(logging.Logger, "warning_once", None)
    if warning_once is not None:
        settings["ignore_logging_functions"] = set(config.ignore_logging_functions) | {warning_once}
    with config.patch(settings), _requires_grad_may_leak(), _installing_hooks_while_tracing():
        yield


@contextlib.contextmanager
def _installing_hooks_while_tracing() -> Iterator[None]:
    module = sys.modules.get("transformers.utils.output_capturing")
    install = getattr(module, "maybe_install_capturing_hooks", None)
    mark = "_dynamo_marked_constant"  # what torch.compiler.assume_constant_result sets: it returns nothing
    if install is None or hasattr(install, mark):
        yield
        return
    setattr(install, mark, True)
    try:
        yield
    finally:
        delattr(install, mark)


@contextlib.contextmanager
def _requires_grad_may_leak() -> Iterator[None]:
    """From torch 2.13 on; before, Dynamo traces no requires_grad_() and the frame breaks there."""
    from torch._dynamo.output_graph import OutputGraph

    name = "_check_requires_grad_intermediate_outputs"
    check = getattr(OutputGraph, name, None)
    if check is None:
        yield
        return
    setattr(OutputGraph, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(OutputGraph, name, check)
