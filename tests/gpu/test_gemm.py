"""Matrix products: every configuration of the tables, layouts, splits, forward and backward epilogues."""

from __future__ import annotations

import pytest
import torch
from gemm_checks import DTYPES, assert_close, label, operand, rounded, rows, tensor

from fusekit.kernels import philox
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.config_table import Config, Row
from fusekit.kernels.gemm import matmul


@pytest.mark.parametrize("row", rows(), ids=label)
def test_every_configuration_of_the_tables(row: Row) -> None:
    """Two ragged tiles and two steps of K, through the epilogue with most in it that the row serves."""
    config, dtype = row.config, DTYPES[row.kind][0]
    M, N, K = config.m + 8, config.n - 24, config.k + 8
    tf32 = row.kind == "tf32"
    letters = "ss" if row.layouts[0] == "s" else row.layouts[0]
    a, b = operand(M, K, letters[0], dtype, 1), operand(K, N, letters[1], dtype, 2)
    exact = rounded(a, tf32) @ rounded(b, tf32)
    output = torch.empty(M, N, device="cuda", dtype=dtype)
    if row.epilogues == ("plain",):
        matmul(a, b, output, tf32=tf32, config=config)
    else:
        bias, residual = tensor(N, dtype=dtype, seed=3), tensor(M, N, dtype=dtype, seed=4)
        z = torch.empty_like(output)
        matmul(a, b, output, bias=bias, act="silu", residual=residual, z=z, tf32=tf32, config=config)
        exact = exact + bias.double()
        assert_close(z, exact, K, tf32)
        exact = torch.nn.functional.silu(exact) + residual.double()
    assert_close(output, exact, K, tf32)


SMALL = Config("tile", 64, 64, 32, 8, 2)
PERSISTENT = Config("persistent", 64, 64, 32, 4, 2, 2)
both = pytest.mark.parametrize("config", [SMALL, PERSISTENT], ids=["tile", "persistent"])


@both
@pytest.mark.parametrize("layout", ["nn", "tn", "tt"])
def test_layouts_and_splits(config: Config, layout: str) -> None:
    """Three splits of four steps: the last has none, and what it adds is zero."""
    M, N, K = 72, 136, 104
    a, b = (
        operand(r, c, x, torch.float16, i)
        for i, (r, c, x) in enumerate(zip((M, K), (K, N), layout, strict=True))
    )
    output = torch.empty(M, N, device="cuda", dtype=torch.float16)
    matmul(a, b, output, config=config, splits=3)
    assert_close(output, a.double() @ b.double(), K)


@both
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_backward_epilogue(config: Config, dropout: float) -> None:
    """dz = dropout'(dy @ W) act'(z), h = dropout(act(z)) and the bias gradient, from one product."""
    M, N, K = 72, 88, 40
    dtype = torch.bfloat16
    dy, weight, z = (tensor(*s, dtype=dtype, seed=i) for i, s in enumerate([(M, K), (K, N), (M, N)]))
    dz, h, grad_bias = torch.empty_like(z), torch.empty_like(z), torch.empty(N, device="cuda", dtype=dtype)
    seed = torch.tensor([7], device="cuda")
    matmul(
        dy, weight, dz, dact="gelu", z=z, h=h, grad_bias=grad_bias, dropout=dropout, seed=seed, seed_offset=3,
        config=config,
    )  # fmt: skip
    exact_z = z.double().requires_grad_()
    exact_h = ACTIVATIONS["gelu"].reference(exact_z)
    if dropout:
        draws = philox.uniform(seed, M * N, seed.device, seed_offset=3).view(M, N)
        exact_h = exact_h.masked_fill(draws < dropout, 0.0) / (1 - dropout)
    (exact,) = torch.autograd.grad(exact_h, exact_z, dy.double() @ weight.double())
    assert_close(dz, exact, K)
    assert_close(h, exact_h.detach(), 1)
    assert_close(grad_bias[None], exact.sum(0)[None], M)


@both
def test_dropout_after_the_activation_and_before_the_residual(config: Config) -> None:
    M, N, K = 72, 88, 40
    x, weight, residual = (tensor(*s, dtype=torch.float32) for s in [(M, K), (N, K), (M, N)])
    output, seed = torch.empty(M, N, device="cuda"), torch.tensor([11], device="cuda")
    matmul(x, weight.t(), output, act="relu", residual=residual, dropout=0.4, seed=seed, config=config)
    kept = philox.uniform(seed, M * N, seed.device).view(M, N) >= 0.4
    y = torch.relu(x.double() @ weight.double().t()).where(kept, torch.zeros((), dtype=torch.float64)) / 0.6
    assert_close(output, y + residual.double(), K)


@pytest.mark.parametrize("row", rows(), ids=label)
def test_row_sums_of_every_configuration(row: Row) -> None:
    """dz.T @ x with the sums of dz's columns: by two block columns in turn, of two splits, both ragged."""
    config, dtype, tf32 = row.config, DTYPES[row.kind][0], row.kind == "tf32"
    M, N, K = config.m + 8, config.n + 8, 3 * config.k + 8
    letters = "ss" if row.layouts[0] == "s" else "tn"
    a, b = operand(M, K, letters[0], dtype, 1), operand(K, N, letters[1], dtype, 2)
    for splits in (1, 2):
        output = torch.full((M, N), torch.nan, device="cuda", dtype=dtype)
        sums = torch.full((M,), torch.nan, device="cuda", dtype=dtype)
        matmul(a, b, output, tf32=tf32, row_sums=sums, config=config, splits=splits)
        assert_close(output, rounded(a, tf32) @ rounded(b, tf32), K, tf32)
        assert_close(sums[None], a.double().sum(1)[None], K)  # not of what tf32 leaves of a


@both
@pytest.mark.parametrize("layout", ["nn", "tt", "ss"])
def test_row_sums_of_layouts(config: Config, layout: str) -> None:
    """More block columns than steps of K: some have nothing to add."""
    if layout == "ss" and config.kernel == "persistent":
        pytest.skip("descriptors need rows 16 bytes apart")
    M, N, K = 72, 200, 40
    a, b = (
        operand(r, c, x, torch.float16, i)
        for i, (r, c, x) in enumerate(zip((M, K), (K, N), layout, strict=True))
    )
    output, sums = torch.empty(M, N, device="cuda", dtype=torch.float16), torch.empty(M, device="cuda")
    matmul(a, b, output, row_sums=sums, config=config)
    assert_close(output, a.double() @ b.double(), K)
    assert_close(sums[None], a.double().sum(1)[None], K)


@pytest.mark.parametrize(("M", "N", "K"), [(8, 16, 0), (70, 1, 24), (5, 130, 33)])
def test_row_sums_of_unusual_shapes(M: int, N: int, K: int) -> None:
    a, b = tensor(K, M, dtype=torch.bfloat16, seed=1).t(), tensor(K, N, dtype=torch.bfloat16, seed=2)
    output, sums = torch.empty(M, N, device="cuda", dtype=torch.bfloat16), torch.empty(M, device="cuda")
    matmul(a, b, output, row_sums=sums)
    assert_close(output, a.double() @ b.double(), K)
    assert_close(sums[None], a.double().sum(1)[None], K)


@pytest.mark.parametrize(("M", "N", "K"), [(130, 67, 33), (1, 8, 16), (70, 1, 24), (8, 16, 0), (0, 8, 8)])
def test_ragged_and_empty_shapes_by_the_tables_choice(M: int, N: int, K: int) -> None:
    a, b = tensor(M, K, dtype=torch.bfloat16, seed=1), tensor(N, K, dtype=torch.bfloat16, seed=2).t()
    bias = tensor(N, dtype=torch.bfloat16)
    output = torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
    matmul(a, b, output, bias=bias)
    assert_close(output, a.double() @ b.double() + bias.double(), K)


def test_a_misaligned_view_is_read_element_by_element() -> None:
    a, b = tensor(73 * 64 + 1, dtype=torch.bfloat16)[1:].view(73, 64), tensor(64, 72, dtype=torch.bfloat16)
    output = torch.empty(73, 72, device="cuda", dtype=torch.bfloat16)
    matmul(a, b, output)
    assert_close(output, a.double() @ b.double(), 64)


def test_column_major_output_is_the_transposed_product() -> None:
    a, b = tensor(72, 40, dtype=torch.bfloat16), tensor(40, 88, dtype=torch.bfloat16, seed=1)
    output = torch.empty(88, 72, device="cuda", dtype=torch.bfloat16).t()
    matmul(a, b, output)
    assert_close(output, a.double() @ b.double(), 40)
