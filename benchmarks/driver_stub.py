"""Triton's own launcher on a machine without a GPU: kernels are compiled for sm_90, and none is started.

A library of a few functions stands in for the CUDA driver (driver_stub.c, built by the C compiler that Triton
needs anyway). Tensors are on the CPU and the ops are told that they are on a GPU; everything between an op's
call and the driver is what runs on one: PyTorch's dispatcher, autograd, allocations, Triton's binder and
launcher. What the driver itself takes, a microsecond or two a kernel, is not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from fusekit.kernels import config_table, tape

SOURCE = Path(__file__).with_name("driver_stub.c")
CAPABILITY = (9, 0)


def build(folder: Path) -> ctypes.CDLL:
    """The stub as libcuda.so.1, loaded so that Triton's modules find it by that name."""
    library = folder / "libcuda.so.1"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _driver() -> CudaDriver:
    """Triton's, asked of PyTorch's CUDA nothing: a build for CPUs has none."""
    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device: CAPABILITY
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    return driver


@contextlib.contextmanager
def stubbed() -> Iterator[Callable[[], int]]:
    """Ops of CPU tensors take their GPU path, with the table of sm_90. Yields how many kernels were launched.

    Triton's driver stays the stub for the rest of the process: what was compiled is unloaded at its end.
    """
    table = config_table.load("sm_90")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        library = build(folder)
        patch: Any = mock.patch.object
        stack.enter_context(patch(triton.knobs.nvidia, "libcuda_path", str(folder)))
        for name, module in list(sys.modules.items()):
            if name.startswith("fusekit.kernels") and hasattr(module, "on_gpu"):
                stack.enter_context(patch(module, "on_gpu", lambda x: True))
        stack.enter_context(patch(config_table, "for_device", lambda index: table))
        stack.enter_context(patch(tape, "same_bits", lambda *results: True))  # of memory that nothing wrote
        triton.runtime.driver.set_active(_driver())
        tape.forget()
        stack.callback(tape.forget)
        yield lambda: ctypes.c_long.in_dll(library, "launches").value
