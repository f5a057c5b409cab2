"""Which cases a run of the kernel suite has, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from benchmarks.kernels.cases import MEASURED, Case
from benchmarks.kernels.suite import Settings, dtype_name
from benchmarks.kernels.sweeps import SWEEPS
from fusekit.kernels import FP8_OPS
from fusekit.kernels.op import Sample


def plan(settings: Settings) -> Iterator[Case]:
    """Every op's first sample in every dtype first, then the second ones, then the sweeps over sizes.

    With settings.largest_first every op's largest sample comes first, and each dtype is finished before the
    next one begins.
    """
    if not settings.largest_first:
        yield from _in_turn(settings, settings.dtypes)
        return
    for dtype in settings.dtypes:
        yield from _in_turn(settings, (dtype,))


def count(settings: Settings) -> int:
    """How many cases `plan` yields; on fake tensors, so that nothing large is drawn."""
    return sum(len(_order(name, dtype, settings)) for name, dtype in _rows(settings, settings.dtypes))


def listing(settings: Settings) -> Iterator[tuple[str, torch.dtype, int, str]]:
    """Op, dtype, position and name of every sample, without drawing any."""
    for name, dtype in _rows(settings, settings.dtypes):
        with FakeTensorMode():
            titles = [sample.name for sample in _samples(name, dtype, settings)]
        for index in _order(name, dtype, settings):
            yield name, dtype, index, titles[index] or str(index)


def draw(name: str, dtype: torch.dtype, settings: Settings, index: int) -> Case:
    """The case at a position of the listing."""
    return Case(name, MEASURED[name], dtype, _sample(name, dtype, settings, index), index)


def label(case: Case) -> str:
    return f"{case.name} {case.sample.name or case.index} {dtype_name(case)}"


def _in_turn(settings: Settings, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    rows = {row: _order(*row, settings) for row in _rows(settings, dtypes)}
    for rank in range(max(map(len, rows.values()), default=0)):
        for (name, dtype), order in rows.items():
            if rank < len(order):  # one sample at a time in memory
                yield draw(name, dtype, settings, order[rank])


def _rows(settings: Settings, dtypes: tuple[torch.dtype, ...]) -> list[tuple[str, torch.dtype]]:
    """FP8 layers in bfloat16 alone, as what is around them is, unless that is none of the dtypes."""
    low = torch.bfloat16
    return [
        (name, dtype)
        for dtype in dtypes
        for name in settings.ops
        if name not in FP8_OPS or dtype == low or low not in dtypes
    ]


def _order(name: str, dtype: torch.dtype, settings: Settings) -> list[int]:
    """Positions of the samples that the op supports here."""
    with FakeTensorMode():
        found = [
            (index, sum(a.numel() * a.element_size() for a in sample.args if isinstance(a, Tensor)))
            for index, sample in enumerate(_samples(name, dtype, settings))
            if MEASURED[name].supports(*sample.args) is None
        ]
    if settings.largest_first:
        found.sort(key=lambda pair: -pair[1])
    return [index for index, _ in found]


def _sample(name: str, dtype: torch.dtype, settings: Settings, index: int) -> Sample:
    """The sample at a position; those before it are not drawn, which for large ones takes seconds."""
    samples = _samples(name, dtype, settings)
    with FakeTensorMode():
        for _ in range(index):
            next(samples)
    sample = next(samples)
    if any(isinstance(a, FakeTensor) for a in sample.args):  # it shares a tensor with an earlier one
        sample = next(itertools.islice(_samples(name, dtype, settings), index, None))
    return sample


def _samples(name: str, dtype: torch.dtype, settings: Settings) -> Iterator[Sample]:
    chosen = (s for s in MEASURED[name].samples(settings.device, dtype) if s.bench != settings.small)
    if settings.small:
        return itertools.islice(chosen, 1)
    sweep = SWEEPS[name](settings.device, dtype) if name in SWEEPS else ()
    if settings.device.type == "cpu":  # the larger samples are a GPU's: they come last
        return itertools.chain(itertools.islice(chosen, 1), sweep, chosen)
    return itertools.chain(chosen, sweep)
