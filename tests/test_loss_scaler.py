"""LossScaler against torch.amp.GradScaler, step by step, and what it does beyond it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusekit import LossScaler

OPTIMIZERS = {
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
}
BAD = {"inf": float("inf"), "nan": float("nan")}


def pair(**settings: Any) -> tuple[Any, LossScaler]:
    return torch.amp.GradScaler("cpu", **settings), LossScaler(floor=1e-45, ceiling=1e38, **settings)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def backward(net: nn.Module, scaler: Any, step: int, poison: str | None = None) -> None:
    generator = torch.Generator().manual_seed(step)
    loss = net(torch.randn(6, 4, generator=generator)).square().mean()
    scaler.scale(loss).backward()
    if poison:
        next(net.parameters()).grad[0, 0] = BAD[poison]


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def counts(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(state["step"]) for state in optimizer.state.values() if "step" in state]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@settings(max_examples=12, deadline=None)
@given(
    pattern=st.lists(st.sampled_from([None, None, "inf", "nan"]), max_size=10), accumulate=st.integers(1, 2)
)
def test_every_step_is_gradscalers(make: Any, clip: bool, pattern: list, accumulate: int) -> None:
    """Any pattern of overflows: weights, scale, growth tracker and step counts, bit for bit."""
    nets = [model() for _ in range(2)]
    optimizers = [make(net.parameters()) for net in nets]
    scalers = pair(init_scale=2.0**10, growth_interval=2)
    for step, poison in enumerate(pattern):
        for net, optimizer, scaler in zip(nets, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            for part in range(accumulate):
                backward(net, scaler, 10 * step + part, poison if part == 0 else None)
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        theirs, ours = (s.state_dict() for s in scalers)
        assert ours == theirs | {"skipped": sum(p is not None for p in pattern[: step + 1])}
        assert counts(optimizers[0]) == counts(optimizers[1])
        assert_equal(*nets)


@pytest.mark.parametrize("stage", ["ready", "unscaled"])
def test_two_optimizers_share_one_scale_and_skip_alone(stage: str) -> None:
    nets = [model() for _ in range(2)]
    scalers = pair(init_scale=4.0)
    optimizers = [
        [torch.optim.AdamW(p, fused=True) for p in (n[0].parameters(), n[2].parameters())] for n in nets
    ]
    for step, poison in enumerate([None, "inf", None]):
        for net, both, scaler in zip(nets, optimizers, scalers, strict=True):
            net.zero_grad()
            backward(net, scaler, step, poison)  # in the first optimizer's gradients alone
            for optimizer in both:
                if stage == "unscaled":
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_equal(*nets)
    assert [counts(o) for o in optimizers[1]] == [[2.0, 2.0], [3.0, 3.0]]


class NoSync(TorchDispatchMode):
    """Fails where a tensor's value goes to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", [False, True])
def test_fused_optimizers_never_make_the_host_wait(clip: bool) -> None:
    net, scaler = model(), LossScaler()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    rates = torch.linspace(1e-3, 1e-2, 4)
    for step in range(3):
        optimizer.zero_grad()
        with NoSync():
            backward(net, scaler, step)
            optimizer.param_groups[0]["lr"] = rates.take(step - scaler.skipped)
            if clip:
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
                scaler.require_finite(optimizer, norm)
            scaler.step(optimizer)
            scaler.update()


def test_the_watch_for_waiting_sees_it() -> None:
    net, scaler = model(), LossScaler()
    optimizer = torch.optim.AdamW(net.parameters())
    backward(net, scaler, 0)
    with pytest.raises(AssertionError, match="waits"), NoSync():
        scaler.step(optimizer)


def test_a_skipped_step_advances_nothing() -> None:
    net, scaler = model(), LossScaler()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for step, poison in enumerate([None, "nan"]):
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
        optimizer.zero_grad()
        backward(net, scaler, step, poison)
        scaler.step(optimizer)
        scaler.update()
    after = net.state_dict(), optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert int(scaler.skipped) == 1


def test_the_scale_stays_between_floor_and_ceiling() -> None:
    net, scaler = model(), LossScaler(init_scale=4.0, growth_interval=1, floor=2.0, ceiling=8.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    seen = []
    for step, poison in enumerate([None, None, None, "inf", "inf", "inf"]):
        optimizer.zero_grad()
        backward(net, scaler, step, poison)
        scaler.step(optimizer)
        scaler.update()
        seen.append(scaler.get_scale())
    assert seen == [8.0, 8.0, 8.0, 4.0, 2.0, 2.0]


def test_an_infinite_norm_of_finite_gradients_skips() -> None:
    net, scaler = model(), LossScaler(init_scale=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = copy.deepcopy(net)
    backward(net, scaler, 0)
    for p in net.parameters():
        p.grad.fill_(3e38)
    scaler.unscale_(optimizer)
    scaler.require_finite(optimizer, nn.utils.clip_grad_norm_(net.parameters(), 1.0))
    scaler.step(optimizer)
    scaler.update()
    assert_equal(net, before)
    assert (scaler.get_scale(), int(scaler.skipped)) == (0.5, 1)


def test_state_moves_between_both_classes_and_before_the_first_loss() -> None:
    theirs, ours = pair(init_scale=8.0, growth_interval=3)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    backward(net, ours, 0)
    ours.step(optimizer)
    ours.update()
    theirs.load_state_dict(ours.state_dict())
    again = LossScaler()
    again.load_state_dict(theirs.state_dict())
    assert again.state_dict() == ours.state_dict() and theirs.state_dict()["_growth_tracker"] == 1
    again.scale(torch.ones(()))
    again.load_state_dict(ours.state_dict() | {"scale": 2.0})
    assert again.get_scale() == 2.0


def test_disabled_hands_through() -> None:
    net, scaler = model(), LossScaler(enabled=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    loss = net(torch.ones(2, 4)).sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    before = copy.deepcopy(net)
    scaler.unscale_(optimizer), scaler.step(optimizer), scaler.update()
    assert not torch.equal(next(net.parameters()), next(before.parameters()))
    assert (scaler.state_dict(), scaler.get_scale(), scaler.is_enabled()) == ({}, 1.0, False)


def test_outputs_may_be_nested() -> None:
    scaler = LossScaler(init_scale=2.0)
    a, (b,) = scaler.scale((torch.ones(()), [torch.ones(2)]))
    assert a == 2 and b.tolist() == [2, 2]
    assert [t.item() for t in scaler.scale(torch.ones(()) for _ in range(2))] == [2, 2]
    with pytest.raises(ValueError, match="takes tensors"):
        scaler.scale("loss")


def test_sparse_gradients_are_unscaled() -> None:
    net, scaler = nn.Embedding(5, 3, sparse=True), LossScaler(init_scale=8.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler.scale(net(torch.tensor([1, 1])).sum()).backward()
    scaler.unscale_(optimizer)
    assert net.weight.grad.to_dense()[1].tolist() == [2.0] * 3


def test_misuse_is_a_sentence() -> None:
    net, scaler = model(), LossScaler()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for call in (lambda: scaler.unscale_(optimizer), lambda: scaler.step(optimizer), scaler.update):
        with pytest.raises(RuntimeError, match="no loss was scaled yet"):
            call()
    loss = scaler.scale(net(torch.ones(2, 4)).sum())
    with pytest.raises(RuntimeError, match="no parameter of this optimizer has a gradient"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="once per optimizer step"):
        scaler.update()
    loss.backward()
    with pytest.raises(RuntimeError, match="takes no closure"):
        scaler.step(optimizer, closure=lambda: loss)
    with pytest.raises(RuntimeError, match="comes after unscale_"):
        scaler.require_finite(optimizer, torch.ones(()))
    scaler = LossScaler()
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_ was called before"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="step was called for this optimizer"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="step was called"):
        scaler.unscale_(optimizer)
    scaler.update(4.0)
    assert scaler.get_scale() == 4.0
    scaler.update(torch.tensor([2.0]))
    assert scaler.get_scale() == 2.0
    with pytest.raises(ValueError, match="positive and finite"):
        scaler.update(float("nan"))


def test_fp16_gradients_are_refused_where_they_would_be_divided() -> None:
    net, scaler = model().half(), LossScaler()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler.scale(net(torch.ones(2, 4).half()).float().sum()).backward()
    with pytest.raises(ValueError, match="keep float32 parameters"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"growth_factor": 1.0}, "growth_factor is above 1"),
        ({"backoff_factor": 1.0}, "backoff_factor is between"),
        ({"growth_interval": 0}, "growth_interval is at least 1"),
        ({"growth_interval": 2.5}, "growth_interval is at least 1"),
        ({"init_scale": "65536"}, "init_scale is a number, got '65536'"),
        ({"init_scale": 2.0**25}, "the scale lies between floor"),
        ({"init_scale": float("nan")}, "the scale lies between floor"),
        ({"floor": 0.0}, "the scale lies between floor"),
    ],
)
def test_numbers_that_cannot_work_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LossScaler(**arguments)


@pytest.mark.parametrize("state", [{}, {"scale": 1.0}])
def test_a_foreign_state_is_refused(state: dict) -> None:
    with pytest.raises(RuntimeError, match="no state of a loss scaler"):
        LossScaler().load_state_dict(state)
