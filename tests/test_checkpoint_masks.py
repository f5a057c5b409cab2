"""Attention in checkpointed blocks: masks and ALiBi that are made outside are read as anywhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from rule_checks import capture, check, reasons, sites
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusekit
from fusekit.passes import price
from fusekit.passes.canonicalise import bodies, call_checkpoint

INF = math.inf
B, H, T, D = 2, 4, 9, 8
IDS = torch.randint(3, 50, (B, T), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1] * T, [1] * 6 + [0] * 3])
TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}


def attentions(regions: list[Any]) -> list[dict[str, Any]]:
    names = [a.name for a in torch.ops.fusekit.attention.default._schema.arguments]
    nodes = [n for r in regions for body in bodies(r.module) for n in body.graph.nodes]
    taken = [n for n in nodes if n.target is torch.ops.fusekit.attention.default]
    return [dict(zip(names, n.args, strict=True)) for n in taken]


def passed(regions: list[Any]) -> list[torch.fx.Node]:
    """What checkpoints take from outside."""
    nodes = [n for r in regions for body in bodies(r.module) for n in body.graph.nodes]
    inputs = [a for n in nodes if n.target is call_checkpoint for a in n.args[1:]]
    return [a for a in inputs if isinstance(a.meta["val"], Tensor)]


def checkpointed(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    if name == "Bloom":
        sizes: dict[str, Any] = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
    elif name == "Mpt":
        sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 12, "expansion_ratio": 2}
    else:
        sizes = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes, **TOKENS, **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


# name: (model, its settings, what is passed beside the tokens, what the op takes, what it takes no more)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], set[str], set[str]]] = {
    "Bloom": ("Bloom", {}, {}, {"causal", "slopes"}, {"mask"}),
    "Bloom, padded": ("Bloom", {}, {"attention_mask": RIGHT}, {"slopes", "places", "mask"}, set()),
    "MPT": ("Mpt", {}, {}, {"causal", "slopes"}, {"mask"}),
    "Llama, written out": ("Llama", {"attn_implementation": "eager"}, {}, {"causal"}, {"mask"}),
    "Llama, padded": ("Llama", {}, {"attention_mask": RIGHT}, {"causal", "mask"}, set()),
    "Llama, packed": (
        "Llama", {}, {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]] * B)},
        {"causal", "documents"}, {"mask"},
    ),
    "Mistral": ("Mistral", {"sliding_window": 4}, {}, {"causal", "window"}, {"mask"}),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_models(name: str, dynamic: bool | None) -> None:
    kind, settings, given, taken, gone = MODELS[name]
    regions = check(checkpointed(kind, **settings), IDS, **given, dynamic=dynamic, tolerance=1e-4)
    found = attentions(regions)
    assert len(found) == 2, reasons(regions)
    for arguments in found:
        have = {name for name, value in arguments.items() if value is not None and value is not False}
        assert taken <= have and not gone & have
    shapes = [tuple(map(str, a.meta["val"].shape)) for a in passed(regions) if "mask" not in taken]
    assert not [
        shape for shape in shapes if len(shape) == 4 and shape[-1] == shape[-2] != "1"
    ]  # none of all scores


def test_padding_of_a_checkpointed_block_is_a_row_of_keys() -> None:
    regions = check(checkpointed("Llama"), IDS, attention_mask=RIGHT, tolerance=1e-4)
    assert {tuple(a["mask"].meta["val"].shape) for a in attentions(regions)} == {(B, 1, 1, T)}


class Blocks(nn.Module):
    """Attention in a checkpoint; `outside` makes of the input what the checkpoint takes beside q, k and v."""

    def __init__(self, outside: Callable[..., Any], attend: Callable[..., Tensor], after: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outside, self.attend, self.after = outside, attend, after
        self.qkv = nn.ParameterList([nn.Parameter(torch.randn(B, H, T, D) * 0.5) for _ in range(3)])
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def forward(self, x: Tensor) -> Tensor:
        made = self.outside(self, x)
        if self.after is not None:
            self.after(made, x)
        return checkpoint(self.attend, *self.qkv, made, use_reentrant=False)


def _causal() -> Tensor:
    return torch.arange(T)[None, :] <= torch.arange(T)[:, None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def _in_another(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return checkpoint(_sdpa, q * 2.0, k, v, mask, use_reentrant=False)


def test_a_checkpoint_in_a_checkpoint() -> None:
    regions = check(Blocks(lambda self, x: _causal() & (x[:, None, None] > 0), _in_another), RIGHT)
    (found,) = attentions(regions)
    assert found["causal"] and tuple(found["mask"].meta["val"].shape) == (B, 1, 1, T)


def _no_grad_bias(self: Blocks, x: Tensor) -> Tensor:
    with torch.no_grad():
        return self.slopes[:, None, None] * torch.arange(T)


# What must not be computed again inside, or would be another number or have another gradient.
KEPT: dict[str, tuple[Callable[..., Any], Any]] = {
    "written later": (lambda self, x: x[:, None, None].bool(), lambda made, x: made.fill_(True)),
    "of an input written later": (lambda self, x: (x > 0)[:, None, None], lambda made, x: x.fill_(1)),
    "a trained bias": (lambda self, x: self.slopes[:, None, None] * torch.arange(T), None),
    "of parameters, without a gradient": (_no_grad_bias, None),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_outside(name: str) -> None:
    outside, after = KEPT[name]

    class Copying(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())

    regions = check(Copying(outside, _sdpa, after), RIGHT)
    assert sites(regions) == {"attention": 1}, reasons(regions)
    (found,) = attentions(regions)
    assert found["mask"].op == "placeholder" and found["slopes"] is None


def test_random_masks_are_drawn_once() -> None:
    model = Blocks(lambda self, x: torch.rand(B, 1, T, T) < 0.7 + 0 * x[0, 0], _sdpa)
    torch.manual_seed(1)
    expected = model(RIGHT)
    torch.manual_seed(1)
    result, _ = capture(model, RIGHT)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", ["Bloom, padded", "Mistral"])
def test_a_site_that_is_put_back_computes_what_it_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`price` undoes a site whose mask was read: its mask is made inside from then on."""
    monkeypatch.setattr(price, "LEAST_GAIN", 1e9)
    kind, settings, given, *_ = MODELS[name]
    expected = checkpointed(kind, **settings)(IDS, labels=IDS, **given).loss
    model = fusekit.optimize(checkpointed(kind, **settings))
    result = model(IDS, labels=IDS, **given).loss
    torch.testing.assert_close(result, expected)
    result.backward()
    report = fusekit.explain(model)
    assert not report.fused and not report.notes


@pytest.mark.parametrize("name", MODELS)
def test_verify_compares_with_the_masks_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price, "LEAST_GAIN", 0.0)
    kind, settings, given, *_ = MODELS[name]
    model = fusekit.optimize(checkpointed(kind, **settings))
    certificate = fusekit.verify(model, IDS, labels=IDS, **given)
    sites = [site for site in certificate.sites if site.op == "attention"]
    assert len(sites) == 2 and all(site.ok for site in sites), str(certificate)


def test_a_users_function_in_a_checkpoint() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3.0 * ctx.saved_tensors[0] * grad  # not the gradient of x * x: it must be this one

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return Square.apply(F.scaled_dot_product_attention(q, k, v, mask))

    def within(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return checkpoint(attend, q, k, v, mask, use_reentrant=False)

    for body in (attend, within):
        regions = check(Blocks(lambda self, x: _causal(), body), RIGHT)
        (found,) = attentions(regions)
        assert found["causal"] and found["mask"] is None
