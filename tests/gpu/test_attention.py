"""The attention kernels, on a GPU or in the sanitizer: every mask, shape and stride, against float64."""

from __future__ import annotations

import functools

import attention_checks
import pytest
import torch
from attention_checks import arguments, assert_parity, assert_sinks_gradient_is_rounded_once

from fusekit.kernels import philox
from fusekit.kernels._triton import tl, triton
from fusekit.kernels.attention import OP
from fusekit.kernels.parity import deterministic, results_and_grads

heads = functools.partial(attention_checks.heads, "cuda")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_causal_grouped_lengths_beyond_a_block(dtype):
    q, k, v = heads(1, 70, 2, 40, dtype), heads(1, 90, 1, 40, dtype), heads(1, 90, 1, 40, dtype)
    assert_parity((q, k, v, None, True))


def test_boolean_mask_over_batch_and_a_row_without_keys():
    q, k, v = heads(2, 50, 2, 32), heads(2, 40, 2, 32), heads(2, 40, 2, 32)
    mask = (torch.rand(2, 1, 50, 40) < 0.5).to("cuda")
    mask[:, :, 7] = False
    fused = assert_parity((q, k, v, mask))
    assert torch.equal(fused["output"][:, :, 7], torch.zeros(2, 2, 32).to("cuda"))
    assert torch.equal(fused["grad_0"][:, :, 7], torch.zeros(2, 2, 32).to("cuda"))


def test_additive_mask_and_rows_of_finfo_min_are_shared_out_evenly():
    q, k, v = heads(1, 40, 1, 16), heads(1, 40, 1, 16), heads(1, 40, 1, 16)
    mask = torch.randn(1, 1, 40, 40).to("cuda")
    mask[..., 30:] = torch.finfo(torch.float32).min
    mask[:, :, :3] = torch.finfo(torch.float32).min
    mask[:, :, 5] = float("-inf")
    fused = assert_parity((q, k, v, mask))
    torch.testing.assert_close(fused["output"][0, 0, 1], v.detach()[0, 0].mean(0))
    assert torch.equal(fused["output"][0, 0, 5], torch.zeros(16).to("cuda"))


def test_dropout_draws_the_same_numbers_forward_and_backward():
    q, k, v = heads(2, 36, 2, 16), heads(2, 45, 2, 16), heads(2, 45, 2, 16)
    seed = torch.tensor([2**40 + 5]).to("cuda")
    assert_parity((q, k, v, None, False, None, 0.3, seed, 11))


def test_heads_of_other_strides_and_a_wider_value():
    packed = torch.randn(1, 34, 3, 2, 16).to("cuda", torch.bfloat16)
    q, k, _ = (x.transpose(1, 2) for x in packed.unbind(2))
    v = torch.randn(1, 2, 24, 34).to("cuda", torch.bfloat16).transpose(-1, -2)
    assert not (q.is_contiguous() or v.is_contiguous())
    args = tuple(x.requires_grad_() for x in (q.detach(), k.detach(), v))
    fused = assert_parity((*args, None, True))
    assert fused["output"].transpose(1, 2).is_contiguous()
    assert all(fused[f"grad_{i}"].transpose(1, 2).is_contiguous() for i in range(3))


def test_one_key_gives_its_value_and_empty_lengths_nothing():
    for Tq, Tk in ((1, 1), (0, 3), (3, 0)):
        q, k, v = heads(1, Tq, 1, 16), heads(1, Tk, 1, 16), heads(1, Tk, 1, 16)
        fused = results_and_grads(OP.fused, (q, k, v, None, True))
        assert fused["output"].shape == (1, 1, Tq, 16) and fused["grad_1"].shape == k.shape
        if Tk == 1:  # the only softmax weight is one, and does not depend on q or k
            assert torch.equal(fused["output"], v.detach())
            assert max(fused["grad_0"].abs().max(), fused["grad_1"].abs().max()) < 1e-6
        else:
            assert all(result.abs().sum() == 0 for result in fused.values())


def test_runs_are_bitwise_equal():
    q, k, v = heads(1, 70, 2, 40, torch.bfloat16), *(heads(1, 90, 1, 40, torch.bfloat16) for _ in range(2))
    assert deterministic(OP.fused, (q, k, v, None, True), runs=2)


FAR = (None, True, None, 0.0, None, 0, False)  # mask to tf32, in front of window, offset, softcap and sinks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "causal, window, offset", [(True, 20, 0), (True, None, 30), (True, 45, 10), (False, 9, 3)]
)
def test_bands_skip_blocks_and_keep_their_edges(causal, window, offset, dtype):
    q, k, v = heads(1, 140, 2, 32, dtype), heads(1, 150, 1, 32, dtype), heads(1, 150, 1, 32, dtype)
    assert_parity((q, k, v, None, causal, *FAR[2:], window, offset))


def test_rows_before_the_first_key_and_after_a_window_are_zero():
    q, k, v = heads(1, 80, 1, 16), heads(1, 30, 1, 16), heads(1, 30, 1, 16)
    fused = assert_parity((q, k, v, *FAR, 12, -4))
    for rows in (fused["output"][:, :, :4], fused["output"][:, :, 46:]):
        assert torch.equal(rows, torch.zeros_like(rows))


def test_window_beside_padding():
    q, k, v = heads(2, 60, 2, 16), heads(2, 60, 2, 16), heads(2, 60, 2, 16)
    padding = (torch.arange(60) >= torch.tensor([0, 25])[:, None])[:, None, None, :].to("cuda")
    assert_parity((q, k, v, padding, *FAR[1:], 17))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_capped_scores(dtype):
    q, k, v = heads(1, 50, 2, 32, dtype), heads(1, 50, 1, 32, dtype), heads(1, 50, 1, 32, dtype)
    for softcap in (0.5, 50.0):
        assert_parity((q, k, v, *FAR, 30, 0, softcap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks_and_their_gradient(dtype):
    q, k, v = heads(2, 50, 4, 16, dtype), heads(2, 50, 2, 16, dtype), heads(2, 50, 2, 16, dtype)
    sinks = torch.tensor([0.5, -2.0, 3.0, float("-inf")]).to("cuda", dtype).requires_grad_()
    mask = (torch.rand(2, 1, 50, 50) < 0.5).to("cuda")
    mask[:, :, 7] = False
    assert_parity((q, k, v, mask, False, *FAR[2:], None, 0, None, sinks))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_of_sinks_is_rounded_once(dtype, seed):
    torch.manual_seed(seed)
    q, k, v = (heads(2, 70, 2, 32, dtype) for _ in "qkv")
    sinks = torch.randn(2).to("cuda", dtype).requires_grad_()
    assert_sinks_gradient_is_rounded_once(sinks, arguments(q, k, v, causal=True, window=17, sinks=sinks))


@pytest.mark.parametrize("shape", [(1, 2, 45, 60), (45, 60), (2, 1, 45, 1), (1,)])
def test_gradient_of_a_bias_that_is_repeated(shape):
    q, k, v = heads(2, 45, 2, 16), heads(2, 60, 1, 16), heads(2, 60, 1, 16)
    bias = torch.randn(shape).to("cuda").requires_grad_()
    args = (q, k, v, bias, True, *FAR[2:], 40, 15, 3.0)
    assert_parity(args)
    assert deterministic(OP.fused, args, runs=2)


def test_heads_of_256_features():
    q, k, v = heads(1, 40, 1, 160, torch.bfloat16), *(heads(1, 40, 1, D, torch.bfloat16) for D in (160, 256))
    assert_parity((q, k, v, *FAR, 20, 0, 3.0))


@pytest.mark.parametrize("D", [16, 32])
def test_gradient_of_a_bias_with_dropout_in_low_precision(D):
    q, k, v = (heads(2, 40, 2, D, torch.bfloat16) for _ in range(3))
    bias = torch.randn(2, 40, 40).to("cuda", torch.bfloat16).requires_grad_()
    assert_parity((q, k, v, bias, False, None, 0.3, torch.tensor([5]).to("cuda"), 2))


@triton.jit
def _draw(out_ptr, seed_ptr, start, COUNT: tl.constexpr):
    i = start.to(tl.int64) + tl.arange(0, COUNT)
    tl.store(out_ptr + tl.arange(0, COUNT), tl.rand(tl.load(seed_ptr), i))


@pytest.mark.parametrize("seed, start", [(0, 0), (-3, 5), (2**40 + 17, 2**33 - 5)])
def test_philox_is_bit_equal_to_triton(seed, start):
    out, seed_tensor = torch.empty(64, device="cuda"), torch.tensor([seed]).to("cuda")
    _draw[(1,)](out, seed_tensor, start, 64)
    assert torch.equal(out, philox.uniform(seed_tensor, 64, out.device, start=start))
