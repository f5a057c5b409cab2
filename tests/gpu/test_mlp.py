"""mlp's and gated_mlp's kernels: activations, packed and strided weights, frozen arguments, no tokens."""

import pytest
import torch
from gemm_checks import DTYPES, assert_close, label, operand, rounded, rows, tensor

from fusekit.kernels.gated_gemm import gated_matmul
from fusekit.kernels.gated_mlp import OP as GATED
from fusekit.kernels.mlp import OP as MLP
from fusekit.kernels.parity import results_and_grads


def leaves(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(s, generator=generator) / 2).to("cuda", dtype).requires_grad_() for s in shapes]


def assert_as_reference(op, args, tolerance=2e-5):
    fused, expected = results_and_grads(op.fused, args), results_and_grads(op.reference, args)
    assert fused.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(fused[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "tanh", "none"])
def test_gates(act):
    x, w_gate, w_up, w_down = leaves(torch.float32, (20, 16), (24, 16), (24, 16), (16, 24))
    assert_as_reference(GATED, (x, w_gate, w_up, w_down, None, None, None, act))


@pytest.mark.parametrize("frozen", ["first", "last", "all but the input"])
def test_frozen_weights(frozen):
    x, w_gate, w_up, w_down, b_gate = leaves(torch.float32, (20, 16), (24, 16), (24, 16), (16, 24), (24,))
    chosen = {"first": [w_gate, w_up, b_gate, x], "last": [w_down]}
    for t in chosen.get(frozen, [w_gate, w_up, w_down]):
        t.requires_grad_(False)
    assert_as_reference(GATED, (x, w_gate, w_up, w_down, b_gate, None, None, "silu"))
    assert_as_reference(MLP, (x, w_gate, b_gate, w_down, None, None, "gelu"))


@pytest.mark.parametrize(("rows", "K"), [(0, 16), (5, 0)])
def test_empty_dimensions(rows, K):
    x, w_gate, w_up, w_down, bias = leaves(torch.float32, (rows, K), (24, K), (24, K), (16, 24), (24,))
    assert_as_reference(GATED, (x, w_gate, w_up, w_down, bias, bias, None, "silu"))
    assert_as_reference(MLP, (x, w_gate, bias, w_down, None, None, "gelu"))


@pytest.mark.parametrize("row", rows("gated"), ids=label)
def test_every_gated_configuration_of_the_tables(row):
    """Two ragged tiles and two steps of K; gate, up and their product."""
    config, dtype, tf32 = row.config, DTYPES[row.kind][0], row.kind == "tf32"
    M, H, K = config.m + 8, config.n + 8, config.k + 8
    letters = "ss" if row.layouts[0] == "s" else row.layouts[0]
    x = operand(M, K, letters[0], dtype, 1)
    weights = [operand(K, H, letters[1], dtype, 2 + i).t() for i in range(2)]
    bias = tensor(H, dtype=dtype, seed=4)
    h, gate, up = (torch.empty(M, H, device="cuda", dtype=dtype) for _ in range(3))
    gated_matmul(x, weights, [bias, None], "silu", "gated", h, [gate, up], tf32, config)
    exact = [rounded(x, tf32) @ rounded(weight, tf32).t() for weight in weights]
    exact[0] = exact[0] + bias.double()
    assert_close(gate, exact[0], K, tf32)
    assert_close(up, exact[1], K, tf32)
    assert_close(h, torch.nn.functional.silu(exact[0]) * exact[1], 2 * K, tf32)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_rounding_twice_does_not_bias_the_second_weights_gradient(act):
    """The mean error towards or from zero; 2.4e-4 where h is computed again from an ordinary bfloat16 z."""
    generator = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(s, generator=generator) for s in ((64, 64), (256, 64), (64, 256)))
    values = (x, 0.4 / 8 * w1, 0.4 / 16 * w2)
    x, w1, w2 = (t.to("cuda", torch.bfloat16).requires_grad_() for t in values)
    fused = results_and_grads(MLP.fused, (x, w1, None, w2, None, None, act))["grad_3"].double()
    wide = (x.double(), w1.double(), None, w2.detach().double().requires_grad_(), None, None, act)
    truth = results_and_grads(MLP.reference, wide)["grad_3"]
    mean = ((fused - truth) * truth.sign()).mean().abs() / truth.abs().mean()
    assert mean < 1e-4
