"""linear_act on the CPU: arguments, layouts, partial gradients, all ways of multiplying."""

import pytest
import torch
import torch.nn.functional as F
from cpu_checks import multiply_low_precision

from fusekit.kernels import linear_cpu
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.linear_act import OP
from fusekit.kernels.linear_cpu import EPILOGUES, add_in_epilogue, apply_with_epilogue
from fusekit.kernels.op import DTYPES
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen

SAMPLES = [sample.name for sample in OP.samples("cpu", torch.float32) if not sample.bench]


def assert_parity(args, **options):
    truth = results_and_grads(OP.reference, widen(args))
    eager = results_and_grads(_eager, args)
    fused = results_and_grads(OP.fused, args)
    verdicts = check(fused, eager, truth, dtype=args[0].dtype, terms=longest_sum(args), **options)
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


def _eager(x, weight, bias=None, residual=None, act="none", tf32=False):
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = ACTIVATIONS[act].reference(F.linear(x, weight, bias))
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_as_good_as_the_dtype_allows(name, dtype):
    (args,) = [sample.args for sample in OP.samples("cpu", dtype) if sample.name == name]
    assert_parity(args, inherent=OP.inherent)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_widened_products_round_once(act, monkeypatch):
    monkeypatch.setattr(linear_cpu, "multiplies", lambda dtype: dtype == torch.float32)
    args = (torch.randn(70, 65).bfloat16(), torch.randn(72, 65).bfloat16() / 8, torch.randn(72).bfloat16())
    assert_parity((*args, torch.randn(70, 72).bfloat16(), act), inherent=False)


@pytest.mark.parametrize("act", ["none", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_widened_products_read_float32_parameters(act, dtype, monkeypatch):
    monkeypatch.setattr(linear_cpu, "multiplies", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(linear_cpu, "BLOCK_BYTES", 1)
    x, residual = ((torch.randn(s) / 2).to(dtype).requires_grad_() for s in ((201, 33), (201, 40)))
    weight, bias = (torch.randn(40, 33) / 4).requires_grad_(), torch.randn(40).requires_grad_()
    assert_parity((x, weight, bias, residual, act), inherent=True)
    y = OP.fused(x, weight, bias, residual, act)
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert [t.dtype for t in (y, *grads)] == [dtype, dtype, torch.float32, torch.float32]
    assert "weight is torch.float32 and bias is" in OP.supports(x, weight, bias.to(dtype))
    empty = torch.autograd.grad(OP.fused(x[:0], weight, bias, None, act).sum(), (weight, bias))
    assert not any(t.any() for t in empty)


def test_a_processor_that_multiplies_low_precision_wants_low_parameters(monkeypatch):
    monkeypatch.setattr(linear_cpu, "multiplies", lambda dtype: True)
    assert "weight is torch.float32; cast one" in OP.supports(X.bfloat16(), W)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_processor_that_multiplies_low_precision(act, dtype, monkeypatch):
    multiply_low_precision(monkeypatch)
    leaves = [(torch.randn(s) / 2).to(dtype).requires_grad_() for s in ((70, 65), (72, 65), (72,), (70, 72))]
    assert_parity((*leaves[:3], None, act), inherent=OP.inherent)
    assert_parity((*leaves, act), inherent=True)


def test_onednn_adds_the_residual():
    x, weight, bias, residual = (
        torch.randn(9, 5),
        torch.randn(5, 7).t(),
        torch.randn(7),
        torch.randn(7, 9).t(),
    )
    expected = F.linear(x, weight, bias) + residual
    torch.testing.assert_close(add_in_epilogue(x, weight, bias, residual), expected)


@pytest.mark.parametrize("bias", [torch.randn(7), None], ids=["bias", "bare"])
@pytest.mark.parametrize("act", EPILOGUES)
def test_onednn_epilogue_is_the_activation(act, bias):
    x, weight = torch.randn(9, 5), torch.randn(5, 7).t()
    expected = ACTIVATIONS[act].reference(F.linear(x, weight, bias))
    torch.testing.assert_close(apply_with_epilogue(x, weight, bias, act), expected)
    x[2, 3] = float("nan")  # a row that a loss must see
    found = apply_with_epilogue(x, weight, bias, act).isnan()
    assert found[2].all() and found.sum() == 7


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_many_row_blocks_add_up(act, monkeypatch):
    monkeypatch.setattr(linear_cpu, "BLOCK_BYTES", 1)  # 64 rows a block, 4 blocks, the last ragged
    monkeypatch.setattr(linear_cpu, "multiplies", lambda dtype: dtype == torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        shapes = ((201, 33), (40, 33), (40,), (201, 40))
        leaves = [(torch.randn(shape) / 2).to(dtype).requires_grad_() for shape in shapes]
        assert_parity((*leaves, act), inherent=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_non_finite_values_go_where_eager_sends_them(act, dtype):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1e18, -1e18, 30.0, -30.0], dtype=dtype)
    args = (x[:, None].requires_grad_(), torch.eye(1, dtype=dtype), None, None, act)
    fused, eager = results_and_grads(OP.fused, args), results_and_grads(_eager, args)
    torch.testing.assert_close(fused["output"], eager["output"], equal_nan=True)
    finite = x.isfinite()
    torch.testing.assert_close(fused["grad_0"][finite], eager["grad_0"][finite])


@pytest.mark.parametrize("wanted", range(16))
def test_only_the_gradients_asked_for(wanted):
    shapes = ((5, 7), (6, 7), (6,), (5, 6))
    args = [torch.randn(s).requires_grad_(bool(wanted >> i & 1)) for i, s in enumerate(shapes)]
    fused = results_and_grads(OP.fused, (*args, "gelu"))
    eager = results_and_grads(_eager, (*args, "gelu"))
    assert fused.keys() == eager.keys()
    for name in eager:
        torch.testing.assert_close(fused[name], eager[name])


@pytest.mark.parametrize("act", ["none", "relu"])
def test_nothing_is_kept_that_backward_does_not_read(act):
    kept = []
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(6, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = OP.fused(x, weight, None, None, act)
    assert kept == ([weight.shape] if act == "none" else [weight.shape, y.shape])


def test_gradient_of_a_transposed_weight_has_its_strides():
    kernel = torch.randn(5, 8, requires_grad=True)  # (K, N), as in Hugging Face's Conv1D
    weight = kernel.t()
    y = OP.fused(torch.randn(3, 5), weight, torch.randn(8))
    grad_weight, grad_kernel = torch.autograd.grad(y.sum(), (weight, kernel))
    assert grad_weight.stride() == weight.stride()
    assert grad_kernel.is_contiguous()


def test_an_expanded_gradient_and_expanded_input():
    x = torch.randn(1, 6).expand(9, 6).requires_grad_()
    weight = torch.randn(4, 6, requires_grad=True)
    fused = torch.autograd.grad(OP.fused(x, weight, None, None, "silu").sum(), (x, weight))
    eager = torch.autograd.grad(F.silu(F.linear(x, weight)).sum(), (x, weight))
    torch.testing.assert_close(fused, eager)


@pytest.mark.parametrize(
    ("lead", "N", "K"), [((), 4, 3), ((0,), 4, 3), ((2, 0), 4, 3), ((5,), 4, 0), ((5,), 0, 3)]
)
def test_empty_dimensions(lead, N, K):
    leaves = [torch.randn(s, requires_grad=True) for s in ((*lead, K), (N, K), (N,), (*lead, N))]
    fused = results_and_grads(OP.fused, (*leaves, "gelu_tanh"))
    eager = results_and_grads(_eager, (*leaves, "gelu_tanh"))
    for name in eager:
        torch.testing.assert_close(fused[name], eager[name])


X, W, B = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((X, torch.randn(4, 5)), "differ in input features; weight is \\(N, K\\)"),
        ((X, W.bfloat16()), "cast one, or call under torch.autocast"),
        ((X, W, B.half()), "bias is torch.float16"),
        ((X.double(), W.double()), "dtype float64 is none of float32, float16, bfloat16"),
        ((X, W, torch.randn(3)), "bias \\(3,\\) is not \\(4,\\)"),
        ((X, W, B, torch.randn(4)), "residual \\(4,\\) is not of y's shape \\(2, 4\\); expand it first"),
        ((X, W, B, None, "gelu_new"), "activation 'gelu_new' is none of none, gelu, gelu_tanh"),
        ((torch.tensor(1.0), W), "needs a last dimension of features"),
        ((X, torch.randn(2, 4, 3)), "two dimensions"),
        ((X, W.to("meta")), "different devices"),
    ],
)
def test_unsupported_arguments_are_refused_in_a_sentence(args, sentence):
    assert OP.supports(*args) is not None
    with pytest.raises(ValueError, match=f"^linear_act: .*{sentence}"):
        OP.fused(*args)


def test_second_derivative_is_refused():
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="linear_act has no second derivative"):
        torch.autograd.grad(OP.fused(x, weight, None, None, "gelu").sum(), x, create_graph=True)


def test_autocast_lowers_a_direct_call():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert OP.fused(X, W, B).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gelu_residual", "strided_conv1d", "empty_batch", "relu"])
def test_opcheck(name):
    (args,) = [sample.args for sample in OP.samples("cpu", torch.float32) if sample.name == name]
    torch.library.opcheck(OP.fused, args)


def test_flops_counts_multiply_and_add():
    assert OP.flops(torch.empty(2, 3, 5), torch.empty(7, 5)) == 2 * 6 * 7 * 5
