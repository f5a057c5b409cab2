"""A library's pass before or behind our kernels, on a GPU or in the sanitizer."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fusekit.kernels import attention, attention_adapter, attention_choice, attention_launch
from fusekit.kernels.attention import OP
from fusekit.kernels.attention_choice import forced
from fusekit.kernels.attention_form import Form
from fusekit.kernels.attention_libraries import LIBRARIES, Library
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen


def stand_in(q: Tensor, k: Tensor, v: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """A library that runs anywhere: out, and the natural log sum exp."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q.float() @ k.float().transpose(-1, -2) * form.scale
    if form.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).to(q.dtype) @ v, scores.logsumexp(-1)


def heads(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, T, H, D).to("cuda", dtype).transpose(1, 2).requires_grad_()


def assert_parity(library: Library, args: tuple, dtype: torch.dtype) -> None:
    truth, eager = results_and_grads(OP.reference, widen(args)), results_and_grads(OP.reference, args)
    with forced(library):
        found = results_and_grads(OP.fused, args)
    verdicts = check(found, eager, truth, dtype=dtype, terms=longest_sum(args), inherent=True)
    assert all(v.ok for v in verdicts), verdicts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_our_backward_kernels_follow_a_librarys_output(dtype, causal):
    torch.manual_seed(0)
    q, k, v = heads(1, 70, 4, 32, dtype), heads(1, 70, 2, 32, dtype), heads(1, 70, 2, 32, dtype)
    assert_parity(
        Library("stand-in", lambda *_: None, stand_in, lambda: None), (q, k, v, None, causal), dtype
    )


def stand_in_gradient(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """From what a forward pass left: out, and the natural log sum exp."""
    group, dtype = q.shape[1] // k.shape[1], q.dtype
    q, k, v, dy, out = (x.float() for x in (q, k, v, dy, out))
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ wide_k.transpose(-1, -2) * form.scale
    if form.causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    p = (scores - lse.unsqueeze(-1)).exp()
    ds = p * (dy @ wide_v.transpose(-1, -2) - (dy * out).sum(-1, keepdim=True)) * form.scale
    wide = (ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dy)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2).to(dtype) for x in wide)
    return (ds @ wide_k).to(dtype), dk, dv


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_a_librarys_gradient_follows_our_forward_kernel(dtype, causal):
    torch.manual_seed(0)
    q, k, v = heads(1, 70, 4, 32, dtype), heads(1, 70, 2, 32, dtype), heads(1, 70, 2, 32, dtype)
    library = Library("stand-in", lambda *_: None, stand_in, lambda: None, stand_in_gradient)

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, mask, causal):  # type: ignore[no-untyped-def, override]
            ctx.form = attention._settings(q, k, v, mask, causal)
            out, stats, _ = attention_launch.forward(q, k, v, ctx.form)
            ctx.save_for_backward(q, k, v, out, stats)
            return out

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
            return *attention_adapter.backward(library, dy, *ctx.saved_tensors, ctx.form), None, None

    args = (q, k, v, None, causal)
    truth, eager = results_and_grads(OP.reference, widen(args)), results_and_grads(OP.reference, args)
    found = results_and_grads(Fused.apply, args)
    verdicts = check(found, eager, truth, dtype=dtype, terms=longest_sum(args), inherent=True)
    assert all(v.ok for v in verdicts), verdicts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("library", [x for x in LIBRARIES if x.gradient], ids=lambda library: library.name)
def test_gradients_of_libraries_keep_their_word(library, dtype, monkeypatch):
    """Where the library is; also behind a backward pass of eager's whose gradient lay in another order."""
    if reason := library.absent():
        pytest.skip(reason)
    monkeypatch.setattr(attention_choice, "LIBRARIES", (library,))
    torch.manual_seed(0)
    for kv_heads, causal in ((4, True), (4, False), (1, True)):
        args = (*(heads(2, 530, n, 64, dtype) for n in (4, kv_heads, kv_heads)), None, causal)
        form = attention._settings(*args, deterministic=False)
        eager, _ = library.run(*args[:3], form)
        torch.autograd.grad(eager, args[:3], torch.randn_like(eager).contiguous())
        assert attention_choice.proved(library, *args[:3], form, backward=True)
        truth, eager = results_and_grads(OP.reference, widen(args)), results_and_grads(OP.reference, args)
        for fused in (partial(attention_adapter.both, library), partial(OP.fused, deterministic=False)):
            found = results_and_grads(fused, args)
            verdicts = check(found, eager, truth, dtype=dtype, terms=longest_sum(args), inherent=True)
            assert all(v.ok for v in verdicts), verdicts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_libraries_keep_their_word(library, dtype):
    """Where the library is: what it may take is exact, and its trial says so."""
    if reason := library.absent():
        pytest.skip(reason)
    torch.manual_seed(0)
    for kv_heads, causal in ((4, True), (4, False), (1, True)):
        q, k, v = (heads(2, 530, n, 64, dtype) for n in (4, kv_heads, kv_heads))
        form = attention._settings(q, k, v, None, causal)
        if library.unfit(q, k, v, form) is None:
            assert_parity(library, (q, k, v, None, causal), dtype)
            assert attention_choice.proved(library, q, k, v, form)
