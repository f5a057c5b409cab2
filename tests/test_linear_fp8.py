"""linear_fp8 on the CPU: parity, straight-through gradients, delayed scales, awkward values, bad input."""

from __future__ import annotations

import dataclasses
import io
import math

import fp8_checks as checks
import hypothesis.strategies as st
import op_checks
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.fp8_history import DelayedScales
from fusekit.kernels.fp8_operand import fp8_operand
from fusekit.kernels.linear_fp8 import OP
from fusekit.kernels.op import DTYPES
from fusekit.kernels.parity import deterministic, results_and_grads, widen
from fusekit.kernels.recipe import PRESETS, Recipe

presets = pytest.mark.parametrize("name", PRESETS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
EXACT = {name: dataclasses.replace(r, accumulation="exact").token() for name, r in PRESETS.items()}


@presets
@every_dtype
def test_parity(name: str, dtype: torch.dtype, device: str) -> None:
    for recipe in (name, EXACT[name]):
        checks.assert_parity(checks.arguments(device, dtype, recipe))


@pytest.mark.parametrize("products", ["output", "grad_input", "grad_weight"])
def test_a_single_product_may_be_fp8(products: str, device: str) -> None:
    chosen = {p: p == products for p in ("output", "grad_input", "grad_weight")}
    args = checks.arguments(device, torch.bfloat16, Recipe(**chosen).token())
    checks.assert_parity(args)


def test_scales_that_are_no_powers_of_two(device: str) -> None:
    recipe = dataclasses.replace(PRESETS["fp8-rowwise"], power_of_two=False).token()
    checks.assert_parity(checks.arguments(device, torch.bfloat16, recipe))


@presets
def test_gradients_are_the_straight_through_ones_behind_an_activation(name: str, device: str) -> None:
    x, weight, bias, act, recipe = checks.arguments(device, torch.float32, name, "gelu")
    y = OP.fused(x, weight, bias, act, recipe)
    dy = checks.draw(device, torch.float32, *y.shape, seed=5).detach()
    found = torch.autograd.grad(y, (x, weight, bias), dy)
    plain = dataclasses.replace(PRESETS[name], output=True)
    z = OP.fused(x.detach(), weight.detach(), bias.detach(), "none", plain.token())
    dz = torch.empty_like(dy)
    ACTIVATIONS["gelu"].cpu_backward(dy, z, dz)
    dz = dz.view(-1, dz.shape[-1])
    dx, dw = checks.straight_through(x.view(-1, x.shape[-1]), weight, dz, PRESETS[name])
    assert checks.error(found[0].view(dx.shape), dx) < 1e-6 and checks.error(found[1], dw) < 1e-6
    assert checks.error(found[2], dz.double().sum(0)) < 1e-6


@presets
def test_as_close_to_the_unquantised_layer_as_fp8_allows(name: str, device: str) -> None:
    args = checks.arguments(device, torch.float32, name, shape=(256, 256, 256))
    fused = results_and_grads(OP.fused, args)
    exact = results_and_grads(lambda x, w, b, *_: F.linear(x.double(), w.double(), b.double()), args)
    assert checks.error(fused["output"], exact["output"]) < 1.25 * checks.IDEAL[PRESETS[name].forward]
    for grad in ("grad_0", "grad_1"):
        assert checks.error(fused[grad], exact[grad]) < 1.25 * checks.IDEAL[PRESETS[name].gradient]
    assert checks.error(fused["output"], exact["output"]) > 1e-2, "nothing was quantised"


@every_dtype
def test_master_weights_are_quantised_from_float32(dtype: torch.dtype, device: str) -> None:
    args = checks.arguments(device, dtype, EXACT["fp8-tensorwise"], master=True)
    results = results_and_grads(OP.fused, args)
    expected = results_and_grads(OP.reference, args)
    assert results["grad_1"].dtype == results["grad_2"].dtype == torch.float32
    exact = OP.reference(*widen(args)[:4], args[4])
    assert torch.equal(results["output"], exact.detach().to(dtype))
    for name in ("grad_0", "grad_1", "grad_2"):
        torch.testing.assert_close(results[name], expected[name], rtol=2e-2, atol=2e-2)


@presets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_float32_bias_is_not_rounded(name: str, dtype: torch.dtype, device: str) -> None:
    """Near -1 a sum with a bias that bfloat16 cannot hold shows the bias's own digits."""
    x, weight, _, act, recipe = checks.arguments(device, dtype, name)
    bias = torch.full((144,), -1 - 2.0**-12, requires_grad=True)
    x, weight = (torch.zeros_like(t).requires_grad_() for t in (x, weight))
    with torch.no_grad():
        x[..., 0], weight[:, 0] = 1.0, 1.0
    results = results_and_grads(OP.fused, (x, weight, bias, act, recipe))
    assert (results["output"] == -(2.0**-12)).all() and results["grad_2"].dtype == torch.float32


@presets
def test_exact_sums_do_not_depend_on_the_order_of_features(name: str, device: str) -> None:
    """Within a group, for groups of features are not the same elsewhere."""
    x, weight, bias, act, recipe = checks.arguments(device, torch.float32, EXACT[name], shape=(20, 32, 128))
    size = {"block": 128, "mx": 32}.get(PRESETS[name].scaling, 128)
    order = torch.cat([torch.randperm(size) + start for start in range(0, 128, size)])
    y = OP.fused(x, weight, bias, act, recipe)
    assert torch.equal(y, OP.fused(x[..., order], weight[:, order], bias, act, recipe))


@presets
def test_opcheck_fakes_and_compile(name: str, device: str) -> None:
    args = checks.arguments(device, torch.float32, name)
    torch.library.opcheck(OP.fused, args)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: OP.fused(*a), backend="aot_eager", fullgraph=True)
    op_checks.assert_same(results_and_grads(compiled, args), results_and_grads(OP.fused, args))


@every_dtype
def test_fake_tells_the_truth_of_every_sample(dtype: torch.dtype, device: str) -> None:
    op_checks.assert_fake_tells_the_truth(OP, device, dtype)
    for sample in op_checks.small_samples(OP, device, dtype):
        assert OP.supports(*sample.args) is None and deterministic(OP.fused, sample.args), sample.name


def test_the_contract_of_every_op(device: str) -> None:
    op_checks.assert_gradients_may_be_expanded(OP, device, torch.bfloat16)
    op_checks.assert_refuses_what_it_does_not_support(OP, device)
    op_checks.assert_double_backward_is_refused(OP, device)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_arguments(frozen: int, device: str) -> None:
    args = checks.arguments(device, torch.bfloat16, "fp8-rowwise")
    every = results_and_grads(OP.fused, args)
    some = results_and_grads(
        OP.fused, tuple(a.detach() if i == frozen else a for i, a in enumerate(args[:3])) + args[3:]
    )
    assert f"grad_{frozen}" not in some
    assert all(torch.equal(t, every[name]) for name, t in some.items())


def test_autocast_lowers_x_and_leaves_weight_and_scales(device: str) -> None:
    x, weight, bias, act, recipe = checks.arguments(device, torch.float32, Recipe(delayed=True).token())
    scale, amax = torch.tensor([64.0, 512.0, 64.0]), torch.zeros(3)
    with torch.autocast(device, torch.bfloat16):
        y = OP.fused(x, weight, bias, act, recipe, scale, amax)
    assert y.dtype == torch.bfloat16 and amax[0] == x.bfloat16().abs().max() and amax[1] == weight.abs().max()
    assert torch.equal(y, OP.fused(x.bfloat16(), weight, bias, act, recipe, scale))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 150), st.integers(0, 10), st.integers(0, 10), st.sampled_from(sorted(PRESETS)),
       st.integers(-60, 60), st.booleans())  # fmt: skip
def test_any_shape_and_magnitude(rows, n, k, name, exponent, frozen) -> None:
    """Multiples of 16 run and are finite, others are refused in a sentence."""
    N, K = 16 * n if n < 8 else 24, 16 * k if k < 8 else 40
    x = checks.draw("cpu", torch.float32, rows, K).detach() * 2.0**exponent
    weight = checks.draw("cpu", torch.float32, N, K).detach()
    x.requires_grad_(not frozen)
    weight.requires_grad_()
    if not N or not K or N % 16 or K % 16:
        assert "does not divide" in str(OP.supports(x, weight, None, "none", name))
        with pytest.raises(ValueError, match="does not divide"):
            OP.fused(x, weight, None, "none", name)
        return
    y = OP.fused(x, weight, None, "none", name)
    y.sum().backward()
    assert y.shape == (rows, N) and y.isfinite().all() and weight.grad.isfinite().all()
    if rows:  # against the values behind the codes: what FP8 costs a small product is a matter of luck
        exact = OP.reference(x.detach().double(), weight.detach().double(), None, "none", name)
        assert checks.error(y.detach(), exact) < 1e-6


@presets
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["x", "weight", "gradient"])
def test_what_is_not_finite_never_disappears(name: str, value: float, where: str, device: str) -> None:
    """e4m3 has no infinity: saturating one would make a step look healthy. Its whole group becomes NaN."""
    x, weight = checks.draw(device, torch.bfloat16, 40, 64), checks.draw(device, torch.bfloat16, 32, 64)
    dy = torch.ones(40, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        {"x": x, "weight": weight, "gradient": dy}[where][3, 5] = value
    y = OP.fused(x, weight, None, "none", name)
    y.backward(dy)
    results: dict[str, list[Tensor]] = {
        "x": [y[3], weight.grad[:, 5]],
        "weight": [y[:, 3], x.grad[:, 5]],
        "gradient": [x.grad[3], weight.grad[5]],
    }
    for result in results[where]:
        assert not result.isfinite().any()


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 3e38])
def test_zero_and_denormal_tensors(value: float, device: str) -> None:
    x = torch.full((20, 32), value, requires_grad=True)
    weight = torch.full((16, 32), 0.5, requires_grad=True)
    for name in PRESETS:
        y = OP.fused(x, weight * 2**-6 if value > 1 else weight, None, "none", name)
        exact = x.detach().double() @ weight.detach().double().t() * (2**-6 if value > 1 else 1)
        assert (
            not y.isnan().any() and (y.double() - exact).abs().max() <= 0.07 * exact.abs().max() + 2.0**-107
        )


def test_bad_input_is_named(device: str) -> None:
    x, weight, bias, *_ = checks.arguments(device, torch.bfloat16, "mxfp8")
    three = torch.ones(3)
    for args, sentence in (
        ((x, weight, bias, "gelu", "fp9"), "is no FP8 recipe"),
        ((x, weight, bias, "swish"), "is none of"),
        ((x, weight[:40], None), "does not divide"),
        ((x, weight.half(), None), "x's dtype or float32"),
        ((x, weight, bias[:-1]), "one value per output feature"),
        ((x, weight, None, "none", "mxfp8", None, None, [x]), "the 4 tensors of fp8_operand"),
        ((x, weight, None, "none", "mxfp8", None, None, [weight] * 4), "the operand has 144 rows"),
        ((x, weight, None, "none", Recipe(delayed=True).token(), three[:2]), "float32 (3,)"),
        ((x, weight, None, "none", "mxfp8", None, three), "has many; leave it out"),
    ):
        assert sentence in str(OP.supports(*args))
        with pytest.raises(ValueError) as caught:
            OP.fused(*args)
        assert sentence in str(caught.value)


# Operands quantised beforehand


@presets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("transposed", [False, True])
def test_given_operands_change_no_bit(name: str, dtype: torch.dtype, transposed: bool, device: str) -> None:
    """Both layouts, or only those that the forward pass takes; and the ops keep their contracts."""
    recipe = PRESETS[name]
    state = (torch.zeros(3), torch.zeros(3)) if recipe.delayed else (None, None)
    x, weight, bias, act, _ = checks.arguments(device, dtype, name, "gelu", master=True)
    if transposed:
        weight = weight.detach().t().contiguous().t().requires_grad_()
    inline = results_and_grads(OP.fused, (x, weight, bias, act, name, *state))
    for turned in (True, False):
        made = [(t, name, which, dtype, True, turned, *state) for which, t in enumerate((x, weight))]
        operands = [fp8_operand(*args) for args in made]
        args = (x, weight, bias, act, name, *state, *operands)
        given = results_and_grads(OP.fused, args)
        assert all(torch.equal(t, given[key]) for key, t in inline.items())
        assert not any(t.requires_grad for operand in operands for t in operand)
        for arguments in made:
            torch.library.opcheck(fp8_operand, arguments)
        torch.library.opcheck(OP.fused, args)


# Delayed scales

DELAYED = Recipe(delayed=True)


def test_a_delayed_scale_is_used_and_amax_gathered(device: str) -> None:
    x, weight, bias, act, _ = checks.arguments(device, torch.bfloat16, "")
    scale, amax = torch.tensor([64.0, 512.0, 1024.0]), torch.tensor([0.0, 9.0, 0.0])
    args = (x, weight, bias, act, DELAYED.token(), scale, amax)
    results = results_and_grads(lambda *a: OP.fused(*a[:6], amax), args)
    expected = results_and_grads(OP.reference, args)
    for name, t in expected.items():
        torch.testing.assert_close(results[name].float(), t.float(), rtol=2e-2, atol=2e-2)
    assert amax[0] == x.abs().max() and amax[1] == 9.0 and amax[2] > 1
    torch.library.opcheck(OP.fused, args)


def test_a_checkpoints_second_forward_pass_changes_nothing(device: str) -> None:
    """Nor do micro-batches move a history: only `update` does."""
    scales = DelayedScales([DELAYED], length=4)
    x, weight, bias, act, _ = checks.arguments(device, torch.bfloat16, "")
    token = DELAYED.token()

    def step(run) -> tuple[list[Tensor], Tensor]:
        y = run(lambda x: OP.fused(x, weight, bias, act, token, *scales.layer(0)), x)
        return list(torch.autograd.grad(y.float().square().sum(), (x, weight))), scales.amax.clone()

    plain = step(lambda f, x: f(x))
    scales.amax.zero_()
    again = step(lambda f, x: checkpoint(f, x, use_reentrant=False))
    op_checks.assert_same(plain[0], again[0])
    assert torch.equal(plain[1], again[1]) and not scales.history.any() and not scales.cursor.any()


def reference_update(history: list[float], amax: float, scale: float, largest: float, length: int) -> float:
    if not 0 < amax < float("inf"):
        return scale  # it stands still
    history.append(amax)
    del history[:-length]
    highest = max(history)
    return 2.0 ** math.floor(math.log2(largest / max(highest, 1.75 * 2.0**-92)))


@pytest.mark.parametrize("length", [1, 3, 16])
def test_histories_move_once_an_update(length: int) -> None:
    recipes = [DELAYED, dataclasses.replace(DELAYED, gradient=torch.float8_e4m3fn)]
    scales = DelayedScales(recipes, length=length)
    largest = [448.0, 448.0, 57344.0, 448.0, 448.0, 448.0]
    histories: list[list[float]] = [[] for _ in largest]
    expected = [0.0] * 6
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        amax = torch.randn(6, generator=generator).mul(4).exp()
        if step == 3:
            amax[:4] = torch.tensor([torch.inf, torch.nan, 0.0, 2.0**-149])
        scales.amax.copy_(amax)
        scales.update()
        for i, value in enumerate(amax.tolist()):
            expected[i] = reference_update(histories[i], value, expected[i], largest[i], length)
        assert scales.scale.tolist() == expected and not scales.amax.any()


AMAX = st.sampled_from([0.0, 2.0**-149, 1e-30, 0.3, 1.75, 1.7500001, 448.0, 3e38, float("inf"), float("nan")])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.lists(AMAX, min_size=3, max_size=3), st.integers(0, 7),
                                             st.booleans()), max_size=9))  # fmt: skip
def test_any_sequence_of_steps(length: int, steps: list[tuple[list[float], int, bool]]) -> None:
    """Slots that are not taken keep what they gathered; a skipped step is forgotten."""
    scales = DelayedScales([DELAYED], length=length)
    histories: list[list[float]] = [[], [], []]
    expected, waiting = [0.0] * 3, [0.0] * 3
    for amax, mask, skipped in steps:
        taken = [mask >> i & 1 for i in range(3)]
        for i, value in enumerate(amax):
            patterns = torch.tensor([value, waiting[i]]).view(torch.int32)
            waiting[i] = patterns.max().view(torch.float32).item()  # NaN is the largest
        scales.amax.copy_(torch.tensor(waiting))
        scales.update(taken=torch.tensor(taken, dtype=torch.int32), skip=torch.tensor(float(skipped)))
        for i in filter(taken.__getitem__, range(3)):
            if not skipped:
                largest = 448.0 if i < 2 else 57344.0
                expected[i] = reference_update(histories[i], waiting[i], expected[i], largest, length)
            waiting[i] = 0.0
        assert scales.scale.tolist() == expected
        assert torch.equal(scales.amax.view(torch.int32), torch.tensor(waiting).view(torch.int32))
        assert scales.history.amax(1).tolist() == [max(h, default=0.0) for h in histories]


def test_a_margin_leaves_headroom() -> None:
    plain, wide = (DelayedScales([DELAYED], length=2, margin=m) for m in (0, 2))
    for scales in (plain, wide):
        scales.amax.fill_(3.0)
        scales.update()
    assert torch.equal(plain.scale, 4 * wide.scale)


def test_scales_resume_from_a_checkpoint() -> None:
    first, second = DelayedScales([DELAYED], length=4), DelayedScales([DELAYED], length=4)
    view = second.layer(0)[0]
    for value in (3.0, 5.0):
        first.amax.fill_(value)
        first.update()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer))
    for scales in (first, second):
        scales.amax.fill_(0.25)
        scales.update()
    op_checks.assert_same(first.state_dict(), second.state_dict())
    assert torch.equal(view, second.scale)
    with pytest.raises(ValueError, match="other layers or another history length"):
        DelayedScales([DELAYED, DELAYED], length=4).load_state_dict(first.state_dict())


@pytest.mark.parametrize(("options", "sentence"), [({"length": 0}, "1 to 1024"), ({"margin": 9}, "0 to 8")])
def test_bad_histories_are_refused(options, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DelayedScales([DELAYED], **options)


@pytest.mark.parametrize("recipe", ["fp8-tensorwise", "fp8-rowwise", "fp8-block", "mxfp8"])
def test_one_row(recipe):
    """A single token: the gradient of the weight contracts over one row, a column that is also a row."""
    x, weight = torch.randn(1, 32), torch.randn(48, 32)
    args = (x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_())
    y = torch.ops.fusekit.linear_fp8(*args, None, "none", recipe)
    y.sum().backward()
    exact = torch.ones(48, 1) @ x.bfloat16().float()
    assert ((args[1].grad.float() - exact).norm() / exact.norm()) < 0.05
