"""A captured graph, before any rewrite, is the model: every bit of gradients, buffers and random numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fusekit
from fusekit.passes import _compat
from fusekit.passes.canonicalise import bodies
from fusekit.session import session

Batch = Callable[[int], dict[str, Any]]


@pytest.fixture(autouse=True)
def _check_invariants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEKIT_VERIFY", "1")


class Block(nn.Module):
    """Pre-norm attention and MLP as nanoGPT writes them, with dropout."""

    def __init__(self, width: int = 16, heads: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        parts = self.qkv(self.norm1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=True)
        x = x + F.dropout(self.proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(32, 16), Block(), nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.block(self.embed(tokens))).flatten(0, 1), labels.flatten())


class Convolutional(nn.Module):
    """BatchNorm's buffers, in-place activations, and a buffer of the model's own."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.head(F.relu_(self.norm(self.conv(x))).mean((2, 3)))


class Checkpointed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.second, self.options = Block(), Block(), options

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, **self.options)
        return checkpoint(self.second, x, **self.options)


class Doubling(torch.autograd.Function):
    """Its backward is not its derivative, so that a lost backward shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output * 7


class OwnBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(Doubling.apply(self.linear(x)))


class Modes(nn.Module):
    """Grad mode and autocast switched inside; einsum, whose casts are not on its own arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.a(x).mean()
        with torch.autocast("cpu", torch.bfloat16):
            y = self.b(self.a(x)) + torch.einsum("bti,oi->bto", x, self.b.weight)
            with torch.autocast("cpu", enabled=False):
                z = self.b(y.float())
            y = F.layer_norm(y + self.a(z), (16,))
        return y.float() * scale + x


def _recompute_nothing_but_matmuls() -> Any:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        return op is torch.ops.aten.mm.default

    return create_selective_checkpoint_contexts(policy)


def _rows(step: int) -> dict[str, Any]:
    return {"x": torch.randn(2, 5, 16, requires_grad=True)}


def _tokens(step: int) -> dict[str, Any]:
    return {"tokens": torch.randint(32, (2, 6)), "labels": torch.randint(32, (2, 6))}


HAND_WRITTEN: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
    "block": (Block, _rows),
    "tied weights": (Tied, _tokens),
    "batch norm": (Convolutional, lambda step: {"x": torch.randn(3, 3, 6, 6)}),
    "checkpoint": (lambda: Checkpointed(use_reentrant=False), _rows),
    "reentrant checkpoint": (lambda: Checkpointed(use_reentrant=True), _rows),
    "selective checkpoint": (
        lambda: Checkpointed(use_reentrant=False, context_fn=_recompute_nothing_but_matmuls),
        _rows,
    ),
    "autograd.Function": (OwnBackward, _rows),
    "modes": (Modes, _rows),
}


def _pieces(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _loss(output: Any) -> Tensor:
    loss = getattr(output, "loss", None)
    return torch.stack([p.float().square().mean() for p in _pieces(output)]).sum() if loss is None else loss


def assert_twins(
    model: nn.Module, batch: Batch, around: Any = contextlib.nullcontext, steps: int = 3
) -> None:
    """Optimizer steps of the captured model and of its eager copy agree in every bit."""
    eager, captured = copy.deepcopy(model), fusekit.optimize(model, fuse="none", remainder="eager")
    models = (eager, captured)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in models]
    for step in range(steps):
        torch.manual_seed(step)
        inputs = batch(step)
        seen = []
        for m, optimizer in zip(models, optimizers, strict=True):
            own = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in inputs.items()}
            torch.manual_seed(100 + step)
            with around():
                output = m(**own)
                loss = _loss(output)
            loss.backward()
            grads = [v.grad for v in own.values()] + [p.grad for p in m.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            seen.append([*_pieces(output), *grads, *m.parameters(), *m.buffers(), torch.get_rng_state()])
        for want, got in zip(*seen, strict=True):
            assert (want is None) == (got is None)
            assert want is None or (want.dtype == got.dtype and torch.equal(want, got)), f"step {step}"
    assert session(captured).failures == []
    assert session(captured).graph_breaks == []
    assert session(captured).regions


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_captured_is_bit_equal_to_eager(name: str) -> None:
    torch.manual_seed(0)
    make, batch = HAND_WRITTEN[name]
    assert_twins(make(), batch)


@pytest.mark.parametrize("name", ["block", "tied weights", "checkpoint", "autograd.Function", "modes"])
def test_ambient_autocast_becomes_nodes_bit_equal_to_eager(name: str) -> None:
    torch.manual_seed(0)
    make, batch = HAND_WRITTEN[name]
    assert_twins(make(), batch, around=lambda: torch.autocast("cpu", torch.bfloat16), steps=2)


def _transformers() -> dict[str, Callable[[Any], tuple[nn.Module, Batch]]]:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}

    def words(step: int) -> dict[str, Any]:
        tokens = torch.randint(2, 64, (2, 7))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}

    def gpt2(t: Any) -> Any:
        return t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)
        ), words

    def llama(t: Any) -> Any:
        return t.LlamaForCausalLM(t.LlamaConfig(vocab_size=64, num_key_value_heads=1, **small)), words

    def bert(t: Any) -> Any:
        return t.BertForMaskedLM(t.BertConfig(vocab_size=64, max_position_embeddings=16, **small)), words

    def vit(t: Any) -> Any:
        config = t.ViTConfig(image_size=8, patch_size=4, num_labels=3, **small)
        config.problem_type = (
            "single_label_classification"  # else the first call sets it, and changes the guards
        )
        model = t.ViTForImageClassification(config)
        return model, lambda step: {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])}

    def t5(t: Any) -> Any:
        config = t.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
        config.decoder_start_token_id = 0
        return t.T5ForConditionalGeneration(config), words

    return {"gpt2": gpt2, "llama": llama, "bert": bert, "vit": vit, "t5": t5}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit", "t5"])
def test_hugging_face_model_is_one_graph_bit_equal_to_eager(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, batch = _transformers()[name](transformers)
    assert_twins(model.train(), batch, steps=2)
    assert len(session(model).regions) == 1


def test_every_node_knows_its_value_and_parameters_are_inputs() -> None:
    model = fusekit.optimize(Checkpointed(use_reentrant=False), fuse="none", remainder="eager")
    model(torch.randn(2, 5, 16))
    graph = session(model).regions[0].region.module
    for body in bodies(graph):
        for node in body.graph.nodes:
            opaque = node.op == "get_attr" and isinstance(getattr(body, node.target), nn.Module)
            assert "val" in node.meta or opaque or node.op == "output", node
    parameters = [n for n in graph.graph.find_nodes(op="placeholder") if n.meta["parameter"]]
    assert len(parameters) == len(list(model.parameters()))
    assert all("_parameters" in n.meta["source"] and n.meta["requires_grad"] for n in parameters)
    assert len(bodies(graph)) == 3


def test_casts_of_autocast_are_visible_in_the_graph() -> None:
    model = fusekit.optimize(Block(dropout=0.0), fuse="none", remainder="eager")
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 5, 16))
    graph = session(model).regions[0].region.module.graph
    linear = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert len(linear) == 4
    for node in linear:
        assert {argument.meta["val"].dtype for argument in node.args} == {torch.bfloat16}
    assert not graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast)


def test_inductor_runs_the_remainder_and_agrees() -> None:
    torch.manual_seed(0)
    eager = OwnBackward()
    model = fusekit.optimize(copy.deepcopy(eager), fuse="none", remainder="inductor")
    x = torch.randn(2, 5, 16)
    for m in (eager, model):
        m(x).square().sum().backward()
    assert session(model).regions[0].region.notes == []
    for want, got in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_code_that_inductor_kept_of_other_signatures_is_not_used(
    monkeypatch: pytest.MonkeyPatch, fresh_inductor_cache: None
) -> None:
    x, kept = torch.randn(2, 5, 16), []
    for signatures in ("old", "old", "new"):
        monkeypatch.setattr("fusekit.passes._compat._signatures", lambda word=signatures: word)
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        fusekit.optimize(OwnBackward(), fuse="none", remainder="inductor")(x).sum().backward()
        found = counters["inductor"]
        kept.append((found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]))
    assert kept == [(0, 2), (2, 0), (0, 2)]  # forward and backward


@pytest.fixture
def fresh_inductor_cache() -> Iterator[None]:
    with fresh_cache():
        yield


def test_a_rebuilt_region_is_what_dynamo_calls_next() -> None:
    model = fusekit.optimize(Block(dropout=0.0), fuse="none", remainder="eager")
    x = torch.randn(2, 5, 16)
    want = model(x)
    (captured,) = session(model).regions
    before = captured.region
    captured.rebuild(frozenset({"attention_0"}))
    assert captured.region is not before and captured.disabled_sites == {"attention_0"}
    ran: list[bool] = []
    rebuilt = captured._run

    def run(*args: Any) -> Any:
        ran.append(True)
        return rebuilt(*args)

    captured._run = run
    assert torch.equal(model(x), want) and ran


def test_recorder_sees_real_values_and_their_gradients() -> None:
    model = fusekit.optimize(Block(dropout=0.0), fuse="none", remainder="eager")
    x = torch.randn(2, 5, 16)
    want = model(x)
    (captured,) = session(model).regions
    seen: dict[str, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.target is torch.ops.aten.gelu.default:
                result.retain_grad()
                seen["gelu"] = result
            return result

    captured.recorder = Recorder
    output = model(x)
    captured.recorder = None
    output.sum().backward()
    assert torch.equal(output, want)
    assert seen["gelu"].grad is not None and seen["gelu"].shape == (2, 5, 64)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_optimised_model(reentrant):
    """Tracing on the first call saves tensors that are no part of the checkpointed forward pass."""
    from torch.utils.checkpoint import checkpoint

    model = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 64), torch.nn.GELU())
    eager = copy.deepcopy(model)
    fusekit.optimize(model)
    for _ in range(2):
        x = torch.randn(16, 32, requires_grad=True)
        grads = []
        for called in (model, eager):
            x.grad = None
            called.zero_grad()
            checkpoint(called, x, use_reentrant=reentrant).square().sum().backward()
            grads.append([x.grad, *(p.grad for p in called.parameters())])
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert fusekit.explain(model).graphs == (2 if reentrant else 1)  # without gradients first


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_start_up_test_passes_where_no_gradients_are_asked_for(mode: Any) -> None:
    """It takes a gradient itself; failing, it would leave the whole model eager."""
    with mode():
        assert _compat.self_test() is None
