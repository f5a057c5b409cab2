"""`model.generate` of an optimised Hugging Face model: eager's tokens, every step fused, few captures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusekit
from fusekit.kernels import attention_choice
from fusekit.passes import cost, decoding, price
from fusekit.session import session

transformers = pytest.importorskip("transformers")

PROMPT, NEW = 7, 6


@pytest.fixture(autouse=True)
def _no_sizes_remembered() -> None:
    torch._dynamo.reset()


@pytest.fixture
def any_size_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models here are so small that starting an op costs more than it saves."""
    monkeypatch.setattr(price, "LEAST_GAIN", 0.0)
    monkeypatch.setattr(price, "_declined", lambda node: None)


def language_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    if name == "GPT2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens)).eval()
    if name == "Bloom":
        sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
        return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, **tokens)).eval()
    if name == "MPT":
        sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}
        return transformers.MptForCausalLM(transformers.MptConfig(**sizes, **tokens)).eval()
    if name.startswith("Falcon"):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
        config = transformers.FalconConfig(**sizes, **tokens, attn_implementation=name.partition(", ")[2])
        return transformers.FalconForCausalLM(config).eval()
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    own = {"Mistral": {"sliding_window": 4}, "Qwen3": {"head_dim": 16}}.get(name, {})
    config = getattr(transformers, f"{name}Config")(**sizes, **tokens, **own)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def prompt(padded: bool) -> dict[str, Any]:
    tokens = torch.randint(3, 96, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(tokens)
    padding[0, : 3 * padded] = 0
    return {"input_ids": tokens, "attention_mask": padding, "do_sample": False}


def sites(model: nn.Module) -> list[int]:
    """Fused sites of attention, graph by graph."""
    regions = [captured.region for captured in session(model).regions]
    return [sum(fusion.op == "attention" for fusion in region.fusions) for region in regions]


# Captures: the prompt; one token behind a cache of that length; one token behind a cache of any length.
@pytest.mark.parametrize(
    "name, cache, padded, captures",
    [
        ("Llama", None, True, 3),
        ("Llama", "static", True, 2),
        ("Mistral", None, True, 3),  # a window that the tokens leave
        ("Qwen3", None, False, 3),
        ("GPT2", None, True, 3),
        ("Bloom", None, True, 3),  # ALiBi of places that padding shifts
        ("MPT", None, True, 2),  # finfo.min in the scores: rows of padding are shared out evenly
        ("Falcon, eager", None, True, 3),
        ("Falcon, sdpa", None, True, 3),
    ],
)
def test_every_step_is_fused_and_few_are_captured(name, cache, padded, captures, any_size_pays) -> None:
    model = language_model(name)
    options = prompt(padded) | ({"cache_implementation": cache} if cache else {})
    expected = model.generate(**options, max_new_tokens=3 * NEW)
    fusekit.optimize(model)
    assert torch.equal(model.generate(**options, max_new_tokens=3 * NEW), expected)
    report = fusekit.explain(model)
    assert not report.graph_breaks and not report.notes
    assert sites(model) == [2] * captures
    running = {fusion.implementation for fusion in report.fused if fusion.op == "attention"}
    assert running and all(name.startswith("CPU ") for name in running)


@pytest.mark.parametrize("name", ["Bloom", "MPT", "Falcon, eager", "Falcon, sdpa"])
def test_alibi_in_bfloat16_gives_eagers_tokens(name, any_size_pays) -> None:
    model = language_model(name).to(torch.bfloat16)
    expected = model.generate(**prompt(True), max_new_tokens=NEW)
    fusekit.optimize(model)
    assert torch.equal(model.generate(**prompt(True), max_new_tokens=NEW), expected)
    assert set(sites(model)) == {2}


def test_a_cache_of_another_kind_follows(any_size_pays) -> None:
    """Dynamo remembers sizes that varied: values' of any length beside keys' of one length."""
    model = language_model("Llama")
    options = prompt(False)
    expected = model.generate(**options, max_new_tokens=NEW)
    fusekit.optimize(model)
    assert torch.equal(model.generate(**options, max_new_tokens=NEW), expected)
    static = {"cache_implementation": "static"}
    assert torch.equal(model.generate(**options, **static, max_new_tokens=NEW), expected)
    assert set(sites(model)) == {2} and len(sites(model)) <= 5


def test_what_does_not_pay_is_left_as_it_was_with_the_same_tokens() -> None:
    model = language_model("Llama")
    expected = model.generate(**prompt(True), max_new_tokens=NEW)
    fusekit.optimize(model)
    assert torch.equal(model.generate(**prompt(True), max_new_tokens=NEW), expected)
    assert len(session(model).regions) == 3 and not fusekit.explain(model).notes


@pytest.fixture
def priced_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites are priced as on a GPU, and run on the CPU; starts cost what they cost (conftest.py: nothing)."""
    monkeypatch.setattr(cost, "EAGER_OVERHEAD", {"cuda": 6e-6})
    monkeypatch.setattr(cost, "FUSED_OVERHEAD", {"cuda": 15e-6})
    for module in (price, cost, decoding, attention_choice):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)


@pytest.mark.parametrize("prompt_length, stays", [(2000, True), (300, False)])
def test_decoding_stays_where_splitting_the_keys_pays(priced_for_a_gpu, prompt_length, stays) -> None:
    """Eager's kernel for float32 has a program a head: 4 of a GPU's 132 multiprocessors read 2000 keys."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=2100, vocab_size=96, bos_token_id=1, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    options = {
        "input_ids": torch.randint(3, 96, (1, prompt_length)), "do_sample": False, "pad_token_id": 0,
        "max_new_tokens": NEW,
    }  # fmt: skip
    expected = model.generate(**options)
    fusekit.optimize(model)
    assert torch.equal(model.generate(**options), expected)
    fused = [f for f in fusekit.explain(model).fused if f.op == "attention" and f.shapes[0][2] == 1]
    assert len(fused) == 4 * stays  # two layers, behind a cache of one length and of any
    assert all(f.implementation.startswith("own decoding kernel: few queries") for f in fused)
    gains = [f.estimated_gain for f in fused]
    assert all(gain is not None and gain > 1.0 for gain in gains)


def test_bloom_decodes_by_the_decoding_kernels(priced_for_a_gpu) -> None:
    """ALiBi of places that are data, beside padding; eager's tokens."""
    model = language_model("Bloom")
    options = prompt(True)
    filler = torch.randint(3, 96, (2, 400), generator=torch.Generator().manual_seed(2))
    options["input_ids"] = torch.cat([options["input_ids"], filler], 1)
    options["attention_mask"] = torch.cat([options["attention_mask"], torch.ones_like(filler)], 1)
    expected = model.generate(**options, max_new_tokens=NEW)
    fusekit.optimize(model)
    assert torch.equal(model.generate(**options, max_new_tokens=NEW), expected)
    fused = [f for f in fusekit.explain(model).fused if f.op == "attention" and f.shapes[0][2] == 1]
    assert len(fused) == 4  # two layers, behind a cache of one length and of any
    assert all(f.implementation.startswith("own decoding kernel") for f in fused)


@pytest.mark.parametrize(
    "dtype, masked, queries, gain",
    [
        (torch.float32, False, 1, True),
        (torch.bfloat16, True, 1, True),
        (torch.bfloat16, False, 1, False),  # PyTorch's flash kernel splits the keys as well
        (torch.bfloat16, True, 17, False),  # no decoding
    ],
)
def test_what_eager_splits_is_not_credited(
    priced_for_a_gpu, monkeypatch, dtype, masked, queries, gain
) -> None:
    monkeypatch.setattr(price, "LEAST_GAIN", 0.0)
    model = fusekit.optimize(Cached().eval())
    q, k = torch.randn(1, 4, queries, 64, dtype=dtype), torch.randn(1, 4, 4000, 64, dtype=dtype)
    mask = torch.rand(1, 1, queries, 4000) < 0.9 if masked else None
    with torch.no_grad():
        model(q, k, k, mask)
    (fusion,) = fusekit.explain(model).fused
    assert (fusion.estimated_gain > 1.0) == gain


class Cached(nn.Module):
    """Attention to a cache that somebody else keeps."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, mask)


def heads(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, length, 16)


def test_lengths_of_a_cache_are_guarded_as_one(any_size_pays) -> None:
    model = fusekit.optimize(Cached().eval())
    q = heads(1)
    for length in range(40, 46):
        k, v, mask = heads(length), heads(length), torch.rand(2, 1, 1, length) < 0.8
        expected = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(model(q, k, v, mask), expected)
    assert sites(model) == [1, 1]


def test_a_mask_that_is_repeated_along_a_size_that_varies(any_size_pays) -> None:
    """A mask of each sequence, then one of all: sizes that happened to be equal are not taken for equal."""
    model = fusekit.optimize(Cached().eval(), dynamic=True)
    for batch, rows in ((2, 2), (3, 3), (3, 1), (4, 1)):
        q, k, v = heads(1, batch), heads(40, batch), heads(40, batch)
        mask = torch.rand(rows, 1, 1, 40) < 0.8
        expected = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(model(q, k, v, mask), expected)


def test_keys_and_values_of_different_lengths_do_as_in_eager(any_size_pays) -> None:
    """On a CPU torch overlooks values too many; whatever it does, it is not taken for attention."""
    model = fusekit.optimize(Cached().eval(), dynamic=True)
    model(heads(1), heads(40), heads(40))
    q, k, v = heads(1), heads(40), heads(41)
    assert torch.equal(model(q, k, v), Cached()(q, k, v))
    assert sites(model) == [1, 0]
