"""Delayed scales inside an optimised model: what moves a history, what does not, and that a run resumes."""

from __future__ import annotations

import copy
import gc
import io
import os
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fp8_checks import Blocks
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fusekit
from fusekit.gpt import GPT, GPTConfig
from fusekit.kernels.fp8_history import DelayedScales
from fusekit.kernels.recipe import PRESETS, Recipe
from fusekit.passes.delayed import ModelScales
from fusekit.session import session

BF16 = torch.bfloat16
SHORT = Recipe(delayed=True, history=3)


pytestmark = pytest.mark.usefixtures("checked")


def made(precision: Any = "fp8-delayed", checkpointed: bool = False, **settings: Any) -> Blocks:
    torch.manual_seed(0)
    return fusekit.optimize(Blocks(checkpointed), precision=precision, **settings)


def batches(count: int, growth: float = 1.5) -> list[Tensor]:
    """Each larger than the one before, so that every step's scale differs."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 32, generator=generator) * growth**i for i in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    found = fusekit.precision_state(model).state_dict()
    return {name: t for name, t in found.items() if isinstance(t, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def slots(model: nn.Module, name: str) -> slice:
    scales = session(model).settings.scales
    assert scales is not None
    index = scales.names.index(name)
    return slice(3 * index, 3 * index + 3)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def train(model: nn.Module, xs: list[Tensor], optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for x in xs:
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


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
    model, by_hand = made(SHORT), Blocks()
    by_hand.load_state_dict(model.state_dict())
    scales, token = DelayedScales([SHORT] * 4, length=3), SHORT.token()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    expected = []
    for x in batches(6):
        h = x.to(BF16)
        for i, block in enumerate(by_hand.blocks):
            for j, act in ((0, "gelu"), (2, "tanh")):
                layer, own = block[j], scales.layer(2 * i + j // 2)
                h = torch.ops.fusekit.linear_fp8(h, layer.weight, layer.bias.to(BF16), act, token, *own)
        y = nn.functional.linear(h, by_hand.out.weight.to(BF16), by_hand.out.bias.to(BF16)).float()
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scales.update()
        expected.append(y.square().mean().detach())
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


def test_each_optimizer_moves_the_weights_it_updates() -> None:
    model = made(SHORT)
    own = dict(model.named_parameters())
    first = torch.optim.SGD([own["blocks.0.0.weight"], own["blocks.0.0.bias"]], lr=0.1)
    rest = torch.optim.SGD([p for p in own.values() if p is not own["blocks.0.0.weight"]], lr=0.1)
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    loss_of(model, batches(1)[0]).backward()
    moved = {name: state(model)["cursor"][slots(model, f"blocks.{name}.weight")] for name in ("0.0", "1.2")}
    for optimizer, expected in ((stranger, (0, 0)), (first, (1, 0)), (first, (1, 0)), (rest, (1, 1))):
        optimizer.step()
        moved = [state(model)["cursor"][slots(model, f"blocks.{n}.weight")].tolist() for n in ("0.0", "1.2")]
        assert moved == [[n] * 3 for n in expected]
    assert not state(model)["amax"].any()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_optimizers_inside_the_backward_pass(checkpointed: bool) -> None:
    """A weight's slots move when its own gradient is there: recomputed passes still find their scales."""
    usual, inside = made(SHORT, checkpointed), made(SHORT, checkpointed)
    train(usual, batches(4))
    for p in inside.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)

        def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)
    for x in batches(4):
        loss_of(inside, x).backward()
    assert same(weights(usual) | state(usual), weights(inside) | state(inside))


def test_a_compiled_optimizer_step() -> None:
    """The hook runs, and a step that is compiled once stays so: a hook that is traced changes every time."""
    usual, compiled = made(SHORT), made(SHORT)
    train(usual, batches(4))
    optimizer, counter = torch.optim.SGD(compiled.parameters(), lr=0.1), CompileCounter()
    step = torch.compile(lambda: optimizer.step(), backend=counter)
    for x in batches(4):
        loss_of(compiled, x).backward()
        step()
        optimizer.zero_grad()
    assert same(weights(usual) | state(usual), weights(compiled) | state(compiled))
    assert counter.frame_count == 1


def test_slots_of_frozen_weights_move_with_the_others() -> None:
    model = made(SHORT)
    model.blocks[1].requires_grad_(False)
    train(model, batches(2), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    found = state(model)
    assert found["cursor"][slots(model, "blocks.1.0.weight")].tolist() == [2, 2, 2]
    assert (found["scale"][slots(model, "blocks.1.0.weight")] > 0).all()


def test_a_loop_without_an_optimizer_updates_by_hand() -> None:
    usual, by_hand = made(SHORT), made(SHORT)
    train(usual, batches(4))
    for x in batches(4):
        loss_of(by_hand, x).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.1 * p.grad
                p.grad = None
        fusekit.precision_state(by_hand).update()
    assert same(state(usual), state(by_hand))
    before = state(by_hand)
    loss_of(by_hand, batches(1)[0]).backward()
    fusekit.precision_state(by_hand).update(skip=torch.tensor(1.0))
    assert same(before, state(by_hand))


class Computed(nn.Module):
    """A weight that is computed, one that is called twice, and one that is a slice of a Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.randn(32, 32) / 6)
        self.twice, self.packed, self.out = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(nn.functional.linear(x, self.fixed))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.out(torch.relu(nn.functional.linear(x, self.packed.weight[:32])))


@pytest.mark.parametrize("precision", ["fp8-delayed", "fp8-rowwise"])
def test_weights_that_are_not_plain_parameters(precision: str) -> None:
    model = fusekit.optimize(Computed(), precision=precision)
    train(model, batches(3, growth=1.0))
    target = torch.ops.fusekit.linear_fp8.default
    nodes = session(model).regions[0].region.module.graph.find_nodes(op="call_function", target=target)
    delayed = [Recipe.parse(n.args[4]).delayed for n in nodes]
    assert len(nodes) == 4
    if precision == "fp8-delayed":
        assert delayed.count(True) == 3  # a buffer has no slots: it takes current scales
        assert any("1 FP8 layers take current scales" in note for note in fusekit.explain(model).notes)
        moved = state(model)["cursor"]
        assert (
            moved[slots(model, "twice.weight")].tolist()
            == [3] * 3
            == moved[slots(model, "packed.weight")].tolist()
        )
    assert all(site.ok for site in fusekit.verify(model, batches(1)[0]).sites)


def test_a_model_is_let_go_of() -> None:
    model = made(SHORT)
    train(model, batches(2))
    scales: weakref.ref[ModelScales] = weakref.ref(session(model).settings.scales)  # type: ignore[arg-type]
    cache = weakref.ref(session(model).regions[0].region.weights)
    fusekit.restore(model)
    torch._dynamo.reset()
    gc.collect()
    assert scales() is None and cache() is None
    train(copy.deepcopy(model), batches(1))


def test_an_attention_model_certifies_before_and_after_steps() -> None:
    model = GPT(GPTConfig(vocab=64, context=16, layers=2, heads=2, width=32))
    fusekit.optimize(model, precision="fp8-delayed")
    x = torch.randint(64, (2, 16))
    for _ in range(2):
        certificate = fusekit.verify(model, x, x)
        assert certificate.ok, str(certificate)
        assert len([s for s in certificate.sites if s.op == "linear_fp8" and not s.reverted]) == 8
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for _ in range(3):
            model(x, x)[1].backward()
            optimizer.step()
            optimizer.zero_grad()


def _rank(rank: int, folder: str, by_hand: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = made(SHORT)
    if by_hand:  # sharded or averaged by something that is no DistributedDataParallel
        fusekit.precision_state(model).agree_within(dist.group.WORLD)
    parallel = model if by_hand else nn.parallel.DistributedDataParallel(model)
    train(parallel, [x * (1 + 3 * rank) for x in batches(2)])
    torch.save(state(model) if by_hand else weights(model) | state(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or os.name != "posix", reason="needs processes and gloo")
@pytest.mark.parametrize("by_hand", [False, True])
def test_ranks_agree_on_scales(by_hand: bool, tmp_path: Any) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path), by_hand), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(first, second)
    largest = max(float((x * 4).to(BF16).abs().max()) for x in batches(2))
    assert first["history"].max() == largest  # the other rank's


def test_the_preset_and_bad_numbers() -> None:
    assert (
        PRESETS["fp8-delayed"].delayed and Recipe(delayed=True, history=7, margin=1).token() == SHORT.token()
    )
    for numbers in ({"history": 0}, {"history": 1025}, {"margin": 9}):
        with pytest.raises(ValueError, match="history is 1 to 1024 steps and margin 0 to 8"):
            Recipe(delayed=True, **numbers)
