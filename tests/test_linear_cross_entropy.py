"""linear_cross_entropy on the CPU: every option against eager, chunks, and the spellings it is found in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_checks import calls, check, reasons, sites
from torch import Tensor, nn

import fusekit
from fusekit.kernels import linear_cpu, linear_cross_entropy_cpu
from fusekit.kernels.linear_cross_entropy import OP
from fusekit.kernels.op import DTYPES
from fusekit.kernels.parity import results_and_grads, widen

V, K = 40, 12


def leaves(M: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    return [(torch.randn(s) * scale).to(dtype).requires_grad_() for s in ((M, K), (V, K), (V,))]


def eager(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *settings: Any) -> Tensor:
    names = ("ignore_index", "reduction", "label_smoothing")
    logits = F.linear(x, weight, bias).flatten(0, -2)
    return F.cross_entropy(logits.float(), targets, **dict(zip(names, settings, strict=False)))


@pytest.mark.parametrize("bytes_", [1, 8 << 20], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize("settings", [(-100, "mean", 0.0), (3, "sum", 0.0), (-1, "mean", 0.2)], ids=str)
def test_equals_eager(settings: tuple[Any, ...], bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy_cpu, "CHUNK_BYTES", bytes_)  # 64 rows, the last chunk ragged
    monkeypatch.setattr(linear_cross_entropy_cpu, "PASS_BYTES", bytes_)
    args, targets = leaves(150), torch.randint(V, (150,))
    targets[::4] = settings[0]
    fused, plain = (results_and_grads(f, (*args, targets, *settings)) for f in (OP.fused, eager))
    assert fused.keys() == plain.keys() == {"output", "grad_0", "grad_1", "grad_2"}
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], msg=name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_row_counts(reduction: str) -> None:
    args, targets = leaves(5), torch.full((5,), -100)
    fused, plain = (results_and_grads(f, (*args, targets, -100, reduction)) for f in (OP.fused, eager))
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], equal_nan=True, msg=name)


def test_large_and_infinite_logits() -> None:
    x, weight, _ = leaves(6, scale=300.0)
    bias = torch.zeros(V)
    bias[5] = -torch.inf  # a class that is masked out
    targets = torch.tensor([0, 1, 2, 3, 4, 6])
    fused, plain = (results_and_grads(f, (x, weight, bias, targets)) for f in (OP.fused, eager))
    assert plain["output"].isfinite()
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], msg=name)


def test_a_target_that_is_no_class() -> None:
    args = leaves(3)
    with pytest.raises(IndexError, match="target 40 is none of the 40 classes"):
        OP.fused(*args, torch.tensor([1, 40, 2]))


@pytest.mark.parametrize("wanted", range(8))
def test_only_the_gradients_asked_for(wanted: int) -> None:
    args = [a.detach().requires_grad_(bool(wanted >> i & 1)) for i, a in enumerate(leaves(7))]
    inputs = (*args, torch.randint(V, (7,)))
    fused, plain = results_and_grads(OP.fused, inputs), results_and_grads(eager, inputs)
    assert fused.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name])


def test_backward_twice_and_accumulation() -> None:
    """The saved gradients are not what leaves: a second pass finds them as they were."""
    args, targets = leaves(9), torch.randint(V, (9,))
    loss = OP.fused(*args, targets)
    first = torch.autograd.grad(loss, args, retain_graph=True)
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    for a, grad in zip(args, first, strict=True):
        torch.testing.assert_close(a.grad, 3 * grad)


def test_logits_never_exist_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy_cpu, "CHUNK_BYTES", 1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(result):
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return result

    args, targets = [a.detach() for a in leaves(640)], torch.randint(V, (640,))
    grads = torch.empty(640, K), torch.empty(V, K), torch.empty(V)
    with Watch():
        linear_cross_entropy_cpu.forward(*args, targets, -100, 0.0, torch.zeros(640), *grads)
    assert 64 * V <= largest <= 640 * K < 640 * V


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_parameters_beside_a_narrow_input(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (linear_cpu, linear_cross_entropy_cpu):
        monkeypatch.setattr(module, "multiplies", lambda d: d == torch.float32)
    (x, *_), (_, weight, bias) = leaves(20, dtype), leaves(20)
    targets = torch.randint(V, (20,))
    fused = results_and_grads(OP.fused, (x, weight, bias, targets))
    plain = results_and_grads(eager, (x.detach().float().requires_grad_(), weight, bias, targets))
    assert fused["grad_0"].dtype == dtype and fused["grad_1"].dtype == torch.float32
    torch.testing.assert_close(fused["grad_0"], plain["grad_0"].to(dtype))
    for name in ("output", "grad_1", "grad_2"):  # nothing between them was rounded
        torch.testing.assert_close(fused[name], plain[name])


def test_a_processor_that_multiplies_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear_cpu, linear_cross_entropy_cpu):
        monkeypatch.setattr(module, "multiplies", lambda d: True)
    args, targets = leaves(70, torch.bfloat16), torch.randint(V, (70,))
    fused = results_and_grads(OP.fused, (*args, targets))
    plain = results_and_grads(eager, (*(a.detach().float().requires_grad_() for a in args), targets))
    for name in plain:
        error = (fused[name].float() - plain[name]).norm() / plain[name].norm()
        assert error < 2**-7, name


X, W, T = torch.randn(2, 3, K), torch.randn(V, K), torch.randint(V, (6,))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((X, W, None, T, -100, "none"), "reduction 'none' is neither 'mean' nor 'sum'"),
        ((X, W, None, T, -100, "mean", 1.5), "label_smoothing 1.5 is not between 0 and 1"),
        ((X, W.t(), None, T), "do not multiply"),
        ((X, W, None, T.view(2, 3)), "is not one class for each row"),
        ((X, W, None, T.int()), "targets are torch.int32; class indices are int64"),
        ((X, W, torch.randn(3), T), "bias \\(3,\\) is not \\(40,\\)"),
        ((X, W.bfloat16(), None, T), "cast one, or call under torch.autocast"),
    ],
)
def test_unsupported_arguments_are_refused_in_a_sentence(args: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: .*{sentence}"):
        OP.fused(*args)


class Head(nn.Module):
    """A head and a loss, as a function of the logits and the targets."""

    def __init__(self, loss: Callable[..., Any], bias: bool = False) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(K, V, bias=bias), loss
        self.register_buffer("class_weights", torch.rand(V))

    def forward(self, x: Tensor, targets: Tensor) -> Any:
        return self.loss(self, self.head(x), targets)


def _nanogpt(model: Head, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def _hugging_face(model: Head, logits: Tensor, labels: Tensor, items: Tensor | None = None) -> Tensor:
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    logits = logits.float().view(-1, V)
    loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="mean" if items is None else "sum")
    return loss if items is None else loss / items


SPELLINGS: dict[str, Callable[..., Any]] = {
    "nanoGPT": _nanogpt,
    "Hugging Face": _hugging_face,
    "Hugging Face, num_items_in_batch": lambda m, z, t: _hugging_face(m, z, t, torch.tensor(7)),
    "flat already": lambda m, z, t: F.cross_entropy(z.flatten(0, 1), t.flatten(), label_smoothing=0.1),
    "nn.CrossEntropyLoss": lambda m, z, t: nn.CrossEntropyLoss(reduction="sum")(
        z.reshape(-1, V), t.flatten()
    ),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_real_spellings_are_found(name: str, bias: bool) -> None:
    regions = check(Head(SPELLINGS[name], bias), torch.randn(2, 5, K), torch.randint(V, (2, 5)))
    assert sites(regions) == {"linear_cross_entropy": 1}, reasons(regions)
    assert not calls(regions, "linear") and not calls(regions, "cross_entropy_loss")


def _weighted(model: Head, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=model.class_weights)


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "logits returned": (
        lambda m, z, t: (F.cross_entropy(z.flatten(0, 1), t.flatten()), z),
        "the result of linear is also read by output; keep_logits=False promises",
    ),
    "logits read": (
        lambda m, z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()) + z.square().mean(),
        "the result of linear is also read by",
    ),
    "class weights": (_weighted, "cross_entropy has a weight for each class"),
    "no reduction": (
        lambda m, z, t: F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="none").mean(),
        "cross_entropy_loss has shape (10,)",
    ),
    "softcap": (
        lambda m, z, t: F.cross_entropy((30 * torch.tanh(z / 30)).flatten(0, 1), t.flatten()),
        "where linear is needed",
    ),
    "class probabilities": (
        lambda m, z, t: F.cross_entropy(z.flatten(0, 1), F.one_hot(t, V).float().flatten(0, 1)),
        "dimensions where (rows) is needed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_be_refused(name: str) -> None:
    loss, reason = REFUSED[name]
    regions = check(Head(loss), torch.randn(2, 5, K), torch.randint(V, (2, 5)))
    assert "linear_cross_entropy" not in sites(regions)
    assert calls(regions, "cross_entropy_loss") == 1
    if name != "softcap":  # one node of two: no near-match
        assert reason in reasons(regions)


def _both(model: Head, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logits.float(), _nanogpt(model, logits, targets)


def test_logits_nobody_reads_are_not_computed() -> None:
    model, x, targets = Head(_both), torch.randn(2, 5, K), torch.randint(V, (2, 5))
    _, expected = model(x, targets)
    (expected_grad,) = torch.autograd.grad(expected, [model.head.weight])
    fusekit.optimize(model, keep_logits=False, fuse="linear_cross_entropy")
    logits, loss = model(x, targets)
    assert [f.op for f in fusekit.explain(model).fused] == ["linear_cross_entropy"]
    (grad,) = torch.autograd.grad(loss, [model.head.weight])
    torch.testing.assert_close((loss, grad), (expected, expected_grad))
    for use in (
        lambda: logits.argmax(-1),
        lambda: F.softmax(logits, -1),
        lambda: logits[0],
        lambda: logits + 1,
    ):
        with pytest.raises(ValueError, match=r"these logits were not kept.*keep_logits=True"):
            use()
    assert "not kept" in repr(logits)
    certificate = fusekit.verify(model, x, targets)
    assert certificate.ok and len(certificate.sites) == 1, str(certificate)


def test_without_the_promise_or_without_a_loss_logits_are_kept() -> None:
    x, targets = torch.randn(2, 5, K), torch.randint(V, (2, 5))
    kept = fusekit.optimize(Head(_both))
    assert torch.equal(kept(x, targets)[0], kept.head(x)) and not fusekit.explain(kept).fused
    inference = fusekit.optimize(Head(lambda m, z, t: (z, t)), keep_logits=False)
    assert torch.equal(inference(x, targets)[0], inference.head(x))


def test_a_hugging_face_model_trains_without_its_logits() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(50, (2, 9))
    expected = model(tokens, labels=tokens, use_cache=False).loss
    fusekit.optimize(model, keep_logits=False, fuse="linear_cross_entropy")
    output = model(tokens, labels=tokens, use_cache=False)
    assert [f.op for f in fusekit.explain(model).fused] == ["linear_cross_entropy"], str(
        fusekit.explain(model)
    )
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    with pytest.raises(ValueError, match="not kept"):
        output.logits.argmax(-1)


@pytest.mark.parametrize("precision", ["keep", "bf16", "fp16"])
def test_verify_certifies_the_site(precision: str) -> None:
    torch.manual_seed(0)
    model = fusekit.optimize(Head(_nanogpt), precision=precision)
    x, targets = torch.randn(2, 40, K), torch.randint(V, (2, 40))
    certificate = fusekit.verify(model, x, targets)
    (site,) = (s for s in certificate.sites if s.op == "linear_cross_entropy")
    assert site.ok, str(certificate)


def test_gradients_of_a_head_that_knows_how_frequent_its_classes_are():
    """p sums up to what the targets are: a class's gradient is a small difference of large sums."""
    generator = torch.Generator().manual_seed(0)
    M, V, K = 1024, 64, 48
    frequencies = torch.linspace(1, 8, V).square()
    targets = torch.multinomial(frequencies, M, replacement=True, generator=generator)
    seen = torch.bincount(targets, minlength=V) / M
    direction = torch.ones(K)
    x = direction + 0.05 * torch.randn(M, K, generator=generator)
    weight = (seen + 1e-3).log()[:, None] * direction / K
    args = (x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), None, targets)
    truth = results_and_grads(OP.reference, widen(args))
    eager = results_and_grads(lambda x, w, b, t: F.cross_entropy(F.linear(x, w).float(), t), args)
    fused = results_and_grads(OP.fused, args)
    for name in ("grad_0", "grad_1"):
        ours, theirs = ((r[name].double() - truth[name]).norm() for r in (fused, eager))
        assert ours <= 1.1 * theirs, (name, (ours / theirs).item())
