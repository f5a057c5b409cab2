"""qkv_linear's kernels: every configuration of the tables, grouped heads, layouts, frozen arguments."""

from __future__ import annotations

import pytest
import torch
from gemm_checks import DTYPES, assert_close, label, operand, rounded, rows, tensor
from torch import Tensor

from fusekit.kernels.config_table import Row
from fusekit.kernels.parity import results_and_grads
from fusekit.kernels.qkv_gemm import project, sum_products
from fusekit.kernels.qkv_linear import OP


@pytest.mark.parametrize("row", rows("qkv"), ids=label)
def test_every_configuration_of_the_tables(row: Row) -> None:
    """Two ragged blocks of q, one of k and of v, two steps of K; k has no bias, as in Whisper."""
    config, dtype, tf32 = row.config, DTYPES[row.kind][0], row.kind == "tf32"
    M, K, features = config.m + 8, config.k + 8, (config.n + 8, 24, 40)
    letter = "s" if row.layouts[0] == "s" else "n"
    x = operand(M, K, letter, dtype, 1)
    weights = [operand(n, K, letter, dtype, 2 + i) for i, n in enumerate(features)]
    biases = [None if i == 1 else tensor(n, dtype=dtype, seed=5 + i) for i, n in enumerate(features)]
    outputs = [torch.empty(M, n, device="cuda", dtype=dtype) for n in features]
    project(x, weights, biases, outputs, tf32, config)
    for weight, bias, output in zip(weights, biases, outputs, strict=True):
        exact = rounded(x, tf32) @ rounded(weight, tf32).t()
        assert_close(output, exact if bias is None else exact + bias.double(), K, tf32)
    grads = [tensor(M, n, dtype=dtype, seed=8 + i) for i, n in enumerate(features)]
    grad_x = torch.empty(M, K, device="cuda", dtype=dtype)
    sum_products(grads, weights, grad_x, tf32, config)
    products = [rounded(g, tf32) @ rounded(w, tf32) for g, w in zip(grads, weights, strict=True)]
    assert_close(grad_x, sum(products[1:], products[0]), sum(features), tf32)


def leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(s, generator=generator) / 2).to("cuda", dtype).requires_grad_() for s in shapes]


def assert_as_reference(*args: Tensor | None) -> None:
    fused, expected = results_and_grads(OP.fused, args), results_and_grads(OP.reference, args)
    assert fused.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(fused[name], expected[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("frozen", [[0], [1, 4], [2, 3], [0, 1, 2, 3]])
def test_frozen_arguments_have_no_gradient(frozen: list[int]) -> None:
    args = leaves(torch.float32, (20, 16), (24, 16), (8, 16), (8, 16), (24,), (8,), (8,))
    for index in frozen:
        args[index].requires_grad_(False)
    assert_as_reference(*args)


@pytest.mark.parametrize(("rows", "K", "key"), [(0, 16, 8), (5, 0, 8), (5, 16, 0), (5, 16, 1)])
def test_empty_and_single_dimensions(rows: int, K: int, key: int) -> None:
    args = leaves(torch.float32, (rows, K), (24, K), (key, K), (8, K), (24,), (key,))
    assert_as_reference(*args, None)


def test_weights_of_different_strides_and_a_weight_that_is_used_twice() -> None:
    x, w_q, w_k = leaves(torch.float32, (70, 24), (40, 24), (24, 8))
    assert_as_reference(x, w_q, w_k.detach().t().requires_grad_(), w_q, None, None, None)


def test_an_output_that_nobody_reads_has_a_gradient_of_zeros() -> None:
    x, w_q, w_k, w_v = leaves(torch.float32, (20, 16), (24, 16), (8, 16), (8, 16))
    q, _, v = OP.fused(x, w_q, w_k, w_v)
    grads = torch.autograd.grad(q.sum() + v.sum(), (x, w_q, w_k, w_v))
    torch.testing.assert_close(grads[0], (w_q.sum(0) + w_v.sum(0)).expand(20, 16))
    assert not grads[2].any()
