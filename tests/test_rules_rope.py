"""Rules of rope and rms_norm_rope: spellings of models and hand-written ones, and what must be refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_checks import check, reasons, sites
from torch import Tensor, nn

import fusekit
from fusekit.kernels.rope import tables
from fusekit.passes import cost, price

transformers = pytest.importorskip("transformers")

B, T, H, D = 2, 6, 3, 8


class Rotated(nn.Module):
    """A projection into heads, rotated by `rotation(x, cos, sin)`; x (B, H, T, D) or (B, T, H, D)."""

    def __init__(self, rotation: Callable[..., Any], cos: Tensor, sin: Tensor, by_head: bool = True) -> None:
        super().__init__()
        self.rotation, self.by_head = rotation, by_head
        self.linear = nn.Linear(16, H * D)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.linear(hidden).view(B, T, H, D)
        x = x.transpose(1, 2) if self.by_head else x
        return self.rotation(x, self.cos, self.sin) * 2.0


def rotated(
    rotation: Callable[..., Any], columns: int = D, repeat: str = "none", by_head: bool = True
) -> Any:
    torch.manual_seed(0)
    cos, sin = tables("cpu", torch.float32, T, columns, repeat)
    if not by_head:
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    return check(Rotated(rotation, cos, sin, by_head), torch.randn(B, T, 16))


def arguments(regions: list[Any], name: str) -> list[tuple[Any, ...]]:
    nodes = (n for r in regions for n in r.module.graph.nodes if "fusion" in n.meta)
    return [n.args for n in nodes if n.meta["fusion"].op == name]


def rotate_half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (rotate_half(x) * sin)


def chunked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return cos * x + sin * torch.cat((-b, a), dim=3)


def gpt_oss(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.split(x.shape[-1] // 2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def nanochat(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    d = x.shape[3] // 2
    a, b = x[..., :d], x[..., d:]
    return torch.cat([a * cos + b * sin, a * (-sin) + b * cos], 3).to(x.dtype)


def every_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def torchtune(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    out = torch.stack(
        [pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 1] * cos + pairs[..., 0] * sin], -1
    )
    return out.flatten(3).type_as(x)


def unbound(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    angles = torch.view_as_complex(torch.stack((cos, sin), -1))
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles).flatten(3).type_as(x)


def neox(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.shape[-1]
    part, rest = x[..., :rotary], x[..., rotary:]
    return torch.cat([part * cos + rotate_half(part) * sin, rest], -1)


SPELLINGS: dict[str, tuple[Callable[..., Any], int, str, bool, dict[str, Any]]] = {
    "llama": (llama, D, "halves", True, {}),
    "llama, positions before heads": (llama, D, "halves", False, {}),
    "chunk": (chunked, D, "halves", True, {}),
    "gpt-oss": (gpt_oss, D // 2, "none", True, {}),
    "split": (split, D // 2, "none", False, {}),
    "nanochat": (nanochat, D // 2, "none", False, {}),
    "rotate_every_two": (every_two, D, "pairs", False, {"interleaved": True}),
    "neighbours": (neighbours, D // 2, "none", True, {"interleaved": True}),
    "torchtune": (torchtune, D // 2, "none", False, {"interleaved": True}),
    "unbind": (unbound, D // 2, "none", True, {"interleaved": True}),
    "complex": (complex_numbers, D // 2, "none", False, {"interleaved": True}),
    "partial": (neox, 4, "halves", True, {"rotary": 4}),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    rotation, columns, repeat, by_head, expected = SPELLINGS[name]
    regions = rotated(rotation, columns, repeat, by_head)
    assert sites(regions) == {"rope": 1}, reasons(regions)
    ((x, _, _, interleaved, rotary),) = arguments(regions, "rope")
    assert x.meta["val"].shape[-1] == D, "a partial rotation takes the whole head"
    assert (interleaved, rotary) == (expected.get("interleaved", False), expected.get("rotary", D))


def broken_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos - rotate_half(x) * sin


def broken_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((x[..., x.shape[-1] // 2 :], -x[..., : x.shape[-1] // 2]), -1) * sin


def swapped_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((x[..., : x.shape[-1] // 2], -x[..., x.shape[-1] // 2 :]), -1) * sin


def uneven(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 3:], x[..., :3]), -1) * sin


def other_tensor(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x + 1.0) * sin


def cast_between(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + (rotate_half(x) * sin).to(torch.bfloat16).to(x.dtype)


def mutated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first = x * cos
    sin.mul_(1.0)
    return first + rotate_half(x) * sin


def escaping(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = rotate_half(x)
    return x * cos + turned * sin + turned.tanh()


def wrong_half_table(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[..., : D // 2], sin[..., : D // 2]
    return torch.cat((a * cos - b * sin, a * cos + b * sin), -1)


def odd_step(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2) * sin


BROKEN = [
    broken_sign, broken_order, swapped_halves, uneven, other_tensor, cast_between, mutated, escaping,
    wrong_half_table, odd_step,
]  # fmt: skip


@pytest.mark.parametrize("rotation", BROKEN, ids=lambda f: f.__name__)
def test_what_is_no_rotation_is_left_alone(rotation: Callable[..., Any]) -> None:
    """`check` compares results and gradients with eager's besides."""
    assert not sites(rotated(rotation, D, "halves"))["rope"]


def test_a_half_rotation_without_the_rest_takes_the_slice() -> None:
    regions = rotated(lambda x, cos, sin: llama(x[..., 2:6], cos, sin), 4, "halves")
    assert sites(regions) == {"rope": 1}
    assert arguments(regions, "rope")[0][0].meta["val"].shape[-1] == 4


@pytest.mark.parametrize("rotary, joined", [(4, "x[..., 2:]"), (4, "tanh"), (4, "in front")])
def test_a_rest_that_is_another_stays_outside(rotary: int, joined: str) -> None:
    def rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = llama(x[..., :rotary], cos, sin)
        if joined == "in front":
            return torch.cat((x[..., rotary:], y), -1)
        return torch.cat((y, x[..., rotary:].tanh() if joined == "tanh" else x[..., 2:6]), -1)

    regions = rotated(rotation, rotary, "halves")
    assert arguments(regions, "rope")[0][0].meta["val"].shape[-1] == rotary


def test_learned_tables_are_refused() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, D)
            self.frequencies = nn.Parameter(torch.rand(D // 2))

        def forward(self, hidden: Tensor) -> Tensor:
            angle = torch.arange(hidden.shape[1])[:, None] * self.frequencies
            angle = torch.cat((angle, angle), -1)
            return llama(self.linear(hidden), angle.cos(), angle.sin())

    regions = check(Learned(), torch.randn(2, T, 16))
    assert not sites(regions)["rope"] and "needs a gradient" in reasons(regions)


def test_autocast_tables_in_float32() -> None:
    """q in bfloat16 by tables in float32, and attention's cast back: one rounding."""

    def rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        return llama(x, cos, sin).to(torch.bfloat16).float()

    torch.manual_seed(0)
    cos, sin = tables("cpu", torch.float32, T, D, "halves")
    regions = check(Rotated(rotation, cos, sin), torch.randn(B, T, 16), tolerance=2e-2)
    assert sites(regions) == {"rope": 1}


term = st.sampled_from(["a*c", "a*s", "b*c", "b*s"])
sign = st.sampled_from([1, -1])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(terms=st.tuples(term, term, term, term), signs=st.tuples(sign, sign, sign, sign), back=st.booleans())
def test_any_sums_of_products_compute_what_they_did(terms: Any, signs: Any, back: bool) -> None:
    """Whatever two halves are made of, the fused graph equals the dense evaluation; only rotations match."""
    if back:
        terms, signs = ("a*c", "b*s", "b*c", "a*s"), (1, signs[1], 1, signs[3])

    def rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        product = {"a*c": a * cos, "a*s": a * sin, "b*c": b * cos, "b*s": b * sin}
        t = [product[name] for name in terms]
        first = t[0] + t[1] if signs[1] > 0 else t[0] - t[1]
        second = t[2] + t[3] if signs[3] > 0 else t[2] - t[3]
        return torch.cat((first, second), -1)

    turned = terms[:2] == ("a*c", "b*s") and {*terms[2:]} == {"b*c", "a*s"}
    assert sites(rotated(rotation, D // 2))["rope"] == (turned and (signs[1], signs[3]) == (-1, 1))


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "Llama": (GROUPED, "rope"),
    "Qwen3": (GROUPED, "rms_norm_rope"),
    "Gemma3": (GROUPED, "rms_norm_rope"),
    "GPTNeoX": ({"rotary_pct": 0.5, "attention_dropout": 0.0, "hidden_dropout": 0.0}, "rope"),
    "GPTJ": ({"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "resid_pdrop": 0.0}, "rope"),
    "Cohere": ({"num_key_value_heads": 2}, "rope"),
    "Glm4": (GROUPED, "rope"),
    "GptOss": ({**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}, "rope"),
}


def hugging_face(name: str) -> nn.Module:
    torch.manual_seed(0)
    shape = {} if name == "GPTJ" else SMALL
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    return getattr(transformers, f"{name}ForCausalLM")(config(**shape, **tokens, **MODELS[name][0]))


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face(name: str) -> None:
    """Queries and keys of the one layer, the partial rotations of GPT-NeoX, GPT-J and GLM whole."""
    regions = check(hugging_face(name).eval(), torch.randint(3, 96, (2, 12)), tolerance=2e-5)
    assert sites(regions)[MODELS[name][1]] == 2, reasons(regions)
    assert {shape[0][-1] for r in regions for f in r.fusions if "rope" in f.op for shape in [f.shapes]} == {8}


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPTNeoX"])
def test_optimised_models_are_as_exact_as_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and all gradients against float64; attention runs fused behind the rotation."""
    monkeypatch.setattr(price, "LEAST_GAIN", 0.0)  # so small a model pays for nothing
    model, ids = hugging_face(name).train(), torch.randint(3, 96, (2, 24))
    exact, fused = copy.deepcopy(model).double(), fusekit.optimize(copy.deepcopy(model))
    for contender in (model, exact, fused):
        contender(input_ids=ids, labels=ids).loss.backward()
    truth = torch.cat([p.grad.flatten() for p in exact.parameters()])

    def error(contender: nn.Module) -> float:
        grads = torch.cat([p.grad.flatten() for p in contender.parameters()])
        return float((grads.double() - truth).norm() / truth.norm())

    assert error(fused) <= 1.2 * error(model) < 1e-5
    report = fusekit.explain(fused)
    ops = [site.op for site in report.fused]
    assert ops.count(MODELS[name][1]) == 2 and "attention" in ops
    assert fusekit.verify(fused, input_ids=ids, labels=ids).ok


@pytest.mark.parametrize("tokens, precision", [(4, "keep"), (512, "keep"), (512, "bf16")])
def test_price_on_a_cpu(tokens: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens do not pay for the calls, and 16 bits not for widening; a rotation in float32 does."""
    monkeypatch.setattr(cost, "EAGER_OVERHEAD", {"cpu": 3e-6})
    monkeypatch.setattr(cost, "FUSED_OVERHEAD", {"cpu": 12e-6})
    model = fusekit.optimize(hugging_face("Llama"), precision=precision)
    model(torch.randint(3, 96, (4, tokens)))
    report = fusekit.explain(model)
    kept = sum(site.op == "rope" for site in report.fused)
    refused = [site.reason for site in report.refused if site.op == "rope"]
    assert (kept, len(refused)) == ((2, 0) if (tokens, precision) == (512, "keep") else (0, 2))
    assert all(("16-bit" if precision == "bf16" else "starting the op") in reason for reason in refused)
