"""Small models with delayed scales, and what the tests read off them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from fp8_checks import Blocks
from torch import Tensor, nn

import fusekit
from fusekit.kernels.recipe import Recipe
from fusekit.session import session

BF16 = torch.bfloat16
SHORT = Recipe(delayed=True, history=3)
RECIPE_OF_ALL = replace(SHORT, head=True)  # a block that is captured alone has an output layer


class Block(nn.Module):
    """With a forward of its own, so that it is captured behind hooks as well, as nn.Sequential is not."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.contract(torch.relu(self.expand(x))))


class OwnBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def own_blocks() -> OwnBlocks:
    torch.manual_seed(0)
    return OwnBlocks()


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
