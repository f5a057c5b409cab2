"""Which layers a recipe casts, which stay and why, and that the model around them trains as before."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fp8_checks import Blocks
from torch import Tensor, nn

import fusekit
from fusekit.gpt import GPT, GPTConfig
from fusekit.kernels.recipe import PRESETS, Recipe
from fusekit.passes.canonicalise import bodies
from fusekit.session import session

BF16 = torch.bfloat16


pytestmark = pytest.mark.usefixtures("checked")


def gpt(**sizes: Any) -> GPT:
    return GPT(GPTConfig(**({"vocab": 64, "context": 16, "layers": 2, "heads": 2, "width": 32} | sizes)))


def tokens() -> Tensor:
    return torch.randint(64, (2, 16))


def run(model: nn.Module, *args: Any, precision: Any = "fp8", **settings: Any) -> Any:
    fusekit.optimize(model, precision=precision, **settings)
    return model(*args)


def layers(model: nn.Module) -> list[Any]:
    """The FP8 nodes of every captured graph."""
    found = [b for captured in session(model).regions for b in bodies(captured.region.module)]
    target = torch.ops.fusekit.linear_fp8.default
    return [n for body in found for n in body.graph.find_nodes(op="call_function", target=target)]


def kept(model: nn.Module) -> list[str]:
    return [r.reason for r in fusekit.explain(model).refused if r.op == "linear_fp8"]


def test_a_gpts_blocks_are_cast_and_its_head_is_not() -> None:
    model = gpt()
    x = tokens()
    run(model, x, x)
    report = fusekit.explain(model)
    assert len(layers(model)) == 8 and len(kept(model)) == 1
    assert "an output layer" in kept(model)[0]
    assert [f.op for f in report.fused].count("linear_cross_entropy") == 1
    x, weight, bias = (n.meta["val"].dtype for n in layers(model)[0].args[:3])
    assert (x, weight, bias) == (BF16, torch.float32, BF16)  # the master weight is what is cast
    assert {n.args[3] for n in layers(model)} == {"none", "gelu_tanh"}
    assert "Emulated" in str(report) and {f.implementation for f in report.fused if f.op == "linear_fp8"} == {
        "emulated"
    }


def test_a_sequential_is_the_op_called_by_hand() -> None:
    """Outputs and gradients bit for bit: the right layer reads the right weight."""
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 32))
    by_hand, x = copy.deepcopy(model), torch.randn(6, 32)
    recipe = replace(PRESETS["fp8-rowwise"], head=True)  # how one in bfloat16 is computed is the processor's
    y = run(model, x, precision=recipe)
    y.square().sum().backward()
    h = x.to(BF16)
    for i, act in ((0, "gelu"), (2, "relu"), (4, "none")):
        weight, bias = by_hand[i].weight, by_hand[i].bias.to(BF16)
        h = torch.ops.fusekit.linear_fp8(h, weight, bias, act, recipe.token())
    z = h.float()
    z.square().sum().backward()
    assert torch.equal(y, z) and len(layers(model)) == 3
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("kind", "layers_of_a_block", "sizes"),
    [
        ("gpt2", 4, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}),
        ("llama", 7, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "num_key_value_heads": 2, "use_cache": True}),
        ("bert", 6, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 2}),
    ],
)  # fmt: skip
def test_transformers_layers_are_found(kind: str, layers_of_a_block: int, sizes: dict[str, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, vocab_size=64, **({"use_cache": False} | sizes))
    head = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
    model = head.from_config(config, attn_implementation="sdpa").eval()
    x = tokens()
    fusekit.optimize(model, precision="fp8")
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    extra = 1 if kind == "bert" else 0  # the transform in front of the head
    assert len(layers(model)) == 2 * layers_of_a_block + extra, kept(model)
    assert len(kept(model)) == 1 and "an output layer" in kept(model)[0]
    expected = head.from_config(config, attn_implementation="sdpa").eval()
    expected.load_state_dict(model.state_dict())
    assert torch.allclose(loss, expected(input_ids=x, labels=x).loss, rtol=2e-2)


class Router(nn.Module):
    """Two experts of which the larger logit takes part, and a way out that is no output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(32, 16), nn.Linear(32, 16)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.softmax(self.gate(x), -1).topk(1)
        both = torch.stack([expert(x) for expert in self.experts], -2)
        return self.out(both.take_along_dim(chosen[..., None] % 2, -2).squeeze(-2) * weights)


def test_a_router_stays() -> None:
    model = Router()
    run(model, torch.randn(5, 32))
    assert len(layers(model)) == 2
    assert sorted(reason.split(":")[1].strip() for reason in kept(model)) == ["a router", "an output layer"]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        h = torch.relu(self.body(x))
        return F.cross_entropy(self.policy(h), targets) + (self.value(h) - x[:, :16]).square().mean()


def test_every_head_of_a_sum_of_losses_stays_and_batches_may_vary() -> None:
    model = TwoHeads()
    fusekit.optimize(model, precision="fp8")
    for rows in (5, 6, 7):
        loss = model(torch.randn(rows, 32), torch.randint(16, (rows,)))
        loss.backward()
        assert loss.isfinite()
    graphs = fusekit.explain(model).graphs
    assert graphs == 2  # the second is for every size
    assert len(layers(model)) == graphs and len(kept(model)) == 2 * graphs


class Results(nn.Module):
    """Logits beside features and another head's result; `by_loss`: its loss beside them."""

    def __init__(self, by_loss: bool) -> None:
        super().__init__()
        self.by_loss, self.body = by_loss, nn.Linear(32, 32)
        self.logits, self.value = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.relu(self.body(x))
        logits, value = self.logits(h), self.value(h)
        return (logits.logsumexp(-1).mean() if self.by_loss else logits), value.tanh(), h


@pytest.mark.parametrize("by_loss", [False, True])
def test_what_is_returned_beside_a_heads_result_makes_it_no_inner_layer(by_loss: bool) -> None:
    model = Results(by_loss)
    sum(result.sum() for result in run(model, torch.randn(5, 32))).backward()
    assert [n.meta["val"].shape[-1] for n in layers(model)] == [32]  # the body
    assert len(kept(model)) == 2 and all("an output layer" in reason for reason in kept(model))


def test_sizes_that_fp8_cannot_take_stay_with_the_reason_and_fuse_in_bf16() -> None:
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 16))
    y = run(model, torch.randn(6, 24), strict=True)
    assert layers(model) == [] and y.isfinite().all()
    assert sum("16 does not divide" in reason for reason in kept(model)) == 2
    assert "mlp" in {f.op for f in fusekit.explain(model).fused} or len(fusekit.explain(model).fused) == 2


def test_head_keep_and_edge_blocks() -> None:
    x = tokens()
    model = gpt(layers=3)
    run(model, x, x, precision=Recipe(head=True))
    assert len(layers(model)) == 13 and kept(model) == []
    run(model, x, x, precision=Recipe(edge_blocks=1))
    assert len(layers(model)) == 4
    assert sum("keeps blocks.0" in reason for reason in kept(model)) == 4
    run(model, x, x, precision=Recipe(keep=("blocks.*.attention", "blocks.1.expand")))
    assert len(layers(model)) == 5
    with pytest.raises(ValueError, match=r"names no module of this GPT.*blocks"):
        fusekit.optimize(model, precision=Recipe(keep=("layers.0",)))
    with pytest.raises(ValueError, match="no list of blocks"):
        fusekit.optimize(nn.Linear(16, 16), precision=Recipe(edge_blocks=1))
    assert Recipe(edge_blocks=2, keep=("a",)).token() == Recipe().token()


def test_a_product_of_activations_is_no_layer() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q(x), self.k(x)
            return self.out(torch.tanh(q @ k.t()) @ x)

    model = Scores()
    run(model, torch.randn(48, 32))
    assert len(layers(model)) == 2


def test_a_block_without_autocast_stays() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            with torch.autocast("cpu", enabled=False):
                x = torch.relu(self.b(x))
            return self.c(x)

    model = Guarded()
    run(model, torch.randn(4, 16))
    assert len(layers(model)) == 1 and any("autocast(enabled=False)" in reason for reason in kept(model))


def test_fuse_none_still_casts_and_the_switch_still_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens()
    model = gpt()
    run(model, x, x, fuse="none")
    assert {f.op for f in fusekit.explain(model).fused} == {"linear_fp8"}
    monkeypatch.setenv("FUSEKIT_DISABLE", "linear_fp8")
    run(model, x, x)
    assert layers(model) == [] and "mlp" in {f.op for f in fusekit.explain(model).fused}


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_training_learns_and_the_state_dict_stays(remainder: str) -> None:
    model, x = gpt(layers=1), tokens()
    before = {name: t.dtype for name, t in model.state_dict().items()}
    fusekit.optimize(model, precision="fp8", remainder=remainder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(x, x)[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert {name: t.dtype for name, t in model.state_dict().items()} == before
    assert len(layers(model)) == 4 and not [n for n in fusekit.explain(model).notes if "Inductor failed" in n]
    fusekit.restore(model)
    assert model._compiled_call_impl is None and model(x, x)[1].isfinite()


def test_accumulation_adds_up_and_sees_updated_weights() -> None:
    model, parts = gpt(layers=1), [tokens() for _ in range(2)]
    fusekit.optimize(model, precision="fp8")
    singles = []
    for x in parts:
        model.zero_grad()
        model(x, x)[1].backward()
        singles.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for x in parts:
        model(x, x)[1].backward()
    for p, a, b in zip(model.parameters(), *singles, strict=True):
        assert torch.equal(p.grad, a + b)
    before = model(*parts[:1] * 2)[1]
    with torch.no_grad():
        model.blocks[0].expand.weight.mul_(2)
    assert not torch.equal(model(*parts[:1] * 2)[1], before)


def test_activation_checkpoints_give_the_same_bits() -> None:
    """The last layer of a checkpoint's body is no output layer either."""
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        model = Blocks(on)
        run(model, torch.randn(6, 32)).square().sum().backward()
        assert len(layers(model)) == 4
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_verify_certifies_every_fp8_site() -> None:
    model, x = gpt(layers=1), tokens()
    fusekit.optimize(model, precision=PRESETS["fp8-block"])
    certificate = fusekit.verify(model, x, x)
    assert certificate.ok and certificate.model
    sites = [site for site in certificate.sites if site.op == "linear_fp8"]
    assert len(sites) == 4 and not any(site.reverted for site in sites)


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("fp9", "did you mean 'fp8'"),
        ("fp8-rowise", "did you mean 'fp8-rowwise'"),
    ],
)
def test_precisions_that_do_not_exist_are_refused(precision: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fusekit.optimize(nn.Linear(16, 16), precision=precision)


def test_low_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="keeps float32 Parameters"):
        fusekit.optimize(nn.Linear(16, 16).bfloat16(), precision="fp8")
