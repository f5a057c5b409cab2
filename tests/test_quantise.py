"""One quantisation for each tensor and layout, and the same bits as with one for each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusekit
from fusekit.kernels import linear_fp8_cpu
from fusekit.kernels.fp8_operand import fp8_operand
from fusekit.kernels.linear_fp8_cpu import GRADIENT, WEIGHT, X
from fusekit.kernels.recipe import PRESETS
from fusekit.passes import pipeline
from fusekit.session import session

X_LETTERS = {X: "x", WEIGHT: "weight", GRADIENT: "gradient"}


pytestmark = pytest.mark.usefixtures("checked")


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often something was quantised."""
    counts = dict.fromkeys(X_LETTERS.values(), 0)
    real = linear_fp8_cpu.through_fp8

    def counting(x: Tensor, recipe: Any, which: int, *rest: Any) -> Tensor:
        counts[X_LETTERS[which]] += 1
        return real(x, recipe, which, *rest)

    monkeypatch.setattr(linear_fp8_cpu, "through_fp8", counting)
    return counts


def reset(counts: dict[str, int]) -> None:
    counts.update(dict.fromkeys(counts, 0))


def each_layer_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = [(name, run) for name, run in pipeline.PIPELINE if name != "quantise"]
    monkeypatch.setattr(pipeline, "PIPELINE", passes)


SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip


def language_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, vocab_size=64, **SIZES[kind])
    config.update({"use_cache": False})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def tokens() -> Tensor:
    return torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))


def backward(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    return loss


# A block of Llama has four inputs of seven layers, one of GPT-2 four of four.
@pytest.mark.parametrize(("kind", "layers"), [("llama", 7), ("gpt2", 4)])
@pytest.mark.parametrize("precision", ["fp8-tensorwise", "fp8-delayed"])
def test_quantisations_of_a_step(kind: str, layers: int, precision: str, count: dict[str, int]) -> None:
    model = fusekit.optimize(language_model(kind), precision=precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        for micro_batch in range(2):
            reset(count)
            backward(model, tokens())
            again = step > 0 and micro_batch > 0  # of the first window nothing is known yet
            expected = {"x": 2 * 4, "weight": 0 if again else 2 * layers, "gradient": 2 * layers}
            assert count == expected, (step, micro_batch)
        optimizer.step()
        optimizer.zero_grad()


def test_rows_are_quantised_once_a_layout(count: dict[str, int]) -> None:
    model = fusekit.optimize(language_model("llama"), precision="fp8-rowwise")
    backward(model, tokens())
    assert count == {"x": 2 * 4 * 2, "weight": 2 * 7 * 2, "gradient": 2 * 7 * 2}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("precision", PRESETS)
def test_the_bits_are_those_of_each_layer_for_itself(
    kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for alone in (False, True):
        torch._dynamo.reset()
        if alone:
            each_layer_for_itself(monkeypatch)
        model = fusekit.optimize(language_model(kind), precision=precision)
        loss = backward(model, tokens())
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Readers(nn.Module):
    def __init__(self, forward: Callable[[Readers, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, torch.tanh(x))


def operands(model: nn.Module) -> int:
    graph = session(model).regions[0].region.module.graph
    return len(graph.find_nodes(op="call_function", target=fp8_operand))


def _plain(m: Readers, x: Tensor) -> Tensor:
    return m.out(torch.tanh(m.q(x)) * torch.tanh(m.k(x)))


def _written(m: Readers, x: Tensor) -> Tensor:
    q = torch.tanh(m.q(x))
    x.mul_(2)
    return m.out(q * torch.tanh(m.k(x)))


def _without_gradient(m: Readers, x: Tensor) -> Tensor:
    with torch.no_grad():
        q = torch.tanh(m.q(x))
    return m.out(q * torch.tanh(m.k(x)))


@pytest.mark.parametrize(("forward", "shared"), [(_plain, 1), (_written, 0), (_without_gradient, 0)])
def test_what_lies_between_the_readers(
    forward: Callable, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write to x or another grad mode keeps them apart."""
    results = []
    for alone in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        if alone:
            each_layer_for_itself(monkeypatch)
        model = fusekit.optimize(Readers(forward), precision="fp8-rowwise")
        x = torch.randn(6, 32)
        model(x).square().sum().backward()
        assert operands(model) == (0 if alone else shared)
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) >= 4 and all(map(torch.equal, *results))


def test_frozen_readers_and_inference() -> None:
    """The layout of a gradient that nobody asks for may be missing, and the one that is asked for is made."""
    model = Readers(_plain)
    model.q.weight.requires_grad_(False)
    fusekit.optimize(model, precision="fp8-rowwise")
    x = torch.randn(6, 32)
    with torch.no_grad():
        expected = model(x)
    y = model(x)
    y.sum().backward()
    assert torch.equal(y, expected) and model.q.weight.grad is None and model.k.weight.grad.any()


def test_a_checkpoints_second_pass_quantises_no_weight(count: dict[str, int]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Readers(_plain), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(checkpoint(self.inner, x, use_reentrant=False)))

    model = fusekit.optimize(Block(), precision="fp8-tensorwise")
    loss = model(torch.randn(6, 32, requires_grad=True)).sum()
    assert count == {"x": 2, "weight": 3, "gradient": 0}
    loss.backward()
    assert count == {"x": 4, "weight": 3, "gradient": 3}  # q and k share x in both passes


@pytest.mark.parametrize("precision", ["fp8-tensorwise", "fp8-rowwise"])
@pytest.mark.parametrize("change", ["data", "copy", "load", "average", "parameter"])
def test_changed_weights_are_seen(precision: str, change: str) -> None:
    """However a weight is written to, within a window and between two."""
    model = fusekit.optimize(Readers(_plain), precision=precision)
    plain = Readers(_plain)
    x, optimizer = torch.randn(6, 32), torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        for _ in range(2):
            model(x).sum().backward()
        if step == 2:
            average = {name: 0.5 * t for name, t in model.state_dict().items()}
            if change == "data":
                model.q.weight.data.add_(0.25)
            elif change == "copy":
                with torch.no_grad():
                    model.q.weight.copy_(average["q.weight"])
            elif change == "parameter":
                model.q.weight = nn.Parameter(average["q.weight"])
            else:
                model.load_state_dict(average)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model(x), fusekit.optimize(plain, precision=precision)(x)), step
        if step != 2:
            optimizer.step()
            optimizer.zero_grad()


def test_given_operands_are_what_is_multiplied() -> None:
    """Not silently ignored: operands of other values change the result."""
    x, weight = torch.randn(8, 32).bfloat16(), torch.randn(16, 32)
    token = PRESETS["fp8-tensorwise"].token()
    operand = fp8_operand(2 * x, token, X, x.dtype, True, True, None, None)
    y = torch.ops.fusekit.linear_fp8(x, weight, None, "none", token, None, None, operand)
    assert torch.equal(y, torch.ops.fusekit.linear_fp8(2 * x, weight, None, "none", token))
    assert F.cosine_similarity(y.float().flatten(), (x.float() @ weight.t()).flatten(), dim=0) > 0.99


@pytest.mark.parametrize("precision", ["fp8-delayed", "fp8-rowwise"])
def test_sites_with_shared_operands_certify(precision: str) -> None:
    """Before and after steps: the operand's own scale counts, which is the first reader's."""
    model, x = fusekit.optimize(language_model("llama"), precision=precision), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        certificate = fusekit.verify(model, input_ids=x, labels=x)
        sites = [site for site in certificate.sites if site.op == "linear_fp8"]
        assert len(sites) == 14 and all(s.ok and not s.reverted for s in sites), str(certificate)
        for _ in range(2):
            backward(model, x)
            optimizer.step()
            optimizer.zero_grad()
