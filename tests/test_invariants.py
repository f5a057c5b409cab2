"""The checks between passes find each kind of broken pass, and only those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusekit
from fusekit.passes.canonicalise import bodies, copy_graph
from fusekit.passes.config import Config
from fusekit.passes.invariants import InvariantError, Snapshot
from fusekit.passes.region import Region, Settings
from fusekit.session import session

aten = torch.ops.aten


class Subject(nn.Module):
    """Something of each kind: a mutation, random ops, views as outputs, a checkpointed body."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def _inside(self, x: Tensor) -> Tensor:
        return F.dropout(F.gelu(self.linear(x)), 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.count.add_(1)
        y = F.dropout(x, 0.1) + F.dropout(x * 2, 0.2)
        z: Any = checkpoint(self._inside, y, use_reentrant=False)
        return z, x.view(-1), z.transpose(0, 1)


@pytest.fixture(scope="module")
def captured() -> Region:
    model = fusekit.optimize(Subject(), fuse="none", remainder="eager")
    model(torch.randn(3, 4))
    return session(model).regions[0].region


@pytest.fixture
def region(captured: Region) -> Region:
    return Region(module=copy_graph(captured.module), settings=Settings(), config=Config())


def _call(region: Region, target: Any, position: int = 0, body: int = 0) -> Any:
    graph = bodies(region.module)[body].graph
    return list(graph.find_nodes(op="call_function", target=target))[position]


def _output(region: Region, position: int) -> Any:
    (output,) = region.module.graph.find_nodes(op="output")
    results: Any = output.args[0]
    return results[position]


def _forget_a_value(region: Region) -> None:
    del _call(region, aten.gelu.default, body=1).meta["val"]


def _change_a_dtype(region: Region) -> None:
    node = _output(region, 0)
    node.meta["val"] = node.meta["val"].double()


def _change_a_stride(region: Region) -> None:
    node = _output(region, 2)
    node.meta["val"] = node.meta["val"].contiguous()


def _copy_a_view(region: Region) -> None:
    node = _output(region, 1)
    node.meta["val"] = node.meta["val"].clone()


def _lose_a_mutation(region: Region) -> None:
    region.module.graph.erase_node(_call(region, aten.add_.Tensor))


def _swap_random_ops(region: Region) -> None:
    first, second = (_call(region, aten.dropout.default, i) for i in (0, 1))
    second.prepend(first)
    second.args[0].prepend(second.args[0])
    first.append(second)
    second.append(first)


def _use_before_definition(region: Region) -> None:
    gelu = _call(region, aten.gelu.default, body=1)
    gelu.args[0].prepend(gelu)


BROKEN: dict[str, tuple[Callable[[Region], None], str]] = {
    "value": (_forget_a_value, "without a value"),
    "dtype": (_change_a_dtype, "changed the outputs"),
    "strides": (_change_a_stride, "changed the outputs"),
    "aliasing": (_copy_a_view, "share memory"),
    "mutation": (_lose_a_mutation, "changed the mutations"),
    "random order": (_swap_random_ops, "order of random ops"),
    "lint": (_use_before_definition, "used before"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pass_is_named_with_what_it_broke(region: Region, name: str) -> None:
    broken, message = BROKEN[name]
    before = Snapshot(region)
    before.check(region, after="nothing")
    broken(region)
    with pytest.raises((InvariantError, RuntimeError), match=message):
        before.check(region, after=name)


def test_broken_pass_is_not_hidden_behind_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEKIT_VERIFY", "1")
    monkeypatch.setattr("fusekit.passes.pipeline.PIPELINE", [("lossy", _lose_a_mutation)])
    model = fusekit.optimize(Subject(), fuse="none", remainder="eager")
    with pytest.raises(Exception, match="pass 'lossy' changed the mutations"):
        model(torch.randn(3, 4))
