"""Attention on the CPU: against float64, where torch's flash kernel is left, what is refused."""

from __future__ import annotations

import functools
import math

import attention_checks
import pytest
import torch
import torch.nn.functional as F
from attention_checks import arguments, assert_parity, assert_sinks_gradient_is_rounded_once

from fusekit.kernels import attention_cpu, attention_native, philox
from fusekit.kernels.attention import OP
from fusekit.kernels.op import DTYPES
from fusekit.kernels.parity import deterministic, results_and_grads, widen

SEED = torch.tensor([7])


heads = functools.partial(attention_checks.heads, "cpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_are_within_budget(dtype):
    for sample in OP.samples("cpu", dtype):
        if not sample.bench:
            assert_parity(sample.args)


def test_samples_are_bitwise_repeatable():
    for sample in OP.samples("cpu", torch.bfloat16):
        if not sample.bench:
            assert deterministic(OP.fused, sample.args), sample.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_goes_through_float32_without_matrix_units(dtype, monkeypatch):
    monkeypatch.setattr(attention_native, "_compute_dtype", lambda dtype: torch.float32)
    q, k, v = heads(2, 80, 4, 24, dtype), heads(2, 80, 2, 24, dtype), heads(2, 80, 2, 24, dtype)
    fused = assert_parity((q, k, v, None, True))
    assert all(result.dtype == dtype for result in fused.values())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_blocks_and_of_shared_heads_are_summed_in_float32(dtype, kv_heads, causal):
    """Torch's kernel adds them in memory of 16 bits: with 16-bit matrix units, 2.8 and 4.4 floors off."""
    q, k, v = (heads(1, 600, n, 32, dtype) for n in (4, kv_heads, kv_heads))
    assert_parity((q, k, v, None, causal))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_result_beside_sinks_is_rounded_once(dtype):
    q, k, v = (heads(2, 90, 4, 32, dtype) for _ in "qkv")
    sinks = torch.randn(4).to(dtype).requires_grad_()
    output = assert_parity(arguments(q, k, v, causal=True, sinks=sinks))["output"]
    truth = OP.reference(*widen(arguments(q, k, v, causal=True, sinks=sinks)))
    floor = (truth.to(dtype).double() - truth).norm()
    assert (output.double() - truth).norm() < 1.1 * floor


@pytest.mark.parametrize("form", [{}, {"window": 40}, {"slopes": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_where_scores_are_alike_do_not_show_that_the_output_was_rounded(dtype, form):
    """Keys and values with a part in common, as of a GPT after a few steps: dq was 140 floors off."""
    made = [
        torch.randn(2, 150, 4, 64) * scale + mean for scale, mean in ((0.05, 0.0), (0.05, 0.5), (0.3, 0.5))
    ]
    q, k, v = (x.to(dtype).transpose(1, 2).requires_grad_() for x in made)
    if "slopes" in form:
        form = {"slopes": torch.full((4,), 1e-3)}
    assert_parity(arguments(q, k, v, causal=True, **form))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_of_sinks_is_rounded_once(dtype, seed):
    torch.manual_seed(seed)
    q, k, v = (heads(2, 130, 2, 32, dtype) for _ in "qkv")
    sinks = torch.randn(2).to(dtype).requires_grad_()
    assert_sinks_gradient_is_rounded_once(sinks, arguments(q, k, v, causal=True, window=17, sinks=sinks))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flash_and_the_composed_path_agree(kv_heads, monkeypatch):
    mask = torch.rand(2, 1, 30, 45) < 0.6
    mask[0, 0, 4] = False
    args = (heads(2, 30, 4, 16), heads(2, 45, kv_heads, 16), heads(2, 45, kv_heads, 16), mask, True, 0.2)
    flash = assert_parity(args)
    monkeypatch.setattr(attention_native, "_flash_fits", lambda *args: False)
    composed = assert_parity(args)
    for name, result in flash.items():
        torch.testing.assert_close(result, composed[name], rtol=1e-4, atol=1e-5)
        assert result.stride() == composed[name].stride(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, "padding", "added", "of one head"])
def test_one_query_reads_shared_keys_once(mask, dtype, monkeypatch):
    """The heads of a group become rows, unless their masks differ; as every call, in eager's layout."""
    q, k, v = heads(2, 1, 6, 24, dtype), heads(2, 90, 2, 24, dtype), heads(2, 90, 2, 24, dtype)
    masks = {
        "padding": (torch.arange(90) >= torch.tensor([0, 33])[:, None])[:, None, None, :],
        "added": torch.randn(1, 90).to(dtype),
        "of one head": torch.rand(2, 6, 1, 90) < 0.5,
    }
    queries, takes = [], attention_cpu.takes
    monkeypatch.setattr(
        attention_cpu, "takes", lambda q, *args: queries.append(q.shape[2]) or takes(q, *args)
    )
    fused = assert_parity((q, k, v, masks.get(mask)))
    assert {*queries} == ({1} if mask == "of one head" else {3})
    assert fused["output"].stride() == q.stride() == fused["grad_0"].stride()
    assert all(fused[f"grad_{i}"].transpose(1, 2).is_contiguous() for i in (1, 2))


def test_agrees_with_torch_on_layout_and_values():
    q, k, v = heads(2, 30, 4, 16), heads(2, 45, 4, 16), heads(2, 45, 4, 16)
    ours, theirs = OP.fused(q, k, v, None, True), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == theirs.stride()


def test_rows_of_finfo_min_are_shared_out_evenly_with_their_gradient():
    mask = torch.zeros(1, 1, 40, 40)
    mask[:, :, :3] = torch.finfo(torch.float32).min
    mask[..., 20:] += -1e9
    args = (heads(1, 40, 2, 16), heads(1, 40, 2, 16), heads(1, 40, 2, 16), mask)
    fused = assert_parity(args)
    torch.testing.assert_close(fused["output"][0, :, 1], args[2].detach()[0].mean(1))


def test_a_row_without_keys_is_zero_and_has_no_gradient():
    for mask in (torch.ones(33, 20, dtype=torch.bool), torch.zeros(33, 20)):
        mask[5] = False if mask.dtype == torch.bool else -math.inf
        fused = assert_parity((heads(1, 33, 2, 16), heads(1, 20, 2, 16), heads(1, 20, 2, 16), mask))
        assert fused["output"][:, :, 5].abs().max() == 0 and fused["grad_0"][:, :, 5].abs().max() == 0


def test_a_wider_value_and_features_that_are_not_adjacent():
    k = torch.randn(1, 2, 16, 40).transpose(-1, -2).requires_grad_()
    assert_parity((heads(1, 40, 2, 16), k, heads(1, 40, 2, 16)))
    assert_parity((heads(1, 40, 2, 16), k, heads(1, 40, 2, 24), None, True))


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


def test_dropout_keeps_the_expected_share_and_depends_on_the_site():
    draws = philox.uniform(SEED, 100_000, torch.device("cpu"))
    assert draws.min() >= 0 and draws.max() < 1 and abs(draws.mean() - 0.5) < 5 / math.sqrt(12 * len(draws))
    assert torch.equal(draws[50_000:], philox.uniform(SEED, 50_000, torch.device("cpu"), start=50_000))
    q, k, v = heads(1, 20, 2, 16), heads(1, 20, 2, 16), heads(1, 20, 2, 16)
    first, second = (OP.fused(q, k, v, None, True, None, 0.5, SEED, site) for site in (0, 1))
    assert not torch.equal(first, second)


def test_gradients_only_where_asked():
    q, k, v = heads(1, 20, 2, 16).detach(), heads(1, 20, 2, 16), heads(1, 20, 2, 16).detach()
    OP.fused(q, k, v).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None


def test_second_derivative_is_refused_with_a_remedy():
    q, k, v = heads(1, 5, 1, 16), heads(1, 5, 1, 16), heads(1, 5, 1, 16)
    with pytest.raises(RuntimeError, match=r"no second derivative.*FUSEKIT_DISABLE=attention"):
        torch.autograd.grad(OP.fused(q, k, v).sum(), q, create_graph=True)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"q": torch.randn(2, 5, 16)}, "dimensions, not .batch, heads, length, features."),
        ({"k": torch.randn(1, 2, 5, 16).half()}, "cast them to one dtype"),
        ({"k": torch.randn(1, 2, 6, 16)}, "differ in batch, length or features"),
        ({"q": torch.randn(1, 3, 5, 16)}, "3 query heads are no multiple of 2 key heads"),
        ({"mask": torch.zeros(5, 5, dtype=torch.int64)}, "a mask is boolean or floating, not int64"),
        ({"window": 0}, "a window of 0 keys is outside 1 to"),
        ({"offset": 1 << 31}, "an offset of 2147483648 places"),
        ({"softcap": -1.0}, "a cap is a positive number"),
        ({"sinks": torch.zeros(3)}, "one floating number for each of 2 heads"),
        ({"mask": torch.zeros(4, 5)}, "does not broadcast"),
        ({"dropout": 0.5}, "dropout needs a seed"),
        ({"dropout": 1.0, "seed": SEED}, "not in .0, 1."),
        ({name: torch.randn(1, 2, 5, 300) for name in "qkv"}, "300 features are outside 1 to 256"),
        ({name: torch.randn(1, 2, 5, 16).double() for name in "qkv"}, "float64 is none of"),
    ],
)
def test_bad_input_is_a_sentence(change, sentence):
    args = {name: torch.randn(1, 2, 5, 16) for name in "qkv"} | change
    with pytest.raises(ValueError, match=sentence):
        OP.fused(**args)
