"""The C++ passes of the CPU paths: right beside float64, the same bits on any number of threads, optional."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import assert_parity

from fusekit.kernels import OPS, attention_cpu, cpu_library, hidden_cpu, hidden_form, linear_cpu
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.attention import reference
from fusekit.kernels.parity import results_and_grads, widen

BF16 = torch.bfloat16
USERS = (
    "mlp",
    "gated_mlp",
    "attention",
    "linear_act",
    "linear_cross_entropy",
    "add_layer_norm",
    "add_rms_norm",
)
FLOOR = 1.66e-3  # relative Frobenius error of rounding to bfloat16
needs_compiler = pytest.mark.skipif(not cpu_library.available(), reason=f"{cpu_library.obstacle()}")
needs_products = pytest.mark.skipif(not cpu_library.multiplies(), reason="needs AVX512-BF16 without AMX")
INFINITIES = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e20, -1e20, 40.0, -40.0], dtype=BF16)


def error(result, truth):
    return ((result.double() - truth).norm() / truth.norm()).item()


def rounded_once(result, truth):
    return error(result, truth) <= 1.02 * error(truth.to(BF16), truth)


def hidden(act, z, form="plain"):
    gate, _ = hidden_form.parts(z, form)
    h = torch.empty(gate.shape, dtype=BF16)
    hidden_cpu.activate_whole(z, act, form, h)
    return h


@needs_compiler
@pytest.mark.parametrize("form", ["plain", "gated", "gate_up", "up_gate"])
@pytest.mark.parametrize("act", hidden_cpu.COMPILED)
def test_hidden_features_and_their_gradients(act, form):
    torch.manual_seed(0)
    M, H = 37, 53  # a whole lane, and an end of one
    z = [
        (torch.randn(M, 2 * H if form in hidden_form.PACKED else H) * 3).to(BF16)
        for _ in range(1 + (form == "gated"))
    ]
    dh = torch.randn(M, H).to(BF16)

    def differentiate(scale=1.0):
        wide = [(t.double() / scale).requires_grad_() for t in z]
        gate, up = hidden_form.parts(wide, form)
        h = ACTIVATIONS[act].reference(gate)
        h = h if up is None else h * up
        h.backward(dh.double())
        return h.detach(), [t.grad for t in wide]

    assert rounded_once(hidden(act, z, form), differentiate()[0])
    truth, grads = differentiate(hidden_form.z_scale(BF16, form))
    h, dzs = dh.clone(), [torch.empty_like(t) for t in z]
    sums = [torch.empty(t.shape[1]) for t in z]
    each = [[t for t in hidden_form.parts(x, form) if t is not None] for x in (z, dzs, sums)]
    hidden_cpu.derive_whole(each[0], h, act, 1.0 / hidden_form.z_scale(BF16, form), *each[1:])
    assert rounded_once(h, truth)
    for dz, total, exact in zip(dzs, sums, grads, strict=True):
        assert rounded_once(dz, exact)
        assert error(total, exact.sum(0)) < 1e-5


@needs_compiler
@pytest.mark.parametrize("act", hidden_cpu.COMPILED)
def test_non_finite_values_stay_where_they_are(act):
    z = INFINITIES[None, :].contiguous()
    truth = ACTIVATIONS[act].reference(z.double())
    assert torch.equal(hidden(act, [z]).isfinite(), truth.isfinite())
    assert torch.equal(hidden(act, [z])[truth.isfinite()], truth[truth.isfinite()].to(BF16))


@needs_products
@pytest.mark.parametrize("act", cpu_library.ACTIVATIONS)
@pytest.mark.parametrize("M,K,N", [(1, 40, 70), (65, 2, 17), (130, 200, 129)])
def test_a_product_is_rounded_once(M, K, N, act):
    torch.manual_seed(0)
    x, weight, bias, residual = (torch.randn(s).to(BF16) for s in ((M, 2 * K), (N, K), (N,), (M, N)))
    x = x[:, :K]  # rows with a distance
    y, z = torch.empty(M, N, dtype=BF16), torch.empty(M, N, dtype=BF16)
    linear_cpu._forward_compiled(x, weight, bias, residual, act, y, z)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert rounded_once(z, exact)
    assert rounded_once(y, ACTIVATIONS[act].reference(exact) + residual.double())


@needs_compiler
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (70, 300), (33, 1000)])
def test_column_sums(shape):
    torch.manual_seed(0)
    wide = torch.randn(shape[0], 2 * shape[1]).to(BF16)
    for x in (wide[:, : shape[1]], wide[:, ::2]):  # rows with a distance; columns too
        exact = x.double().sum(0)
        assert error(linear_cpu.column_sums(x), exact) < 1e-6 if shape[0] else not exact.any()
    poisoned = torch.full((4, 20), torch.inf, dtype=BF16)
    poisoned[2, 3] = -torch.inf
    assert torch.equal(linear_cpu.column_sums(poisoned).isnan().nonzero()[:, 0], torch.tensor([3]))


@needs_products
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2), key_heads=st.integers(1, 2), group=st.integers(1, 3),
    queries=st.integers(1, 140),
    keys=st.integers(1, 140), features=st.integers(1, 40), values=st.integers(1, 40), causal=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_attention_of_any_size(batch, key_heads, group, queries, keys, features, values, causal, seed):
    torch.manual_seed(seed)

    def heads(T, H, D):
        return torch.randn(batch, T, H, 2 * D, dtype=torch.float32).to(BF16).transpose(1, 2)

    args = (
        heads(queries, key_heads * group, features),
        heads(keys, key_heads, features),
        heads(keys, key_heads, values),
    )
    args = tuple(x.detach().requires_grad_() for x in args)
    assert attention_cpu.takes(*args, None, 0.0)
    truth = results_and_grads(lambda *a: reference(*a, None, causal), widen(args))
    eager = results_and_grads(lambda *a: reference(*a, None, causal), args)
    fused = results_and_grads(lambda *a: OPS["attention"].fused(*a, None, causal), args)
    for name, exact in truth.items():  # one key or query leaves gradients that are zero but for rounding
        spread = (eager[name].double() - exact).norm() + FLOOR * exact.norm()
        assert (fused[name].double() - exact).norm() <= 2.5 * spread + 1e-2 * (min(queries, keys) == 1), name


@needs_products
def test_attention_of_values_with_a_large_mean():
    """dP - delta is a difference of near equals: delta from the rounded output would spoil dq and dk."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 100, 32).to(BF16) for _ in range(3))
    args = tuple(x.requires_grad_() for x in (q, k, (v + 8).detach()))
    truth = results_and_grads(lambda *a: reference(*a, None, True), widen(args))
    fused = results_and_grads(lambda *a: OPS["attention"].fused(*a, None, True), args)
    for name in ("grad_0", "grad_1"):
        assert error(fused[name], truth[name]) < 2.5 * FLOOR, name


@needs_products
def test_attention_keeps_a_nan_in_its_row():
    q, k, v = (torch.randn(1, 2, 70, 16).to(BF16) for _ in range(3))
    q[0, 1, 5, 3] = math.nan
    y = OPS["attention"].fused(q, k, v, None, True)
    broken = torch.zeros(1, 2, 70, dtype=torch.bool)
    broken[0, 1, 5] = True
    assert torch.equal(y.isnan().all(-1), broken) and torch.equal(y.isnan().any(-1), broken)


@needs_compiler
def test_threads_do_not_change_the_bits():
    torch.manual_seed(0)
    ops = {
        name: OPS[name] for name in ("mlp", "gated_mlp", "attention", "linear_act", "linear_cross_entropy")
    }
    samples = [(op, next(iter(op.samples("cpu", BF16))).args) for op in ops.values()]
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append([results_and_grads(op.fused, args) for op, args in samples])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*runs, strict=True):
        assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("name", USERS)
def test_without_the_library_the_ops_are_as_exact(name, monkeypatch):
    monkeypatch.setattr(cpu_library, "_built", lambda: (None, "taken away"))
    monkeypatch.setattr(cpu_library, "multiplies", lambda: False)
    assert not hidden_cpu.compiled("silu", BF16)
    assert_parity(OPS[name], "cpu", BF16)


def test_no_compiler_is_a_sentence_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    library, sentence = cpu_library._built.__wrapped__()
    assert library is None and sentence == "no C++ compiler (c++, g++ or clang++) is installed"


def test_a_failing_build_is_a_sentence_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such machine' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    library, sentence = cpu_library._built.__wrapped__()
    assert library is None and "no such machine" in sentence
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_compiler
def test_the_build_is_kept_and_made_anew_for_another_processor(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = cpu_library._compiler()
    first = cpu_library._library(compiler)
    made = first.stat().st_mtime_ns
    assert cpu_library._library(compiler) == first and first.stat().st_mtime_ns == made
    monkeypatch.setattr(cpu_library, "_processor", lambda: "flags: another")
    assert cpu_library._library(compiler) != first
