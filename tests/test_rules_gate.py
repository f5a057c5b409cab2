"""Rules of gated_act: every spelling, what is refused with which sentence, and who comes first."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from adapted import Adapted
from rule_checks import Functional, calls, capture, check, reasons, sites
from torch import Tensor, nn

from fusekit.passes.rules import gate
from fusekit.passes.rules.linear import erf_gelu, erf_gelu_scaled, fast_gelu, new_gelu

X = torch.randn(2, 3, 8)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "pays", lambda node: True)


def acts(regions):  # type: ignore[no-untyped-def]
    """The arguments behind the gate, `up` as whether it is given; maxima are for the pass `quantise`."""
    found = [n for r in regions for n in r.module.graph.nodes if "fusekit.gated_act." in str(n.target)]
    assert all(n.args[4] is None for n in found)
    return [(n.args[1] is not None, *n.args[2:4]) for n in found]


def gated(act, commuted: bool = False) -> Functional:  # type: ignore[no-untyped-def]
    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        g, u = act(F.linear(x, a)), F.linear(x, b)
        return u * g if commuted else g * u

    return Functional(function, (12, 8), (12, 8))


@pytest.mark.parametrize("commuted", [False, True])
@pytest.mark.parametrize(
    ("act", "named"),
    [
        (F.gelu, "gelu"), (erf_gelu, "gelu"), (erf_gelu_scaled, "gelu"), (new_gelu, "gelu_tanh"),
        (fast_gelu, "gelu_tanh"), (F.relu, "relu"), (lambda z: F.relu(z).square(), "relu_squared"),
        (F.silu, "silu"), (lambda z: z * torch.sigmoid(z), "silu"), (torch.tanh, "tanh"),
        (lambda z: z * torch.sigmoid(1.702 * z), "quick_gelu"), (torch.sigmoid, "sigmoid"),
    ],
)  # fmt: skip
def test_the_gate_comes_before_the_layer_in_front_of_it(act, named: str, commuted: bool) -> None:  # type: ignore[no-untyped-def]
    regions = check(gated(act, commuted), X)
    assert sites(regions) == {"gated_act": 1}
    assert named in acts(regions)[0]


@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize(
    "split", [lambda z: z.chunk(2, -1), lambda z: z.split(12, -1), lambda z: (z[..., :12], z[..., 12:])]
)
def test_halves_of_one_tensor(split, up_first: bool) -> None:  # type: ignore[no-untyped-def]
    def function(x: Tensor, both: Tensor) -> Tensor:
        first, second = split(F.linear(x, both))
        return F.silu(second) * first if up_first else second * F.silu(first)

    regions = check(Functional(function, (24, 8)), X)
    assert acts(regions) == [(False, "silu", up_first)]
    assert calls(regions, "slice") == calls(regions, "chunk") == calls(regions, "split") == 0


@pytest.mark.parametrize("dim", [-1, 2])
def test_glu_of_the_last_dimension(dim: int) -> None:
    regions = check(Functional(lambda x, w: F.glu(F.linear(x, w), dim), (24, 8)), X)
    assert acts(regions) == [(False, "sigmoid", True)]


def test_glu_of_another_dimension_is_left() -> None:
    regions = check(Functional(lambda x, w: F.glu(F.linear(x, w), 1), (24, 8)), torch.randn(2, 4, 8))
    assert sites(regions) == {} and calls(regions, "glu") == 1


def test_halves_that_are_read_elsewhere_are_two_views() -> None:
    def function(x: Tensor, both: Tensor) -> Tensor:
        first, second = F.linear(x, both).chunk(2, -1)
        return F.silu(first) * second + second

    regions = check(Functional(function, (24, 8)), X)
    assert acts(regions) == [(True, "silu", False)]


def test_adapted_layers() -> None:
    class SwiGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = (8, 12), (8, 12), (12, 8)
            self.gate, self.up, self.down = (Adapted(nn.Linear(*size)) for size in sizes)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    regions = check(SwiGLU(), X)
    assert sites(regions)["gated_act"] == 1 and acts(regions) == [(True, "silu", False)]


def test_llama_keeps_its_mlp_and_gates_what_dropout_parts() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, a)) * F.linear(x, b), c)

    assert sites(check(Functional(function, (12, 8), (12, 8), (8, 12)), X)) == {"gated_mlp": 1}

    def dropping(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return F.linear(F.dropout(F.silu(F.linear(x, a)) * F.linear(x, b), 0.5, True), c)

    _, regions = capture(Functional(dropping, (12, 8), (12, 8), (8, 12)), X)
    assert sites(regions) == {"gated_act": 1}


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_attention_heads=4, num_local_experts=4)
    return MixtralForCausalLM(config)


def _mamba2() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
    config = Mamba2Config(hidden_size=32, num_hidden_layers=2, vocab_size=50, **sizes)
    return Mamba2ForCausalLM(config)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}


@pytest.mark.parametrize(
    ("build", "found"), [(_mixtral, (False, "silu", False)), (_mamba2, (True, "silu", False))]
)
def test_gates_of_experts_and_of_state_spaces(build, found) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(1))
    regions = check(build(), tokens, use_cache=False, tolerance=1e-4)
    assert acts(regions) == [found, found]


def _broadcast(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, a).mean(1, keepdim=True)) * F.linear(x, b)


def _read_twice(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    g = F.silu(F.linear(x, a))
    return g * F.linear(x, b) + g


def _cast(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.linear(x, a).double()).float() * F.linear(x, b)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_broadcast, "broadcast"),
        (_read_twice, "also read by"),
        (_cast, ""),
        (lambda x, a, b: F.leaky_relu(F.linear(x, a)) * F.linear(x, b), ""),
    ],
)
def test_refused(function, reason: str) -> None:  # type: ignore[no-untyped-def]
    _, regions = capture(Functional(function, (12, 8), (12, 8)), X)
    assert "gated_act" not in sites(regions)
    assert reason in reasons(regions)


def test_in_place() -> None:
    def written(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.linear(x, a)).mul_(F.linear(x, b))

    def overwritten(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        up = F.linear(x, b).detach()
        y = F.silu(F.linear(x, a)) * up
        up.add_(1.0)
        return y * up

    assert sites(check(Functional(written, (12, 8), (12, 8)), X)) == {"gated_act": 1}
    eager = Functional(overwritten, (12, 8), (12, 8))
    torch.testing.assert_close(capture(eager, X)[0], eager(X))


def test_an_activation_written_as_a_product_is_no_gate() -> None:
    regions = check(Functional(lambda x, w: (z := x * w) * torch.sigmoid(z), (8,)), X)
    assert sites(regions) == {}
    assert "gate and up are one tensor" in reasons(regions)


def test_a_cpu_keeps_the_two_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    regions = check(gated(F.silu), X)
    assert sites(regions) == {"linear_act": 1}
    assert "gated_act: on a CPU" in reasons(regions)
