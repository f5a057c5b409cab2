"""Clocks, memory and a description of the machine: what every figure carries."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes since `reset_peak`: the process at its largest; on CUDA, PyTorch's allocations. 0 is unknown."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss starts at the parent's size after fork and exec; the kernel's high-water mark does not.
    high_water = _status("VmHWM")
    if high_water is not None:
        return high_water
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_memory(device: torch.device | str = "cpu") -> int:
    """Bytes in use now; 0 where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or 0


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be taken; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Start measuring the peak anew. False where that is impossible: it then covers the whole process."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class Stopwatch:
    """Wall and process time since the last `lap`, waiting for a GPU first."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        self.lap()

    def lap(self) -> tuple[float, float]:
        if self.on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        before = getattr(self, "_started", now)
        self._started = now
        return now[0] - before[0], now[1] - before[1]


def machine() -> dict[str, Any]:
    """Versions, processor, GPU and thread count, for reports and results files."""
    described: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
        described["cuda"] = torch.version.cuda
    return described


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
