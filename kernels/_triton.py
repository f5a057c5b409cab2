"""Triton where it is installed, and a stand-in where it is not (macOS, Windows).

Kernel files import `triton`, `tl` and `libdevice` from here, so that they load everywhere; only launching a
kernel needs the real thing.
"""

from __future__ import annotations

from typing import Any


class _Missing:
    """Answers every attribute, so decorators and annotations of kernels evaluate without Triton."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:  # @triton.jit
            return args[0]
        return self

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError("this kernel needs Triton, which is not installed here: pip install triton")


try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    HAS_TRITON = True
except ImportError:
    triton = tl = libdevice = _Missing()  # type: ignore[assignment]
    HAS_TRITON = False
