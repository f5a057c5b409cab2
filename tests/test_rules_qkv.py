"""The rule of qkv_linear: real spellings, what is refused, switches, verification, and what it costs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from rule_checks import Functional, calls, capture, check, reasons, sites
from torch import Tensor, nn

import fusekit
from fusekit.passes import cost, price, projections
from fusekit.passes.config import Config
from fusekit.passes.region import Region, Settings
from fusekit.passes.rules.linear import conv1d
from fusekit.session import session

X = torch.randn(2, 3, 8)
ONLY = Settings(fuse=frozenset({"qkv_linear"}))


class Attention(nn.Module):
    """Grouped-query attention as most people write it."""

    def __init__(self, heads: int = 4, groups: int = 2, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q, self.k, self.v = (nn.Linear(8, 2 * n, bias=bias) for n in (heads, groups, groups))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        source = x if other is None else other
        q, k, v = self.q(x), self.k(source), self.v(source)
        shape = (*x.shape[:-1], -1, 2)
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def three(*shapes: tuple[int, ...]) -> Functional:
    return Functional(
        lambda x, q, k, v: torch.cat((F.linear(x, q), F.linear(x, k), F.linear(x, v)), -1), *shapes
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_written_by_hand(bias: bool, groups: int) -> None:
    regions = check(Attention(groups=groups, bias=bias), X)
    assert sites(regions) == {"qkv_linear": 1, "attention": 1}
    assert calls(regions, "linear") == 1


@pytest.mark.parametrize("written", ["conv1d", "matmul", "matmul and bias", "mixed"])
def test_ways_to_write_a_linear(written: str) -> None:
    def linears(x: Tensor, q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Any:
        if written == "conv1d":
            return conv1d(x, q.t(), b), conv1d(x, k.t(), b), conv1d(x, v.t(), b)
        if written == "matmul":
            return x @ q, x @ k, x @ v
        if written == "mixed":
            return F.linear(x, q.t(), b), x @ k, x @ v + b
        return x @ q + b, x @ k + b, x @ v + b

    model = Functional(lambda *args: torch.stack(linears(*args)).sin(), (8, 12), (8, 12), (8, 12), (12,))
    assert sites(check(model, X)) == {"qkv_linear": 1}


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Phi", "Whisper"])
def test_other_hugging_face_layers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4 if name == "Phi" else 2, "vocab_size": 96, "use_cache": False,
    }  # fmt: skip
    inputs: dict[str, Tensor] = {"input_ids": torch.randint(3, 96, (2, 12))}
    if name == "Whisper":
        small = {
            "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 96,
            "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16, "use_cache": False,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        }  # fmt: skip
        inputs = {"input_features": torch.randn(2, 8, 12), "decoder_input_ids": torch.randint(3, 96, (2, 5))}
    model_class = "WhisperModel" if name == "Whisper" else f"{name}ForCausalLM"
    model = getattr(transformers, model_class)(getattr(transformers, f"{name}Config")(**small))
    # Two layers of cross-attention read one encoder output with two linears each: they are not joined.
    expected = 3 if name == "Whisper" else 1
    assert sites(check(model, **inputs, tolerance=2e-5))["qkv_linear"] == expected


def test_the_first_three_of_four_are_taken() -> None:
    model = Functional(lambda x, *w: torch.stack([F.linear(x, t) for t in w]), *[(6, 8)] * 4)
    regions = check(model, X)
    assert sites(regions) == {"qkv_linear": 1} and calls(regions, "linear") == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x, q, k, v: F.linear(x, q) + F.linear(x.sin(), k) + F.linear(x, v),
        lambda x, q, k, v: F.linear(x, q) + F.linear(x, k),
        lambda x, q, k, v: F.linear(x, q) + F.linear(F.linear(x, k), v[:, :6]),
        lambda x, q, k, v: F.linear(F.linear(F.linear(x, q), k[:, :6]), v[:, :6]),
        lambda x, q, k, v: F.linear(x, q) + F.linear(x, k) + torch.matmul(x.mT, x).sum(),
    ],
    ids=["another input", "two", "one after another", "a chain", "a product of two inputs"],
)
def test_other_graphs_are_left_alone(function: Any) -> None:
    regions = check(Functional(function, (6, 8), (6, 8), (6, 8)), X, settings=ONLY)
    assert not sites(regions)["qkv_linear"]


def test_each_cross_attention_keeps_its_own() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            other = x.sin()
            for layer in self.layers:
                x = x + layer(x, other)
            return x

    regions = check(Decoder(), X)
    assert not sites(regions)["qkv_linear"] and "qkv_linear" not in reasons(regions)


def test_another_dtype_is_refused() -> None:
    model = Functional(
        lambda x, q, k, v: F.linear(x, q).double() + F.linear(x.double(), k.double()) + F.linear(x, v),
        (6, 8), (6, 8), (6, 8),
    )  # fmt: skip
    assert not sites(check(model, X, settings=ONLY))
    model = three((6, 8), (6, 8), (6, 8)).double()
    regions = check(model, X.double())
    assert not sites(regions) and "float64" in reasons(regions)


def test_a_write_between_the_linears_is_refused() -> None:
    def function(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x.sin()
        first = F.linear(x, q)
        x.mul_(2.0)
        return first + F.linear(x, k) + F.linear(x, v)

    model = Functional(function, *[(6, 8)] * 3)
    with torch.no_grad():
        result, regions = capture(model, X, settings=ONLY)
        torch.testing.assert_close(result, model(X))
    assert not sites(regions)  # what is written to is another value to the graph


def test_no_grad_around_one_is_refused() -> None:
    def function(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            first = F.linear(x, q)
        return first + F.linear(x, k) + F.linear(x, v)

    regions = check(Functional(function, (6, 8), (6, 8), (6, 8)), X, settings=ONLY)
    assert not sites(regions)
    assert "grad-mode, autocast or in-place boundary" in reasons(regions)


def test_what_has_an_activation_joins_that() -> None:
    def function(x: Tensor, w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack((F.gelu(F.linear(x, w)), F.linear(x, q), F.linear(x, k), F.linear(x, v)))

    regions = check(Functional(function, *[(6, 8)] * 4), X)
    assert sites(regions) == {"linear_act": 1, "qkv_linear": 1}


def test_weights_cast_beside_each_linear() -> None:
    """As autocast casts them: k's weight after q was read. The cast moves; a computed weight stays."""

    def function(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x.bfloat16()
        first = F.linear(x, q.bfloat16()).sin()
        return torch.stack((first, F.linear(x, k.bfloat16()), F.linear(x, v.bfloat16())))

    regions = check(Functional(function, *[(6, 8)] * 3), X, tolerance=2e-2)
    assert sites(regions) == {"qkv_linear": 1}

    def computed(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = F.linear(x, q).sin()
        return torch.stack((first, F.linear(x, k * first.mean()), F.linear(x, v)))

    regions = check(Functional(computed, *[(6, 8)] * 3), X)
    assert not sites(regions) and "only after a result is read" in reasons(regions)


def test_an_input_cast_beside_each_linear() -> None:
    """As autocast casts an activation; the casts after the first result is read go."""

    def function(x: Tensor, scale: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = x * scale
        first = F.linear(x.bfloat16(), q.bfloat16()).sin()
        more = [F.linear(x.bfloat16(), w.bfloat16()) for w in (k, v)]
        return torch.stack((first, *more))

    regions = check(Functional(function, (8,), *[(6, 8)] * 3), X, tolerance=2e-2)
    assert sites(regions) == {"qkv_linear": 1}
    assert calls(regions, "to") == 4


def test_results_stay_in_order_and_are_each_others() -> None:
    """k is read before q is made, and each result has its own width."""

    def function(x: Tensor, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        first = F.linear(x, k).sin().sum(-1, keepdim=True)
        return F.linear(x, q) * first + F.linear(x, v).sum(-1, keepdim=True)

    regions = check(Functional(function, (4, 8), (6, 8), (10, 8)), X, settings=ONLY)
    assert sites(regions) == {"qkv_linear": 1}


@pytest.mark.parametrize(
    "config", [Config(disable=frozenset({"qkv_linear"})), Config(fuel=0)], ids=["disabled", "no fuel"]
)
def test_switches(config: Config) -> None:
    regions = check(Attention(), X, config=config, settings=ONLY)
    assert not sites(regions) and calls(regions, "linear") == 4


def test_fuel_leaves_the_second_site() -> None:
    model = nn.Sequential(Attention(), Attention())
    regions = check(model, X, config=Config(fuel=1), settings=ONLY)
    assert [f.site for f in regions[0].fusions] == ["qkv_linear_0"]
    assert calls(regions, "linear") == 5


def test_under_an_activation_checkpoint() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x.sin(), use_reentrant=False)

    assert sites(check(Model(), X))["qkv_linear"] == 1


def after_declining(on_gpu: bool, features: int, precision: str = "keep") -> Region:
    """Three linears of that many features, fused, and undone where they do not pay."""
    settings = Settings(fuse=frozenset({"qkv_linear"}), precision=precision)
    _, (region,) = capture(three(*[(features, features)] * 3), torch.randn(64, features), settings=settings)
    with mock.patch.object(projections, "on_gpu", lambda x: on_gpu):
        projections.decline_projections(region)
    return region


def test_it_is_undone_where_it_does_not_pay() -> None:
    assert "on a CPU" in after_declining(False, 32).refusals[0].reason
    assert after_declining(True, 32).fusions and not after_declining(True, 32).refusals
    with mock.patch.object(projections, "LEAST_SHARE", 10.0):
        region = after_declining(True, 32)
        assert "of the products' time" in region.refusals[0].reason and not region.fusions
        assert sum("aten.linear" in str(n.target) for n in region.module.graph.nodes) == 3


def test_precision_decides_what_the_products_cost() -> None:
    """A device whose products in float32 take 100 times as long as in 16 bits."""
    device = cost.Device(name="test", float32=1e12, tf32=1e13, low=1e14, bandwidth=1e12)
    with mock.patch.object(projections, "device_of", lambda value: device):
        kept = {p: bool(after_declining(True, 64, p).fusions) for p in ("keep", "tf32", "bf16", "fp16")}
    # 10 x 64 e bytes against 3 x 2 x 64 x 192 FLOPs for each token
    assert kept == {"keep": False, "tf32": True, "bf16": True, "fp16": True}


@pytest.mark.parametrize("precision", ["keep", "bf16"])
def test_what_was_undone_is_lowered_like_any_linear(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that emulates 16-bit products linears become linear_act, those that were undone as well."""
    monkeypatch.setattr("fusekit.passes.lowering.multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr("fusekit.kernels.linear_cpu.multiplies", lambda dtype: dtype == torch.float32)
    model = fusekit.optimize(Attention(bias=True), precision=precision)
    model(X).sum().backward()
    (region,) = [c.region for c in session(model).regions]
    targets = [str(n.target) for n in region.module.graph.nodes]
    assert not any("qkv_linear" in t for t in targets)
    assert sum("linear_act" in t for t in targets) == (0 if precision == "keep" else 4)


@pytest.fixture
def fused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "_reason", lambda node, fusion, precision: None)
    monkeypatch.setattr(price, "LEAST_GAIN", 0.0)


def test_strict_does_not_ask_for_it() -> None:
    model = fusekit.optimize(Attention(bias=True), strict=True)
    model(X)
    assert "on a CPU" in str(fusekit.explain(model))


@pytest.mark.parametrize("precision", ["keep", "bf16"])
def test_verify_and_bisect_handle_three_results(fused_on_a_cpu: None, precision: str) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = Attention(bias=True), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * self.scale).float().square().mean()

    model = fusekit.optimize(Loss(), precision=precision, fuse=["qkv_linear"])
    x = torch.randn(2, 40, 8)
    certificate = fusekit.verify(model, x)
    (site,) = certificate.sites
    assert certificate.ok and site.op == "qkv_linear", str(certificate)
    names = {c.name for c in site.checks}
    assert {"output0", "output1", "output2", "grad_0", "grad_1", "grad_6"} <= names
    from fusekit.bisect import bisect_model

    assert not bisect_model(model, x).guilty
    model(x).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_swapped_result_is_caught(fused_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusekit import site_check

    def swapped(target: Any) -> Any:
        return lambda *args: tuple(target(*args)[i] for i in (0, 2, 1))

    monkeypatch.setattr(site_check, "call_target", swapped)
    model = fusekit.optimize(Attention(), fuse=["qkv_linear"])
    certificate = fusekit.verify(model, X)
    assert not certificate.ok


def test_casts_to_two_dtypes_are_two_inputs() -> None:
    def function(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = torch.tanh(x)
        first = F.linear(x.bfloat16(), q.bfloat16()).float()
        return first + F.linear(x.half(), k.half()).float() + F.linear(x.bfloat16(), v.bfloat16()).float()

    _, regions = capture(Functional(function, (8, 8), (8, 8), (8, 8)), torch.randn(2, 3, 8))
    assert not sites(regions)["qkv_linear"]
