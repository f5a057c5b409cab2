"""Ops played from their tapes: the same kernels of the same addresses, and another tape for another kind."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusekit.kernels import (
    FP8_OPS,
    OPS,
    add_layer_norm,
    attention_gradient,
    launch,
    linear_act,
    linear_gpu,
    tape,
    tape_watch,
    times_file,
)
from fusekit.kernels._triton import HAS_TRITON
from tests.tape_checks import Machine, a_gpu

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
DTYPES = (torch.bfloat16, torch.float32)
fusekit = torch.ops.fusekit


def fresh(x: Any) -> Any:
    """A copy in memory of its own, laid out and aligned alike."""
    if not isinstance(x, Tensor):
        return [fresh(item) for item in x] if isinstance(x, list) else x
    memory = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    memory.untyped_storage().copy_(x.untyped_storage())
    return memory.as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_(x.requires_grad)


def results_of(op: Any, args: Any) -> list[Tensor]:
    """Results and gradients of one call."""
    returned = op.fused(*args)
    results = list(returned) if isinstance(returned, tuple) else [returned]
    wanted = [y for y in results if y.requires_grad]
    if wanted:
        inputs = [x for x in tape_watch.tensors_in(args) if x.requires_grad]
        grads = torch.autograd.grad(wanted, inputs, [torch.ones_like(y) for y in wanted], allow_unused=True)
        results += [g for g in grads if g is not None]
    return results


def does(machine: Machine, op: Any, args: Any, played: bool) -> Any:
    """What a call does, and how its results lie."""
    with machine.logging(args, played) as log:
        results = results_of(op, args)
        log.alive += results
        return log.entries, [log.where(x) for x in results]


def tapes() -> int:
    return sum(len(taped.tapes) for taped in tape._every)


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


M, K, N = 32, 64, 48


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.randn(M, K, dtype=dtype), torch.randn(N, K, dtype=dtype)


def shifted(x: Tensor) -> Tensor:
    """The same numbers, one element behind where 16 bytes load at once."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def test_only_calls_of_one_kind_share_a_tape() -> None:
    x, weight = operands()
    bias, residual = torch.randn(N).to(x.dtype), torch.randn(M, N).to(x.dtype)
    kinds: list[tuple[Any, ...]] = [
        (x, weight),
        operands(torch.float16),
        operands(torch.float32),
        (*operands(torch.float32), None, None, "none", True),  # tf32
        (x[:16], weight),
        (x, torch.randn(N + 1, K).to(x.dtype)),
        (x.t().contiguous().t(), weight),
        (x, weight.t().contiguous().t()),
        (shifted(x), weight),
        (x, shifted(weight)),
        (x, weight, bias),
        (x, weight, None, residual),
        (x, weight, bias, shifted(residual)),
        (x, weight, bias, residual.t().contiguous().t()),
        (x, weight, None, None, "relu"),
        (x, weight, None, None, "silu"),
        (x.view(4, 8, K), weight),
    ]
    op = OPS["linear_act"]
    with a_gpu() as machine, torch.no_grad():
        for number, args in enumerate(kinds):
            for _ in range(4):
                op.fused(*args)
            assert tapes() == number + 1
        for args in reversed(kinds):
            again = [fresh(x) for x in args]
            assert does(machine, op, again, True) == does(machine, op, again, False)
        assert tapes() == len(kinds)


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


@pytest.mark.parametrize("op", ["linear_act", "linear_cross_entropy", "qkv_linear", "mlp"])
def test_the_switch_for_tf32_is_part_of_the_kind(op: str) -> None:
    x, weight = operands(torch.float32)
    args = {
        "linear_act": (x, weight),
        "linear_cross_entropy": (x, weight, None, torch.zeros(M, dtype=torch.int64), -100, "mean", 0.0),
        "qkv_linear": (x, weight, weight, weight),
        "mlp": (x, weight, None, weight.t().contiguous(), None),
    }[op]
    with a_gpu(), torch.no_grad():
        for expected, on in enumerate((False, True), 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(linear_gpu, "use_tf32", lambda x, tf32, on=on: on)
                for _ in range(4):
                    getattr(fusekit, op)(*args)
            assert tapes() == expected


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


count: list[int] = []


def test_a_tape_that_computes_other_bits_is_never_played() -> None:
    count.clear()
    same_bits, taped = tape.same_bits, tape.Taped(played_wrongly, name="counting")
    try:
        with a_gpu(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(tape, "same_bits", same_bits)
            results = [taped(torch.ones(2)).tolist() for _ in range(2)]
            with pytest.warns(UserWarning, match="counting: played, it computed other bits"):
                results.append(taped(torch.ones(2)).tolist())
            results += [taped(torch.ones(2)).tolist() for _ in range(3)]
            assert results == [[float(n)] * 2 for n in range(1, 7)] and not taped.tapes and taped.noted
    finally:
        tape._every.remove(taped)


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


def test_inference_tensors_are_played() -> None:
    """Whose writes nobody counts; views of them are given to operators and returned."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        made = x.new_empty(2, *x.shape)
        made.copy_(x.expand(2, *x.shape))
        return made[1], made.t().contiguous()

    taped = tape.Taped(run)
    try:
        with a_gpu(), torch.inference_mode():
            for _ in range(6):
                x = torch.randn(4)
                second, total = taped(x)
                assert torch.equal(second, x) and torch.equal(total, torch.stack((x, x)).t())
            assert taped.tapes
    finally:
        tape._every.remove(taped)


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
        taped = tape.Taped(run)
        try:
            with a_gpu():
                for _ in range(5):
                    taped(torch.ones(4))
                assert not taped.tapes and list(taped.noted.values()) == [
                    "memory that nobody was seen to write"
                ]
        finally:
            tape._every.remove(taped)


def test_a_kind_that_is_on_tape_is_not_watched_again_on_another_device(monkeypatch) -> None:
    args = operands()
    with a_gpu() as machine, torch.no_grad():
        for _ in range(4):
            fusekit.linear_act(*args)
        assert tapes() == 1
        monkeypatch.setattr(launch, "current", lambda: (1, 0))
        starts = machine.starts
        for _ in range(3):
            fusekit.linear_act(*args)
        assert machine.starts == starts + 3 and tapes() == 1


def test_attention_waits_until_a_kind_is_no_step_of_a_growing_cache() -> None:
    taped = next(taped for taped in tape._every if taped.name == "attention_forward")
    assert taped.patience == tape.PATIENT
    q = torch.randn(1, 2, 16, 32).bfloat16()
    with a_gpu(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(taped, "patience", 3)
        found = []
        for _ in range(6):
            fusekit.attention(q, q, q)
            found.append((len(taped.unproved), len(taped.tapes)))
    assert found == [(0, 0)] * 3 + [(1, 0), (0, 1), (0, 1)]


def test_what_is_written_to_is_written_once_a_call_and_compared() -> None:
    """The third call is computed twice; of its argument nobody may notice."""

    def run(x: Tensor, total: Tensor) -> Tensor:
        total += x
        return x * 2

    same_bits, total = tape.same_bits, torch.zeros(3)
    taped = tape.Taped(run, writes=(1,))
    try:
        with a_gpu(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(tape, "same_bits", same_bits)
            for number in range(1, 7):
                assert torch.equal(taped(torch.ones(3), total), torch.full((3,), 2.0))
                assert torch.equal(total, torch.full((3,), float(number)))
            assert taped.tapes
    finally:
        tape._every.remove(taped)


def test_arguments_that_ops_write_to_are_known() -> None:
    writes = {taped.name: taped.writes for taped in tape._every if taped.writes}
    assert {"feed_forward_backward_over_saved", "linear_fp8_forward", "linear_fp8_backward"} <= writes.keys()
    assert writes["feed_forward_backward_over_saved"] == (4,)


def test_what_need_not_repeat_its_bits_is_never_played() -> None:
    """Attention's backward pass where a library may compute it, and there alone."""
    q, k, v = (torch.randn(1, 2, 16, 32).bfloat16().requires_grad_() for _ in range(3))
    backward = next(taped for taped in tape._every if taped.name == "attention_backward")
    for chosen, deterministic, played in (
        ("cuDNN", False, 0),
        ("cuDNN", True, 1),
        (times_file.OWN, False, 1),
    ):
        with a_gpu(), pytest.MonkeyPatch.context() as patch:
            choice = times_file.Choice(chosen, "")
            patch.setattr(attention_gradient, "choose", lambda *_, choice=choice: choice)
            patch.setattr(attention_gradient, "prepare", lambda *_: None)
            for _ in range(5):
                fusekit.attention(q, k, v, deterministic=deterministic).sum().backward()
            assert len(backward.tapes) == played


def test_tapes_can_be_switched_off(monkeypatch) -> None:
    monkeypatch.setattr(tape, "ENABLED", False)
    args = operands()
    with a_gpu(), torch.no_grad():
        for _ in range(5):
            fusekit.linear_act(*args)
        assert tapes() == 0


def test_nothing_is_watched_or_compared_while_a_graph_is_captured(monkeypatch) -> None:
    monkeypatch.setattr(tape.trial, "is_capturing", lambda: True)
    args = operands()
    with a_gpu(), torch.no_grad():
        for _ in range(5):
            fusekit.linear_act(*args)
        assert tapes() == 0 and not any(taped.unproved or taped.noted for taped in tape._every)


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


class Wrapped(Tensor):
    pass


def unplayed(taped: tape.Taped, args: tuple[Any, ...]) -> bool:
    return taped.played(args) is None


def test_tensors_that_are_not_plain_are_never_played() -> None:
    x, weight = operands()
    args = (x, weight, None, None, "none", False, False)
    with a_gpu(), torch.no_grad():
        for _ in range(4):
            linear_act.forward_op(*args)
        taped = linear_act.forward_op.taped
        assert taped.played(args) is not None
        assert unplayed(taped, (x.as_subclass(Wrapped), *args[1:]))
        assert unplayed(taped, (torch._neg_view(x), *args[1:]))
        assert unplayed(taped, (torch._efficientzerotensor(x.shape, dtype=x.dtype), *args[1:]))


def test_nobody_who_listens_misses_a_call() -> None:
    asked: list[Any] = []
    x, weight = operands()
    args = (x, weight, None, None, "none", False, False)
    with a_gpu(), torch.no_grad():
        for _ in range(4):
            linear_act.forward_op(*args)
        taped = linear_act.forward_op.taped
        with torch.utils._python_dispatch.TorchDispatchMode():
            assert unplayed(taped, args)
        torch.func.vmap(lambda t: asked.append(taped.played(args)) or t)(torch.zeros(2))
        assert asked == [None]
        with launch.record():
            assert unplayed(taped, args)
        for name in ("launch_enter_hook", "launch_exit_hook"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(launch.triton.knobs.runtime, name, SimpleNamespace(calls=[print]))
                assert unplayed(taped, args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "current", lambda: (1, 0))  # another device is the current one
            assert unplayed(taped, args)
        assert not unplayed(taped, args)


def test_what_reads_a_value_is_run_each_time() -> None:
    calls = []

    def run(x: Tensor) -> Tensor:
        calls.append(float(x.sum()))
        return x + calls[-1]

    taped = tape.Taped(run)
    try:
        with a_gpu():
            for number in range(1, 5):
                assert taped(torch.full((4,), float(number))).tolist() == [5.0 * number] * 4
        assert calls == [4.0, 8.0, 12.0, 16.0]
    finally:
        tape._every.remove(taped)


def test_operators_of_pytorch_are_played_on_the_calls_own_tensors() -> None:
    """Views, copies and several results, of other values each time."""

    def run(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        calls.append(1)
        top, index = x.t()[1:].contiguous().max(1)
        empty = x.new_empty(2, 2)
        empty.copy_(x[:2, :2])
        return top, [index, empty.t()]

    calls: list[int] = []
    taped = tape.Taped(run)
    try:
        with a_gpu():
            for _ in range(5):
                x = torch.randn(4, 5)
                top, (index, corner) = taped(x)
                found = x[:, 1:].max(0)
                assert torch.equal(top, found.values) and torch.equal(index, found.indices)
                assert torch.equal(corner, x[:2, :2].t())
        assert len(calls) == 3
    finally:
        tape._every.remove(taped)


def test_versions_are_those_of_the_op() -> None:
    """Gradients that nobody has touched are told by it: passes/weights.py."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        counted, uncounted = x.new_empty(x.shape), x.new_empty(x.shape)
        torch.mul(x, 2.0, out=counted)
        torch.mul(x, 3.0, out=uncounted)
        return counted, uncounted.data

    taped = tape.Taped(run)
    try:
        with a_gpu():
            x = torch.randn(4)
            for _ in range(4):
                counted, uncounted = taped(x)
                assert torch.equal(counted, 2 * x) and torch.equal(uncounted, 3 * x)
                assert counted._version == 1 and uncounted._version == 0
            assert tapes() == 1
    finally:
        tape._every.remove(taped)


def test_autocast_casts_nothing_within_an_op() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    taped = tape.Taped(tape_watch.without_autocast(lambda x, weight: x @ weight))
    try:
        with a_gpu(), torch.autocast("cpu", torch.bfloat16):
            results = [taped(x, weight) for _ in range(5)]
            assert tapes() == 1
        with torch.no_grad():
            assert all(torch.equal(y, x @ weight) for y in results)
    finally:
        tape._every.remove(taped)


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


def test_measured_times_make_ops_choose_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(times_file, "_path", lambda suite, name: tmp_path / "times.json")
    args = operands()
    with a_gpu(), torch.no_grad():
        for _ in range(4):
            fusekit.linear_act(*args)
        assert tapes() == 1
        times_file.record("attention", torch.device("cpu"), "any", {"own kernel": 1.0})
        assert tapes() == 0


def test_sizes_that_never_come_again_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "MOST_TAPES", 3)
    x, weight = operands()
    with a_gpu(), torch.no_grad():
        for rows in range(1, 9):
            for _ in range(4):
                fusekit.linear_act(x[:rows], weight)
            taped = linear_act.forward_op.taped
            assert len(taped.tapes) <= 3 and len(taped.noted) <= 3


def test_a_backward_pass_of_saved_tensors_from_elsewhere_is_another_kind() -> None:
    """An offloader may give back what it was given in other memory, aligned otherwise."""
    x, residual = (torch.randn(4, 8, 65).bfloat16().requires_grad_() for _ in range(2))
    weight = torch.ones(65).bfloat16().requires_grad_()
    backward = add_layer_norm._backward.taped

    def step() -> None:
        y, h = fusekit.add_layer_norm(x, residual, weight, None, 1e-5)
        (y + h).sum().backward()

    with a_gpu():
        for _ in range(4):
            step()
        found = len(backward.tapes)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, shifted):
            for _ in range(4):
                step()
        assert len(backward.tapes) == found + 1
