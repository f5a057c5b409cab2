"""Which model to train: the built-in GPT, or any Hugging Face causal language model with random weights."""

from __future__ import annotations

import os
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fusekit.gpt import GPT, GPTConfig


class HuggingFaceLM(nn.Module):
    """A transformers causal LM called like GPT: forward(tokens, targets) -> (logits or None, loss or None).

    Targets are shifted already, so the loss is taken here and not by the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        logits = self.model(input_ids=tokens, use_cache=False).logits
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build_model(sizes: dict[str, Any], hf_config: str | None = None) -> nn.Module:
    """The model to train, with random weights drawn from torch's generator.

    Args:
        sizes: fields of GPTConfig. For a Hugging Face model they replace its defaults where `hf_config` is a
            model type, and only the vocabulary where it is a file or folder.
        hf_config: None for GPT, or a model type ("llama", "gpt2"), a folder with config.json, or such a file.

    Raises:
        ValueError: transformers is missing, does not know the type, or has no causal LM of that type.
    """
    if hf_config is None:
        return GPT(GPTConfig(**sizes))
    return HuggingFaceLM(_hugging_face(hf_config, GPTConfig(**sizes)))


def _hugging_face(source: str, sizes: GPTConfig) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError("--hf-config needs transformers: pip install 'fusekit-compiler[models]'") from None
    if os.path.exists(source):
        config = _read(AutoConfig, source)
        config.vocab_size = sizes.vocab
    else:
        config = _of_type(AutoConfig, source, sizes)
    if (getattr(config, "pad_token_id", None) or 0) >= sizes.vocab:
        config.pad_token_id = None
    try:
        return AutoModelForCausalLM.from_config(config)
    except ValueError:
        raise ValueError(f"transformers has no causal language model of type {config.model_type!r}") from None


def _read(auto_config: Any, source: str) -> Any:
    try:
        return auto_config.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source} holds no Hugging Face configuration: {reason}") from None


def _of_type(auto_config: Any, model_type: str, sizes: GPTConfig) -> Any:
    try:
        config = auto_config.for_model(model_type)
    except ValueError:
        raise ValueError(
            f"{model_type!r} is neither a file nor a model type that transformers knows; types are named "
            f"like gpt2, llama, qwen3"
        ) from None
    wanted = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "head_dim": sizes.width // sizes.heads,
        "intermediate_size": 4 * sizes.width,
        "max_position_embeddings": sizes.context,
        "bos_token_id": None,  # the defaults point past a small vocabulary
        "eos_token_id": None,
    }
    present = {name: value for name, value in wanted.items() if hasattr(config, name)}
    return auto_config.for_model(model_type, **present)
