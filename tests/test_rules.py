"""Rules on the spellings they are for: how many sites, the same results and gradients, the ops before and after.

Hugging Face models come from tiny configurations with random weights.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusekit.kernels import OPS
from fusekit.passes import _compat
from fusekit.passes.canonicalise import bodies, canonicalise, copy_graph
from fusekit.passes.config import Config
from fusekit.passes.fuse import fuse
from fusekit.passes.invariants import Snapshot
from fusekit.passes.normalise import normalise
from fusekit.passes.region import Region, Settings


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield


def capture(model: Any, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> tuple[Any, list[Region]]:
    """Run a model once with its graph captured, normalised and fused; the result and the regions."""
    regions = []
    config = kwargs.pop("config", Config())
    settings = kwargs.pop("settings", Settings())

    def backend(module: Any, example_inputs: Any) -> Any:
        region = Region(
            module=copy_graph(canonicalise(module, example_inputs)), settings=settings, config=config
        )
        before = Snapshot(region)
        normalise(region)
        before.check(region, after="normalise")
        fuse(region)
        before.check(region, after="fuse")
        regions.append(region)
        return region.module.forward

    with _compat.dynamo_settings():
        result = torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return result, regions


def sites(regions: list[Region]) -> Counter[str]:
    return Counter(f.op for r in regions for f in r.fusions)


def reasons(regions: list[Region]) -> str:
    return "\n".join(f"{r.op}: {r.reason}" for region in regions for r in region.refusals)


def calls(regions: list[Region], name: str) -> int:
    """How many calls of an ATen op are left."""
    nodes = (n for r in regions for body in bodies(r.module) for n in body.graph.nodes)
    return sum(str(n.target).removeprefix("aten.").split(".")[0] == name for n in nodes)


def _tensor(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return (
        result[0] if isinstance(result, tuple) else next(v for v in result.values() if isinstance(v, Tensor))
    )


def check(model: nn.Module, *args: Any, tolerance: float = 1e-5, **kwargs: Any) -> list[Region]:
    """Capture a copy of the model, compare its result and every gradient with eager's."""
    model.zero_grad()
    twin = copy.deepcopy(model)
    expected = _tensor(model(*args, **_without_options(kwargs)))
    result, regions = capture(twin, *args, **kwargs)
    result = _tensor(result)
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(expected)
    expected.backward(direction)
    result.backward(direction)
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(
                b.grad, a.grad, rtol=20 * tolerance, atol=float(largest) * tolerance, msg=name
            )
    for region in regions:
        for fusion in region.fusions:
            assert fusion.eager is not None and fusion.flops > 0
    return regions


def _without_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in ("config", "settings", "dynamic")}


class Act(nn.Module):
    """act(linear(x)), with a residual sum where asked."""

    def __init__(self, act: Callable[[Tensor], Tensor], bias: bool = True, residual: bool = False) -> None:
        super().__init__()
        self.linear, self.act, self.residual = nn.Linear(8, 8, bias=bias), act, residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.linear(x))
        return x + y if self.residual else y


ACTS = {
    "gelu": [nn.GELU(), lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5))],
    "gelu_tanh": [
        nn.GELU("tanh"),
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    ],
    "relu": [nn.ReLU(), nn.ReLU(inplace=True)],
    "silu": [nn.SiLU(), nn.SiLU(inplace=True), lambda x: x * torch.sigmoid(x)],
    "quick_gelu": [lambda x: x * torch.sigmoid(1.702 * x)],
    "tanh": [nn.Tanh()],
    "sigmoid": [nn.Sigmoid()],
    "relu_squared": [lambda x: F.relu(x).square(), lambda x: F.relu(x) ** 2],
}
CASES = [(name, i) for name, functions in ACTS.items() for i in range(len(functions))]


@pytest.mark.parametrize("name, number", CASES)
def test_every_activation_after_a_linear(name: str, number: int) -> None:
    act = ACTS[name][number]
    for bias, residual in ((True, False), (False, True)):
        regions = check(Act(act, bias, residual), torch.randn(2, 3, 8))
        assert sites(regions) == {"linear_act": 1}
        (node,) = (n for n in regions[0].module.graph.nodes if "fusion" in n.meta)
        assert node.args[4] == name
        assert [n for n in regions[0].module.graph.nodes if n.op == "call_function"] == [node]


class Functional(nn.Module):
    """Parameters, and a plain function of them and the input."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.parameters_ = nn.ParameterList([nn.Parameter(torch.randn(s) * 0.5) for s in shapes])

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parameters_)


LINEARS = {
    "x @ w + b": lambda x, w, b: F.gelu(x @ w + b),
    "b + matmul(x, w)": lambda x, w, b: F.gelu(b + torch.matmul(x, w)),
    "x @ w": lambda x, w, b: F.gelu(x @ w),
    "Conv1D": lambda x, w, b: F.gelu(torch.addmm(b, x.view(-1, 8), w).view(2, 3, 16)),
    "addmm": lambda x, w, b: F.gelu(torch.addmm(b, x[0], w)),
    "x @ w.T": lambda x, w, b: F.gelu(x @ w.t().contiguous().t() + b),
}


@pytest.mark.parametrize("spelling", LINEARS)
def test_every_spelling_of_a_linear(spelling: str) -> None:
    regions = check(Functional(LINEARS[spelling], (8, 16), (16,)), torch.randn(2, 3, 8))
    assert sites(regions) == {"linear_act": 1}
    assert not any(calls(regions, name) for name in ("matmul", "addmm", "gelu", "add"))


def _rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


NORMS: dict[str, Callable[..., Tensor]] = {
    "F.rms_norm": lambda x, w: F.rms_norm(x, (8,), w, 1e-6),
    "F.rms_norm, no epsilon": lambda x, w: F.rms_norm(x, (8,), w),
    "Llama": lambda x, w: w * _rms(x.to(torch.float32)).to(x.dtype),
    "T5": lambda x, w: (
        w * (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)).to(w.dtype)
    ),
    "Gemma": lambda x, w: (_rms(x.float()) * (1.0 + w.float())).type_as(x),
    "OLMo2": lambda x, w: (w * _rms(x.float())).to(x.dtype),
    "square and divide": lambda x, w: w * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)),
    "torch.square": lambda x, w: torch.rsqrt(torch.square(x).mean(-1, keepdim=True) + 1e-5) * x * w,
}


@pytest.mark.parametrize("spelling", NORMS)
def test_every_spelling_of_rms_norm(spelling: str) -> None:
    norm = NORMS[spelling]
    alone = check(Functional(norm, (8,)), torch.randn(2, 3, 8))
    summed = check(Functional(lambda x, w: norm(x + x.sin(), w), (8,)), torch.randn(2, 3, 8))
    assert sites(alone) == sites(summed) == {"add_rms_norm": 1}
    assert calls(summed, "add") == calls(alone, "mean") == 0


@pytest.mark.parametrize("spelling", ["Llama", "T5", "Gemma", "OLMo2"])
def test_casts_of_low_precision_norms_are_part_of_the_match(spelling: str) -> None:
    model = Functional(NORMS[spelling], (8,)).to(torch.bfloat16)
    regions = check(model, torch.randn(2, 3, 8, dtype=torch.bfloat16), tolerance=2e-2)
    assert sites(regions) == {"add_rms_norm": 1}
    assert calls(regions, "to") == 0


def test_layer_norm_of_a_sum_that_is_read_again() -> None:
    def block(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = x + x.cos()
        return F.layer_norm(h, (8,), w, b) * h

    regions = check(Functional(block, (8,), (8,)), torch.randn(2, 3, 8))
    assert sites(regions) == {"add_layer_norm": 1}
    assert calls(regions, "layer_norm") == calls(regions, "add") == 0


def test_a_norm_without_weight_and_bias() -> None:
    class Bare(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x * self.parameters_[0], (8,))

    assert sites(check(Bare(lambda: None, (8,)), torch.randn(2, 8))) == {"add_layer_norm": 1}


REFUSALS: dict[str, tuple[Callable[..., Any], str]] = {
    "intermediate read elsewhere": (
        lambda x, w, b: (lambda y: F.gelu(y) * y.sum())(F.linear(x, w, b)),
        "also read by",
    ),
    "a cast in between": (
        lambda x, w, b: F.gelu(F.linear(x, w, b).half().float()),
        "",
    ),
    "another GELU constant": (
        lambda x, w, b: (lambda y: 0.5 * y * (1 + torch.tanh(0.7978845608 * (y + 0.05 * y**3))))(
            F.linear(x, w, b)
        ),
        "0.05 where 0.044715",
    ),
    "an in-place write in between": (
        lambda x, w, b: (lambda y: (x.mul_(2.0), F.gelu(y))[1])(F.linear(x.clone(), w, b)),
        "boundary",
    ),
    "grad mode switched in between": (
        lambda x, w, b: _gelu_without_grad(F.linear(x, w, b)) + w.sum(),
        "boundary",
    ),
    "a residual that broadcasts": (
        lambda x, w, b: F.gelu(F.linear(x[:, :1], w, b)) + x,
        "",
    ),
    "layer norm over two dims": (
        lambda x, w, b: F.layer_norm(x * w.sum(), (3, 8)),
        "2 where 1",
    ),
    "RMS over another dim": (
        lambda x, w, b: b * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)),
        "-2",
    ),
    "a weight of the whole shape": (
        lambda x, w, b: F.rms_norm(x, (8,)) * x,
        "",
    ),
}


def _gelu_without_grad(y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.gelu(y)


@pytest.mark.parametrize("case", REFUSALS)
def test_what_must_not_fuse_is_left_and_named(case: str) -> None:
    function, reason = REFUSALS[case]
    x = torch.randn(2, 3, 8)
    expected = Functional(function, (8, 8), (8,))
    twin = copy.deepcopy(expected)
    result, regions = capture(twin, x.clone())
    torch.testing.assert_close(result, expected(x.clone()))
    if reason:
        assert reason in reasons(regions), reasons(regions)
        assert not sites(regions)
    else:
        assert sum(sites(regions).values()) <= 1


HF: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "GPT2": ("GPT2LMHeadModel", {}, {"add_layer_norm": 5, "linear_act": 2}),
    "Llama": ("LlamaForCausalLM", {}, {"add_rms_norm": 5, "linear_act": 2}),
    "Bert": ("BertForMaskedLM", {}, {"add_layer_norm": 6, "linear_act": 3}),
    "T5": ("T5ForConditionalGeneration", {}, {"add_rms_norm": 12, "linear_act": 4}),
    "Qwen3": ("Qwen3ForCausalLM", {}, {"add_rms_norm": 9, "linear_act": 2}),
    "Gemma2": ("Gemma2ForCausalLM", {"attn_implementation": "eager"}, {"add_rms_norm": 9, "linear_act": 2}),
    "CLIPText": ("CLIPTextModel", {}, {"add_layer_norm": 5, "linear_act": 2}),
    "ViT": ("ViTModel", {}, {"add_layer_norm": 5, "linear_act": 3}),
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "resid_pdrop": 0, "embd_pdrop": 0,
             "attn_pdrop": 0, "bos_token_id": 1, "eos_token_id": 2},
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0},
    "ViT": {**SMALL, "image_size": 16, "patch_size": 8},
    "Bert": {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "CLIPText": {**SMALL, "bos_token_id": 1, "eos_token_id": 2},
}  # fmt: skip


def hugging_face(name: str, **extra: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    shape = CONFIGS.get(name, {**SMALL, "num_key_value_heads": 2, "head_dim": 8})
    vocabulary = {} if name == "ViT" else {"vocab_size": 96}
    config = getattr(transformers, f"{name}Config")(**shape, **vocabulary, **HF[name][1], **extra)
    config.use_cache = False
    model = getattr(transformers, HF[name][0])(config)
    if name == "ViT":
        return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
    inputs = {"input_ids": torch.randint(3, 96, (2, 12))}
    return model, inputs | ({"decoder_input_ids": torch.randint(3, 96, (2, 7))} if name == "T5" else {})


@pytest.mark.parametrize("name", HF)
def test_hugging_face_models(name: str) -> None:
    model, inputs = hugging_face(name)
    found = sites(check(model, **inputs, tolerance=2e-5))
    for op, count in HF[name][2].items():
        assert found[op] == count, found


def test_varying_sizes_match_alike() -> None:
    regions = check(Act(nn.GELU(), residual=True), torch.randn(2, 3, 8), dynamic=True)
    assert sites(regions) == {"linear_act": 1}
    assert any(isinstance(s, str) for f in regions[0].fusions for shape in f.shapes for s in shape)


def test_switches() -> None:
    model, x = nn.Sequential(Act(nn.GELU()), Act(nn.ReLU()), nn.LayerNorm(8)), torch.randn(2, 8)
    assert sites(check(model, x)) == {"linear_act": 2, "add_layer_norm": 1}
    assert sites(check(model, x, settings=Settings(fuse=frozenset({"linear_act"})))) == {"linear_act": 2}
    assert sites(check(model, x, config=Config(disable=frozenset({"linear_act"})))) == {"add_layer_norm": 1}
    assert (
        sites(check(model, x, config=Config(disable=frozenset({"linear, torch.nn.GELU"}))))["linear_act"] == 1
    )
    assert sum(sites(check(model, x, config=Config(fuel=1))).values()) == 1


def test_a_disabled_site_stays_and_the_others_keep_their_names() -> None:
    model, x = nn.Sequential(Act(nn.GELU()), Act(nn.ReLU()), Act(nn.GELU())), torch.randn(2, 8)
    named = {f.site: f.rule for f in check(model, x)[0].fusions}
    graph = _canonical(model, x)
    for site in named:
        region = Region(
            module=copy_graph(graph), settings=Settings(), config=Config(), disabled_sites=frozenset({site})
        )
        normalise(region)
        fuse(region)
        assert {f.site: f.rule for f in region.fusions} == {s: r for s, r in named.items() if s != site}


def _canonical(model: nn.Module, x: Tensor) -> Any:
    graphs = []

    def backend(module: Any, example_inputs: Any) -> Any:
        graphs.append(canonicalise(module, example_inputs))
        return graphs[0].forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x)
    return graphs[0]


def test_strict_names_what_stays() -> None:
    model = Functional(lambda x, w, b: F.layer_norm(x * w.sum(), (3, 8)), (8, 8), (8,))
    with pytest.raises(Exception, match="strict: left unfused"):
        capture(model, torch.randn(2, 3, 8), settings=Settings(strict=True))


def test_the_replaced_nodes_compute_the_same_alone() -> None:
    model = Functional(lambda x, w, b: F.layer_norm(x + F.gelu(F.linear(x, w, b)), (8,)), (8, 8), (8,))
    x = torch.randn(2, 8)
    _, (region,) = capture(model, x)
    for node in region.module.graph.nodes:
        if "fusion" not in node.meta:
            continue
        fusion = node.meta["fusion"]
        values = {n: torch.randn(n.meta["val"].shape) for n in node.meta["fusion_inputs"]}
        tensors = [values[n] for n in node.meta["fusion_inputs"]]
        assert fusion.inputs == (None,) * len(tensors) and fusion.location
        arguments = [values[a] if a in values else a for a in node.args]
        torch.testing.assert_close(OPS[fusion.op].fused(*arguments), fusion.eager(*tensors))
