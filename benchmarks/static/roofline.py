"""Predicted, never measured: the least time that a device's peaks allow for each case of real size.

    seconds = max(FLOPs / rate, bytes / bandwidth)

No kernel is faster; how near one comes is for `fusekit bench` to measure on the device. Bytes count every
input and output once (benchmarks/kernels/work.py). Products of 16-bit values run at the tensor cores' dense
rate, other arithmetic and float32 products at float32's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels.cases import Case
from benchmarks.kernels.work import Work, work
from benchmarks.static.specialisations import forward_and_backward
from fusekit.kernels import OPS
from fusekit.kernels.launch import record
from fusekit.kernels.op import Op, Sample

DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Device:
    """half, fp32: FLOPs a second, dense; bandwidth: bytes a second."""

    arch: int
    half: float
    fp32: float
    bandwidth: float
    source: str


DEVICES = {
    "A100": Device(80, 312e12, 19.5e12, 2.039e12, "published: NVIDIA A100 datasheet, SXM 80 GB"),
    "H100": Device(90, 989.4e12, 66.9e12, 3.35e12, "published: NVIDIA H100 whitepaper, SXM"),
    "H200": Device(90, 989.4e12, 66.9e12, 4.8e12, "published: NVIDIA H200 datasheet, SXM"),
    "H200, measured": Device(
        90, 788e12, 66.9e12, 4.3e12,
        "ceilings measured on one H200: cuBLAS bf16 8192x8192x8192 and a large copy; float32 as published",
    ),
    "B200": Device(100, 2250e12, 75e12, 7.7e12, "published: NVIDIA HGX B200 datasheet, a GPU of it"),
}  # fmt: skip


class Prediction(NamedTuple):
    """bound: "compute" or "memory", whichever takes longer."""

    op: str
    sample: str
    dtype: str
    direction: str
    device: str
    seconds: float
    bound: str


def predict(todo: Work, device: Device, tensor_cores: bool) -> tuple[float, str]:
    """The least seconds, and what bounds them."""
    compute = todo.flops / (device.half if tensor_cores else device.fp32)
    memory = todo.moved / device.bandwidth
    return (compute, "compute") if compute > memory else (memory, "memory")


def predictions() -> Iterator[Prediction]:
    """Every bench shape, by op, dtype, direction and device."""
    for name, op in OPS.items():
        for dtype in DTYPES:
            with FakeTensorMode(allow_non_fake_inputs=True):
                chosen = [s for s in op.samples("cpu", dtype) if s.bench]
                products = dtype != torch.float32 and _multiplies(op, chosen[0])
                todo = [(s.name, work(Case(name, op, dtype, s, 0))) for s in chosen]
            for sample, directions in todo:
                for direction, amount in directions.items():
                    for device, peaks in DEVICES.items():
                        seconds, bound = predict(amount, peaks, products)
                        shown = str(dtype).removeprefix("torch.")
                        yield Prediction(name, sample, shown, direction, device, seconds, bound)


def _multiplies(op: Op, sample: Sample) -> bool:
    """Whether a kernel of the op holds a matrix product."""
    with record() as launches:
        forward_and_backward(op, sample.args)
    return any("tl.dot(" in start.kernel.src for start in launches)
