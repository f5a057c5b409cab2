"""requires_grad_() of an intermediate, which adapters call on a frozen embedding's output, is captured."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapted import Adapted
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fusekit
from fusekit.passes.canonicalise import require_gradient
from fusekit.passes.leaves import find_leaves, split_leaves
from fusekit.session import session


class Small(nn.Module):
    def __init__(self, checkpointed: bool, frozen: bool) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(50, 32), nn.LayerNorm(32)
        self.fc, self.out = Adapted(nn.Linear(32, 64)), nn.Linear(64, 32)
        self.checkpointed = checkpointed
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not frozen and name in ("fc.down.weight", "fc.up.weight"))
        self.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))

    def block(self, h: Tensor) -> Tensor:
        return h + self.out(nn.functional.gelu(self.fc(self.norm(h))))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embedding(tokens)
        return h, checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)


TOKENS = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
@pytest.mark.parametrize("frozen", [False, True], ids=["adapters", "all frozen"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpoint"])
def test_gradients_and_leaves_are_eagers(checkpointed: bool, frozen: bool, remainder: str) -> None:
    torch.manual_seed(0)
    eager = Small(checkpointed, frozen)
    model = fusekit.optimize(copy.deepcopy(eager), precision="keep", remainder=remainder)
    found = []
    for each in (eager, model):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="fusekit")
            h, y = each(TOKENS)
        y.square().sum().backward()
        assert h.is_leaf and h.requires_grad
        found.append([y, h.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
        with torch.no_grad():
            h, y = each(TOKENS)
        assert h.requires_grad and not y.requires_grad
    assert len(found[0]) == (2 if frozen else 4)
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not session(model).failures and not session(model).regions[0].region.notes


@pytest.mark.parametrize("precision", ["keep", "bf16"])
def test_an_adapted_llama_with_checkpoints_is_one_graph(precision: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50, use_cache=False)
    eager = transformers.LlamaForCausalLM(config).requires_grad_(False).train()
    for layer in eager.model.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = Adapted(layer.mlp.gate_proj), Adapted(layer.mlp.up_proj)
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    eager.gradient_checkpointing_enable()  # calls requires_grad_() on what the embedding returns
    model = fusekit.optimize(copy.deepcopy(eager), precision=precision)
    gradients = []
    for each in (eager, model):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="fusekit")
            each(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad for p in each.parameters() if p.grad is not None])
    report = fusekit.explain(model)
    assert report.graphs == 1 and not session(model).failures
    assert [f.op for f in report.fused].count("add_rms_norm") == 5
    tolerance = 1e-5 if precision == "keep" else 5e-2
    for want, got in zip(*gradients, strict=True):
        assert (got - want).norm() <= tolerance * want.norm()


def test_what_may_not_run_first_is_not_split() -> None:
    def trace(function, *args):  # type: ignore[no-untyped-def]
        module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*args)
        (marked,) = [n for n in module.graph.nodes if "cos" in str(n.target)]
        with module.graph.inserting_after(marked):
            leaf = module.graph.call_function(require_gradient, (marked,))
        marked.replace_all_uses_with(leaf, lambda user: user is not leaf)
        leaf.meta = dict(marked.meta)
        module.recompile()
        return module

    x = torch.randn(4)
    kept = trace(lambda x: torch.nn.functional.dropout(x, 0.5, True).cos() * 2, x)
    assert split_leaves(kept) is None and len(find_leaves(kept)) == 1
    module = trace(lambda x: x.sin().cos() * x, x)
    first = split_leaves(module)
    assert first is not None and not find_leaves(module)
    assert len(module.graph.find_nodes(op="placeholder")) == 2
    torch.testing.assert_close(module(x, *first(x)), x.sin().cos() * x)


def test_two_calls_one_behind_the_other() -> None:
    """As of two embeddings; results keep their order, and what they were made of is not computed again."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.cos() * x.sin()

    x, y = torch.randn(4), torch.randn(4)
    module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(x, y)
    for node in [n for n in module.graph.nodes if n.op == "call_function" and len(n.all_input_nodes) == 1]:
        with module.graph.inserting_after(node):
            leaf = module.graph.call_function(require_gradient, (node,))
        node.replace_all_uses_with(leaf, lambda user, leaf=leaf: user is not leaf)
        leaf.meta = dict(node.meta)
    module.recompile()
    first = split_leaves(module)
    assert first is not None
    made = first(x, y)
    assert all(t.is_leaf and t.requires_grad for t in made)
    torch.testing.assert_close(module(x, y, *made), function(x, y))
    assert len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)) == 0
