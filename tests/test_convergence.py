"""Convergence twins: 30 AdamW steps of real architectures, eager and optimised, against the same run in
float64.

Judged as design.md judges one op: the optimised run may be as far from float64 as eager's own run is (a
factor for the noise of two independent roundings), and no further. Comparing with eager alone would accept
any error that eager happens to share, and reject harmless ones where eager itself is far off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor, nn

import fusekit

transformers = pytest.importorskip("transformers")

STEPS = 30
# Two runs that round differently are two samples of the same noise: their distances to float64 differ by a
# factor.
NOISE = 3.0
FLOOR = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}

Loss = Callable[[nn.Module, int], Tensor]


def _text_batches(batch: int, length: int) -> Callable[[int], Tensor]:
    """Real English, as bytes: the documentation that ships with Python."""
    data = torch.tensor(list("".join(topics.values()).encode()[:200_000]), dtype=torch.long)

    def draw(step: int) -> Tensor:
        starts = torch.randint(len(data) - length, (batch,), generator=torch.Generator().manual_seed(step))
        return torch.stack([data[s : s + length] for s in starts])

    return draw


def _language_model(name: str) -> nn.Module:
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=256, n_embd=48, n_layer=2, n_head=4, n_positions=64, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    shape = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    if name == "llama":
        config = transformers.LlamaConfig(num_key_value_heads=2, use_cache=False, **shape)
        return transformers.LlamaForCausalLM(config)
    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape)
    return transformers.BertForMaskedLM(config)


def _tiny_gpt() -> tuple[nn.Module, Loss]:
    from fusekit.gpt import GPT, GPTConfig

    draw = _text_batches(4, 25)

    def loss(model: nn.Module, step: int) -> Tensor:
        tokens = draw(step)
        return model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1]

    return GPT(GPTConfig(vocab=256, context=24, layers=2, width=48, heads=4)), loss


def _hf_text(name: str) -> tuple[nn.Module, Loss]:
    draw = _text_batches(4, 24)

    def loss(model: nn.Module, step: int) -> Tensor:
        tokens = draw(step)
        return model(input_ids=tokens, labels=tokens).loss

    return _language_model(name), loss


def _vit() -> tuple[nn.Module, Loss]:
    config = transformers.ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=16,
        patch_size=4, num_labels=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    def loss(model: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 16, 16, generator=generator).to(next(model.parameters()).dtype)
        return model(pixel_values=images, labels=torch.randint(8, (8,), generator=generator)).loss

    return transformers.ViTForImageClassification(config), loss


TWINS = {
    "tiny-gpt": _tiny_gpt,
    "gpt2": lambda: _hf_text("gpt2"),
    "llama": lambda: _hf_text("llama"),
    "bert": lambda: _hf_text("bert"),
    "vit": _vit,
}


def _train(model: nn.Module, loss: Loss) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    losses = []
    for step in range(STEPS):
        value = loss(model, step)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def _distance(got: Tensor, truth: Tensor) -> float:
    return ((got.detach().double() - truth).norm() / truth.detach().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", TWINS)
def test_thirty_steps_stay_as_close_to_float64_as_eager_does(name: str) -> None:
    torch.manual_seed(0)
    eager, loss = TWINS[name]()
    truth, fused = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    fusekit.optimize(fused)

    true, plain, ours = _train(truth, loss), _train(eager, loss), _train(fused, loss)

    report = fusekit.explain(fused)
    ops = {f.op for f in report.fused}
    assert {"attention", "mlp"} <= ops | ({"mlp"} if "gated_mlp" in ops else set()), str(report)
    assert any(op.endswith("norm") for op in ops), str(report)
    floor = FLOOR[torch.float32]
    for step, (want, base, got) in enumerate(zip(true, plain, ours, strict=True)):
        allowed = NOISE * max(abs(base - want), 8 * floor * abs(want))
        assert abs(got - want) <= allowed, f"step {step}: {got} against {want}, eager {base}"
    for (key, want), base, got in zip(
        truth.named_parameters(), eager.parameters(), fused.parameters(), strict=True
    ):
        allowed = NOISE * max(_distance(base, want), 8 * floor)
        assert _distance(got, want) <= allowed, f"{key}: {_distance(got, want):.2e} against {allowed:.2e}"


@pytest.mark.parametrize("name", ["tiny-gpt", "llama"])
def test_bfloat16_training_follows_autocast(name: str) -> None:
    torch.manual_seed(0)
    eager, loss = TWINS[name]()
    truth, fused = copy.deepcopy(eager).double(), copy.deepcopy(eager)
    fusekit.optimize(fused, precision="bf16")

    def under_autocast(model: nn.Module, step: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, step)

    true, plain, ours = _train(truth, loss), _train(eager, under_autocast), _train(fused, loss)

    assert ours[-1] < ours[0] - 0.2, "the optimised model does not learn"
    mean_gap = sum(abs(a - b) for a, b in zip(ours, true, strict=True)) / STEPS
    eager_gap = sum(abs(a - b) for a, b in zip(plain, true, strict=True)) / STEPS
    assert mean_gap <= NOISE * max(eager_gap, FLOOR[torch.bfloat16]), (mean_gap, eager_gap)
    assert all(p.dtype == torch.float32 for p in fused.parameters())
