"""Delayed scales and who steps: several optimizers, loops by hand, ranks; weights of every kind."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from delayed_checks import (
    BF16,
    RECIPE_OF_ALL,
    SHORT,
    batches,
    loss_of,
    made,
    own_blocks,
    same,
    slots,
    state,
    train,
    weights,
)
from rank_checks import outputs_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fusekit
from fusekit.gpt import GPT, GPTConfig
from fusekit.kernels.recipe import PRESETS, Recipe
from fusekit.passes.delayed import ModelScales
from fusekit.session import session

pytestmark = pytest.mark.usefixtures("checked")


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


def _step_inside(model: nn.Module) -> None:
    """An optimizer for each parameter, that steps when its gradient is there."""
    for p in (p for p in model.parameters() if p.requires_grad):
        optimizer = torch.optim.SGD([p], lr=0.1)

        def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_optimizers_inside_the_backward_pass(checkpointed: bool) -> None:
    """A weight's slots move when its own gradient is there: recomputed passes still find their scales."""
    usual, inside = made(SHORT, checkpointed), made(SHORT, checkpointed)
    train(usual, batches(4))
    _step_inside(inside)
    for x in batches(4):
        loss_of(inside, x).backward()
    assert same(weights(usual) | state(usual), weights(inside) | state(inside))


@pytest.mark.parametrize("stops", [False, True])
def test_frozen_weights_and_optimizers_inside_the_backward_pass(stops: bool) -> None:
    """Of several steps in one backward pass none moves what a checkpoint's second pass still reads."""
    usual, inside = (made(SHORT, checkpointed=True) for _ in range(2))
    for model in (usual, inside):
        model.blocks[0].requires_grad_(False)
        model.blocks[1][0].weight.requires_grad_(False)
    xs = [x.requires_grad_() for x in batches(5)]  # so that the first block's layers have gradients
    train(usual, xs[:4], torch.optim.SGD([p for p in usual.parameters() if p.requires_grad], lr=0.1))
    _step_inside(inside)
    for x in xs[:4]:
        if stops:  # a checkpoint between the backward pass and the next forward pass
            saved = fusekit.precision_state(inside).state_dict()
            fusekit.precision_state(inside).load_state_dict(copy.deepcopy(saved))
        loss_of(inside, x).backward()
    assert same(weights(usual), weights(inside))
    with torch.no_grad():
        inside(xs[4])
    assert same(state(usual), state(inside))


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


RANK = """
from torch import nn
import fusekit
from delayed_checks import SHORT, batches, made, state, train, weights
folder, by_hand = arguments[0], arguments[1] == "True"
model = made(SHORT)
if by_hand:  # sharded or averaged by something that is no DistributedDataParallel
    fusekit.precision_state(model).agree_within(dist.group.WORLD)
parallel = model if by_hand else nn.parallel.DistributedDataParallel(model)
train(parallel, [x * (1 + 3 * rank) for x in batches(2)])
torch.save(state(model) if by_hand else weights(model) | state(model), f"{folder}/{rank}.pt")
"""


@pytest.mark.parametrize("by_hand", [False, True])
def test_ranks_agree_on_scales(by_hand: bool, tmp_path: Path) -> None:
    outputs_of(RANK, tmp_path, str(tmp_path), str(by_hand))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(first, second)
    largest = max(float((x * 4).to(BF16).abs().max()) for x in batches(2))
    assert first["history"].max() == largest  # the other rank's


SHARDED_STATES = """
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from delayed_checks import SHORT, batches, made, state, train, weights
folder = arguments[0]
model = made(SHORT)
parallel = nn.parallel.DistributedDataParallel(model)
optimizer = ZeroRedundancyOptimizer(parallel.parameters(), torch.optim.SGD, lr=0.1)
train(parallel, [x * (1 + 3 * rank) for x in batches(2)], optimizer)
torch.save(weights(model) | state(model), f"{folder}/{rank}.pt")
"""


def test_an_optimizer_that_shards_its_states_is_one_step(tmp_path: Path) -> None:
    """It steps another one in itself, with other weights on each rank."""
    outputs_of(SHARDED_STATES, tmp_path, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(first, second)
    assert first["cursor"].tolist() == [0] * 3 + [2] * 12  # the output layer is first


SHARDED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import fusekit
from delayed_checks import RECIPE_OF_ALL, batches, own_blocks, state, train
folder, first, reshards = arguments
mesh = init_device_mesh("cpu", (2,))
model = own_blocks()
if first == "optimise":
    fusekit.optimize(model, precision=RECIPE_OF_ALL)
for module in (*model.blocks, model):
    fully_shard(module, mesh=mesh, reshard_after_forward=reshards == "True")
if first == "shard":
    fusekit.optimize(model, precision=RECIPE_OF_ALL)
fusekit.precision_state(model).agree_within(dist.group.WORLD)
train(model, batches(2))
torch.save(state(model), f"{folder}/{rank}.pt")
"""


@pytest.mark.parametrize(("first", "reshards"), [("optimise", True), ("shard", True), ("shard", False)])
def test_sharded_weights_have_moving_histories(first: str, reshards: bool, tmp_path: Path) -> None:
    """FSDP2's optimizers update other Parameters than those that the layers run with. Both ranks have the
    same batch, so the numbers are those of one process."""
    outputs_of(SHARDED, tmp_path, str(tmp_path), first, str(reshards))
    alone = fusekit.optimize(own_blocks(), precision=RECIPE_OF_ALL)
    train(alone, batches(2))
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["cursor"].tolist() == [2] * 12
        assert same(found, state(alone))


def test_the_preset_and_bad_numbers() -> None:
    assert (
        PRESETS["fp8-delayed"].delayed and Recipe(delayed=True, history=7, margin=1).token() == SHORT.token()
    )
    for numbers in ({"history": 0}, {"history": 1025}, {"margin": 9}):
        with pytest.raises(ValueError, match="history is 1 to 1024 steps and margin 0 to 8"):
            Recipe(delayed=True, **numbers)
