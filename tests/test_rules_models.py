"""Rules on Hugging Face models, from tiny configurations with random weights, and on timm's ViT block."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from rule_checks import calls, check, reasons, sites
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    "T5": ("T5ForConditionalGeneration", {"add_rms_norm": 12, "mlp": 4, "attention": 6, "qkv_linear": 4}),
    "Qwen3": (
        "Qwen3ForCausalLM",
        {"add_rms_norm": 5, "gated_mlp": 2, "attention": 2, "rms_norm_rope": 4, "qkv_linear": 2},
    ),
    "Gemma2": (
        "Gemma2ForCausalLM",
        {"add_rms_norm": 9, "gated_mlp": 2, "attention": 2, "rope": 4, "qkv_linear": 2},
    ),
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


def attentions(regions: list[Any]) -> list[dict[str, Any]]:
    """The arguments of each attention by name, a mask as its shape."""
    found = []
    for region in regions:
        for n in region.module.graph.nodes:
            if "attention" in str(n.target) and "fusion" in n.meta:
                names = [a.name for a in n.target._schema.arguments]
                given = dict(zip(names, n.args, strict=True))
                mask = given["mask"]
                found.append(given | {"mask": None if mask is None else tuple(mask.meta["val"].shape)})
    return found


def attention_arguments(regions: list[Any]) -> list[tuple[bool, bool]]:
    """For each attention: is it causal, has it a mask."""
    return [(given["causal"], given["mask"] is not None) for given in attentions(regions)]


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


PADDING = torch.ones(2, 12, dtype=torch.long)
PADDING[1, 9:] = 0
GEMMA3 = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
MODERNBERT = {"local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0}
GEMMA2 = {"sliding_window": 4, "head_dim": 8, "attn_implementation": "eager"}
# name: (model, configuration, options, (causal, window, offset) of each layer)
WINDOWED: dict[str, tuple[str, str, dict[str, Any], list[tuple[Any, ...]]]] = {
    "Mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 4}, [(True, 4, 0)] * 2),
    "Phi3": ("Phi3ForCausalLM", "Phi3Config", {"sliding_window": 5, "pad_token_id": 0}, [(True, 5, 0)] * 2),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3, [(True, 4, 0), (True, None, 0)]),
    "ModernBert": ("ModernBertModel", "ModernBertConfig", MODERNBERT, [(False, None, 0), (True, 9, 4)]),
}


def windowed(name: str, **extra: Any) -> nn.Module:
    torch.manual_seed(0)
    model, config_class, options, _ = WINDOWED[name]
    heads = {} if name == "ModernBert" else {"num_key_value_heads": 2, "use_cache": False}
    config = getattr(transformers, config_class)(**SMALL, **heads, vocab_size=96, **options, **extra)
    return getattr(transformers, model)(config)


def bands(regions: list[Any]) -> list[tuple[Any, ...]]:
    return [(given["causal"], given["window"], given["offset"]) for given in attentions(regions)]


def test_padding_stays_a_small_mask_beside_causal() -> None:
    model, inputs = hugging_face("Llama")
    regions = check(model, **inputs, attention_mask=PADDING, tolerance=2e-5)
    assert bands(regions) == [(True, None, 0)] * 2
    assert {given["mask"] for given in attentions(regions)} == {(2, 1, 1, 12)}


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_windows_need_no_mask(name: str, implementation: str) -> None:
    model = windowed(name, attn_implementation=implementation)
    regions = check(model, torch.randint(3, 96, (2, 12)), tolerance=2e-5)
    assert bands(regions) == WINDOWED[name][3], reasons(regions)
    assert {given["mask"] for given in attentions(regions)} == {None}


@pytest.mark.parametrize("name", WINDOWED)
def test_padding_stays_a_small_mask_beside_a_window(name: str) -> None:
    regions = check(windowed(name), torch.randint(3, 96, (2, 12)), attention_mask=PADDING, tolerance=2e-5)
    assert bands(regions) == WINDOWED[name][3], reasons(regions)
    assert {given["mask"] for given in attentions(regions)} == {(2, 1, 1, 12)}


def test_padding_and_a_window_in_one_added_mask_stay_whole() -> None:
    """A padded query may see no key at all: then eager shares its row out over every key."""
    model = windowed("Mistral", attn_implementation="eager")
    regions = check(model, torch.randint(3, 96, (2, 12)), attention_mask=PADDING.flip(-1), tolerance=2e-5)
    assert attention_arguments(regions) == [(False, True)] * 2


def test_gemma2_is_capped_and_windowed() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SMALL, **GEMMA2, num_key_value_heads=2, vocab_size=96, use_cache=False, attn_logit_softcapping=0.5,
        query_pre_attn_scalar=16,
    )  # fmt: skip
    regions = check(transformers.Gemma2ForCausalLM(config), torch.randint(3, 96, (2, 12)), tolerance=2e-5)
    assert bands(regions) == [(True, 4, 0), (True, None, 0)], reasons(regions)
    assert [(given["softcap"], given["scale"], given["mask"]) for given in attentions(regions)] == [
        (0.5, pytest.approx(0.25), None)
    ] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gpt_oss_has_sinks_and_a_window(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, vocab_size=96, sliding_window=4, num_local_experts=2,
        num_experts_per_tok=2, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    for parameter in model.parameters():  # sinks and experts start as they were in memory
        torch.nn.init.normal_(parameter, std=0.1)
    tolerance = 2e-5 if dtype == torch.float32 else 5e-2
    regions = check(model.to(dtype), torch.randint(3, 96, (2, 12)), tolerance=tolerance)
    assert bands(regions) == [(True, 4, 0), (True, None, 0)], reasons(regions)
    assert all(given["sinks"] is not None and given["mask"] is None for given in attentions(regions))


def test_varying_lengths_match_alike() -> None:
    model, inputs = hugging_face("Llama")
    regions = check(model, **inputs, dynamic=True, tolerance=2e-5)
    assert sites(regions) == HF["Llama"][1]
    assert attention_arguments(regions) == [(True, False)] * 2


def test_low_precision_parameters() -> None:
    model, inputs = hugging_face("Llama")
    regions = check(model.to(torch.bfloat16), **inputs, tolerance=5e-2)
    assert sites(regions) == HF["Llama"][1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_learned_bias_is_an_argument_and_its_mask_none(implementation: str) -> None:
    model, inputs = hugging_face("T5", attn_implementation=implementation)
    found = attentions(check(model, **inputs, tolerance=2e-5))
    biased = [(given["mask"], given["causal"]) for given in found if given["mask"] is not None]
    assert biased == [((1, 4, 12, 12), False)] * 2 + [((1, 4, 7, 7), True)] * 2


def test_checkpointed_layers_are_rewritten_inside() -> None:
    model, inputs = hugging_face("Llama")
    model.gradient_checkpointing_enable()
    found = sites(check(model.train(), **inputs, tolerance=2e-5))
    assert found["attention"] == 2 and found["rope"] == 4, found


def test_learned_tables_of_a_checkpointed_layer_keep_their_gradient() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.angle, self.scale = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor, learned: bool) -> Tensor:
            with contextlib.nullcontext() if learned else torch.no_grad():
                angle = torch.cat((self.angle, self.angle), -1)
                cos, sin = angle.cos(), angle.sin()
            return checkpoint(turn, torch.tanh(x) * self.scale, cos, sin, use_reentrant=False)

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = torch.cat((-x[..., 8:], x[..., :8]), -1)
        return x * cos + half * sin

    x = torch.randn(2, 3, 5, 16, requires_grad=True)
    for learned in (False, True):
        regions = check(Layer(), x, learned)
        assert sites(regions)["rope"] == (0 if learned else 1)
        assert ("cos or sin needs a gradient" in reasons(regions)) is learned


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
