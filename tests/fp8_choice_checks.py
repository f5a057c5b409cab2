"""An H100 in place of the library and of the own kernel: for the tests of who computes an FP8 product."""

from __future__ import annotations

from typing import Any

import mmaemu
import pytest
import torch
from torch import Tensor

from fusekit.kernels import fp8_choice, fp8_library, fp8_trial, times_file
from fusekit.kernels.fp8_format import Operand
from fusekit.kernels.fp8_library import Call

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
CPU = torch.device("cpu")


def call(**changes: Any) -> Call:
    return Call(CPU, (9, 0), (2048, 1024, 4096), (E4M3, E4M3, BF16), "tensor", "promote128")._replace(
        **changes
    )


def h100(a: Operand, b: Operand, output: Tensor, call: Call, bias: Tensor | None = None) -> None:
    """An H100's sums, bit by bit, and an epilogue in float32."""
    left, right = (o.codes.view(d) for o, d in zip((a, b), call.dtypes[:2], strict=True))
    fast = call.accumulation == "fast"
    if call.scaling == "block":
        sums = sums_of_blocks(left, right, a.inverse, b.inverse)
    else:
        sums = mmaemu.accumulate(left, right, use_fast_accum=fast, profile="hopper", splitk=1)
        sums = sums * a.inverse.t() * b.inverse
    output.copy_(sums if bias is None else sums + bias)


def sums_of_blocks(left: Tensor, right: Tensor, a_inverse: Tensor, b_inverse: Tensor) -> Tensor:
    """Each step's sum leaves the tensor core and is added in float32, times its scales."""
    sums = torch.zeros(len(left), len(right))
    for step, (a, b) in enumerate(zip(left.split(128, 1), right.split(128, 1), strict=True)):
        rows = b_inverse[step].repeat_interleave(-(-len(right) // b_inverse.shape[1]))
        product = mmaemu.accumulate(a, b, use_fast_accum=True, profile="hopper", splitk=1)
        sums += product * a_inverse[step][:, None] * rows
    return sums


def fails(*args: Any) -> None:
    raise RuntimeError("no algorithm for this product")


KINDS = {
    "output": {},
    "fast": {"accumulation": "fast"},
    "gradient": {"dtypes": (E5M2, E4M3, BF16)},
    "float32 gradient": {"dtypes": (E5M2, E4M3, torch.float32)},
    "float16": {"dtypes": (E4M3, E4M3, torch.float16)},
    "rows": {"scaling": "row"},
    "bias": {"bias": BF16},
    "blocks": {"scaling": "block", "square": True},
    "blocks and bias": {"scaling": "block", "square": True, "bias": BF16},
    "blocks, weight gradient": {"scaling": "block", "dtypes": (E4M3, E4M3, torch.float32)},
}


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No times, no trials and no plans of other tests; a library that is there; an H100 as the own kernel."""
    monkeypatch.setattr(times_file, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(times_file, "device_name", lambda device: "test")
    monkeypatch.setattr(fp8_trial, "_outcomes", {})
    monkeypatch.setattr(fp8_trial, "SIZES", (16, 16, 1024))  # the emulation takes its time
    monkeypatch.setattr(fp8_trial, "BLOCK_SIZES", (16, 256, 640))
    monkeypatch.setattr(fp8_choice, "_failed", {})
    monkeypatch.setattr(fp8_library, "absent", lambda: None)
    monkeypatch.setattr(fp8_library, "run", h100)
    monkeypatch.setattr(fp8_choice, "own", h100)
    monkeypatch.setattr(fp8_choice, "capability", lambda x: (9, 0))
    times_file.forget()
    fp8_choice._plans.held.clear()
    yield
    times_file.forget()
    fp8_choice._plans.held.clear()
