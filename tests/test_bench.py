"""What the suites are built of: clock, copies, baselines."""

import time

import pytest
import torch

from benchmarks.clock import CpuClock
from benchmarks.kernels import cases as op_suite
from benchmarks.report.style import MARKERS
from fusekit.kernels import OPS
from fusekit.kernels.parity import results_and_grads


def test_the_cpu_clock_counts_work_and_not_sleep():
    working, sleeping = CpuClock().sample([lambda: sum(range(300_000)), lambda: time.sleep(0.05)])
    assert working > sleeping


@pytest.mark.parametrize("name", OPS)
def test_what_an_op_is_measured_against_computes_the_same(name):
    if name not in op_suite.BASELINES:
        pytest.skip("measured against its reference")
    op = OPS[name]
    compared = 0
    for sample in op.samples("cpu", torch.float32):
        if sample.bench or op.supports(*sample.args) is not None or _random(sample.args):
            continue
        ours, theirs = (results_and_grads(fn, sample.args) for fn in (op.reference, op_suite.BASELINES[name]))
        if not all(t.isfinite().all() for t in theirs.values()):
            continue  # a fully masked row: PyTorch answers NaN or zero depending on the backend
        for key in ours:
            torch.testing.assert_close(theirs[key], ours[key], rtol=2e-3, atol=2e-3)
        compared += 1
    assert compared > 0


def _random(args):
    """A seed among the arguments: class indices are as many as rows."""
    return any(isinstance(a, torch.Tensor) and a.dtype == torch.int64 and a.numel() == 1 for a in args)


def test_copies_keep_strides_and_gradients_in_other_memory():
    x = torch.randn(6, 4).t().requires_grad_()
    first, second = (args[0] for args in op_suite.copies((x, None, 3))[:2])
    assert second.stride() == first.stride() and second.requires_grad
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_every_op_has_a_shape_of_its_own_in_the_roofline():
    assert len(set(MARKERS)) == len(MARKERS) >= len(op_suite.MEASURED)
