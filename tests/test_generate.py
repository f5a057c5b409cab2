"""`model.generate` of an optimised Hugging Face model: the same greedy tokens as eager, whatever is fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusekit

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name, extra", [("Llama", {}), ("Mistral", {"sliding_window": 4})])
def test_greedy_tokens_are_those_of_eager(name: str, extra: dict[str, Any]) -> None:
    """A cache that grows, left padding, and a window that the tokens leave."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, **extra,
    )  # fmt: skip
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    tokens = torch.randint(3, 96, (2, 7))
    padding = torch.ones_like(tokens)
    padding[0, :3] = 0
    options = {"attention_mask": padding, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(tokens, **options)
    fusekit.optimize(model)
    assert torch.equal(model.generate(tokens, **options), expected)
    report = fusekit.explain(model)
    assert any(fusion.op == "attention" for fusion in report.fused) and not report.graph_breaks
