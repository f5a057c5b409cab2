"""Rules of mlp and gated_mlp: every spelling, and what is refused with which sentence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rule_checks import Functional, calls, capture, check, reasons, sites
from torch import Tensor, nn

from fusekit.passes.rules.linear import conv1d, erf_gelu, fast_gelu, new_gelu

X = torch.randn(2, 3, 8)


def gated(act, commuted=False):  # type: ignore[no-untyped-def]
    def function(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        g, u = act(F.linear(x, gate)), F.linear(x, up)
        return F.linear(u * g if commuted else g * u, down)

    return Functional(function, (12, 8), (12, 8), (8, 12))


def packed(split, up_first=False):  # type: ignore[no-untyped-def]
    def function(x: Tensor, both: Tensor, bias: Tensor, down: Tensor) -> Tensor:
        first, second = split(F.linear(x, both, bias))
        return F.linear(F.silu(second) * first if up_first else second * F.silu(first), down)

    return Functional(function, (24, 8), (24,), (8, 12))


def arguments(regions, name):  # type: ignore[no-untyped-def]
    return [n.args for r in regions for n in r.module.graph.nodes if f"fusekit.{name}." in str(n.target)]


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (F.gelu, "gelu"), (erf_gelu, "gelu"), (new_gelu, "gelu_tanh"), (fast_gelu, "gelu_tanh"),
        (F.relu, "relu"), (lambda z: F.relu(z).square(), "relu_squared"),
        (F.silu, "silu"), (lambda z: z * torch.sigmoid(z), "silu"),
        (lambda z: z * torch.sigmoid(1.702 * z), "quick_gelu"),
    ],
)  # fmt: skip
def test_two_linears(act, named):  # type: ignore[no-untyped-def]
    plain = Functional(
        lambda x, w1, b1, w2, b2: F.linear(act(F.linear(x, w1, b1)), w2, b2), (12, 8), (12,), (6, 12), (6,)
    )
    regions = check(plain, X)
    assert sites(regions) == {"mlp": 1}
    assert named in arguments(regions, "mlp")[0]


@pytest.mark.parametrize("linear", ["conv1d", "matmul", "no bias"])
def test_ways_to_write_a_linear(linear: str) -> None:
    functions = {
        "conv1d": lambda x, w1, b1, w2, b2: conv1d(new_gelu(conv1d(x, w1.t(), b1)), w2.t(), b2),
        "matmul": lambda x, w1, b1, w2, b2: new_gelu(x @ w1 + b1) @ w2 + b2,
        "no bias": lambda x, w1, b1, w2, b2: new_gelu(x @ w1) @ w2,
    }
    model = Functional(functions[linear], (8, 12), (12,), (12, 8), (8,))
    x = X.clone().requires_grad_()
    regions = capture(model, x)[1]
    assert sites(regions) == {"mlp": 1}, reasons(regions)
    assert not calls(regions, "matmul") and not calls(regions, "addmm")


@pytest.mark.parametrize("act", [F.silu, F.gelu, F.relu, new_gelu, torch.sigmoid])
def test_gated(act):  # type: ignore[no-untyped-def]
    for commuted in (False, True):
        assert sites(check(gated(act, commuted), X)) == {"gated_mlp": 1}


@pytest.mark.parametrize("up_first", [False, True])
def test_packed_weights(up_first: bool) -> None:
    ways = (
        lambda z: z.chunk(2, -1),
        lambda z: z.split(12, dim=-1),
        lambda z: z.split([12, 12], dim=2),
        lambda z: (z[..., :12], z[..., 12:]),
    )
    for split in ways:
        regions = check(packed(split, up_first), X)
        assert sites(regions) == {"gated_mlp": 1}, reasons(regions)
        assert arguments(regions, "gated_mlp")[0][8] is up_first
    uneven = packed(lambda z: (z[..., 4:16], z[..., 12:]), up_first)
    assert not sites(check(uneven, X))["gated_mlp"]


class Block(nn.Module):
    """timm's Mlp: fc1, act, drop, fc2, drop."""

    def __init__(self, p: float, norm: bool = False) -> None:
        super().__init__()
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(8, 12), nn.GELU(), nn.Dropout(p), nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.drop(self.fc2(self.drop(self.act(self.fc1(x))))))


def test_the_sum_is_taken_along_unless_a_norm_reads_it() -> None:
    regions = check(Block(0.0), X)
    assert sites(regions) == {"mlp": 1} and not calls(regions, "add")
    regions = check(Block(0.0, norm=True), X)
    assert sites(regions) == {"mlp": 1, "add_layer_norm": 1}
    assert arguments(regions, "mlp")[0][5] is None and arguments(regions, "add_layer_norm")[0][1] is not None


def test_active_dropout_between_the_layers_is_refused() -> None:
    _, regions = capture(Block(0.1).train(), X)
    assert sites(regions) == {"linear_act": 1}
    assert "mlp: dropout 0.1 is active between the two layers" in reasons(regions)
    assert sites(check(Block(0.1).eval(), X)) == {"mlp": 1}


def test_each_layer_with_an_activation_stays_a_linear_act() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
    assert sites(check(model, X)) == {"linear_act": 2}


REFUSED = {
    "read elsewhere": lambda x, g, u, d: (lambda h: F.linear(h, d).sum(-1) + h.sum(-1))(
        F.silu(F.linear(x, g)) * F.linear(x, u)
    ),
    "cast between": lambda x, g, u, d: F.linear(
        (F.silu(F.linear(x, g)) * F.linear(x, u)).double(), d.double()
    ),
    "written to": lambda x, g, u, d: F.linear((F.silu(F.linear(x, g)) * F.linear(x, u)).mul_(x.mean()), d),
    "two inputs": lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x + 1, u), d),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_functions_are_left_alone(name: str) -> None:
    assert not sites(check(Functional(REFUSED[name], (12, 8), (12, 8), (8, 12)), X))["gated_mlp"]


def test_one_weight_for_gate_and_up() -> None:
    def function(x: Tensor, w: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, w)) * F.linear(x, w), down)

    assert not sites(check(Functional(function, (12, 8), (8, 12)), X))["gated_mlp"]


def test_an_autocast_boundary_inside_is_no_match() -> None:
    def function(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        h = F.gelu(F.linear(x, w1))
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(h, w2)

    _, regions = capture(Functional(function, (12, 8), (8, 12)), X)
    assert not sites(regions)["mlp"]


def cast_twice(recorded: bool) -> Functional:
    """As autocast casts an activation: once for each of its readers."""

    def function(x: Tensor, scale: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        x = x * scale
        with torch.set_grad_enabled(recorded):
            first = x.bfloat16()
        g, u = F.silu(F.linear(first, gate.bfloat16())), F.linear(x.bfloat16(), up.bfloat16())
        return F.linear(g * u, down.bfloat16())

    return Functional(function, (8,), (12, 8), (12, 8), (8, 12))


def test_an_input_cast_beside_each_linear() -> None:
    regions = check(cast_twice(recorded=True), X, tolerance=2e-2)
    assert sites(regions) == {"gated_mlp": 1}
    assert calls(regions, "to") == 4


def test_casts_with_and_without_a_gradient_are_two() -> None:
    regions = check(cast_twice(recorded=False), X, tolerance=2e-2)
    assert not sites(regions)["gated_mlp"]
