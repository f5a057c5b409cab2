"""linear_fp8's kernels: native and decoded products of every scaling, the CPU's bits, delayed scales."""

from __future__ import annotations

import dataclasses

import fp8_checks as checks
import pytest
import torch
from torch import Tensor

from fusekit.kernels import fp8_gemm, linear_fp8_cpu
from fusekit.kernels.fp8_cast import cast, empty_operand
from fusekit.kernels.fp8_gemm import Tile, product
from fusekit.kernels.fp8_history import DelayedScales
from fusekit.kernels.fp8_operand import fp8_operand
from fusekit.kernels.linear_fp8 import OP
from fusekit.kernels.parity import check, deterministic, results_and_grads
from fusekit.kernels.recipe import PRESETS, Recipe

presets = pytest.mark.parametrize("name", PRESETS)
SMALL = Tile(64, 64, 128, 4, 2)


@presets
def test_parity(name: str) -> None:
    dtype = torch.float16 if name == "mxfp8" else torch.bfloat16
    checks.assert_parity(checks.arguments("cuda", dtype, name, shape=(70, 144, 272)))


def test_float32_and_plain_float32_sums() -> None:
    recipe = dataclasses.replace(PRESETS["fp8-block"], accumulation="fp32").token()
    checks.assert_parity(checks.arguments("cuda", torch.float32, recipe))


@presets
@pytest.mark.parametrize("native", [True, False], ids=["native", "decoded"])
@pytest.mark.parametrize("gradient", [False, True], ids=["output", "gradient"])
def test_products_over_several_tiles(name: str, native: bool, gradient: bool, sanitizer: bool) -> None:
    """Ragged tiles, several steps of the contraction, both kinds of code; against the decoded codes."""
    recipe = PRESETS[name]
    if recipe.scaling == "mx" and native:
        pytest.skip("Microscaling is decoded on every architecture")
    M, N, K = 130, 80, 272
    dtypes = (recipe.gradient if gradient else recipe.forward), recipe.forward
    square = recipe.scaling == "block" and not gradient
    tensors = [checks.draw("cuda", torch.float32, rows, K).detach() for rows in (M, N)]
    tensors[0] *= torch.linspace(-12, 12, M, device="cuda").exp2()[:, None] if recipe.scaling == "row" else 1
    operands = [empty_operand(t, recipe, square and i == 1, False) for i, t in enumerate(tensors)]
    for i, t in enumerate(tensors):
        cast(t, dtypes[i], recipe, operands[i], None, weight=square and i == 1)
    a, b = (
        fp8_gemm.values(operand, recipe, dtype, K, square and i == 1)
        for i, (operand, dtype) in enumerate(zip(operands, dtypes, strict=True))
    )
    output = torch.empty(M, N, device="cuda")
    settings = {"contraction": K, "square": square, "native": native}
    product(*operands, output, recipe, dtypes, tile=SMALL, **settings)
    exact = {"output": a.double() @ b.double().t()}
    products = a.double().abs() @ b.double().abs().t()
    if (
        native and not sanitizer
    ):  # the tensor core keeps 14 bits or so of a sum until it leaves after 128 terms
        assert checks.error(output, exact["output"]) < 2e-4
        assert ((output - exact["output"]).abs() <= 2.0**-10 * products).all()
    else:
        (verdict,) = check(
            {"output": output}, {"output": a @ b.t()}, exact, dtype=torch.float32, terms=K,
            products={"output": products},
        )  # fmt: skip
        assert verdict.ok, verdict.reason
    if name == "fp8-tensorwise" and native:
        fast = torch.empty_like(output)
        product(*operands, fast, recipe, dtypes, tile=SMALL, fast=True, **settings)
        torch.testing.assert_close(fast, output, rtol=1e-3, atol=1e-3 * float(output.abs().max()))


@presets
def test_exact_sums_have_the_bits_of_the_cpu(name: str) -> None:
    """Codes, scales and sums: output and gradients of a CPU and a GPU are the same tensors."""
    recipe = dataclasses.replace(PRESETS[name], accumulation="exact")
    x, weight, bias, act, token = checks.arguments("cuda", torch.bfloat16, recipe.token())
    fused = results_and_grads(OP.fused, (x, weight, bias, act, token))
    rows = x.detach().cpu().reshape(-1, x.shape[-1])
    y = torch.empty(len(rows), weight.shape[0], dtype=x.dtype)
    saved = torch.empty(rows.shape), torch.empty(weight.shape)
    linear_fp8_cpu.forward(
        rows, weight.detach().cpu(), bias.detach().cpu(), act, recipe, None, None, y, None, *saved
    )
    assert torch.equal(fused["output"].cpu().view(y.shape), y)
    g = checks.draw("cpu", torch.bfloat16, *y.shape, seed=4).detach()
    kept = [s if used else t for s, t, used in zip(
        saved, (rows, weight.detach().cpu()), (recipe.grad_weight, recipe.grad_input), strict=True
    )]  # fmt: skip
    expected = [torch.empty_like(t.detach().cpu()) for t in (rows, weight, bias)]
    linear_fp8_cpu.backward(g, kept[0], kept[1].to(torch.float32), None, act, recipe, None, None, *expected)
    shaped = g.view(*x.shape[:-1], -1).to("cuda")
    found = torch.autograd.grad(OP.fused(x, weight, bias, act, token), (x, weight), shaped)
    assert torch.equal(found[0].cpu().view(rows.shape), expected[0])
    if recipe.grad_weight:
        assert torch.equal(found[1].cpu(), expected[1])


def test_an_activation_and_the_same_bits_every_run(sanitizer: bool) -> None:
    args = checks.arguments("cuda", torch.float32, "fp8-tensorwise", "gelu", shape=(34, 48, 64))
    assert deterministic(OP.fused, args, runs=2)
    results = results_and_grads(OP.fused, args)
    expected = results_and_grads(OP.reference, args)
    narrow = 1e-6 if sanitizer else 3e-4  # the tensor core's own sums
    assert checks.error(results["output"], expected["output"].double()) < narrow
    for name in ("grad_0", "grad_1"):
        assert checks.error(results[name], expected[name].double()) < 0.03  # codes of dz near a tie


def test_empty_batches_vectors_and_frozen_arguments() -> None:
    x, weight = checks.draw("cuda", torch.bfloat16, 0, 32), checks.draw("cuda", torch.bfloat16, 16, 32)
    y = OP.fused(x, weight)
    y.sum().backward()
    assert y.shape == (0, 16) and not weight.grad.any() and x.grad.shape == x.shape
    vector = checks.draw("cuda", torch.bfloat16, 32)
    assert OP.fused(vector, weight.detach()).shape == (16,)
    OP.fused(vector.detach(), weight, None, "none", "fp8-block").sum().backward()
    assert weight.grad.any()


@presets
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_never_disappears(name: str, value: float) -> None:
    x, weight = (
        checks.draw("cuda", torch.bfloat16, 40, 64).detach(),
        checks.draw("cuda", torch.bfloat16, 32, 64),
    )
    x[3, 5] = value
    y = OP.fused(x, weight, None, "none", name)
    y.sum().backward()
    assert not y[3].isfinite().any() and not weight.grad[:, 5].isfinite().any()


def test_delayed_scales() -> None:
    token = Recipe(delayed=True).token()
    x, weight, bias, act, _ = checks.arguments("cuda", torch.bfloat16, "")
    scale, amax = torch.tensor([64.0, 512.0, 1024.0], device="cuda"), torch.zeros(3, device="cuda")
    checks.assert_parity((x, weight, bias, act, token, scale))
    OP.fused(x, weight, bias, act, token, scale, amax).sum().backward()
    assert amax.tolist() == [x.abs().max().item(), weight.abs().max().item(), 1.0]
    current = torch.zeros(3, device="cuda")
    OP.fused(x, weight, bias, act, "fp8-tensorwise", None, current).sum().backward()
    assert torch.equal(current, amax)


@pytest.mark.parametrize("length", [1, 3, 20])
def test_histories_have_the_bits_of_the_cpu(length: int) -> None:
    """update_kernel against the CPU's calls, with amax of every kind."""
    on_gpu = DelayedScales([Recipe(), PRESETS["fp8-block"]], length=length, device="cuda")
    generator = torch.Generator().manual_seed(0)
    history, scale, cursor = torch.zeros(6, length), torch.zeros(6), torch.zeros(6, dtype=torch.int64)
    taken = torch.tensor([1, 1, 1, 1, 1, 0], dtype=torch.int32)
    for step in range(5):
        amax = torch.randn(6, generator=generator).mul(4).exp()
        if step == 2:
            amax[:4] = torch.tensor([torch.inf, torch.nan, 0.0, 2.0**-149])
        skip = torch.tensor(float(step == 3))
        on_gpu.amax.copy_(amax)
        on_gpu.update(taken=taken.to("cuda"), skip=skip.to("cuda"))
        moves = amax.isfinite() & (amax > 0) & (taken > 0) & (skip == 0)
        for slot in moves.nonzero().flatten().tolist():
            history[slot, cursor[slot]] = amax[slot]
        cursor = torch.where(moves, (cursor + 1) % length, cursor)
        highest = history.amax(1).clamp(min=1.75 * 2.0**-92)
        largest = torch.where(on_gpu.top.cpu() == 8, 448.0, 57344.0)
        fresh = (largest.double() / highest.double()).log2().floor().exp2().float()
        scale = torch.where(moves, fresh, scale)
        assert torch.equal(on_gpu.scale.cpu(), scale) and torch.equal(on_gpu.history.cpu(), history)
        assert torch.equal(on_gpu.amax.cpu(), torch.where(taken > 0, 0, amax)) and torch.equal(
            on_gpu.cursor.cpu(), cursor
        )


@pytest.mark.parametrize("name", [*PRESETS, "delayed", "first step"])
def test_operands_made_beforehand_give_the_same_bits(name: str) -> None:
    """Where no step was seen (scale 0) a delayed layer has the bits of the current scale."""
    recipe = PRESETS.get(name, Recipe(delayed=True))
    state: tuple[Tensor | None, Tensor | None] = (None, None)
    if recipe.delayed:
        known = [0.0] * 3 if name == "first step" else [64.0, 512.0, 1024.0]
        state = torch.tensor(known, device="cuda"), torch.zeros(3, device="cuda")
    x, weight, bias, act, token = checks.arguments("cuda", torch.bfloat16, recipe.token(), "relu")
    x_operand = fp8_operand(x, token, 0, x.dtype, True, True, *state)
    w_operand = fp8_operand(weight, token, 1, x.dtype, True, True, *state)
    inline = results_and_grads(OP.fused, (x, weight, bias, act, token, *state))
    given = results_and_grads(OP.fused, (x, weight, bias, act, token, *state, x_operand, w_operand))
    assert all(torch.equal(t, given[k]) for k, t in inline.items())
    assert not any(t.requires_grad for t in (*x_operand, *w_operand))
    if recipe.delayed:
        assert state[1][:2].tolist() == [x.abs().max().item(), weight.abs().max().item()]
    if name == "first step":
        current = results_and_grads(OP.fused, (x, weight, bias, act, "fp8-tensorwise"))
        assert all(torch.equal(t, inline[k]) for k, t in current.items())
