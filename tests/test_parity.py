"""The judge is judged: mistakes people make in kernels are caught, good kernels pass over many seeds."""

import math

import pytest
import torch
import torch.nn.functional as F

from fusekit.kernels import mlp
from fusekit.kernels.parity import check, deterministic, longest_sum, results_and_grads, widen

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LOW = DTYPES[1:]
SEEDS = range(4)


def wide(*tensors):
    """The tensors in the dtype that a good kernel computes in."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def truncate(x, dtype):
    """Store without rounding: what a cast by shifting bits does."""
    near = x.to(dtype)
    if x.dtype == dtype:
        return near
    away = near.to(x.dtype).abs() > x.abs()
    return torch.where(away, torch.nextafter(near, torch.zeros_like(near)), near)


def linear_gelu(x, w, b, approximate="tanh"):
    xf, wf, bf = wide(x, w, b)
    return F.gelu(xf @ wf.T + bf, approximate=approximate).to(x.dtype)


def layer_norm(x, w, b, eps=1e-5, correction=0):
    xf, wf, bf = wide(x, w, b)
    centred = xf - xf.mean(-1, keepdim=True)
    variance = xf.var(-1, correction=correction, keepdim=True)
    return (centred * torch.rsqrt(variance + eps) * wf + bf).to(x.dtype)


def attention(q, k, v, shift=0, scale=None, round_p=False):
    qf, kf, vf = wide(q, k, v)
    scores = qf @ kf.mT * (scale or q.shape[-1] ** -0.5)
    keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(shift)
    p = scores.masked_fill(~keep, -math.inf).softmax(-1)
    if round_p:
        p = p.to(q.dtype).to(p.dtype)
    return (p @ vf).to(q.dtype)


class FlashAttention(torch.autograd.Function):
    """Rounds P and dS to the dtype of the inputs and delta is of the rounded output, as in flash kernels."""

    @staticmethod
    def forward(ctx, q, k, v):
        o = attention(q, k, v, round_p=True)
        ctx.save_for_backward(q, k, v, o)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o = ctx.saved_tensors
        qf, kf, vf, of, dof = wide(q, k, v, o, do)
        scale = q.shape[-1] ** -0.5
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        p = (qf @ kf.mT * scale).masked_fill(~keep, -math.inf).softmax(-1)
        ds = p * (dof @ vf.mT - (of * dof).sum(-1, keepdim=True))
        p, ds = (t.to(q.dtype).to(t.dtype) for t in (p, ds))
        return (scale * ds @ kf).to(q.dtype), (scale * ds.mT @ qf).to(q.dtype), (p.mT @ dof).to(q.dtype)


def linear_args(dtype, seed, M=70, K=256, N=96):
    g = torch.Generator().manual_seed(seed)
    x, w, b = torch.randn(M, K, generator=g), torch.randn(N, K, generator=g) / 16, torch.randn(N, generator=g)
    return tuple(t.to(dtype).requires_grad_() for t in (x, w, b))


def norm_args(dtype, seed, scale=1.0, M=96, N=384):
    g = torch.Generator().manual_seed(seed)
    x = scale * (3 * torch.randn(M, N, generator=g) + 5)
    w, b = 1 + torch.randn(N, generator=g) / 4, torch.randn(N, generator=g) / 4
    return tuple(t.to(dtype).requires_grad_() for t in (x, w, b))


def attention_args(dtype, seed, T=96, D=64):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 2, T, D, generator=g).to(dtype).requires_grad_() for _ in range(3))


def verdicts(fused, reference, args, inherent=False, terms=None):
    dtype = args[0].dtype
    runs = [
        results_and_grads(fn, a) for fn, a in ((fused, args), (reference, args), (reference, widen(args)))
    ]
    return check(*runs, dtype=dtype, inherent=inherent, terms=terms or longest_sum(args))


def passes(*args, **kwargs):
    return all(v.ok for v in verdicts(*args, **kwargs))


GOOD = {
    "linear": (
        lambda x, w, b: F.gelu(F.linear(*wide(x, w, b)), approximate="tanh").to(x.dtype),
        linear_gelu,
        linear_args,
    ),
    "layer_norm": (
        lambda x, w, b: F.layer_norm(*wide(x)[:1], x.shape[-1:], *wide(w, b)).to(x.dtype),
        layer_norm,
        norm_args,
    ),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(*wide(q, k, v), is_causal=True).to(q.dtype),
        attention,
        attention_args,
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GOOD)
def test_good_kernels_pass_for_every_seed(name, dtype):
    fused, reference, make = GOOD[name]
    failed = [v for seed in SEEDS for v in verdicts(fused, reference, make(dtype, seed)) if not v.ok]
    assert not failed


def short_mlp(dtype, seed):
    """One row of 24 features: errors of so few numbers scatter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((24,), 1.0), ((40, 24), 24**-0.5), ((24, 40), 40**-0.5)
    x, w1, w2 = (
        (torch.randn(n, generator=generator) * scale).to(dtype).requires_grad_() for n, scale in shapes
    )
    return x, w1, None, w2, None, None, "silu"


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_short_results_pass_and_wrong_ones_do_not(dtype):
    passed, spoilt = [], []
    wrong = 1.0 + 8 * torch.finfo(dtype).eps
    for seed in range(50):
        args = short_mlp(dtype, seed)
        passed += [v.ok for v in verdicts(mlp.fused, mlp.reference, args, inherent=True)]
        verdict, *_ = verdicts(lambda *args: mlp.fused(*args) * wrong, mlp.reference, args, inherent=True)
        spoilt.append(verdict.ok)
    assert sum(passed) >= 0.97 * len(passed)  # 0.87 of the first gradients without the allowance
    assert not any(spoilt)


@pytest.mark.parametrize("T", [48, 96, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_attention_passes_as_inherently_rounded(dtype, T):
    failed = [
        v
        for seed in SEEDS
        for v in verdicts(FlashAttention.apply, attention, attention_args(dtype, seed, T), inherent=True)
        if not v.ok
    ]
    assert not failed


def _truncating(x, w, b):
    return truncate(linear_gelu(*wide(x, w, b)), x.dtype)


def _dropped_term(x, w, b):
    return linear_gelu(x[:, 1:], w[:, 1:], b)


def _low_precision_blocks(x, w, b):
    blocks = [(xf @ wf.T).to(x.dtype) for xf, wf in zip(*(t.split(64, -1) for t in wide(x, w)), strict=True)]
    total = blocks[0]
    for block in blocks[1:]:
        total = total + block  # rounded at every step
    return F.gelu(total.float() + b.float(), approximate="tanh").to(x.dtype)


def _rounds_before_bias(x, w, b):
    return F.gelu((x.float() @ w.float().T).to(x.dtype).float() + b.float(), approximate="tanh").to(x.dtype)


def _erf_for_tanh(x, w, b):
    return linear_gelu(x, w, b, approximate="none")


def _forgotten_bias_column(x, w, b):
    keep = torch.ones_like(b)
    keep[17] = 0
    return linear_gelu(x, w, b * keep)


def _one_wrong_tile(x, w, b):
    y = linear_gelu(x, w, b)
    return torch.cat([y[:32], torch.cat([y[32:48, :80], y[32:48, 80:].roll(1, 0)], 1), y[48:]])


BAD_LINEAR = [_dropped_term, _erf_for_tanh, _forgotten_bias_column, _one_wrong_tile]
BAD_ROUNDING = [_truncating, _low_precision_blocks, _rounds_before_bias]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", BAD_LINEAR, ids=lambda f: f.__name__)
def test_wrong_linear_is_caught(bad, dtype):
    size = (
        {"M": 512, "N": 512} if bad is _erf_for_tanh else {}
    )  # 1 % above the floor in bfloat16: a bias, over many
    for seed in SEEDS:
        assert not passes(bad, linear_gelu, linear_args(dtype, seed, **size))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bad", BAD_ROUNDING, ids=lambda f: f.__name__)
def test_careless_rounding_is_caught(bad, dtype):
    for seed in SEEDS:
        assert not passes(bad, linear_gelu, linear_args(dtype, seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_variance_is_caught(dtype):
    for seed in SEEDS:
        assert not passes(lambda *a: layer_norm(*a, correction=1), layer_norm, norm_args(dtype, seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrong_eps_is_caught_on_small_inputs(dtype):
    for seed in SEEDS:
        args = norm_args(dtype, seed, scale=1e-3)
        assert not passes(lambda *a: layer_norm(*a, eps=1e-6), layer_norm, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "bad",
    [dict(shift=1), dict(shift=-1), dict(scale=63**-0.5)],
    ids=["sees_next", "blind_to_itself", "scale"],
)
def test_wrong_attention_is_caught(bad, dtype):
    for seed in SEEDS:
        assert not passes(
            lambda *a: attention(*a, **bad), attention, attention_args(dtype, seed), inherent=True
        )


@pytest.mark.parametrize("row", [0, 95], ids=["first", "last"])
def test_one_wrong_row_of_attention_is_caught(row):
    def bad(q, k, v):
        o = attention(q, k, v)
        return torch.cat([o[..., :row, :], o[..., row : row + 1, :] * 1.02, o[..., row + 1 :, :]], -2)

    for seed in SEEDS:
        assert not passes(bad, attention, attention_args(torch.bfloat16, seed), inherent=True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_products_bound_each_element(dtype):
    x, w, _ = (t.detach() for t in linear_args(dtype, 0))
    truth = x.double() @ w.double().T
    products = {"output": x.double().abs() @ w.double().abs().T}
    eager = {"output": truth.to(dtype)}
    good = check(eager, eager, {"output": truth}, dtype=dtype, terms=256, products=products)
    assert good[0].ok
    wrong = eager["output"].clone()
    wrong[3, 5] *= 1 + 4 * torch.finfo(dtype).eps
    bad = check({"output": wrong}, eager, {"output": truth}, dtype=dtype, terms=256, products=products)
    assert not bad[0].ok and "sum of products" in bad[0].reason


def test_tf32_operands_pass_and_bfloat16_operands_do_not():
    args = linear_args(torch.float32, 0)

    def cut(bits):
        def fn(x, w, b):
            mask = -(1 << bits)
            xc, wc = ((t.detach().view(torch.int32) & mask).view(torch.float32) for t in (x, w))
            return F.gelu((x + (xc - x).detach()) @ (w + (wc - w).detach()).T + b, approximate="tanh")

        return fn

    def judge(fn):
        runs = [
            results_and_grads(f, a) for f, a in ((fn, args), (linear_gelu, args), (linear_gelu, widen(args)))
        ]
        return check(*runs, dtype=torch.float32, terms=256, tf32=True)

    assert all(v.ok for v in judge(cut(13)))
    assert not all(v.ok for v in judge(cut(16)))


# What is not a matter of size


def one(fused, truth, eager=None, dtype=torch.bfloat16, **kwargs):
    """The verdict on a single result; eager defaults to the truth, rounded."""
    eager = truth.to(fused.dtype) if eager is None else eager
    (verdict,) = check(
        {"output": fused},
        {"output": eager},
        {"output": truth},
        dtype=dtype,
        terms=kwargs.pop("terms", 64),
        **kwargs,
    )
    return verdict


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_elements_must_agree(value):
    truth = torch.randn(32, 32, dtype=torch.float64)
    truth[3, 4] = value
    good = truth.to(torch.bfloat16)
    assert one(good, truth).ok
    bad = good.clone()
    bad[3, 4] = 1.0
    verdict = one(bad, truth)
    assert not verdict.ok and "finite" in verdict.reason
    bad = good.clone()
    bad[5, 5] = value
    assert not one(bad, truth).ok


def test_overflow_of_the_dtype_is_expected_where_rounding_overflows():
    truth = torch.randn(32, 32, dtype=torch.float64)
    truth[0, 0] = 1e6
    assert one(truth.to(torch.float16), truth, dtype=torch.float16).ok
    assert not one(truth.clamp(max=6e4).to(torch.float16), truth, dtype=torch.float16).ok


def test_zero_truth_wants_zero():
    truth = torch.zeros(16, 16, dtype=torch.float64)
    assert one(truth.to(torch.bfloat16), truth).ok
    verdict = one(truth.to(torch.bfloat16) + 1e-3, truth)
    assert not verdict.ok and "zero" in verdict.reason


def test_empty_result_passes_and_says_so():
    truth = torch.empty(0, 8, dtype=torch.float64)
    verdict = one(truth.to(torch.float16), truth)
    assert verdict.ok and "empty" in verdict.reason


def test_dtype_shape_and_missing_results_are_refused():
    truth = torch.randn(4, 4, dtype=torch.float64)
    assert "float32" in one(truth.float(), truth, eager=truth.to(torch.bfloat16)).reason
    assert "shapes" in one(truth.to(torch.bfloat16)[:2], truth, eager=truth.to(torch.bfloat16)).reason
    (verdict,) = check({}, {"output": truth.float()}, {"output": truth}, dtype=torch.float32, terms=1)
    assert not verdict.ok and "missing" in verdict.reason


def test_constant_truth_still_has_a_floor():
    truth = torch.ones(32, 32, dtype=torch.float64)
    assert one(truth.to(torch.bfloat16), truth).ok
    assert not one((truth * 1.01).to(torch.bfloat16), truth).ok


def test_ill_conditioned_results_are_only_held_to_eager():
    truth = 1e-6 * torch.randn(64, 2, dtype=torch.float64)  # dx of a norm over two columns: all of it cancels
    eager = (truth + 1e-4 * torch.randn(64, 2, dtype=torch.float64)).float()
    fused = (truth + 1e-4 * torch.randn(64, 2, dtype=torch.float64)).float()
    verdict = one(fused, truth, eager, dtype=torch.float32)
    assert verdict.ok and "ill-conditioned" in verdict.reason
    assert not one(fused * 10, truth, eager, dtype=torch.float32).ok


# Collecting results


def test_results_and_grads_names_tuples_and_skips_what_has_no_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    frozen = torch.randn(4)
    unused = torch.randn(2, requires_grad=True)

    def fn(x, frozen, unused, eps):
        return x * frozen + eps, x.new_empty(0), x.argmax(-1), None

    results = results_and_grads(fn, (x, frozen, unused, 1.0))
    assert list(results) == ["output0", "output1", "output2", "grad_0", "grad_2"]
    assert results["grad_2"].eq(0).all() and results["output1"].shape == (0,)
    assert x.grad is None and not any(t.requires_grad for t in results.values())


def test_every_dtype_sees_the_same_random_gradients():
    grads = [
        results_and_grads(
            lambda x: x.clone(), (torch.zeros(64, 64, dtype=dtype, requires_grad=True),), seed=3
        )["grad_0"]
        for dtype in (torch.float64, *DTYPES)
    ]
    assert all(torch.equal(grads[0], g.double()) for g in grads) and grads[0].std() > 0.9


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(6, 8).T,
        lambda: torch.randn(6, 16)[:, 3::2],
        lambda: torch.randn(1, 8).expand(6, 8),
        lambda: torch.randn(40).unfold(0, 8, 4),
        lambda: torch.randn(0, 3),
        lambda: torch.randn(()),
    ],
    ids=["transposed", "sliced", "expanded", "overlapping", "empty", "scalar"],
)
def test_copies_keep_values_strides_and_alignment(make):
    x = make()
    seen = []
    results_and_grads(lambda t: seen.append(t) or t * 2, (x.requires_grad_(),))
    (wide_x,) = widen((x,))
    for copy in (*seen, wide_x):
        assert copy.stride() == x.stride() and torch.equal(copy.to(x.dtype), x) and copy.requires_grad
        assert copy.data_ptr() != x.data_ptr() or x.numel() == 0
    assert (seen[0].data_ptr() - x.data_ptr()) % 16 == 0 or x.numel() == 0
    assert wide_x.dtype == torch.float64


def test_deterministic_notices_one_bit():
    x = torch.randn(8, 8, requires_grad=True)
    assert deterministic(lambda t: t.sin(), (x,))
    calls = []

    def drifting(t):
        calls.append(1)
        return t + (2.0**-20 if len(calls) == 3 else 0.0)

    assert not deterministic(drifting, (x,))


def test_longest_sum_is_the_largest_row_or_column():
    assert longest_sum((torch.empty(2, 3, 5), torch.empty(7), 1.0, None)) == 7
    assert longest_sum((torch.empty(4, 50, 5),)) == 200
    assert longest_sum((1.0,)) == 1
