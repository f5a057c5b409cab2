"""rope and rms_norm_rope kernels: head sizes, programs that loop, gradients, frozen inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusekit.kernels import OPS, rotation
from fusekit.kernels.op import Op
from fusekit.kernels.parity import check, deterministic, longest_sum, results_and_grads, widen
from fusekit.kernels.rope import tables

ROPE, NORM_ROPE = OPS["rope"], OPS["rms_norm_rope"]


@pytest.fixture
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four programs share all rows of a backward pass, as on a large input."""
    monkeypatch.setattr(rotation, "multiprocessors", lambda x: 1)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to("cuda", dtype)


def heads(B: int, T: int, H: int, D: int) -> Tensor:
    return draw(B, T, H, D).transpose(1, 2).requires_grad_()


def assert_parity(op: Op, args: tuple[Any, ...]) -> None:
    runs = [results_and_grads(fn, given) for fn, given in (
        (op.fused, args), (op.reference, args), (op.reference, widen(args)),
    )]  # fmt: skip
    verdicts = check(*runs, dtype=args[0].dtype, terms=longest_sum(args))
    assert all(v.ok for v in verdicts), "\n".join(map(str, verdicts))


@pytest.mark.parametrize(
    "D, rotary, interleaved", [(2, 2, False), (96, 96, True), (72, 18, False), (256, 256, False)]
)
def test_head_sizes(D: int, rotary: int, interleaved: bool) -> None:
    cos, sin = tables("cuda", torch.bfloat16, 11, rotary // 2)
    assert_parity(ROPE, (heads(1, 11, 3, D), cos, sin, interleaved, rotary))
    if D > 2:
        weight = draw(D).requires_grad_()
        assert_parity(NORM_ROPE, (heads(1, 11, 3, D), weight, cos, sin, 1e-6, 1.0, interleaved, rotary))


@pytest.mark.parametrize("interleaved", [False, True])
def test_programs_loop_over_rows(one_multiprocessor: None, interleaved: bool) -> None:
    cos, sin = tables("cuda", torch.bfloat16, 61, 64, "halves")
    args = (heads(2, 61, 3, 80), draw(80).requires_grad_(), cos, sin, 1e-6, 0.0, interleaved, 64)
    assert_parity(NORM_ROPE, args)
    assert deterministic(NORM_ROPE.fused, args, runs=2)


def test_gradients_that_lie_otherwise() -> None:
    """Attention hands back gradients in its own order; so does a sum, with stride 0."""
    cos, sin = tables("cuda", torch.float32, 9, 16, "halves")
    x = draw(2, 9, 3, 16, dtype=torch.float32).transpose(1, 2).requires_grad_()
    for dy in (draw(2, 3, 9, 16, dtype=torch.float32), torch.ones((), device="cuda").expand(2, 3, 9, 16)):
        for op, args in ((ROPE, (x, cos, sin)), (NORM_ROPE, (x, None, cos, sin, 1e-6))):
            fused, exact = (torch.autograd.grad(fn(*args), x, dy)[0] for fn in (op.fused, op.reference))
            torch.testing.assert_close(fused, exact)
            assert fused.stride() == x.stride()


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs(frozen: int) -> None:
    cos, sin = tables("cuda", torch.bfloat16, 9, 32, "halves")
    args = (heads(1, 9, 2, 32), draw(32).requires_grad_(), cos, sin, 1e-6)
    args[frozen].requires_grad_(False)
    assert_parity(NORM_ROPE, args)


def test_two_and_three_dimensions() -> None:
    cos, sin = tables("cuda", torch.bfloat16, 10, 24, "halves")
    assert_parity(ROPE, (draw(10, 24).requires_grad_(), cos[0, 0], sin[0, 0]))
    assert_parity(ROPE, (draw(3, 10, 24).requires_grad_(), cos[0], sin[0]))
    assert_parity(ROPE, (heads(2, 10, 3, 24), cos[0, 0], sin[0, 0]))


def test_wide_heads_are_refused() -> None:
    cos, sin = tables("cuda", torch.bfloat16, 3, 512, "halves")
    with pytest.raises(ValueError, match="512 features exceed"):
        ROPE.fused(heads(1, 3, 1, 512), cos, sin)
