"""What is tried on the device before it is trusted (libraries, tapes) asks, and says of what failed."""

from __future__ import annotations

import torch


def is_capturing() -> bool:
    """Whether the current stream is captured into a CUDA graph, which must not wait for the device."""
    return torch.backends.cuda.is_built() and torch.cuda.is_current_stream_capturing()


def failure(error: BaseException) -> str:
    """An exception in one line: its type, and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
