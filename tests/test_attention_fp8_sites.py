"""Which attentions a recipe casts to FP8, which stay and why, and that models around them train as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_fp8_checks import BLOCK, HEAD, gpt, tokens
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fusekit
from fusekit import Recipe
from fusekit.passes import cost
from fusekit.passes.canonicalise import bodies
from fusekit.session import session

BF16 = torch.bfloat16


pytestmark = pytest.mark.usefixtures("checked")


class Attend(nn.Module):
    """One projection and an attention of its parts, so that there is something to train."""

    def __init__(self, attend: Any, width: int = 96, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out, self.attend, self.heads = nn.Linear(32, width), nn.Linear(32, 16), attend, heads

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v, *rest).transpose(1, 2).reshape(B, T, -1))


def sites(model: nn.Module) -> list[Any]:
    """The nodes of attention_fp8 in every captured graph."""
    found = [b for captured in session(model).regions for b in bodies(captured.region.module)]
    target = torch.ops.fusekit.attention_fp8.default
    return [n for body in found for n in body.graph.find_nodes(op="call_function", target=target)]


def kept(model: nn.Module) -> list[str]:
    return [r.reason for r in fusekit.explain(model).refused if r.op == "attention_fp8"]


def run(attend: Any, *rest: Tensor, recipe: Recipe = HEAD, T: int = 48, **sizes: int) -> nn.Module:
    model = fusekit.optimize(Attend(attend, **sizes), precision=recipe)
    loss = model(torch.randn(2, T, 32), *rest)
    loss.square().mean().backward()
    return model


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[-2], device=q.device)
    distance = place[:, None] - place
    return F.scaled_dot_product_attention(q, k, v, (distance >= 0) & (distance < 10))


def packed(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    place = torch.arange(q.shape[-2], device=q.device)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, same & (place[:, None] >= place))


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k.transpose(-1, -2) / 8) * 2.0, -1) @ v


@pytest.mark.parametrize("recipe", [HEAD, BLOCK], ids=["head", "block"])
@pytest.mark.parametrize("attend", [causal, windowed, written], ids=["causal", "window", "written out"])
def test_forms_are_cast(attend: Any, recipe: Recipe) -> None:
    model = run(attend, recipe=recipe)
    (site,) = sites(model)
    assert site.args[-1] == recipe.attention and site.args[0].meta["val"].dtype == BF16
    assert kept(model) == [] and "1 attentions by" in str(fusekit.explain(model))
    (fusion,) = (f for f in fusekit.explain(model).fused if f.op == "attention_fp8")
    assert (fusion.implementation, fusion.dtype) == ("emulated", "bfloat16")


def test_documents_and_shared_heads_are_cast() -> None:
    model = run(packed, (torch.arange(48) // 20).expand(2, 48))
    (site,) = sites(model)
    assert site.args[3] is True and site.args[7] is not None

    class Grouped(Attend):
        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            B, T, _ = x.shape
            q, k, v = (t.view(B, T, -1, 16).transpose(1, 2) for t in self.qkv(x).split((64, 32, 32), -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.out(y[:, :2].transpose(1, 2).reshape(B, T, -1))

    model = fusekit.optimize(Grouped(None, width=128), precision=HEAD)
    model(torch.randn(2, 48, 32)).sum().backward()
    (site,) = sites(model)
    assert [site.args[i].meta["val"].shape[1] for i in range(3)] == [4, 2, 2]


def test_what_is_computed_is_the_op_called_by_hand() -> None:
    model = Attend(causal)
    by_hand, x = copy.deepcopy(model), torch.randn(2, 48, 32)
    fusekit.optimize(model, precision=Recipe(attention="block", keep=("qkv", "out")))
    y = model(x)
    y.square().sum().backward()
    by_hand.attend = lambda q, k, v: torch.ops.fusekit.attention_fp8(q, k, v, True, scaling="block")
    fusekit.optimize(by_hand, precision="bf16")  # so that layers are computed alike, whatever the CPU has
    z = by_hand(x)
    z.float().square().sum().backward()
    assert torch.equal(y, z.float())
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2, atol=2e-2 * theirs.grad.abs().max())


def test_nothing_is_cast_unless_it_is_asked_for() -> None:
    for precision in ("fp8", "fp8-block", Recipe()):
        model, x = gpt(layers=1), tokens()
        fusekit.optimize(model, precision=precision)
        model(x, x)
        assert sites(model) == [] and kept(model) == []
        assert "attention" in {f.op for f in fusekit.explain(model).fused}


@pytest.mark.parametrize(
    ("attend", "rest", "sizes", "words"),
    [
        (masked, (torch.rand(48, 48) < 0.7,), {}, "no form with a mask"),
        (capped, (), {}, "no form with capped scores"),
        (causal, (), {"heads": 4}, "heads of 8 and 8 features: FP8 needs multiples of 16"),
    ],
)
def test_other_forms_stay_and_say_why(attend: Any, rest: Any, sizes: Any, words: str) -> None:
    model = run(attend, *rest, **sizes)
    assert sites(model) == [] and len(kept(model)) == 1 and words in kept(model)[0]
    assert kept(model)[0].startswith("stays in 16 bits: ")
    assert "attention" in {f.op for f in fusekit.explain(model).fused}


def test_what_attention_knows_and_fp8_does_not_is_never_left_out() -> None:
    """A window beside global tokens, which became attention's own: the op would lose the global tokens."""

    def longformer(q: Tensor, k: Tensor, v: Tensor, important: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2])
        near = (i[:, None] - i[None, :]).abs() <= 5
        seen = near | important[:, None] | important[None, :]
        return F.scaled_dot_product_attention(q, k, v, seen)

    model = run(longformer, torch.zeros(48, dtype=torch.bool).index_fill(0, torch.tensor([0, 30]), True))
    assert sites(model) == [] and "no form with global tokens" in kept(model)[0]


def test_a_learned_bias_and_dropout_stay() -> None:
    bias = nn.Parameter(torch.randn(2, 48, 48))
    model = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias))
    assert sites(model) == [] and "no form with a mask" in kept(model)[0]
    assert bias.grad is not None
    torch._dynamo.reset()
    model = run(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True))
    assert sites(model) == []


def test_decoding_stays() -> None:
    def last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, -1:], k, v).expand_as(q)

    model = run(last)
    assert sites(model) == [] and "1 queries of 48 keys: decoding" in kept(model)[0]


def test_keep_edge_blocks_and_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens()
    model = gpt(layers=3)
    fusekit.optimize(model, precision=Recipe(attention="head", edge_blocks=1))
    model(x, x)
    assert len(sites(model)) == 1 and sum("keeps blocks." in reason for reason in kept(model)) == 2
    fusekit.optimize(model, precision=Recipe(attention="head", keep=("blocks.*.attention",)))
    model(x, x)
    assert sites(model) == [] and len(kept(model)) == 3
    monkeypatch.setenv("FUSEKIT_DISABLE", "attention_fp8")
    fusekit.optimize(model, precision=HEAD)
    model(x, x)
    assert sites(model) == [] and [f.op for f in fusekit.explain(model).fused].count("attention") == 3


def test_a_block_without_autocast_stays() -> None:
    def guarded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return causal(q, k, v)

    model = run(guarded)
    assert sites(model) == [] and "autocast(enabled=False)" in kept(model)[0]


def test_a_refusal_is_no_error_under_strict() -> None:
    model = fusekit.optimize(Attend(masked), precision=HEAD, strict=True)
    assert model(torch.randn(2, 48, 32), torch.rand(48, 48) < 0.7).isfinite().all()
    assert len(kept(model)) == 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_transformers_models_are_cast(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    if family == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    if family == "mistral":
        sizes |= {"sliding_window": 8, "head_dim": 16}
    config = transformers.AutoConfig.for_model(family, vocab_size=64, **sizes)
    config.update({"use_cache": False})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    fusekit.optimize(model, precision=HEAD)
    x = tokens()
    loss = model(input_ids=x, labels=x).loss
    loss.backward()
    assert loss.isfinite() and len(sites(model)) == 2, kept(model)
    if family == "mistral":
        assert {site.args[5] for site in sites(model)} == {8}


@pytest.mark.parametrize("recipe", [HEAD, BLOCK], ids=["head", "block"])
def test_a_gpt_learns_as_in_bf16(recipe: Recipe) -> None:
    """Thirty steps on one text; the linear layers stay, so that attention is all that differs."""
    text = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(1))
    base, losses = gpt(), {}
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    only = Recipe(attention=recipe.attention, keep=tuple(names))
    for name, precision in (("bf16", "bf16"), ("fp8", only)):
        torch._dynamo.reset()
        model = fusekit.optimize(copy.deepcopy(base), precision=precision)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses[name] = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = model(text[:, :-1], text[:, 1:])[1]
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        assert len(sites(model)) == (2 if name == "fp8" else 0)
    assert losses["fp8"][-1] < 0.6 * losses["fp8"][0] and losses["fp8"] != losses["bf16"]
    for ours, theirs in zip(losses["fp8"], losses["bf16"], strict=True):
        assert abs(ours - theirs) < 0.02 * theirs


def test_an_activation_checkpoint_gives_the_same_bits() -> None:
    class Two(nn.Module):
        def __init__(self, on: bool) -> None:
            super().__init__()
            self.on, self.attend, self.last = on, Attend(causal), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.attend, x, use_reentrant=False) if self.on else self.attend(x)
            return self.last(h)

    grads = []
    for on in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = fusekit.optimize(Two(on), precision=HEAD)
        model(torch.randn(2, 48, 32)).square().sum().backward()
        assert len(sites(model)) == 1
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("T", "training", "pays"),
    [(44000, True, False), (48000, True, True), (9000, False, False), (11000, False, True)],
)
def test_short_attention_does_not_pay_on_a_gpu(
    T: int, training: bool, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From where on it does, docs/precision.md says."""
    monkeypatch.undo()  # starts cost something here
    monkeypatch.setattr(cost, "GPU", next(gpu for gpu in cost.GPUS if gpu.name == "H100"))
    with FakeTensorMode():
        q, few = (torch.empty(1, 16, T, D, device="cuda", dtype=BF16) for D in (128, 64))
    flops = 2 * 16 * T * T * 128
    reason = cost.why_fp8_attention_does_not_pay(q, q, q, flops, "block", training, False)
    assert reason is None if pays else reason is not None and "as estimated" in reason
    assert cost.why_fp8_attention_does_not_pay(*[torch.empty(1)] * 3, 1, "head", training, True) is None
    packed = cost.why_fp8_attention_does_not_pay(q, q, q, flops, "block", training, True)
    assert packed is not None and "documents are compared" in packed
    narrow = cost.why_fp8_attention_does_not_pay(few, few, few, flops, "block", training, False)
    assert narrow is not None and "softmax of 64 features" in narrow


def test_a_recipe_names_what_there_is() -> None:
    with pytest.raises(ValueError, match="attention='tensor' is none of None, head, block"):
        Recipe(attention="tensor")
    assert Recipe(attention="head").token() == Recipe().token()


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_lengths_that_vary_make_one_graph_more(remainder: str) -> None:
    model = fusekit.optimize(Attend(causal), precision=BLOCK, remainder=remainder)
    for T in (40, 52, 150):
        loss = model(torch.randn(2, T, 32)).square().mean()
        loss.backward()
        assert loss.isfinite()
    report = fusekit.explain(model)
    assert report.graphs == 2 and len(sites(model)) == 2, str(report)
    assert not [note for note in report.notes if "Inductor failed" in note]
