"""Capturing, fusing and comparing a model: what the tests of rules share."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusekit.passes import _compat
from fusekit.passes.canonicalise import bodies, canonicalise, copy_graph
from fusekit.passes.config import Config
from fusekit.passes.fuse import fuse
from fusekit.passes.invariants import Snapshot
from fusekit.passes.normalise import normalise
from fusekit.passes.region import Region, Settings


class Functional(nn.Module):
    """Parameters, and a plain function of them and the input."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.parameters_ = nn.ParameterList([nn.Parameter(torch.randn(s) * 0.5) for s in shapes])

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parameters_)


def capture(model: Any, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> tuple[Any, list[Region]]:
    """Run a model once with its graph captured, normalised and fused; the result and the regions."""
    regions: list[Region] = []
    torch._dynamo.reset()
    config = kwargs.pop("config", Config())
    settings = kwargs.pop("settings", Settings())

    def backend(module: Any, example_inputs: Any) -> Any:
        region = Region(
            module=copy_graph(canonicalise(module, example_inputs)), settings=settings, config=config
        )
        before = Snapshot(region)
        normalise(region)
        before.check(region, after="normalise")
        fuse(region)
        before.check(region, after="fuse")
        regions.append(region)
        return region.module.forward

    with _compat.dynamo_settings():
        result = torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return result, regions


def sites(regions: list[Region]) -> Counter[str]:
    return Counter(f.op for r in regions for f in r.fusions)


def reasons(regions: list[Region]) -> str:
    return "\n".join(f"{r.op}: {r.reason}" for region in regions for r in region.refusals)


def calls(regions: list[Region], name: str) -> int:
    """How many calls of an ATen op are left."""
    nodes = (n for r in regions for body in bodies(r.module) for n in body.graph.nodes)
    return sum(str(n.target).removeprefix("aten.").split(".")[0] == name for n in nodes)


def _tensor(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return (
        result[0] if isinstance(result, tuple) else next(v for v in result.values() if isinstance(v, Tensor))
    )


def check(model: nn.Module, *args: Any, tolerance: float = 1e-5, **kwargs: Any) -> list[Region]:
    """Capture a copy of the model, compare its result and every gradient with eager's."""
    model.zero_grad()
    twin = copy.deepcopy(model)
    expected = _tensor(model(*args, **_without_options(kwargs)))
    result, regions = capture(twin, *args, **kwargs)
    result = _tensor(result)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    result.backward(direction)
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(
                b.grad, a.grad, rtol=20 * tolerance, atol=float(largest) * tolerance, msg=name
            )
    for region in regions:
        for fusion in region.fusions:
            assert fusion.eager is not None and fusion.flops > 0
    return regions


def _without_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in ("config", "settings", "dynamic")}
