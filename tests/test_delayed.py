"""Delayed scales inside an optimised model: what moves a history, what does not, and that a run resumes."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from delayed_checks import BF16, SHORT, batches, loss_of, made, same, slots, state, train, weights
from fp8_checks import Blocks
from torch import Tensor, nn

import fusekit
from fusekit.gpt import GPT, GPTConfig
from fusekit.kernels.fp8_history import DelayedScales

pytestmark = pytest.mark.usefixtures("checked")


def test_the_first_step_is_one_with_current_scales() -> None:
    x = batches(1)[0]
    grads = []
    for precision in ("fp8-delayed", "fp8-tensorwise"):
        model = made(precision)
        loss_of(model, x).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_training_is_the_op_and_its_histories_by_hand() -> None:
    """Six steps bit for bit against linear_fp8 called with the scales of a DelayedScales of one's own."""
    recipe = replace(SHORT, head=True)  # all layers, as one in bfloat16 depends on the processor
    model, by_hand = made(recipe), Blocks()
    by_hand.load_state_dict(model.state_dict())
    scales, token = DelayedScales([recipe] * 5, length=3), recipe.token()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    layers = [(block[i], act) for block in by_hand.blocks for i, act in ((0, "gelu"), (2, "tanh"))]
    expected = []
    for x in batches(6):
        h = x.to(BF16)
        for i, (layer, act) in enumerate((*layers, (by_hand.out, "none"))):
            own = scales.layer(i)
            h = torch.ops.fusekit.linear_fp8(h, layer.weight, layer.bias.to(BF16), act, token, *own)
        loss = h.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scales.update()
        expected.append(loss.detach())
    assert all(map(torch.equal, train(model, batches(6)), expected))
    assert same(weights(model), weights(by_hand))
    assert set(scales.cursor.tolist()) == {0} and len(set(scales.history[0].tolist())) == 3  # six of three


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_checkpoints_change_no_bit_and_move_a_history_once(remainder: str) -> None:
    found = []
    for checkpointed in (False, True):
        model = made(SHORT, checkpointed, remainder=remainder)
        train(model, batches(4))
        found.append(weights(model) | state(model))
        assert not [n for n in fusekit.explain(model).notes if "Inductor failed" in n]
    assert same(*found)
    moved = found[0]["cursor"][slots(model, "blocks.1.2.weight")]
    assert moved.tolist() == [1, 1, 1]  # four steps of three places


def test_micro_batches_gather_one_maximum_and_share_a_scale() -> None:
    model, xs = made(SHORT), batches(4)
    train(model, xs[:1])
    first = slots(model, "blocks.0.0.weight")
    before = state(model)
    for x in xs[1:3]:
        loss_of(model, x).backward()
        assert torch.equal(state(model)["scale"], before["scale"])
    assert state(model)["amax"][first][0] == xs[2].to(BF16).abs().max()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = state(model)
    assert after["cursor"][first].tolist() == [2, 2, 2] and not after["amax"].any()
    assert after["history"][first][0, 1] == xs[2].to(BF16).abs().max()


def _overflowing(model: nn.Module, x: Tensor) -> Tensor:
    loss = loss_of(model, x)
    return loss * torch.tensor(3e38) * 1e3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["LossScaler", "GradScaler"])
def test_a_skipped_step_moves_nothing(kind: str, fused: bool) -> None:
    model, xs = made(SHORT), batches(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler: Any = fusekit.LossScaler() if kind == "LossScaler" else torch.amp.GradScaler("cpu")

    def step(x: Tensor, overflows: bool = False) -> None:
        scaler.scale(_overflowing(model, x) if overflows else loss_of(model, x)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(xs[0])
    before = weights(model) | state(model)
    step(xs[2], overflows=True)
    after = weights(model) | state(model)
    if kind == "GradScaler" and not fused:  # nobody tells: what was seen waits for the next step
        after["amax"] = before["amax"]
    assert same(before, after)
    step(xs[1])
    moved = state(model)["cursor"] - before["cursor"]
    assert moved[slots(model, "blocks.0.0.weight")][:2].tolist() == [1, 1]
    assert state(model)["scale"].isfinite().all()


def test_looking_is_not_training() -> None:
    """Evaluation, verify and bisect gather nothing, and leave the next steps their bits."""
    plain, looked_at = made(SHORT), made(SHORT)
    xs = batches(5, growth=1.0)
    train(plain, xs)
    optimizer = torch.optim.SGD(looked_at.parameters(), lr=0.1)
    for i, x in enumerate(xs):
        with torch.no_grad():
            looked_at(100 * x)
        with torch.inference_mode():
            looked_at(100 * x)
        if i in (0, 3):
            assert all(site.ok for site in fusekit.verify(looked_at, x).sites)
        train(looked_at, [x], optimizer)
    assert same(weights(plain) | state(plain), weights(looked_at) | state(looked_at))


def test_capturing_with_example_inputs_leaves_no_trace() -> None:
    model = made(SHORT, example_inputs=((100 * batches(1)[0],), {}))
    assert not any(t.any() for t in state(model).values())


def test_bisect_leaves_histories_alone() -> None:
    from fusekit.bisect import bisect_model

    model = GPT(GPTConfig(vocab=64, context=16, layers=1, heads=2, width=32))
    fusekit.optimize(model, precision=SHORT)
    x = torch.randint(64, (2, 16))
    model(x, x)[1].backward()
    before = state(model)
    bisect_model(model, x, x)
    assert same(before, state(model))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_resumes_with_the_same_bits(steps: int) -> None:
    xs = batches(8)
    straight = made(SHORT)
    optimizer = torch.optim.AdamW(straight.parameters(), lr=1e-2)
    train(straight, xs[:steps], optimizer)
    loss_of(straight, xs[5]).backward()  # saved in the middle of a window
    file = io.BytesIO()
    torch.save({
        "model": straight.state_dict(), "optimizer": optimizer.state_dict(),
        "precision": fusekit.precision_state(straight).state_dict(),
        "grads": [p.grad for p in straight.parameters()],
    }, file)  # fmt: skip
    optimizer.step()
    optimizer.zero_grad()
    train(straight, xs[steps:], optimizer)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = fusekit.optimize(Blocks(), precision=SHORT)
    resumed.load_state_dict(saved["model"])
    again = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    again.load_state_dict(saved["optimizer"])
    fusekit.precision_state(resumed).load_state_dict(saved["precision"])
    for p, grad in zip(resumed.parameters(), saved["grads"], strict=True):
        p.grad = grad.clone()
    assert same(state(straight), state(straight)) and saved["precision"]["weights"][0] == "out.weight"
    assert list(saved["model"]) == list(Blocks().state_dict())
    again.step()
    again.zero_grad()
    train(resumed, xs[steps:], again)
    assert same(weights(straight) | state(straight), weights(resumed) | state(resumed))


def test_states_that_do_not_fit_are_refused() -> None:
    model = made(SHORT)
    train(model, batches(1))
    saved = fusekit.precision_state(model).state_dict()
    other = fusekit.optimize(nn.Sequential(nn.Linear(16, 16)), precision=SHORT)
    with pytest.raises(ValueError, match=r"a model with other weights: 0\.weight"):
        fusekit.precision_state(other).load_state_dict(saved)
    with pytest.raises(ValueError, match="another history length"):
        fusekit.precision_state(made("fp8-delayed")).load_state_dict(saved)
    with pytest.raises(ValueError, match="is missing, of this model"):
        fusekit.precision_state(made(SHORT)).load_state_dict(saved | {"scale": 1.0})
    with pytest.raises(ValueError, match="a dict of names, and got a str"):
        fusekit.precision_state(model).load_state_dict("run.pt")  # type: ignore[arg-type]
    plain = made("fp8-tensorwise")
    empty = fusekit.precision_state(plain)
    assert empty.state_dict() == {}
    empty.load_state_dict({})
    empty.update()
    with pytest.raises(ValueError, match="the model none"):
        empty.load_state_dict(saved)
    with pytest.raises(ValueError, match="not optimised"):
        fusekit.precision_state(Blocks())
    fusekit.precision_state(model).load_state_dict({})  # anew
    assert not any(t.any() for t in state(model).values())
