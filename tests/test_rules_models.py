"""Rules on Hugging Face models, from tiny configurations with random weights, and on timm's ViT block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rule_checks import calls, check, reasons, sites
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

HF: dict[str, tuple[str, dict[str, int]]] = {
    "GPT2": ("GPT2LMHeadModel", {"add_layer_norm": 5, "mlp": 2, "attention": 2}),
    "Llama": (
        "LlamaForCausalLM",
        {"add_rms_norm": 5, "gated_mlp": 2, "attention": 2, "rope": 4, "qkv_linear": 2},
    ),
    "Bert": (
        "BertForMaskedLM",
        {"add_layer_norm": 6, "mlp": 2, "linear_act": 1, "attention": 2, "qkv_linear": 2},
    ),
    "T5": ("T5ForConditionalGeneration", {"add_rms_norm": 12, "mlp": 4, "attention": 2, "qkv_linear": 4}),
    "Qwen3": (
        "Qwen3ForCausalLM",
        {"add_rms_norm": 5, "gated_mlp": 2, "attention": 2, "rms_norm_rope": 4, "qkv_linear": 2},
    ),
    "Gemma2": ("Gemma2ForCausalLM", {"add_rms_norm": 9, "gated_mlp": 2, "rope": 4, "qkv_linear": 2}),
    "CLIPText": ("CLIPTextModel", {"add_layer_norm": 5, "mlp": 2, "attention": 2, "qkv_linear": 2}),
    "ViT": ("ViTModel", {"add_layer_norm": 5, "mlp": 2, "linear_act": 1, "attention": 2, "qkv_linear": 2}),
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0,
             "attn_pdrop": 0, "bos_token_id": 1, "eos_token_id": 2},
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0},
    "ViT": {**SMALL, "image_size": 16, "patch_size": 8},
    "Bert": {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "CLIPText": {**SMALL, "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip


def hugging_face(name: str, **extra: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    shape = CONFIGS.get(name, {**SMALL, "num_key_value_heads": 2, "head_dim": 8})
    vocabulary = {} if name == "ViT" else {"vocab_size": 96}
    config = getattr(transformers, f"{name}Config")(**shape, **vocabulary, **extra)
    config.use_cache = False
    model = getattr(transformers, HF[name][0])(config)
    if name == "ViT":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs = {"input_ids": torch.randint(3, 96, (2, 12))}
    return model, inputs | ({"decoder_input_ids": torch.randint(3, 96, (2, 7))} if name == "T5" else {})


def attention_arguments(regions: list[Any]) -> list[tuple[bool, bool]]:
    """For each attention: is it causal, has it a mask."""
    nodes = (
        n
        for r in regions
        for n in r.module.graph.nodes
        if "attention" in str(n.target) and "fusion" in n.meta
    )
    return [(n.args[4], n.args[3] is not None) for n in nodes]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", HF)
def test_hugging_face_models(name: str, implementation: str) -> None:
    if name == "Gemma2" and implementation == "sdpa":
        implementation = "eager"  # its capped scores have no other implementation
    model, inputs = hugging_face(name, attn_implementation=implementation)
    assert sites(check(model, **inputs, tolerance=2e-5)) == HF[name][1]


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Qwen3"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_causal_language_models_need_no_mask(name: str, implementation: str) -> None:
    model, inputs = hugging_face(name, attn_implementation=implementation)
    regions = check(model, **inputs, tolerance=2e-5)
    assert attention_arguments(regions) == [(True, False)] * 2
    heads = {tuple(shape[1] for shape in f.shapes) for f in regions[0].fusions if f.op == "attention"}
    assert heads == {(4, 4, 4)} if name == "GPT2" else heads == {(4, 2, 2)}, (
        "heads are not repeated in memory"
    )


def test_padding_stays_a_mask_beside_causal() -> None:
    model, inputs = hugging_face("Llama")
    padding = torch.ones(2, 12, dtype=torch.long)
    padding[1, 9:] = 0
    regions = check(model, **inputs, attention_mask=padding, tolerance=2e-5)
    assert attention_arguments(regions) == [(True, True)] * 2


def test_window_stays_a_mask_beside_causal() -> None:
    config = transformers.MistralConfig(
        **SMALL, vocab_size=96, num_key_value_heads=2, sliding_window=4, use_cache=False
    )
    regions = check(transformers.MistralForCausalLM(config), torch.randint(3, 96, (2, 12)), tolerance=2e-5)
    assert attention_arguments(regions) == [(True, True)] * 2


def test_varying_lengths_match_alike() -> None:
    model, inputs = hugging_face("Llama")
    regions = check(model, **inputs, dynamic=True, tolerance=2e-5)
    assert sites(regions) == HF["Llama"][1]
    assert attention_arguments(regions) == [(True, False)] * 2


def test_low_precision_parameters() -> None:
    model, inputs = hugging_face("Llama")
    regions = check(model.to(torch.bfloat16), **inputs, tolerance=5e-2)
    assert sites(regions) == HF["Llama"][1]


def test_a_learned_bias_is_refused() -> None:
    model, inputs = hugging_face("T5")
    assert reasons(check(model, **inputs, tolerance=2e-5)).count("needs a gradient") == 4


def test_checkpointed_layers_are_rewritten_inside() -> None:
    model, inputs = hugging_face("Llama")
    model.gradient_checkpointing_enable()
    assert sites(check(model.train(), **inputs, tolerance=2e-5))["attention"] == 2


class TimmBlock(nn.Module):
    """timm's ViT block: packed q, k, v, unbound."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2, self.act = nn.Linear(width, 64), nn.Linear(64, width), nn.GELU()
        self.drop, self.drop_path = nn.Dropout(0.0), nn.Identity()

    def attention(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        return self.drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.drop(self.fc2(self.drop(self.act(self.fc1(self.norm2(x)))))))


def test_timm_block() -> None:
    regions = check(TimmBlock(), torch.randn(2, 5, 32))
    assert sites(regions) == {"add_layer_norm": 2, "attention": 1, "mlp": 1}
    assert not any(
        calls(regions, name) for name in ("add", "gelu", "layer_norm", "scaled_dot_product_attention")
    )


def test_transformer_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
    found = sites(check(layer, torch.randn(2, 5, 32)))
    assert found == {"add_layer_norm": 2, "attention": 1, "mlp": 1}
