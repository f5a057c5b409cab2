"""linear_act's kernels: ragged blocks, layouts, every activation, splits of K, the same bits each run."""

import pytest
import torch
import torch.nn.functional as F

from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.gemm import sum_partials
from fusekit.kernels.linear_act import OP
from fusekit.kernels.parity import check, deterministic, longest_sum, results_and_grads, widen


def _eager(x, weight, bias=None, residual=None, act="none", tf32=False):
    y = ACTIVATIONS[act].reference(F.linear(x, weight, bias))
    return y if residual is None else y + residual


def assert_parity(args, **options):
    truth = results_and_grads(OP.reference, widen(args))
    eager = results_and_grads(_eager, args)
    fused = results_and_grads(OP.fused, args)
    verdicts = check(fused, eager, truth, dtype=args[0].dtype, terms=longest_sum(args), **options)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


def leaves(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(s, generator=generator) / 2).to("cuda", dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_forward_and_backward(act):
    args = (*leaves(torch.float16, (2, 70, 40), (136, 40), (136,), (2, 70, 136)), act)
    assert_parity(args, inherent=OP.inherent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ragged_blocks_without_bias(dtype):
    x, weight, residual = leaves(dtype, (131, 67), (77, 67), (131, 77))
    assert_parity((x, weight, None, residual, "gelu_tanh"), inherent=OP.inherent)


def test_transposed_weight_and_strided_input():
    x, weight, bias = leaves(torch.bfloat16, (65, 2, 72), (72, 80), (80,))
    x, weight = (t.detach().transpose(0, 1).requires_grad_() for t in (x, weight))
    assert_parity((x, weight, bias, None, "silu"), inherent=OP.inherent)
    grad = torch.autograd.grad(OP.fused(x, weight, bias).sum(), weight)[0]
    assert grad.stride() == weight.stride()


def test_tf32_operands():
    x, weight, bias = leaves(torch.float32, (70, 72), (68, 72), (68,))
    args = (x, weight, bias, None, "gelu", True)
    assert_parity(args, tf32=True)


def test_same_bits_every_run():
    args = (*leaves(torch.bfloat16, (130, 72), (80, 72), (80,)), None, "gelu")
    assert deterministic(OP.fused, args)


def test_partials_are_summed_past_one_block():
    partials = torch.randn(70, 133, device="cuda")
    total = torch.empty(133, device="cuda")
    sum_partials(partials, total)
    torch.testing.assert_close(total, partials.double().sum(0).float())


@pytest.mark.parametrize(("lead", "N", "K"), [((), 40, 33), ((0,), 4, 3), ((5,), 4, 0)])
def test_vectors_and_empty_dimensions(lead, N, K):
    args = (*leaves(torch.float32, (*lead, K), (N, K), (N,)), None, "gelu_tanh")
    fused, eager = results_and_grads(OP.fused, args), results_and_grads(_eager, args)
    for name in eager:
        torch.testing.assert_close(fused[name], eager[name])


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_inputs_have_no_gradient(frozen):
    x, weight, bias = leaves(torch.float32, (40, 33), (36, 33), (36,))
    inputs = [x, weight, bias]
    inputs[frozen].requires_grad_(False)
    fused = results_and_grads(OP.fused, (*inputs, None, "relu"))
    eager = results_and_grads(_eager, (*inputs, None, "relu"))
    assert fused.keys() == eager.keys()
    for name in eager:
        torch.testing.assert_close(fused[name], eager[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "conv1d"])
def test_bias_gradient_without_activation(dtype, columns):
    """It rides on the product for the weight's gradient, or where that is stored by columns on a pass."""
    x, weight, bias = leaves(dtype, (131, 40), (40, 72) if columns else (72, 40), (72,))
    if columns:
        weight = weight.detach().t().requires_grad_()
    assert_parity((x, weight, bias), inherent=OP.inherent)
    assert deterministic(OP.fused, (x, weight, bias))
