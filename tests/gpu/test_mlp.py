"""mlp's and gated_mlp's kernels: activations, packed and strided weights, frozen arguments, no tokens."""

import pytest
import torch

from fusekit.kernels.gated_mlp import OP as GATED
from fusekit.kernels.mlp import OP as MLP
from fusekit.kernels.parity import results_and_grads


def leaves(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(s, generator=generator) / 2).to("cuda", dtype).requires_grad_() for s in shapes]


def assert_close(op, args, tolerance=2e-5):
    fused, expected = results_and_grads(op.fused, args), results_and_grads(op.reference, args)
    assert fused.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(fused[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "tanh", "none"])
def test_gates(act):
    x, w_gate, w_up, w_down = leaves(torch.float32, (20, 16), (24, 16), (24, 16), (16, 24))
    assert_close(GATED, (x, w_gate, w_up, w_down, None, None, None, act))


@pytest.mark.parametrize("frozen", ["first", "last", "all but the input"])
def test_frozen_weights(frozen):
    x, w_gate, w_up, w_down, b_gate = leaves(torch.float32, (20, 16), (24, 16), (24, 16), (16, 24), (24,))
    chosen = {"first": [w_gate, w_up, b_gate, x], "last": [w_down]}
    for t in chosen.get(frozen, [w_gate, w_up, w_down]):
        t.requires_grad_(False)
    assert_close(GATED, (x, w_gate, w_up, w_down, b_gate, None, None, "silu"))
    assert_close(MLP, (x, w_gate, b_gate, w_down, None, None, "gelu"))


@pytest.mark.parametrize(("rows", "K"), [(0, 16), (5, 0)])
def test_empty_dimensions(rows, K):
    x, w_gate, w_up, w_down, bias = leaves(torch.float32, (rows, K), (24, K), (24, K), (16, 24), (24,))
    assert_close(GATED, (x, w_gate, w_up, w_down, bias, bias, None, "silu"))
    assert_close(MLP, (x, w_gate, bias, w_down, None, None, "gelu"))
