"""Who computes attention's backward pass on a GPU where equal bits are not asked for."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any, ClassVar

import pytest
import torch
from library_checks import Attend, exact, form, heads, library, nothing_known, offer, take_the_gpus_way
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusekit
from fusekit.kernels import (
    attention,
    attention_choice,
    attention_gradient,
    attention_libraries,
    attention_trial,
    times_file,
)
from fusekit.kernels.attention import OP
from fusekit.kernels.attention_choice import OWN
from fusekit.kernels.attention_form import Form
from fusekit.kernels.launch import record
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen
from fusekit.kernels.recipe import Recipe
from fusekit.session import session

Grads = tuple[Tensor, Tensor, Tensor]


def gradient(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, form: Form) -> Grads:
    """What a right library returns, in strides of its own."""
    group, dtype = q.shape[1] // k.shape[1], q.dtype
    q, k, v, dy, out = (x.float() for x in (q, k, v, dy, out))
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ wide_k.transpose(-1, -2) * form.scale
    if form.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(form.offset)
        scores = scores.masked_fill(~seen, -math.inf)
    p = (scores - lse.unsqueeze(-1)).exp()
    ds = p * (dy @ wide_v.transpose(-1, -2) - (dy * out).sum(-1, keepdim=True)) * form.scale
    wide = (ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dy)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2).to(dtype) for x in wide)
    return (ds @ wide_k).to(dtype).contiguous(), dk.contiguous(), dv.contiguous()


def unscaled_keys(*args: Any) -> Grads:
    dq, dk, dv = gradient(*args)
    return dq, dk / args[-1].scale, dv


def swapped_heads(*args: Any) -> Grads:
    dq, dk, dv = gradient(*args)
    return dq.flip(1), dk, dv


def in_log2(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, form: Form) -> Grads:
    return gradient(dy, q, k, v, out, lse * math.log2(math.e), form)


def failing(*args: Any) -> Grads:
    raise RuntimeError("no engine for this graph")


JITTER = itertools.cycle((0.0, 1e-6))


def jittery(*args: Any) -> Grads:
    """As sums whose order changes: right, and never the same bits twice."""
    dq, dk, dv = gradient(*args)
    return dq, dk, (dv.float() + next(JITTER)).to(dv.dtype)


class Planned(torch.autograd.Function):
    """A library that keeps a plan by the shapes of q alone, and reads dy as the first one lay."""

    plans: ClassVar[dict[Any, tuple[int, ...]]] = {}

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor]:
        out, lse = exact(q, k, v, form)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.form = form
        return out, lse

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> Any:  # type: ignore[override]
        return *Planned.planned(dy, *ctx.saved_tensors, ctx.form), None

    @staticmethod
    def planned(dy: Tensor, q: Tensor, *rest: Any) -> Grads:
        strides = Planned.plans.setdefault(q.shape, dy.stride())
        return gradient(dy.as_strided(dy.shape, strides), q, *rest)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    Planned.plans.clear()
    with nothing_known(tmp_path, monkeypatch):
        yield


@pytest.fixture
def on_gpu(monkeypatch):
    take_the_gpus_way(monkeypatch)
    for module in (attention_gradient, attention_choice):
        monkeypatch.setattr(module, "on_gpu", lambda x: True)


def call(dtype: torch.dtype = torch.bfloat16, kv_heads: int = 2, causal: bool = True) -> tuple[Any, ...]:
    q, k, v = (heads(520, n, 32, dtype).requires_grad_() for n in (4, kv_heads, kv_heads))
    return q, k, v, None, causal, 0.2


def unordered(*args: Any) -> Tensor:
    return OP.fused(*args, deterministic=False)


def parity(args: tuple[Any, ...], fused: Any = unordered) -> dict[str, Tensor]:
    ours, truth = results_and_grads(fused, args), results_and_grads(OP.reference, widen(args))
    eager = results_and_grads(OP.reference, args)
    verdicts = check(ours, eager, truth, dtype=args[0].dtype, terms=longest_sum(args), inherent=True)
    assert all(verdict.ok for verdict in verdicts), verdicts
    return ours


def described(args: tuple[Any, ...]) -> str:
    q, k, v, *rest = args
    names = ("mask", "causal", "scale")
    given = form(q, k, v, **dict(zip(names, rest, strict=True)), deterministic=False)
    return attention_gradient.describe(q, k, v, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_a_librarys_gradient_is_exact(on_gpu, monkeypatch, dtype, kv_heads, causal):
    ran = []
    offer(monkeypatch, library(gradient=lambda *args: ran.append(args[0].shape[2]) or gradient(*args)))
    ours = parity(call(dtype, kv_heads, causal))
    assert ran == [attention_trial.LENGTH, attention_trial.LENGTH, 520]
    assert all(ours[name].transpose(1, 2).is_contiguous() for name in ("grad_0", "grad_1", "grad_2"))


def test_equal_bits_are_the_default(on_gpu, monkeypatch):
    offer(monkeypatch, library(gradient=failing))
    parity(call(), OP.fused)
    assert not any(kind.backward for kind in attention_trial._outcomes)
    assert not described(call()).startswith("forward and backward: own")


def test_bits_may_differ(on_gpu, monkeypatch):
    ran = []
    offer(monkeypatch, library(gradient=lambda *args: ran.append(1) or jittery(*args)))
    parity(call())
    assert len(ran) == 3


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (unscaled_keys, "grad 1 is wrong"),
        (swapped_heads, "grad 0 is wrong"),
        (in_log2, "is wrong"),
        (failing, "RuntimeError: no engine for this graph"),
    ],
)
def test_a_wrong_gradient_is_refused_by_the_trial(on_gpu, monkeypatch, wrong, reason):
    offer(monkeypatch, library(gradient=wrong))
    assert described(call()) == "forward and backward: cuDNN: static default on sm_90"  # as documented
    parity(call())
    told = described(call())
    assert told.startswith("cuDNN: static default on sm_90; backward own kernel: cuDNN: on a small call")
    assert reason in told


def test_a_plan_kept_for_another_layout_is_noticed(on_gpu, monkeypatch):
    """PyTorch keeps cuDNN's plans by the layouts of q, k and v; the trial runs one of another dy first."""
    offer(monkeypatch, library(lambda *args: Planned.apply(*args), gradient=Planned.planned))
    parity(call())
    assert "backward own kernel: cuDNN: on a small call" in described(call())


def test_the_trial_is_held_in_the_forward_pass(on_gpu, monkeypatch):
    """Autograd has one thread a GPU: a trial on it would wait for itself."""
    offer(monkeypatch, library(gradient=gradient))
    out = unordered(*call())
    (tried,) = (kind for kind in attention_trial._outcomes if kind.backward)
    del attention_trial._outcomes[tried]  # as after a forward pass inside a CUDA graph's capture
    monkeypatch.setattr(attention_trial, "passes", failing)
    out.sum().backward()


def test_ordered_algorithms_overrule(on_gpu, monkeypatch):
    offer(monkeypatch, library(gradient=failing))
    torch.use_deterministic_algorithms(True)
    try:
        parity(call())
        told = described(call())
    finally:
        torch.use_deterministic_algorithms(False)
    assert told.endswith("; backward own kernel: torch.use_deterministic_algorithms is on")
    assert not any(kind.backward for kind in attention_trial._outcomes)


def test_what_holds_around_the_forward_pass_decides_of_both(on_gpu, monkeypatch):
    """As torch.nn.attention.sdpa_kernel does, whose switches are back when autograd runs."""
    ran = []
    offer(monkeypatch, library(gradient=lambda *args: ran.append(1) or gradient(*args)))
    unordered(*call()).sum().backward()
    assert ran
    ran.clear()
    torch.use_deterministic_algorithms(True)
    try:
        out = unordered(*call())
    finally:
        torch.use_deterministic_algorithms(False)
    out.sum().backward()
    assert not ran


def test_the_own_kernels_keep_what_libraries_do_not_compute(on_gpu, monkeypatch):
    offer(monkeypatch, library(gradient=failing))
    q, k, v, *_ = call()
    for settings, reason in (
        ({"causal": True, "window": 100}, "window"),
        ({"mask": torch.ones(520, 520, dtype=torch.bool)}, "boolean mask"),
        ({"slopes": torch.ones(4)}, "slopes"),
    ):
        given = form(q, k, v, **settings, deterministic=False)
        assert attention_gradient.choose(q, k, v, given) == (OWN, reason)
    offer(monkeypatch, library())  # computes no gradients
    given = form(q, k, v, deterministic=False)
    assert attention_gradient.choose(q, k, v, given) == (OWN, "")


def test_the_fastest_of_what_was_measured_runs(on_gpu, monkeypatch):
    offer(monkeypatch, library(gradient=gradient))
    clock = iter((3e-4, 2e-4, 6e-4, 5e-4))
    args = call()
    times = measured(args, clock)
    assert times == {OWN: 3e-4, "cuDNN": 2e-4, f"{OWN} backward": 6e-4, "cuDNN backward": 5e-4}
    assert described(args) == (
        "forward and backward: cuDNN: measured 200 µs, own kernel 300; "
        "backward measured 500 µs, own kernel 600"
    )
    clock = iter((3e-4, 2e-4, 5e-4, 6e-4))
    measured(args, clock)
    assert described(args).endswith("; backward own kernel: measured 500 µs, cuDNN 600")


def measured(args: tuple[Any, ...], clock: Any) -> dict[str, float]:
    return attention.measure(*args, deterministic=False, clock=lambda run: run() and next(clock))


def test_recorded_launches_are_our_own(monkeypatch):
    offer(monkeypatch, library(gradient=gradient))
    with torch._subclasses.fake_tensor.FakeTensorMode(), record() as launches:
        q, k, v = (torch.empty(1, 2, 600, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        torch.autograd.grad(unordered(q, k, v).sum(), (q, k, v))
    assert len(launches) == 3


def test_cudnn_is_called_as_its_schema_says(monkeypatch):
    """On meta tensors; a forward pass that returns one dimension more gets it back."""
    q, k = torch.empty(2, 4, 64, 32, device="meta"), torch.empty(2, 2, 64, 32, device="meta")
    given = form(q, k, k, causal=True)
    out, lse = attention_libraries._cudnn(q, k, k, given)
    asked: list[Any] = []
    run = attention_libraries.aten._scaled_dot_product_cudnn_attention_backward.default

    class Aten:
        class _scaled_dot_product_cudnn_attention_backward:
            @staticmethod
            def default(*args: Any, **kwargs: Any) -> Any:
                asked.extend(args)
                return run(*args, **kwargs)

    monkeypatch.setattr(attention_libraries, "aten", Aten)
    grads = attention_libraries._cudnn_gradient(out, q, k, k, out, lse, given)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]
    assert asked[5].shape == (2, 4, 64, 1)
    (dropout,) = (x for x in asked if isinstance(x, float))
    assert dropout == 0.0 and math.copysign(1.0, dropout) == -1.0  # plans of our own


def test_optimize_takes_the_setting_to_the_op(on_gpu, monkeypatch):
    """As an argument of each site, in training only; checkpoints run it again as it was."""
    offer(monkeypatch, library(gradient=gradient))
    layer = Attend().to(torch.bfloat16)
    fusekit.optimize(layer, deterministic=False)
    x = torch.randn(2, 600, 32, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    (site,) = sites(layer)
    assert site.implementation == "forward and backward: cuDNN: static default on sm_90"
    assert settings_of(layer) == [False]
    with torch.no_grad():
        layer(x)
    assert settings_of(layer) == [False, True]


@pytest.mark.parametrize("right", [True, False])
def test_verify_judges_a_librarys_gradient(on_gpu, monkeypatch, right):
    """One that passed its trial and is wrong for the model's sizes gives way to our own, not to eager."""
    ran, clock = [], itertools.count(9, -1)

    def run(*args: Any) -> Grads:
        ran.append(args[0].shape[2])
        return gradient(*args) if right or ran[-1] == attention_trial.LENGTH else swapped_heads(*args)

    offer(monkeypatch, library(gradient=run))
    monkeypatch.setattr(times_file, "seconds", lambda run: next(clock))  # the library's are the last
    layer = fusekit.optimize(Attend().to(torch.bfloat16), deterministic=False)
    x = torch.randn(2, 600, 32, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    fails = pytest.warns(UserWarning, match="^cuDNN fails at attention_0")
    with contextlib.nullcontext() if right else fails:
        certificate = fusekit.verify(layer, x)
    assert ran.count(600) > 1 and certificate.ok and not certificate.sites[0].reverted
    before = len(ran)
    layer(x).sum().backward()
    assert len(ran) == before + right
    args = (x.new_empty(2, 2, 600, 16),) * 3
    reason = attention.runs_on(*args, None, True, deterministic=False)
    assert ("cuDNN: verify: grad_" in reason) != right


def test_verify_judges_a_librarys_output(on_gpu, monkeypatch):
    """Here where our own backward pass follows, as by default."""
    ran, clock = [], itertools.count(9, -1)

    def run(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        ran.append(q.shape[2])
        out, lse = exact(q, *args)
        return (out if ran[-1] == attention_trial.LENGTH else out * 1.02), lse

    offer(monkeypatch, library(run=run))
    monkeypatch.setattr(times_file, "seconds", lambda run: next(clock))
    layer = fusekit.optimize(Attend().to(torch.bfloat16))
    x = torch.randn(2, 600, 32, dtype=torch.bfloat16, requires_grad=True)
    layer(x)
    assert ran[-1] == 600
    with pytest.warns(UserWarning, match="^cuDNN fails at attention_0.*output: "):
        certificate = fusekit.verify(layer, x)
    assert certificate.ok and not certificate.sites[0].reverted
    before = len(ran)
    layer(x)
    assert len(ran) == before


def test_a_checkpoints_second_forward_has_the_same_setting(on_gpu, monkeypatch):
    ran = []
    offer(monkeypatch, library(gradient=lambda *args: ran.append(args[0].shape[2]) or gradient(*args)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attend().to(torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    block = fusekit.optimize(Block(), deterministic=False)
    block(torch.randn(2, 600, 32, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert ran[-1] == 600


def test_fp8_attention_stays_what_it_is(monkeypatch):
    layer = Attend()
    recipe = Recipe(attention="head")
    fusekit.optimize(layer, precision=recipe, deterministic=False)
    layer(torch.randn(2, 600, 32, requires_grad=True)).sum().backward()
    assert "attention_fp8" in {f.op for f in fusekit.explain(layer).fused}


def test_the_setting_is_a_flag():
    with pytest.raises(ValueError, match="deterministic is True or False, and got 'no'"):
        fusekit.optimize(Attend(), deterministic="no")  # type: ignore[arg-type]


def sites(layer: nn.Module) -> list[Any]:
    return [f for f in fusekit.explain(layer).fused if f.op == "attention"]


def settings_of(layer: nn.Module) -> list[bool]:
    found = []
    for captured in session(layer).regions:
        for node in captured.region.module.graph.nodes:
            if node.target is OP.fused:
                names = [argument.name for argument in OP.fused._schema.arguments]
                given = dict(zip(names, node.args, strict=False)) | node.kwargs
                found.append(given.get("deterministic", True))
    return found
