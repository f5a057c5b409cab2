"""The models whose training steps are measured: rows of data, with random weights and random batches.

A row's sizes are per device, and "small" ones of no meaning try the suite itself. Every model is called as
model(**batch); its loss is `output.loss`, or the second of a pair. Dropout is off: providers draw different
random numbers, and their losses shall be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fusekit.gpt import GPT, GPTConfig

Sizes = Mapping[str, Any]
Batch = dict[str, Tensor]
IGNORED = -100  # a label that the loss leaves out
MASKED_SHARE = 0.15  # of BERT's tokens (Devlin et al. 2019, arXiv:1810.04805)
CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Model:
    """unit: what a step's speed is counted in. sizes: by device type, and "small"; "batch" is among them."""

    unit: str
    build: Callable[[Sizes], nn.Module]
    make_batch: Callable[[Sizes, torch.device], Batch]
    sizes: dict[str, dict[str, Any]]

    def sizes_on(self, device: torch.device, small: bool) -> dict[str, Any]:
        return self.sizes["small" if small else device.type]

    def units(self, sizes: Sizes) -> int:
        """Tokens or images of a step."""
        return sizes["batch"] * (sizes["context"] if self.unit == "tokens" else 1)


def loss_of(output: Any) -> Tensor:
    return output[1] if isinstance(output, tuple) else output.loss


def described(model: Model, sizes: Sizes) -> dict[str, Any]:
    """Parameters, and FLOPs of a step's forward and backward pass, counted in eager PyTorch.

    Counted on fake tensors, so nothing is computed. A multiplication and its addition are two FLOPs;
    attention counts its whole score matrix, also where it is causal.
    """
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):  # some initialisations look at values, which fake tensors refuse
        built = model.build(sizes).train()
    parameters = sum(p.numel() for p in built.parameters())  # before to_empty unties the tied ones
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        built.to_empty(device="cpu")
        with counter:
            loss_of(built(**model.make_batch(sizes, torch.device("cpu")))).backward()
    return {
        "unit": model.unit,
        "sizes": dict(sizes),
        "units_per_step": model.units(sizes),
        "parameters": parameters,
        "flops_per_step": counter.get_total_flops(),
    }


def _gpt(sizes: Sizes) -> nn.Module:
    return GPT(GPTConfig(**{name: value for name, value in sizes.items() if name != "batch"}))


def _gpt_batch(sizes: Sizes, device: torch.device) -> Batch:
    tokens = _tokens(sizes["vocab"], (sizes["batch"], sizes["context"] + 1), device)
    return {"tokens": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def _hugging_face(config: str, model: str, sizes: Sizes, *, names: Mapping[str, str], **fixed: Any) -> Any:
    """A transformers model; `names`: what its configuration calls our sizes."""
    import transformers

    given = {names[name]: value for name, value in sizes.items() if name in names}
    built = getattr(transformers, config)(**given, **fixed)
    if model.endswith("Classification"):  # left open, the first step decides it: two compiles
        built.problem_type = "single_label_classification"
    return getattr(transformers, model)(built)


def _language_batch(sizes: Sizes, device: torch.device) -> Batch:
    """transformers shifts the labels itself."""
    tokens = _tokens(sizes["vocab"], (sizes["batch"], sizes["context"]), device)
    return {"input_ids": tokens, "labels": tokens}


def _masked_batch(sizes: Sizes, device: torch.device) -> Batch:
    tokens = _tokens(sizes["vocab"], (sizes["batch"], sizes["context"]), device)
    masked = torch.rand(tokens.shape, device=device) < MASKED_SHARE
    return {"input_ids": tokens.masked_fill(masked, 0), "labels": tokens.masked_fill(~masked, IGNORED)}


def _image_batch(sizes: Sizes, device: torch.device) -> Batch:
    batch, edge = sizes["batch"], sizes["image"]
    labels = torch.randint(CLASSES, (batch,), device=device)
    return {"pixel_values": torch.randn(batch, 3, edge, edge, device=device), "labels": labels}


def _tokens(vocab: int, shape: tuple[int, int], device: torch.device) -> Tensor:
    return torch.randint(vocab, shape, device=device)


_BERT = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}
_LLAMA = _BERT | {"key_value_heads": "num_key_value_heads"}
_VIT = {**_BERT, "image": "image_size", "patch": "patch_size"}
_GPT2 = {
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
    "vocab": "vocab_size",
    "context": "n_positions",
}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NO_ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "use_cache": False}

_vit = partial(
    _hugging_face, "ViTConfig", "ViTForImageClassification", names=_VIT, num_labels=CLASSES, **_NO_DROPOUT
)
_SMALL = {"layers": 1, "width": 32, "heads": 2}
_SMALL_TEXT = {**_SMALL, "context": 32, "vocab": 128, "batch": 2}
_SMALL_VIT = {**_SMALL, "hidden": 64, "image": 16, "patch": 8, "batch": 2}
_BASE = {"layers": 12, "width": 768, "heads": 12}
_RESNET_50 = {"depths": [3, 4, 6, 3], "widths": [256, 512, 1024, 2048], "stem": 64}
_RESNET = {"depths": "depths", "widths": "hidden_sizes", "stem": "embedding_size"}

ZOO: dict[str, Model] = {
    "GPT 17M": Model(
        unit="tokens",
        build=_gpt,
        make_batch=_gpt_batch,
        sizes={
            "cpu": dict(layers=6, width=384, heads=6, context=256, vocab=8192, tied=False, batch=8),
            "small": {**_SMALL_TEXT, "tied": False},
        },
    ),
    "BERT-mini": Model(
        unit="tokens",
        build=partial(_hugging_face, "BertConfig", "BertForMaskedLM", names=_BERT, **_NO_DROPOUT),
        make_batch=_masked_batch,
        sizes={
            "cpu": dict(layers=4, width=256, hidden=1024, heads=4, context=128, vocab=30522, batch=8),
            "small": {**_SMALL_TEXT, "hidden": 64},
        },
    ),
    "GPT-2 124M": Model(
        unit="tokens",
        build=partial(
            _hugging_face,
            "GPT2Config",
            "GPT2LMHeadModel",
            names=_GPT2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **_NO_ENDS,
        ),
        make_batch=_language_batch,
        sizes={
            "cuda": {**_BASE, "context": 1024, "vocab": 50257, "batch": 16},
            "small": _SMALL_TEXT,
        },
    ),
    "Llama 1B": Model(  # the sizes of TinyLlama 1.1B
        unit="tokens",
        build=partial(_hugging_face, "LlamaConfig", "LlamaForCausalLM", names=_LLAMA, **_NO_ENDS),
        make_batch=_language_batch,
        sizes={
            "cuda": dict(
                layers=22,
                width=2048,
                hidden=5632,
                heads=32,
                key_value_heads=4,
                context=2048,
                vocab=32000,
                batch=4,
            ),
            "small": {**_SMALL_TEXT, "hidden": 64, "key_value_heads": 1},
        },
    ),
    "ViT-Ti": Model(
        unit="images",
        build=_vit,
        make_batch=_image_batch,
        sizes={
            "cpu": dict(layers=12, width=192, hidden=768, heads=3, image=224, patch=16, batch=8),
            "small": _SMALL_VIT,
        },
    ),
    "ViT-B": Model(
        unit="images",
        build=_vit,
        make_batch=_image_batch,
        sizes={
            "cuda": {**_BASE, "hidden": 3072, "image": 224, "patch": 16, "batch": 64},
            "small": _SMALL_VIT,
        },
    ),
    "ResNet-50": Model(
        unit="images",
        build=partial(
            _hugging_face,
            "ResNetConfig",
            "ResNetForImageClassification",
            names=_RESNET,
            num_labels=CLASSES,
        ),
        make_batch=_image_batch,
        sizes={
            "cpu": {**_RESNET_50, "image": 112, "batch": 8},
            "cuda": {**_RESNET_50, "image": 224, "batch": 64},
            "small": {"depths": [1, 1, 1, 1], "widths": [16, 16, 32, 32], "stem": 8, "image": 64, "batch": 4},
        },
    ),
}
