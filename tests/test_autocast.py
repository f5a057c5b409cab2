"""What autocast would cast, seen on fakes: also for CUDA, whose rules are not the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fusekit.passes.autocast import UnderAutocast, materialise_autocast
from fusekit.passes.config import Config
from fusekit.passes.region import Region, Settings

aten = torch.ops.aten
f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def _region(mode: FakeTensorMode, dtypes: list[torch.dtype], call: Any, device: str = "cuda") -> Region:
    """A graph of one call over 4×4 inputs, captured under bfloat16 autocast of `device`."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(dtypes))]
    for node, dtype in zip(inputs, dtypes, strict=True):
        node.meta["val"] = torch.empty(4, 4, dtype=dtype, device=device)
    target, args, kwargs = call(*inputs)
    node = graph.call_function(target, args, kwargs)
    graph.output((node,))
    values = torch.utils._pytree.tree_map(
        lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (args, kwargs)
    )
    with torch.autocast("cpu", bf16, enabled=device == "cpu"):
        node.meta["val"] = target(*values[0], **values[1])
    module = fx.GraphModule(torch.nn.Module(), graph)
    module.meta["autocast"] = {device: bf16}
    return Region(module=module, settings=Settings(), config=Config())


def _after(region: Region) -> tuple[fx.Node, list[torch.dtype]]:
    """The op's node and the dtypes of the tensors it is now given."""
    materialise_autocast(region)
    (output,) = region.module.graph.find_nodes(op="output")
    results: Any = output.args[0]
    node = results[0]
    return node, [tensor.meta["val"].dtype for tensor in node.all_input_nodes]


CUDA_RULES = {
    "matmul lowers": ([f32, f32], lambda a, b: (aten.matmul.default, (a, b), {}), [bf16, bf16]),
    "mixed matmul lowers": ([bf16, f32], lambda a, b: (aten.matmul.default, (a, b), {}), [bf16, bf16]),
    "lowered matmul stays": ([bf16, bf16], lambda a, b: (aten.matmul.default, (a, b), {}), [bf16, bf16]),
    "double stays": (
        [torch.float64] * 2,
        lambda a, b: (aten.matmul.default, (a, b), {}),
        [torch.float64] * 2,
    ),
    "pow rises": ([bf16], lambda a: (aten.pow.Tensor_Scalar, (a, 2), {}), [f32]),
    "cat promotes by itself": ([bf16, f32], lambda a, b: (aten.cat.default, ([a, b],), {}), [bf16, f32]),
    "einsum lowers its list": (
        [f32, f32],
        lambda a, b: (aten.einsum.default, ("ij,jk", [a, b]), {}),
        [bf16, bf16],
    ),
    "add is not touched": ([bf16, f32], lambda a, b: (aten.add.Tensor, (a, b), {}), [bf16, f32]),
    "conversion is not touched": ([f32], lambda a: (aten.to.dtype, (a, f16), {}), [f32]),
}


@pytest.mark.parametrize("name", CUDA_RULES)
def test_casts_are_those_of_cuda_autocast(mode: FakeTensorMode, name: str) -> None:
    dtypes, call, expected = CUDA_RULES[name]
    node, got = _after(_region(mode, dtypes, call))
    assert got == expected
    assert isinstance(node.target, torch._ops.OpOverload)


def test_softmax_gets_its_dtype_as_an_argument(mode: FakeTensorMode) -> None:
    node, got = _after(_region(mode, [bf16], lambda a: (aten.softmax.int, (a, -1), {})))
    assert node.kwargs.get("dtype") == f32 or got == [f32]


def test_cpu_rules_are_the_cpus(mode: FakeTensorMode) -> None:
    region = _region(mode, [bf16, f32], lambda a, b: (aten.cat.default, ([a, b],), {}), device="cpu")
    assert _after(region)[1] == [f32, f32]


def test_op_that_casts_views_of_its_arguments_keeps_autocast(mode: FakeTensorMode) -> None:
    def call(a: fx.Node, b: fx.Node) -> Any:
        return aten.einsum.default, ("ij,kj->ik", [a, b]), {}

    node, got = _after(_region(mode, [f32, f32], call, device="cpu"))
    assert isinstance(node.target, UnderAutocast) and got == [f32, f32]
    assert "einsum" in node.target.__name__


def test_other_devices_are_left_alone(mode: FakeTensorMode) -> None:
    region = _region(mode, [f32, f32], lambda a, b: (aten.matmul.default, (a, b), {}), device="cpu")
    region.module.meta["autocast"] = {"cuda": bf16}
    assert _after(region)[1] == [f32, f32]


def test_parameter_is_cast_once_and_activation_for_each_use(mode: FakeTensorMode) -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    for node in (x, weight):
        node.meta |= {"val": torch.empty(4, 4), "parameter": node is weight}
    products = [graph.call_function(aten.matmul.default, (x, weight)) for _ in range(2)]
    for node in products:
        node.meta["val"] = torch.empty(4, 4, dtype=bf16)
    graph.output(tuple(products))
    module = fx.GraphModule(torch.nn.Module(), graph)
    module.meta["autocast"] = {"cpu": bf16}
    materialise_autocast(Region(module=module, settings=Settings(), config=Config()))
    casts = module.graph.find_nodes(op="call_function", target=aten.to.dtype)
    assert sorted(cast.args[0].name for cast in casts) == ["weight", "x", "x"]
