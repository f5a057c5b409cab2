"""A call computed both ways decides whether its tape is kept, and nobody else notices."""

from __future__ import annotations

import ctypes
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fusekit.kernels import tape
from fusekit.kernels._triton import HAS_TRITON
from tests.tape_checks import M, N, a_gpu, a_taped, operands, tapes

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
fusekit = torch.ops.fusekit
count: list[int] = []


def test_a_first_call_is_noted_a_second_watched_a_third_compared_a_fourth_played() -> None:
    args = operands()
    with a_gpu() as machine, torch.no_grad():
        found = []
        for _ in range(5):
            fusekit.linear_act(*args)
            found.append((machine.bound, machine.starts, tapes()))
    # (the third is started past Triton's binder by both: launch.Repeated)
    assert found == [(1, 1, 0), (2, 2, 0), (2, 4, 1), (2, 5, 1), (2, 6, 1)]


def played_wrongly(x: Tensor) -> Tensor:
    """What a tape would keep of this is the number that it saw."""
    count.append(1)
    return x * len(count)


def test_a_tape_that_computes_other_bits_is_never_played() -> None:
    count.clear()
    same_bits = tape.same_bits
    named = a_taped(played_wrongly, name="counting")
    with named as taped, a_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tape, "same_bits", same_bits)
        results = [taped(torch.ones(2)).tolist() for _ in range(2)]
        with pytest.warns(UserWarning, match="counting: played, it computed other bits"):
            results.append(taped(torch.ones(2)).tolist())
        results += [taped(torch.ones(2)).tolist() for _ in range(3)]
        assert results == [[float(n)] * 2 for n in range(1, 7)] and not taped.tapes and taped.noted


@pytest.mark.parametrize("other", ["last bit", "NaN", "shape", "strides", "dtype"])
def test_same_bits_sees(other: str) -> None:
    x = torch.randn(3, 4).bfloat16()
    x[1, 1] = torch.nan
    assert tape.same_bits((x, [x.t()]), (x.clone(), [x.clone().t()]))
    spoilt = {
        "last bit": (x.view(torch.int16) ^ torch.eye(3, 4, dtype=torch.int16)).view(torch.bfloat16),
        "NaN": x.nan_to_num(),
        "shape": x[:, :3],
        "strides": x.t().contiguous().t(),
        "dtype": x.half(),
    }[other]
    assert not tape.same_bits([x], [spoilt])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("simulated"), RuntimeError("no such launcher")])
def test_a_comparison_that_fails_is_not_the_users_and_not_tried_again(error: Exception) -> None:
    args = operands()
    with a_gpu() as machine, torch.no_grad():
        for _ in range(2):
            fusekit.linear_act(*args)

        def broken(*_: Any) -> Tensor:
            raise error

        (taped,) = (t for t in tape._every if t.unproved)
        (key,) = taped.unproved
        taped.unproved[key] = taped.unproved[key]._replace(play=broken)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert fusekit.linear_act(*args).shape == (M, N)
        assert len(said) == (not isinstance(error, torch.OutOfMemoryError))
        assert not taped.unproved and not taped.tapes and isinstance(taped.noted[key], str)
        starts = machine.starts
        fusekit.linear_act(*args)
        assert machine.starts == starts + 1


def test_two_threads_may_meet_in_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    args, meet = operands(), threading.Barrier(2, timeout=30)
    with a_gpu(), torch.no_grad():
        for _ in range(2):
            fusekit.linear_act(*args)
        monkeypatch.setattr(tape, "same_bits", lambda *_: meet.wait() >= 0)

        def call() -> Tensor:
            with torch.no_grad():
                return fusekit.linear_act(*args)

        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(call)
            while next(iter(t for t in tape._every if t.name == "linear_act_forward")).unproved:
                time.sleep(0.001)
            second = pool.submit(call)
            assert second.result(30).shape == (M, N)
            meet.wait()
            assert first.result(30).shape == (M, N)


def test_what_a_checkpoint_keeps_has_the_version_that_it_had() -> None:
    """Kernels write uncounted; putting back what they wrote to must not count either."""
    total = torch.zeros(3)
    tape._fill([total], [torch.ones(3)])
    assert total._version == 0 and total.tolist() == [1.0] * 3


def test_memory_that_an_unseen_kernel_wrote_is_never_on_tape() -> None:
    """As of flash-attn 4, whose kernels are started past PyTorch."""

    def unseen(made: Tensor, value: float) -> None:
        ctypes.memmove(made.data_ptr(), (ctypes.c_float * made.numel())(*[value] * made.numel()), made.nbytes)

    def returned(x: Tensor) -> Tensor:
        made = x.new_empty(x.shape)
        unseen(made, 3.0)
        return made

    def read(x: Tensor) -> Tensor:
        return returned(x) * 2

    for run in (returned, read):
        with a_taped(run) as taped, a_gpu():
            for _ in range(5):
                taped(torch.ones(4))
            assert not taped.tapes and list(taped.noted.values()) == ["memory that nobody was seen to write"]


def test_what_is_written_to_is_written_once_a_call_and_compared() -> None:
    """The third call is computed twice; of its argument nobody may notice."""

    def run(x: Tensor, total: Tensor) -> Tensor:
        total += x
        return x * 2

    same_bits, total = tape.same_bits, torch.zeros(3)
    with a_taped(run, writes=(1,)) as taped, a_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tape, "same_bits", same_bits)
        for number in range(1, 7):
            assert torch.equal(taped(torch.ones(3), total), torch.full((3,), 2.0))
            assert torch.equal(total, torch.full((3,), float(number)))
        assert taped.tapes


def test_arguments_that_ops_write_to_are_known() -> None:
    writes = {taped.name: taped.writes for taped in tape._every if taped.writes}
    assert {"feed_forward_backward_over_saved", "linear_fp8_forward", "linear_fp8_backward"} <= writes.keys()
    assert writes["feed_forward_backward_over_saved"] == (4,)
