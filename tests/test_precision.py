"""The precision pass: which dtype every value gets, and that outputs, mutations and foreign dtypes stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fusekit.kernels import linear_cpu
from fusekit.passes import lowering
from fusekit.passes.autocast import materialise_autocast
from fusekit.passes.canonicalise import bodies, canonicalise
from fusekit.passes.config import Config
from fusekit.passes.precision import place_casts
from fusekit.passes.propagate import dtype_of, tensors_of
from fusekit.passes.region import Region, Settings
from fusekit.passes.weights import WeightCache, cast_parameters

aten = torch.ops.aten
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests read the graph of a processor with 16-bit products, whichever runs them."""
    monkeypatch.setattr(lowering, "multiplies", lambda dtype: True)


class Lowered:
    """A module compiled with nothing but capture and the precision pass."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        self.regions: list[Region] = []
        self.cache = WeightCache()

        def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            region = Region(
                module=canonicalise(module, inputs), settings=Settings(precision=precision), config=Config()
            )
            materialise_autocast(region)
            place_casts(region)
            self.regions.append(region)
            return lambda *args: region.module(*cast_parameters(args, region.input_casts, self.cache))

        torch._dynamo.reset()
        self.run = torch.compile(model, backend=backend)

    def nodes(self) -> list[fx.Node]:
        return [n for region in self.regions for body in bodies(region.module) for n in body.graph.nodes]

    def dtypes(self, packet: Any) -> list[torch.dtype | None]:
        return [dtype_of(n) for n in self.nodes() if getattr(n.target, "overloadpacket", None) is packet]

    def casts(self) -> Counter[torch.dtype]:
        return Counter(n.args[1] for n in self.nodes() if n.target is aten.to.dtype)  # type: ignore[misc]


def lowered(model: nn.Module, *args: Tensor, precision: str = "bf16") -> tuple[Lowered, Any]:
    compiled = Lowered(model, precision)
    result = compiled.run(*args)
    _check_values(compiled)
    return compiled, result


def _check_values(compiled: Lowered) -> None:
    """Every meta["val"] has the dtype that really comes out, checkpoint bodies aside."""
    for region in compiled.regions:
        region.module.graph.lint()
        for node in region.module.graph.nodes:
            assert node.op == "output" or "val" in node.meta or node.op == "get_attr", node


class Fn(nn.Module):
    def __init__(self, fn: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.fn = fn
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, *args: Tensor) -> Any:
        return self.fn(self, *args)


def _gpt(checkpointed: bool = False) -> nn.Module:
    return _GPT(checkpointed)


class _Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, 4, -1).transpose(1, 2) for y in self.qkv(self.n1(x)).split(c, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class _GPT(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.blocks = nn.ModuleList(_Block(32) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight
        self.checkpointed = checkpointed

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.view(-1, 50), targets.view(-1))


@pytest.mark.parametrize("precision, dtype", [("bf16", BF16), ("fp16", torch.float16)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gpt_trains_as_in_float32(precision: str, dtype: torch.dtype, checkpointed: bool) -> None:
    torch.manual_seed(0)
    model, tokens, targets = _gpt(checkpointed), torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    logits, loss = model(tokens, targets)
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    compiled, (low_logits, low_loss) = lowered(model, tokens, targets, precision=precision)
    low_loss.backward()
    assert (low_logits.dtype, low_loss.dtype) == (F32, F32)
    assert torch.allclose(low_loss, loss, rtol=2e-3)
    assert (low_logits - logits).norm() / logits.norm() < 1e-2
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == F32
        assert (p.grad - expected[name]).norm() / expected[name].norm() < 3e-2, name
    assert set(compiled.dtypes(aten.linear)) == {dtype}
    assert compiled.dtypes(aten.scaled_dot_product_attention) == [dtype] * 2
    assert set(compiled.dtypes(aten.add)) == {F32, dtype}  # embeddings in float32, the residual stream low
    assert len(compiled.regions[0].input_casts) == 17  # 8 weights and biases a block, and the tied head


def test_keep_places_nothing() -> None:
    compiled, _ = lowered(_gpt(), torch.randint(50, (2, 16)), torch.randint(50, (2, 16)), precision="keep")
    assert compiled.casts() == Counter() and compiled.regions[0].input_casts == []


def test_logits_read_twice_are_cast_once() -> None:
    compiled, _ = lowered(_gpt(), torch.randint(50, (2, 16)), torch.randint(50, (2, 16)))
    up = [n for n in compiled.nodes() if n.target is aten.to.dtype and n.args[1] == F32]
    logits = [n for n in up if n.args[0].target is aten.linear.default]  # type: ignore[union-attr]
    assert len(logits) == 1 and {u.op for u in logits[0].users} == {"call_function", "output"}


def test_one_cast_for_many_readers() -> None:
    weights = {f"w{i}": nn.Parameter(torch.randn(8, 8)) for i in range(3)}
    model = Fn(lambda m, x: F.linear(x, m.w0) + F.linear(x, m.w1) + F.linear(x, m.w2), **weights)
    compiled, _ = lowered(model, torch.randn(4, 8))
    assert compiled.casts() == {BF16: 1, F32: 1}


def test_softmax_accumulates_in_float32_without_a_copy() -> None:
    model = Fn(lambda m, x: torch.softmax(F.linear(x, m.w), -1), w=nn.Parameter(torch.randn(8, 8)))
    compiled, result = lowered(model, torch.randn(4, 8))
    assert compiled.dtypes(aten.softmax) == [F32] and result.dtype == F32
    assert compiled.casts() == {BF16: 1}


@pytest.mark.parametrize("op", [torch.exp, torch.log1p, torch.cumsum, torch.pow, torch.logsumexp, torch.norm])
def test_unknown_ops_run_in_float32(op: Callable[..., Tensor]) -> None:
    arguments = {torch.cumsum: (0,), torch.pow: (2.0,), torch.logsumexp: (-1,)}.get(op, ())
    model = Fn(lambda m, x: op(F.linear(x, m.w), *arguments), w=nn.Parameter(torch.rand(8, 8)))
    _, result = lowered(model, torch.rand(4, 8))
    low = F.linear(*(t.to(BF16) for t in (torch.rand(4, 8), model.w))).float()
    assert result.dtype == op(low, *arguments).dtype == F32


def test_constants_follow_and_float32_results_promote() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, m.w)
        cosine = torch.cos(m.angle)  # made of a buffer alone: cast down
        statistic = torch.exp(y)  # made of an activation: promotes
        return y * cosine * m.scale, y + statistic

    weight, scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
    model = Fn(forward, w=weight, scale=scale, angle=torch.rand(8))
    compiled, _ = lowered(model, torch.randn(4, 8))
    assert compiled.dtypes(aten.mul) == [BF16, BF16] and compiled.dtypes(aten.add) == [F32]
    assert compiled.dtypes(aten.cos) == [F32]


def test_a_users_float_input_promotes() -> None:
    model = Fn(lambda m, x, y: (F.linear(x, m.w) - y) ** 2, w=nn.Parameter(torch.randn(8, 8)))
    compiled, _ = lowered(model, torch.randn(4, 8), torch.randn(4, 8))
    assert compiled.dtypes(aten.sub) == [F32]


def test_written_casts_keep_their_meaning() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, m.w)
        half = y.to(torch.float16)
        return half * 2, y.double() + 1

    compiled, (half, double) = lowered(Fn(forward, w=nn.Parameter(torch.randn(8, 8))), torch.randn(4, 8))
    assert (half.dtype, double.dtype) == (torch.float16, torch.float64)
    assert compiled.dtypes(aten.mul) == [torch.float16]


def test_float64_and_low_models_are_left_alone() -> None:
    for dtype in (torch.float64, BF16):
        model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)).to(dtype)
        x = torch.randn(4, 8, dtype=dtype)
        compiled, result = lowered(model, x, precision="fp16" if dtype == BF16 else "bf16")
        assert compiled.casts() == Counter() and torch.equal(result, model(x))


def test_masks_keep_their_fill_value() -> None:
    """finfo(float32).min rounds to -inf in bfloat16: a fully masked row would become NaN."""

    def forward(m: Any, x: Tensor, keep: Tensor) -> Tensor:
        scores = F.linear(x, m.w) * 0.125
        return torch.softmax(scores.masked_fill(~keep, torch.finfo(torch.float32).min), -1)

    keep = torch.ones(4, 8, dtype=torch.bool)
    keep[1] = False
    _, result = lowered(Fn(forward, w=nn.Parameter(torch.randn(8, 8))), torch.randn(4, 8), keep)
    assert torch.allclose(result[1], torch.full((8,), 1 / 8))

    def additive(m: Any, x: Tensor, keep: Tensor) -> Tensor:
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
        return torch.softmax(F.linear(x, m.w) + mask, -1)

    _, result = lowered(Fn(additive, w=nn.Parameter(torch.randn(8, 8))), torch.randn(4, 8), keep)
    assert torch.isfinite(result).all()


def test_a_cast_is_not_reused_after_a_write() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        first = F.linear(x, m.w)
        x.add_(1.0)
        return first + F.linear(x, m.w)

    model, x = Fn(forward, w=nn.Parameter(torch.randn(8, 8))), torch.randn(4, 8)
    expected = forward(model, x.clone())
    _, result = lowered(model, x.clone())
    assert torch.allclose(result, expected, atol=0.1)


def test_buffers_keep_dtype_and_are_updated() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    twin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    _, result = lowered(model, x)
    assert torch.allclose(result, twin(x), atol=0.1) and result.dtype == F32
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert mine.dtype == theirs.dtype and torch.allclose(mine, theirs, atol=1e-2)


def test_a_cast_made_without_gradients_is_not_shared() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.exp(F.linear(x, m.w))
        with torch.no_grad():
            gate = F.linear(h, m.v)
        return F.linear(h, m.v) * torch.sigmoid(gate)

    model = Fn(forward, w=nn.Parameter(torch.randn(8, 8) / 8), v=nn.Parameter(torch.randn(8, 8) / 8))
    _, result = lowered(model, torch.randn(4, 8))
    result.sum().backward()
    assert model.w.grad is not None and model.w.grad.abs().sum() > 0


def test_a_view_of_a_parameter_reads_the_cached_copy() -> None:
    weight, bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
    model = Fn(lambda m, x: torch.addmm(m.b, x, m.w.t()), w=weight, b=bias)
    compiled, _ = lowered(model, torch.randn(4, 8))
    assert len(compiled.regions[0].input_casts) == 2 and compiled.casts() == {BF16: 1, F32: 1}


def test_a_block_without_autocast_stays_in_float32() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.linear(x, m.w)
        with torch.autocast("cpu", enabled=False):
            return F.linear(y, m.v)

    model = Fn(forward, w=nn.Parameter(torch.randn(8, 8)), v=nn.Parameter(torch.randn(8, 8)))
    compiled, _ = lowered(model, torch.randn(4, 8))
    assert compiled.dtypes(aten.linear) == [BF16, F32]


@pytest.mark.parametrize("precision", ["keep", "bf16"])
def test_ambient_autocast_is_honoured_and_completed(precision: str) -> None:
    model, tokens, targets = _gpt(), torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(tokens, targets)
        compiled, (low_logits, low_loss) = lowered(model, tokens, targets, precision=precision)
    assert (low_logits.dtype, low_loss.dtype) == (logits.dtype, loss.dtype) == (BF16, F32)
    assert torch.allclose(low_loss, loss, rtol=2e-3)
    assert set(compiled.dtypes(aten.linear)) == {BF16}
    low_loss.backward()
    weights_cast_in_graph = [
        n for n in compiled.nodes() if n.target is aten.to.dtype and n.args[0].op == "placeholder"
    ]
    assert bool(weights_cast_in_graph) == (precision == "keep")


def test_without_matrix_instructions_products_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """No aten matmul on low tensors: ATen would run it in scalar code. Activations are low all the same."""
    monkeypatch.setattr(lowering, "multiplies", lambda dtype: dtype == F32)
    model, tokens, targets = _gpt(), torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    _, loss = model(tokens, targets)
    compiled, (_, low_loss) = lowered(model, tokens, targets)
    low_loss.backward()
    assert torch.allclose(low_loss, loss, rtol=2e-3)
    assert compiled.dtypes(aten.linear) == []
    assert compiled.dtypes(torch.ops.fusekit.linear_act) == [BF16] * 9
    assert compiled.dtypes(aten.scaled_dot_product_attention) == [F32, F32]
    assert compiled.dtypes(aten.gelu) == [BF16, BF16]
    assert compiled.regions[0].notes[0].startswith("this CPU has no bfloat16 matrix instructions")


@pytest.mark.parametrize("has_units", [False, True])
def test_widened_products_read_the_master_weights(has_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without 16-bit units no low copy of a linear's parameters exists; with them every one is cast."""
    for module in (lowering, linear_cpu):
        monkeypatch.setattr(module, "multiplies", lambda dtype: has_units or dtype == F32)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4, bias=False)), torch.randn(4, 8)
    compiled, result = lowered(model, x)
    assert len(compiled.regions[0].input_casts) == (3 if has_units else 0)
    if not has_units:
        weights = [n.args[1] for n in compiled.nodes() if n.target is torch.ops.fusekit.linear_act.default]
        assert [w.meta["val"].dtype for w in weights] == [F32, F32]
        grads = torch.autograd.grad(result.sum(), model.parameters())
        expected = torch.autograd.grad(model(x).sum(), model.parameters())
        assert all(torch.allclose(a, b, rtol=3e-2, atol=3e-2) for a, b in zip(grads, expected, strict=True))


def test_tf32_on_a_cpu_is_a_note() -> None:
    compiled, result = lowered(nn.Linear(8, 8), torch.randn(4, 8), precision="tf32")
    assert compiled.regions[0].notes == ["TF32 exists on GPUs only: float32 kept"]
    assert compiled.casts() == Counter() and result.dtype == F32


def test_tf32_on_a_gpu_switches_linears() -> None:
    """Read off the graph, with fake tensors on "cuda"."""
    graph, mode = fx.Graph(), FakeTensorMode()
    with mode:
        x, weight = torch.empty(4, 8, device="cuda"), torch.empty(16, 8, device="cuda")
    nodes = [graph.placeholder("x"), graph.placeholder("weight")]
    nodes.append(graph.call_function(aten.linear.default, tuple(nodes)))
    plain = (*nodes[:2], None, None, "gelu", False)
    nodes.append(graph.call_function(torch.ops.fusekit.linear_act.default, plain))
    graph.output(tuple(nodes[2:]))
    with mode:
        y = torch.empty(4, 16, device="cuda")
    for node, value in zip(nodes, (x, weight, y, y), strict=True):
        node.meta["val"] = value
    region = Region(module=fx.GraphModule({}, graph), settings=Settings(precision="tf32"), config=Config())
    place_casts(region)
    calls = region.module.graph.find_nodes(op="call_function", target=torch.ops.fusekit.linear_act.default)
    assert [c.kwargs.get("tf32", c.args[-1]) for c in calls] == [True, True] and region.notes == []


def test_values_have_the_dtypes_that_come_out() -> None:
    """meta["val"] against the tensors of a real run, node by node."""
    tokens, targets = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    compiled = Lowered(_gpt(), "bf16")
    seen: list[tuple[Any, Any]] = []

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function":
                expected = [(t.dtype, t.shape) for t in tensors_of(n.meta["val"])]
                seen.append((expected, [(t.dtype, t.shape) for t in tensors_of(value)]))
            return value

    compiled.run(tokens, targets)
    region = compiled.regions[0]
    inputs = [_like(n.meta["val"]) for n in region.module.graph.find_nodes(op="placeholder")]
    Recorder(region.module).run(*inputs)
    assert len(seen) > 30 and all(expected == found for expected, found in seen)


def _like(value: Tensor) -> Tensor:
    return torch.zeros(value.shape, dtype=value.dtype)
