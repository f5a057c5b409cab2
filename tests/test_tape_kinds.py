"""Which calls share a tape, which have none, and when tapes are dropped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusekit.kernels import (
    OPS,
    add_layer_norm,
    attention_gradient,
    launch,
    linear_act,
    linear_gpu,
    tape,
    times_file,
)
from fusekit.kernels._triton import HAS_TRITON
from tests.tape_checks import K, M, N, a_gpu, does, fresh, operands, shifted, tapes

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
fusekit = torch.ops.fusekit


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
