"""Ctrl-C and SIGTERM without loss: the step in progress is finished and a checkpoint written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came, a checkpoint was written. `exit_code` is the shell's: 128 plus the signal."""

    def __init__(self, number: int, step: int, checkpoint: Path) -> None:
        super().__init__(f"stopped at step {step}; continue with --resume ({checkpoint})")
        self.exit_code = 128 + number


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish, so that no step is cut in half; a second is obeyed."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.signal = say, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        self.say("finishing this step, then saving; press Ctrl-C again to stop at once")
