"""Models, and what is read off them, of the tests of precision="auto"."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fusekit
from fusekit.gpt import GPT, GPTConfig
from fusekit.passes.canonicalise import bodies
from fusekit.session import session

AutoPrecision = partial(fusekit.AutoPrecision, emulate=True)  # a CPU has no FP8 products
PLANTED = "blocks.1.expand.inner"


def gpt(**sizes: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**({"vocab": 64, "context": 32, "layers": 2, "heads": 2, "width": 32} | sizes)))


class Scaled(nn.Module):
    """A layer whose input has tokens of very different scale; its output has not."""

    def __init__(self, inner: nn.Module, tokens: int, spread: float = 3.0) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("factor", torch.exp(spread * torch.randn(tokens, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.factor) / self.factor


def planted() -> GPT:
    model = gpt()
    model.blocks[1].expand = Scaled(model.blocks[1].expand, 32)
    return model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int, *, accumulate: int = 1, start: int = 0) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    for step in range(start, start + steps):
        for part in range(accumulate):
            x = tokens(100 * step + part)
            loss = model(x, x)[1] / accumulate
            loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def levels(model: nn.Module) -> dict[str, tuple[int, ...]]:
    plan = fusekit.auto_precision(model).plan
    return {name: tuple(unit.level for unit in layer.units.values()) for name, layer in plan.layers.items()}


def recipes(model: nn.Module) -> dict[str, str]:
    """The token of every FP8 node by layer, as the graphs have them."""
    target = torch.ops.fusekit.linear_fp8.default
    found = [b for captured in session(model).regions for b in bodies(captured.region.module)]
    nodes = [n for body in found for n in body.graph.find_nodes(op="call_function", target=target)]
    return {n.meta["fusion"].layer: n.args[4] for n in nodes}
