"""What makes a tensor that FP8 layers read: norms that quantise it, layers that count; no bit changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fusekit
from benchmarks.traffic.counting import as_on_gpu, launch_bytes
from fusekit.kernels import OPS, norm_fp8
from fusekit.kernels.fp8_maxima import fp8_maxima
from fusekit.kernels.fp8_operand import fp8_operand
from fusekit.kernels.recipe import PRESETS, Recipe
from fusekit.passes import quantise
from fusekit.passes.canonicalise import bodies
from fusekit.session import session

WITH_CODES = tuple(norm_fp8.WITH_CODES.values())


class Block(nn.Module):
    def __init__(self, forward: Callable[[Block, Tensor], Tensor], rms: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32) if rms else nn.LayerNorm(32)
        self.q, self.k, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def one_reader(m: Block, x: Tensor) -> Tensor:
    return m.out(torch.tanh(m.q(m.norm(x + torch.tanh(x)))))


def two_readers(m: Block, x: Tensor) -> Tensor:
    y = m.norm(x + torch.tanh(x))
    return m.out(torch.tanh(m.q(y)) * torch.tanh(m.k(y)))


def read_elsewhere(m: Block, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.out(torch.tanh(m.q(y)) + torch.sin(y))


def checkpointed(m: Block, x: Tensor) -> Tensor:
    return m.out(torch.tanh(checkpoint(lambda x: m.q(m.norm(x)), x, use_reentrant=False)))


def behind_a_layer(m: Block, x: Tensor) -> Tensor:
    return m.out(torch.tanh(m.k(nn.functional.gelu(m.q(torch.sin(x))))))


def behind_a_plain_layer(m: Block, x: Tensor) -> Tensor:
    return m.out(torch.tanh(m.k(m.q(torch.sin(x)))))


def not_by_a_norm(m: Block, x: Tensor) -> Tensor:
    return m.out(torch.tanh(m.q(torch.tanh(m.norm(x)))))


def without_gradient(m: Block, x: Tensor) -> Tensor:
    y = m.norm(x)
    with torch.no_grad():
        q = torch.tanh(m.q(y))
    return m.out(q * torch.tanh(y))


pytestmark = pytest.mark.usefixtures("checked")


def optimised(forward: Callable, precision: str, rms: bool = False) -> Block:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return fusekit.optimize(Block(forward, rms), precision=precision)


def nodes(model: nn.Module, targets: tuple) -> list:
    modules = bodies(session(model).regions[0].region.module)
    return [n for m in modules for n in m.graph.nodes if n.target in targets]


def gradients(model: Block) -> list[Tensor]:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("precision", ["fp8-tensorwise", "fp8-rowwise", "fp8-rowwise-bf16-wgrad"])
@pytest.mark.parametrize("forward", [one_reader, two_readers, read_elsewhere, checkpointed])
def test_the_norm_quantises_and_no_bit_changes(forward, precision, rms, monkeypatch) -> None:
    model = optimised(forward, precision, rms)
    found = gradients(model)
    assert len(nodes(model, WITH_CODES)) == 1
    monkeypatch.setattr(quantise, "help_quantise", lambda *_: None)
    apart = optimised(forward, precision, rms)
    assert all(map(torch.equal, found, gradients(apart))) and not nodes(apart, WITH_CODES)


@pytest.mark.parametrize("precision", ["fp8-tensorwise", "fp8-rowwise", "fp8-rowwise-bf16-wgrad"])
def test_a_layer_with_an_activation_keeps_count(precision, monkeypatch) -> None:
    model = optimised(behind_a_layer, precision)
    found = gradients(model)
    (maxima,) = nodes(model, (fp8_maxima,))
    (layer, operand) = maxima.users
    assert layer.target is quantise.LINEAR and operand.target is fp8_operand
    monkeypatch.setattr(quantise, "help_quantise", lambda *_: None)
    apart = optimised(behind_a_layer, precision)
    assert all(map(torch.equal, found, gradients(apart))) and not nodes(apart, (fp8_maxima,))


@pytest.mark.parametrize(
    ("forward", "precision"),
    [
        (behind_a_layer, "fp8-delayed"),
        (behind_a_layer, "fp8-block"),
        (behind_a_layer, Recipe(output=False)),
        (behind_a_plain_layer, "fp8-rowwise"),
    ],
    ids=str,
)
def test_layers_that_keep_no_count(forward, precision) -> None:
    """Both layouts come from one read already; and a library may be faster where nothing else rides."""
    model = optimised(forward, precision)
    gradients(model)
    assert not nodes(model, (fp8_maxima,))


@pytest.mark.parametrize(
    ("forward", "precision"),
    [
        (one_reader, "fp8-delayed"),
        (one_reader, "fp8-block"),
        (one_reader, "mxfp8"),
        (not_by_a_norm, "fp8-rowwise"),
        (without_gradient, "fp8-rowwise"),
    ],
)
def test_what_the_norm_leaves_alone(forward, precision) -> None:
    model = optimised(forward, precision)
    gradients(model)
    assert not nodes(model, WITH_CODES) and nodes(model, tuple(norm_fp8.WITH_CODES))


def test_layouts_that_nobody_asks_for_are_not_made() -> None:
    """Without a gradient of the weights rows are all there is, and no operand is made beside the norm's."""
    model = optimised(two_readers, "fp8-rowwise")
    for layer in (model.q, model.k):
        layer.weight.requires_grad_(False)
    found = gradients(model)
    (norm,) = nodes(model, WITH_CODES)
    assert norm.args[-1] is False and not nodes(model, (fp8_operand,)) and len(found) > 4
    with torch.no_grad():
        assert torch.equal(model(torch.ones(6, 32)), optimised(two_readers, "fp8-rowwise")(torch.ones(6, 32)))


def test_layers_of_two_recipes_share_a_norm() -> None:
    """It quantises for the first of them; the other quantises what it reads."""
    model = optimised(two_readers, "fp8-rowwise")
    token = PRESETS["fp8-tensorwise"].token()
    before = quantise.quantise_once

    def mixed(region) -> None:
        second = list(region.module.graph.find_nodes(op="call_function", target=quantise.LINEAR))[1]
        second.args = (*second.args[:4], token, *second.args[5:])
        before(region)

    from fusekit.passes import pipeline

    passes = [(name, mixed if name == "quantise" else run) for name, run in pipeline.PIPELINE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "PIPELINE", passes)
        gradients(model)
    assert len(nodes(model, WITH_CODES)) == 1 and not nodes(model, (fp8_operand,))[1:]


@pytest.mark.parametrize("precision", ["fp8-tensorwise", "fp8-rowwise"])
def test_sites_certify_and_stay(precision: str) -> None:
    """A norm is timed as a norm: what it replaced quantised nothing."""
    model = optimised(two_readers, precision)
    certificate = fusekit.verify(model, torch.randn(64, 32))
    norms = [site for site in certificate.sites if site.op == "add_layer_norm"]
    assert len(norms) == 1 and norms[0].ok, str(certificate)
    assert all(site.ok for site in certificate.sites), str(certificate)


@pytest.mark.parametrize("name", ["fp8-tensorwise", "fp8-rowwise"])
def test_bytes_an_element_of_a_gate_and_its_quantisation(name: str) -> None:
    """In docs/precision.md: gate, up and y in bfloat16, and both layouts of its codes."""
    M, H = 8192, 4096
    found = []
    with FakeTensorMode(), as_on_gpu() as launches:
        gate, up = (torch.empty(M, H, dtype=torch.bfloat16) for _ in range(2))
        for maxima in (None, fp8_maxima(gate, H, name, False)):
            y = OPS["gated_act"].fused(gate, up, "silu", False, maxima)
            fp8_operand(y, name, 0, torch.bfloat16, True, True, None, None, maxima)
            found.append(sum(map(launch_bytes, launches)) / (M * H))
            launches.clear()
    assert found == [pytest.approx(12, rel=5e-3), pytest.approx(10, rel=5e-3)]


@pytest.mark.parametrize(
    ("name", "turned", "apart", "together"),
    [
        ("fp8-tensorwise", True, 14, 12),
        ("fp8-rowwise", True, 14, 12),
        ("fp8-rowwise-bf16-wgrad", False, 13, 9),
    ],
)
def test_bytes_an_element_of_a_norm_and_its_quantisation(
    name: str, turned: bool, apart: int, together: int
) -> None:
    """docs/precision.md has this table: norm of a sum in bfloat16, and the codes of y."""
    M, N = 8192, 4096
    recipe = PRESETS[name].token()
    given = (recipe, 0, torch.bfloat16)
    with FakeTensorMode(), as_on_gpu() as launches:
        x, residual = (torch.empty(M, N, dtype=torch.bfloat16) for _ in range(2))
        weight = torch.empty(N, dtype=torch.bfloat16)
        y, _ = OPS["add_rms_norm"].fused(x, residual, weight, 1e-6, 0.0)
        fp8_operand(y, *given, True, turned, None, None)
        first = [launches.pop(0) for _ in range(len(launches))]
        y, _, codes, _, maxima = norm_fp8.add_rms_norm_fp8(x, residual, weight, 1e-6, 0.0, recipe, turned)
        if turned or not codes.numel():
            fp8_operand(y, *given, not codes.numel(), turned, None, None, maxima)
        second = list(launches)
    for started, expected in ((first, apart), (second, together)):
        assert sum(map(launch_bytes, started)) / (M * N) == pytest.approx(expected, rel=5e-3)
