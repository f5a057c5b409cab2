"""From an op to the driver: what the compiled kernel is handed, how often the binder runs, and its time."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch

from benchmarks import launch_path
from benchmarks.launch_path import Compiled
from fusekit.kernels import gemm, launch
from fusekit.kernels._triton import HAS_TRITON
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.launch import Repeated

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


class Recorder(launch_path.Compiled):
    def __init__(self) -> None:
        self.starts: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *args: self.starts.append((grid, args))


def operands(dtype=torch.bfloat16):
    return (
        torch.randn(64, 32, dtype=dtype),
        torch.randn(32, 48, dtype=dtype),
        torch.empty(64, 48, dtype=dtype),
    )


def test_the_compiled_kernel_gets_every_parameter_in_its_place():
    a, b, output = operands()
    bias, z = torch.randn(48, dtype=a.dtype), torch.empty_like(output)
    recorder = Recorder()
    with launch_path.stubbed(), mock.patch.object(launch, "launch", lambda *args, **meta: recorder):
        for _ in range(2):
            gemm.matmul(a, b, output, bias=bias, act="silu", z=z)
        (plan,) = gemm._plans.held.values()
    kernel = plan.start._kernel
    ((grid, args),) = recorder.starts  # the first start goes through Triton's binder
    given = dict(zip(kernel.arg_names, args, strict=True))
    assert len(grid) == 3 and given["a_ptr"] is a and given["z_ptr"] is z and given["residual_ptr"] is None
    assert (given["M"], given["N"], given["K"]) == (64, 48, 32) and given["stride_om"] == 48
    assert given["ACT"] is ACTIVATIONS["silu"].kernel and given["BLOCK_M"] == plan.config.m


def test_only_calls_of_one_kind_share_a_plan():
    a, b, output = operands()
    with launch_path.stubbed():
        gemm.matmul(a, b, output)
        gemm.matmul(a.clone(), b.clone(), output.clone())
        assert len(gemm._plans.held) == 1
        changes = [
            lambda: gemm.matmul(*operands(torch.float16)),
            lambda: gemm.matmul(a, b, output, act="relu"),
            lambda: gemm.matmul(a, torch.randn(48, 32, dtype=a.dtype).t(), output),
            lambda: gemm.matmul(torch.empty(65 * 32, dtype=a.dtype)[1 : 64 * 32 + 1].view(64, 32), b, output),
            lambda: gemm.matmul(a[:40], b, output[:40]),
        ]
        for number, change in enumerate(changes):
            change()
            assert len(gemm._plans.held) == number + 2


def test_plans_of_shapes_that_never_come_again_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(launch, "MOST_PLANS", 3)
    a, b, output = operands()
    with launch_path.stubbed():
        for rows in range(1, 9):
            gemm.matmul(a[:rows], b, output[:rows])
            assert len(gemm._plans.held) <= 3


def test_descriptors_get_memory_in_any_thread_and_the_users_allocator_stays():
    allocation = pytest.importorskip("triton.runtime._allocation")
    before, during = allocation._allocator.get(), []

    def start(*args, **meta):
        during.append(allocation._allocator.get())

    with mock.patch.object(launch, "launch", start):
        Repeated(object(), (1,), scratch=True)()
        Repeated(object(), (1,))()
    assert during == [launch._allocate, before] and allocation._allocator.get() is before


def test_host_time_is_measured_and_small(tmp_path, capsys, monkeypatch):
    """10 µs a kernel is the aim on a quiet machine; ten times that is what a busy one must still reach."""
    monkeypatch.setattr(launch_path, "CALLS", 50)
    monkeypatch.setattr(launch_path, "ROUNDS", 5)
    assert launch_path.main(["--out", str(tmp_path / "l.json")]) == 0
    held = json.loads((tmp_path / "l.json").read_text())
    assert 0 < held["microseconds"]["matmul"] < 100 and "linear_act forward" in capsys.readouterr().out
    assert all(op["own_a_kernel"] < 100 for op in held["ops"].values())
    kernels = {name: op["kernels"] for name, op in held["ops"].items()}
    assert kernels["linear_act forward"] == kernels["qkv_linear forward"] == 1
    assert kernels["mlp forward"] == kernels["gated_mlp forward"] == 2


@pytest.mark.parametrize("name", launch_path.cases())
def test_a_second_call_settles_nothing_again(name):
    """No plan is made, and no kernel goes through Triton's binder, where nothing has changed."""
    op, _, args = launch_path.cases()[name]
    started = []
    with launch_path.stubbed(), torch.no_grad():
        with mock.patch.object(launch, "launch", lambda *args, **meta: started.append(args) or Compiled()):
            op(*args)
        first, plans = len(started), [len(plans.held) for plans in launch_path.PLANS]
        before = Compiled.starts
        op(*args)
        assert [len(plans.held) for plans in launch_path.PLANS] == plans
        assert first and len(started) == first and Compiled.starts > before
