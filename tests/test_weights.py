"""Cached low-precision weights: one cast per update, and never a stale one, however they are changed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusekit.kernels.fp8_operand import fp8_operand
from fusekit.kernels.linear_fp8 import fused as linear_fp8
from fusekit.kernels.recipe import PRESETS
from fusekit.passes.inputs import InputCast, InputOperand
from fusekit.passes.weights import WeightCache, cast_parameters

BF16 = torch.bfloat16


class Net:
    """Two weights, one of them used twice, run through the cache as an emitted graph would be."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))]
        self.cache = WeightCache()
        self.x = torch.randn(4, 8)
        self.casts = [InputCast(source=1, target=3, dtype=BF16), InputCast(source=2, target=4, dtype=BF16)]

    def trust(self) -> Net:
        """Train two steps: the cache then knows that this loop updates visibly. Leaves zeroed gradients."""
        optimizer = torch.optim.SGD(self.parameters, lr=1e-3)
        for _ in range(2):
            self.loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        self.cache.refreshed = 0
        return self

    def copies(self) -> tuple[Tensor, Tensor]:
        _, _, _, weight, bias = cast_parameters((self.x, *self.parameters), self.casts, self.cache)
        return weight, bias

    def loss(self) -> Tensor:
        weight, bias = self.copies()
        assert_fresh(self.parameters, (weight, bias))
        hidden = F.linear(self.x.to(BF16), weight, bias)
        return F.linear(hidden, weight).float().square().mean()


class Quantised(Net):
    """The same with the weight in FP8, both layouts, for linear_fp8; the bias is cast as above."""

    recipe = PRESETS["fp8-rowwise"].token()

    def __init__(self) -> None:
        super().__init__()
        self.parameters = [nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))]
        self.x = torch.randn(4, 16)
        weight = InputOperand(
            source=1, target=3, dtype=BF16, recipe=self.recipe, transposed=False, turned=True
        )
        self.casts = [weight, InputCast(source=2, target=7, dtype=BF16)]

    def loss(self) -> Tensor:
        _, weight, _, *operand, bias = cast_parameters((self.x, *self.parameters), self.casts, self.cache)
        assert torch.equal(bias.detach(), self.parameters[1].detach().to(BF16)), "a stale bias"
        fresh = fp8_operand(self.parameters[0].detach(), self.recipe, 1, BF16, True, True, None, None)
        assert all(map(torch.equal, operand, fresh)), "a stale weight"
        hidden = linear_fp8(self.x.to(BF16), weight, bias, "none", self.recipe, None, None, None, operand)
        hidden = linear_fp8(hidden, weight, None, "none", self.recipe, None, None, None, operand)
        return hidden.float().square().mean()


kinds = pytest.mark.parametrize("kind", [Net, Quantised])


def assert_fresh(parameters: list[nn.Parameter], copies: tuple[Tensor, Tensor]) -> None:
    for parameter, low in zip(parameters, copies, strict=True):
        assert torch.equal(low.detach(), parameter.detach().to(BF16)), "a stale weight"


def _zero_first(net: Net, update: Callable[[], None], zero: Callable[[], None]) -> None:
    zero()
    net.loss().backward()
    update()


def _zero_between(net: Net, update: Callable[[], None], zero: Callable[[], None]) -> None:
    loss = net.loss()
    zero()
    loss.backward()
    update()


def _zero_last(net: Net, update: Callable[[], None], zero: Callable[[], None]) -> None:
    net.loss().backward()
    update()
    zero()


ORDERS = [_zero_first, _zero_between, _zero_last]


def _sgd_data(net: Net) -> None:
    for p in net.parameters:
        p.data -= 0.1 * p.grad  # does not count in p._version


def _set_none(net: Net) -> None:
    for p in net.parameters:
        p.grad = None


def _set_zero(net: Net) -> None:
    for p in net.parameters:
        if p.grad is not None:
            p.grad.zero_()


@pytest.mark.parametrize("zero", [_set_none, _set_zero])
@pytest.mark.parametrize("order", ORDERS)
@kinds
def test_updates_through_data_are_seen(kind: type[Net], order: Callable, zero: Callable) -> None:
    net = kind()
    net.cache.sampled = False  # as on a GPU, where the elements are not compared
    for _ in range(5):
        order(net, lambda: _sgd_data(net), lambda: zero(net))
    net.loss()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@kinds
def test_optimizer_steps_are_seen(
    kind: type[Net], options: dict[str, bool], set_to_none: bool, order: Callable
) -> None:
    net = kind()
    net.cache.sampled = False
    optimizer = torch.optim.AdamW(net.parameters, lr=0.1, **options)
    for _ in range(4):
        order(net, optimizer.step, lambda: optimizer.zero_grad(set_to_none=set_to_none))
    net.loss()
    assert net.cache.refreshed == 2 * 5  # both weights once a step, and once more at the end


@pytest.mark.parametrize("set_to_none", [True, False])
def test_one_cast_per_update_not_per_micro_batch(set_to_none: bool) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters, lr=0.1, fused=True)
    for step in range(4):
        before = net.cache.refreshed
        for _ in range(5):
            net.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        made = net.cache.refreshed - before
        assert made == (10 if step == 0 else 2)  # nothing is known about the loop in its first window
    assert_fresh(net.parameters, net.copies())


@kinds
def test_several_forwards_before_one_backward(kind: type[Net]) -> None:
    net = kind().trust()
    (net.loss() + net.loss() + net.loss()).backward()
    assert net.cache.refreshed == 2  # the step before them made the copies stale, once
    shared = [p.grad.clone() for p in net.parameters]
    _set_zero(net)
    for _ in range(3):
        net.loss().backward()
    for p, expected in zip(net.parameters, shared, strict=True):
        assert torch.allclose(p.grad, expected, rtol=1e-5)


@pytest.mark.parametrize("holds", [False, True])
@kinds
def test_inference_casts_on_every_call_and_keeps_codes_alone(kind: type[Net], holds: bool) -> None:
    net = kind()
    net.cache.holds = holds
    with torch.no_grad():
        for _ in range(3):
            net.loss()
            for p in net.parameters:
                p.data.mul_(1.1)
    assert net.cache.refreshed == 6
    kept = {cast.target for cast in net.casts if holds and isinstance(cast, InputOperand)}
    assert set(net.cache.copies) == kept


@kinds
def test_weights_swapped_for_an_evaluation(kind: type[Net]) -> None:
    """Averaged weights put in by data.copy_, evaluated, and taken out, between forward and backward."""
    net = kind()
    loss, saved = net.loss(), [p.detach().clone() for p in net.parameters]
    for p in net.parameters:
        p.data.mul_(0.5)
    with torch.no_grad():
        net.loss()
    for p, value in zip(net.parameters, saved, strict=True):
        p.data.copy_(value)
    loss.backward()
    expected = [p.grad for p in net.parameters]
    _set_none(net)
    net.loss().backward()
    for p, out in zip(net.parameters, expected, strict=True):
        assert torch.equal(p.grad, out)
    for p in net.parameters:
        p.data.mul_(0.5)
    net.loss()


@kinds
def test_sampling_sees_noise_inside_one_window(kind: type[Net]) -> None:
    net = kind().trust()
    net.loss().backward()
    net.loss().backward()
    assert net.cache.refreshed == 2
    for p in net.parameters:
        p.data.add_(0.25)
    net.loss()
    assert net.cache.refreshed == 4


@pytest.mark.parametrize("change", ["copy_", "load", "set_data", "requires_grad"])
def test_other_changes_are_seen(change: str) -> None:
    net = Net().trust()
    net.loss().backward()
    for p in net.parameters:
        if change == "copy_":
            with torch.no_grad():
                p.copy_(p * 2)
        elif change == "load":
            nn.ParameterList([p]).load_state_dict({"0": p.detach() * 3})
        elif change == "set_data":
            p.data = p.detach() * 2
        else:
            p.requires_grad_(False)
            p.data.mul_(2)
    weight, bias = net.copies()
    assert_fresh(net.parameters, (weight, bias))
    assert weight.requires_grad == (change != "requires_grad")


@kinds
def test_another_parameter_in_the_same_place(kind: type[Net]) -> None:
    net = kind().trust()
    net.loss().backward()
    net.parameters = [copy.deepcopy(p) for p in net.parameters]
    with torch.no_grad():
        net.parameters[0].mul_(2)
    net.loss()


@kinds
def test_frozen_weights_get_no_gradient_and_are_never_stale(kind: type[Net]) -> None:
    net = kind()
    net.parameters[0].requires_grad_(False)
    for _ in range(3):
        net.loss().backward()
        net.parameters[0].data.mul_(1.1)
    assert net.parameters[0].grad is None and net.parameters[1].grad is not None


@kinds
def test_an_unfinished_graph_keeps_the_weights_it_saw(kind: type[Net]) -> None:
    """Refreshing must not write into what a pending backward pass saved."""
    net = kind()
    first = net.loss()
    expected = torch.autograd.grad(first, net.parameters, retain_graph=True)
    for p in net.parameters:
        p.data.mul_(2)
    second = net.loss()
    found = torch.autograd.grad(first, net.parameters)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    second.backward()


def test_memory_is_reused_when_nobody_holds_it() -> None:
    net = Net()
    net.loss().backward()
    address = net.cache.copies[3].low.data_ptr()
    _set_none(net)
    net.loss().backward()
    assert net.cache.copies[3].low.data_ptr() == address


def test_tied_weights_share_one_copy_and_sum_their_gradients() -> None:
    net = Net()
    net.loss().backward()
    low = [p.detach().to(BF16).requires_grad_() for p in net.parameters]
    hidden = F.linear(net.x.to(BF16), low[0], low[1])
    F.linear(hidden, low[0]).float().square().mean().backward()
    for p, reference in zip(net.parameters, low, strict=True):
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, reference.grad.float())


@kinds
def test_copies_die_with_the_cache(kind: type[Net]) -> None:
    net = kind()
    net.loss().backward()
    low = weakref.ref(net.cache.copies[3].low)
    net.cache = WeightCache()
    gc.collect()
    assert low() is None
