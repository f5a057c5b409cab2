"""mlp and gated_mlp on the CPU: what is saved, layouts, partial gradients, both ways of multiplying."""

import pytest
import torch
import torch.nn.functional as F
from cpu_checks import multiply_low_precision

from fusekit.kernels import cpu_library, feed_forward_whole, linear_cpu
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.gated_mlp import OP as GATED
from fusekit.kernels.mlp import OP as MLP
from fusekit.kernels.parity import check, longest_sum, results_and_grads, widen

GATES = [act for act in ACTIVATIONS if act != "relu_squared"]


def _mlp(x, w1, b1, w2, b2, residual=None, act="gelu", tf32=False):
    y = F.linear(ACTIVATIONS[act].reference(F.linear(x, w1, b1)), w2, b2)
    return y if residual is None else y + residual


def _gated(x, w_gate, w_up, w_down, b_gate=None, b_up=None, b_down=None, act="silu", up_first=False):
    if w_up is None:
        first, second = F.linear(x, w_gate, b_gate).chunk(2, -1)
        gate, up = (second, first) if up_first else (first, second)
    else:
        gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
    return F.linear(ACTIVATIONS[act].reference(gate) * up, w_down, b_down)


def leaves(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(s, generator=generator) / 2).to(dtype).requires_grad_() for s in shapes]


def mlp_arguments(act, dtype=torch.float32, rows=70):
    return (*leaves((rows, 33), (40, 33), (40,), (24, 40), (24,), (rows, 24), dtype=dtype), act)


def gated_arguments(act, dtype=torch.float32, rows=70):
    return (*leaves((rows, 33), (40, 33), (40, 33), (24, 40), (40,), (40,), (24,), dtype=dtype), act)


def packed_arguments(act, dtype=torch.float32, up_first=False):
    x, w, down, b, b_down = leaves((70, 33), (80, 33), (24, 40), (80,), (24,), dtype=dtype)
    return x, w, None, down, b, None, b_down, act, up_first


def assert_close(op, eager, args, **tolerance):
    fused, expected = results_and_grads(op.fused, args), results_and_grads(eager, args)
    assert fused.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            fused[name], expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act):
    assert_close(MLP, _mlp, mlp_arguments(act), rtol=1e-4, atol=1e-4)
    if act in GATES:
        assert_close(GATED, _gated, gated_arguments(act), rtol=1e-4, atol=1e-4)
        for up_first in (False, True):
            assert_close(GATED, _gated, packed_arguments(act, up_first=up_first), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_row_blocks_add_up(dtype, monkeypatch):
    monkeypatch.setattr(linear_cpu, "BLOCK_BYTES", 1)  # 64 rows a block, the last ragged
    for op, eager, args in (
        (MLP, _mlp, mlp_arguments("gelu_tanh", dtype, 201)),
        (GATED, _gated, gated_arguments("silu", dtype, 201)),
    ):
        truth = results_and_grads(op.reference, widen(args))
        verdicts = check(
            results_and_grads(op.fused, args), results_and_grads(eager, args), truth,
            dtype=dtype, terms=longest_sum(args), inherent=True,
        )  # fmt: skip
        assert all(v.ok for v in verdicts), "\n".join(map(str, verdicts))


@pytest.mark.parametrize("act", ["gelu", "relu", "none"])
def test_a_processor_that_multiplies_low_precision(act, monkeypatch):
    """Whole products in x's dtype, which ATen emulates where the processor has none."""
    monkeypatch.setattr(feed_forward_whole, "multiplies", lambda dtype: True)
    cases = ((MLP, _mlp, mlp_arguments), (GATED, _gated, gated_arguments), (GATED, _gated, packed_arguments))
    for op, eager, arguments in cases:
        args = arguments(act, torch.bfloat16)
        truth = results_and_grads(op.reference, widen(args))
        verdicts = check(
            results_and_grads(op.fused, args), results_and_grads(eager, args), truth,
            dtype=torch.bfloat16, terms=longest_sum(args), inherent=True,
        )  # fmt: skip
        assert all(v.ok for v in verdicts), "\n".join(map(str, verdicts))


def saved_bytes(function, args):
    """Kept for backward beside the arguments' own memory; a storage counts once."""
    own = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
    kept = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        function(*args)
    return sum(kept.values())


def without_biases(args):
    return tuple(None if isinstance(a, torch.Tensor) and a.dim() == 1 else a for a in args)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_are_counted(dtype, bias):
    """M = 70 rows, H = 40 hidden features: one tensor of MH less than eager for mlp, two less where gated."""
    hidden = 70 * 40 * dtype.itemsize
    cases = (
        (MLP, _mlp, mlp_arguments("gelu", dtype), 1, 2),
        (MLP, _mlp, mlp_arguments("relu", dtype), 1, 1),  # eager's ReLU keeps its output alone as well
        (GATED, _gated, gated_arguments("silu", dtype), 2, 4),
        (GATED, _gated, packed_arguments("silu", dtype), 2, 4),
    )
    for op, eager, args, ours, theirs in cases:
        args = args if bias else without_biases(args)
        assert saved_bytes(op.fused, args) == ours * hidden
        assert saved_bytes(eager, args) == theirs * hidden


@pytest.mark.parametrize("frozen", range(7))
def test_frozen_arguments_have_no_gradient(frozen):
    args = gated_arguments("gelu")
    args[frozen].requires_grad_(False)
    assert_close(GATED, _gated, args, rtol=1e-4, atol=1e-4)
    if frozen < 6:
        args = mlp_arguments("gelu")
        args[frozen].requires_grad_(False)
        assert_close(MLP, _mlp, args, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alone", range(7))
def test_one_gradient_alone(alone):
    for op, eager, args in ((MLP, _mlp, mlp_arguments("silu")), (GATED, _gated, gated_arguments("silu"))):
        for i, a in enumerate(t for t in args if isinstance(t, torch.Tensor)):
            a.requires_grad_(i == alone)
        assert_close(op, eager, args, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lead", "K", "H", "N"),
    [((), 3, 4, 5), ((0,), 3, 4, 5), ((2, 0), 3, 4, 5), ((5,), 0, 4, 3), ((5,), 3, 0, 4), ((5,), 3, 4, 0)],
)
def test_empty_dimensions_and_vectors(lead, K, H, N):
    x, w1, b1, w2, b2, residual = leaves((*lead, K), (H, K), (H,), (N, H), (N,), (*lead, N))
    assert_close(MLP, _mlp, (x, w1, b1, w2, b2, residual, "gelu"))
    w_up = leaves((H, K))[0]
    assert_close(GATED, _gated, (x, w1, w_up, w2, b1, None, b2, "silu"))


def test_expanded_input_and_shared_weight():
    x, w1, w2 = leaves((1, 6), (8, 6), (4, 8))
    assert_close(MLP, _mlp, (x.detach().expand(9, 6).requires_grad_(), w1, None, w2, None))
    fused = torch.autograd.grad(GATED.fused(x, w1, w1, w2).sum(), (x, w1, w2))
    torch.testing.assert_close(fused, torch.autograd.grad(_gated(x, w1, w1, w2).sum(), (x, w1, w2)))


def test_gradients_of_transposed_weights_have_their_strides():
    x, first, second = leaves((9, 6), (6, 8), (8, 4))
    y = MLP.fused(x, first.t(), None, second.t(), None)
    assert all(g.is_contiguous() for g in torch.autograd.grad(y.sum(), (first, second)))


X, W1, W2 = torch.randn(2, 3), torch.randn(4, 3), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((X, torch.randn(4, 5), None, W2, None), "x \\(2, 3\\) and w1 \\(4, 5\\) differ in input features"),
        ((X, W1, None, W1, None), "w2 \\(4, 3\\) does not take the 4 features of w1"),
        ((X, W1, None, W2.bfloat16(), None), "x is torch.float32 and w2 is torch.bfloat16; cast one"),
        ((X.double(), W1.double(), None, W2.double(), None), "float64 is none of"),
        ((X, W1, torch.randn(3), W2, None), "b1 \\(3,\\) is not \\(4,\\)"),
        ((X, W1, None, W2, None, torch.randn(5)), "residual \\(5,\\) is not of y's shape"),
        ((X, W1, None, W2, None, None, "gelu_new"), "activation 'gelu_new' is none of"),
        ((torch.tensor(1.0), W1, None, W2, None), "needs a last dimension of features"),
        ((X, torch.randn(2, 4, 3), None, W2, None), "w1 \\(2, 4, 3\\) needs two dimensions"),
    ],
)
def test_mlp_refuses_in_a_sentence(args, sentence):
    with pytest.raises(ValueError, match=f"^mlp: .*{sentence}"):
        MLP.fused(*args)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((X, W1, torch.randn(6, 3), W2), "w_gate \\(4, 3\\) and w_up \\(6, 3\\) differ in shape"),
        ((X, torch.randn(7, 3), None, W2), "does not take the 7 features \\(gate and up\\)"),
        ((X, torch.randn(8, 3), None, W2, None, torch.randn(4)), "b_up is given, but no w_up"),
        ((X, W1, W1, W2, None, None, None, "silu", True), "up_first is about a packed w_gate"),
        ((X, W1, W1, W2, None, None, None, "relu_squared"), "squares the gate"),
    ],
)
def test_gated_mlp_refuses_in_a_sentence(args, sentence):
    with pytest.raises(ValueError, match=f"^gated_mlp: .*{sentence}"):
        GATED.fused(*args)


def test_flops_count_every_product():
    assert MLP.flops(*mlp_arguments("gelu")) == 2 * 70 * (33 * 40 + 40 * 24)
    assert GATED.flops(*gated_arguments("silu")) == 2 * 70 * (2 * 33 * 40 + 40 * 24)
    assert GATED.flops(*packed_arguments("silu")) == 2 * 70 * (2 * 33 * 40 + 40 * 24)


def as_initialised(act, device="cpu", rows=256, K=128, H=512):
    """An mlp of normed tokens, its weights as a GPT starts with them: most of z is small."""
    generator = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(s, generator=generator) for s in ((rows, K), (H, K), (K, H)))
    values = [x, 0.4 * K**-0.5 * w1, 0.4 * H**-0.5 * w2]
    x, w1, w2 = (t.to(device, torch.bfloat16).requires_grad_() for t in values)
    return x, w1, None, w2, None, None, act


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu"])
def test_rounding_twice_does_not_bias_the_second_weights_gradient(act, compiled, monkeypatch):
    multiply_low_precision(monkeypatch, feed_forward_whole)
    if not compiled:
        monkeypatch.setattr(cpu_library, "available", lambda: False)
        monkeypatch.setattr(cpu_library, "multiplies", lambda: False)
    args = as_initialised(act)
    truth = results_and_grads(lambda *a: MLP.reference(*a), widen(args))
    fused = results_and_grads(MLP.fused, args)
    assert bias_of(fused["grad_3"], truth["grad_3"]) < 1e-4
    eager = results_and_grads(lambda *a: _mlp(*a), args)
    if act == "gelu":  # the same sizes show the bias where there is one
        assert bias_of(eager["grad_3"], truth["grad_3"]) > 1.5e-4


def bias_of(grad, truth):
    """The mean error towards or from zero, relative to the mean magnitude."""
    mean = ((grad.double() - truth) * truth.sign()).mean()
    return (mean.abs() / truth.abs().mean()).item()


def backward_ops(backward):
    with torch.profiler.profile() as profile:
        backward()
    return {e.key for e in profile.key_averages() if e.key.startswith("fusekit::feed_forward_backward")}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_the_last_backward_pass_alone_writes_over_what_was_saved(packed, compiled, monkeypatch):
    multiply_low_precision(monkeypatch, feed_forward_whole)
    monkeypatch.setattr(feed_forward_whole, "HIDDEN_BYTES", 1)  # many blocks of columns
    monkeypatch.setattr(feed_forward_whole, "LEAST_WIDTH", 16)
    if not compiled:
        monkeypatch.setattr(cpu_library, "available", lambda: False)
        monkeypatch.setattr(cpu_library, "multiplies", lambda: False)
    args = packed_arguments("silu", torch.bfloat16) if packed else mlp_arguments("gelu", torch.bfloat16)
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    y = (GATED if packed else MLP).fused(*args)
    dy = torch.randn_like(y)
    grads = []

    def backward(keep):
        grads.append(torch.autograd.grad(y, inputs, dy, retain_graph=keep))

    kept = "fusekit::feed_forward_backward"
    assert backward_ops(lambda: backward(True)) == {kept}
    assert backward_ops(lambda: backward(True)) == {kept}
    assert backward_ops(lambda: backward(False)) == {f"{kept}_over_saved"}
    for first, second, last in zip(*grads, strict=True):
        assert torch.equal(first, second) and torch.equal(first, last)
    truth = results_and_grads((GATED if packed else MLP).reference, widen(args))
    fused = results_and_grads((GATED if packed else MLP).fused, args)
    for name in truth:
        assert (fused[name].double() - truth[name]).norm() < 0.02 * truth[name].norm(), name


def test_a_compiled_backward_pass_keeps_what_was_saved():
    args = mlp_arguments("gelu", torch.bfloat16)
    compiled = torch.compile(lambda *a: MLP.fused(*a), backend="aot_eager")
    assert backward_ops(lambda: compiled(*args).sum().backward()) == {"fusekit::feed_forward_backward"}


def test_a_backward_pass_that_was_interrupted_is_not_tried_again_on_overwritten_tensors(monkeypatch):
    multiply_low_precision(monkeypatch, feed_forward_whole)
    *args, act = mlp_arguments("gelu", torch.bfloat16)
    y = MLP.fused(*args, act)

    def interrupt(*_):
        raise KeyboardInterrupt

    y.grad_fn.register_hook(interrupt)  # behind the op, before what it saved is freed
    with pytest.raises(KeyboardInterrupt):
        y.sum().backward()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|second time"):
        y.sum().backward()


def test_hooks_that_keep_what_is_saved_find_it_as_it_was():
    *args, act = mlp_arguments("gelu", torch.bfloat16)
    kept = []

    def pack(t):
        kept.append(t)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        y = MLP.fused(*args, act)
    before = [t.clone() for t in kept]
    y.sum().backward()
    assert before and all(map(torch.equal, before, kept))
