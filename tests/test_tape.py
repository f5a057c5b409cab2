"""Ops played from their tapes: the same kernels of the same addresses, operators, results and devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fusekit.kernels import FP8_OPS, OPS, tape_watch
from fusekit.kernels._triton import HAS_TRITON
from tests.tape_checks import M, N, a_gpu, a_taped, does, fresh, operands, results_of, tapes

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
DTYPES = (torch.bfloat16, torch.float32)
fusekit = torch.ops.fusekit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*OPS, *FP8_OPS])
def test_a_tape_does_what_the_op_does(name: str, dtype: torch.dtype) -> None:
    """Same starts and operators, in order, of the same memory, though every tensor is another one."""
    op, played = (OPS | FP8_OPS)[name], 0
    for sample in op.samples("cpu", dtype):
        if sample.bench:
            continue
        with a_gpu() as machine:
            for _ in range(3):
                results_of(op, sample.args)
            played += tapes()
            args = [fresh(x) for x in sample.args]
            assert does(machine, op, args, True) == does(machine, op, args, False), sample.name
    assert played


def test_what_was_one_tensor_may_be_two() -> None:
    """x + mlp(x) is watched with one tensor in both places."""
    op = OPS["linear_act"]
    x, weight = torch.randn(M, N).bfloat16(), torch.randn(N, N).bfloat16()
    with a_gpu() as machine:
        for _ in range(4):
            op.fused(x, weight, None, x)
        args = [fresh(x), weight, None, fresh(x)]
        assert does(machine, op, args, True) == does(machine, op, args, False)
        with machine.logging(args, True) as log:
            op.fused(*args)
        assert log.entries[0][2][0] != log.entries[0][2][4]  # a_ptr and residual_ptr
        assert tapes() == 1


def test_inference_tensors_are_played() -> None:
    """Whose writes nobody counts; views of them are given to operators and returned."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        made = x.new_empty(2, *x.shape)
        made.copy_(x.expand(2, *x.shape))
        return made[1], made.t().contiguous()

    with a_taped(run) as taped, a_gpu(), torch.inference_mode():
        for _ in range(6):
            x = torch.randn(4)
            second, total = taped(x)
            assert torch.equal(second, x) and torch.equal(total, torch.stack((x, x)).t())
        assert taped.tapes


def test_results_are_new_each_time() -> None:
    args = operands()
    with a_gpu(), torch.no_grad():
        results = [fusekit.linear_act(*args) for _ in range(5)]
    assert len({y.data_ptr() for y in results}) == 5


def test_bad_input_is_refused_though_there_is_a_tape() -> None:
    x, weight = operands()
    q, table = torch.randn(1, 2, 8, 16).bfloat16(), torch.randn(1, 1, 8, 16).bfloat16()
    with a_gpu(), torch.no_grad():
        for _ in range(4):
            fusekit.linear_act(x, weight)
            fusekit.rope(q, table, table.clone())
        assert tapes() == 2
        with pytest.raises(ValueError, match=r"linear_act: x .* differ in input features"):
            fusekit.linear_act(x, weight[:, :-1])
        with pytest.raises(ValueError, match=r"linear_act: .*weight is"):
            fusekit.linear_act(x, weight.half())
        with pytest.raises(ValueError, match="rope: cos and sin need a gradient"):
            fusekit.rope(q, table.clone().requires_grad_(), table)


def test_what_reads_a_value_is_run_each_time() -> None:
    calls = []

    def run(x: Tensor) -> Tensor:
        calls.append(float(x.sum()))
        return x + calls[-1]

    with a_taped(run) as taped:
        with a_gpu():
            for number in range(1, 5):
                assert taped(torch.full((4,), float(number))).tolist() == [5.0 * number] * 4
        assert calls == [4.0, 8.0, 12.0, 16.0]


def test_operators_of_pytorch_are_played_on_the_calls_own_tensors() -> None:
    """Views, copies and several results, of other values each time."""

    def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        calls.append(1)
        top, index = x.t()[1:].contiguous().max(1)
        empty = x.new_empty(2, 2)
        empty.copy_(x[:2, :2])
        return top, [index, empty.t()]

    calls: list[int] = []
    with a_taped(run) as taped:
        with a_gpu():
            for _ in range(5):
                x = torch.randn(4, 5)
                top, (index, corner) = taped(x)
                found = x[:, 1:].max(0)
                assert torch.equal(top, found.values) and torch.equal(index, found.indices)
                assert torch.equal(corner, x[:2, :2].t())
        assert len(calls) == 3


def test_versions_are_those_of_the_op() -> None:
    """Gradients that nobody has touched are told by it: passes/weights.py."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        counted, uncounted = x.new_empty(x.shape), x.new_empty(x.shape)
        torch.mul(x, 2.0, out=counted)
        torch.mul(x, 3.0, out=uncounted)
        return counted, uncounted.data

    with a_taped(run) as taped, a_gpu():
        x = torch.randn(4)
        for _ in range(4):
            counted, uncounted = taped(x)
            assert torch.equal(counted, 2 * x) and torch.equal(uncounted, 3 * x)
            assert counted._version == 1 and uncounted._version == 0
        assert tapes() == 1


def test_autocast_casts_nothing_within_an_op() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    with a_taped(tape_watch.without_autocast(lambda x, weight: x @ weight)) as taped:
        with a_gpu(), torch.autocast("cpu", torch.bfloat16):
            results = [taped(x, weight) for _ in range(5)]
            assert tapes() == 1
        with torch.no_grad():
            assert all(torch.equal(y, x @ weight) for y in results)


def test_an_op_computes_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = operands()
    current = []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted)
        yield

    with a_gpu(), torch.no_grad():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "device", device)
        fusekit.linear_act(x, weight)
        assert current == [x.device]
