"""Unusual input of every GEMM op: the right answer, with every gradient, or a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from input_checks import CASES, Case, arguments, assert_as_eager, label, maker
from torch import Tensor

from fusekit.kernels import OPS

every_case = pytest.mark.parametrize("case", CASES, ids=label)

RIGHT: dict[str, Callable[[], Tensor]] = {
    "K = 0": lambda: maker("cpu")(5, 0),
    "M = 0": lambda: maker("cpu")(0, 8),
    "M = 0 and K = 0": lambda: maker("cpu")(0, 0),
    "M = 0, three dimensions": lambda: maker("cpu")(2, 0, 8),
    "one dimension": lambda: maker("cpu")(8),
    "not contiguous": lambda: maker("cpu")(8, 5).detach().t().requires_grad_(),
    "heads and tokens swapped": lambda: maker("cpu")(5, 2, 8).detach().transpose(0, 1).requires_grad_(),
    "every second feature": lambda: maker("cpu")(5, 16).detach()[:, ::2].requires_grad_(),
    "expanded rows": lambda: maker("cpu")(1, 8).detach().expand(5, 8).requires_grad_(),
    "expanded features": lambda: maker("cpu")(5, 1).detach().expand(5, 8).requires_grad_(),
    "no gradient": lambda: maker("cpu")(5, 8).detach(),
}


@every_case
@pytest.mark.parametrize("x", RIGHT.values(), ids=RIGHT)
def test_right_answer(case: Case, x: Callable[[], Tensor]) -> None:
    assert_as_eager(case, arguments(case, x(), "cpu"))


# Of a matrix, a vector or a residual; values stay, so eager is what it was.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "by columns": lambda t: t.t().contiguous().t() if t.dim() > 1 else t,
    "every second": lambda t: torch.stack((t, t), -1)[..., 0],
    "cut out": lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
    "expanded": lambda t: t[:1].expand(t.shape),
    "backwards in memory": lambda t: t.flip(0).contiguous()[torch.arange(len(t) - 1, -1, -1)],
}


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_every_layout(case: Case, layout: str) -> None:
    x, *rest = arguments(case, maker("cpu")(5, 8), "cpu")
    rest = [LAYOUTS[layout](t.detach()).requires_grad_() if isinstance(t, Tensor) else t for t in rest]
    assert_as_eager(case, (x, *rest))


@every_case
@pytest.mark.parametrize("layout", ["expanded", "by columns"])
def test_output_gradients_of_every_layout(case: Case, layout: str) -> None:
    """A sum's gradient is one number expanded; a transpose behind the op hands columns back."""
    assert_same_gradients(case, arguments(case, maker("cpu")(5, 8), "cpu"), LAYOUTS[layout])


def assert_same_gradients(case: Case, args: tuple[Any, ...], arrange: Callable[[Tensor], Tensor]) -> None:
    """Every output has a gradient of its own, also where eager does not ask for it."""
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    found = []
    for function in (OPS[case.name].fused, case.eager):
        returned = function(*args)
        outputs = enumerate([returned] if isinstance(returned, Tensor) else returned)
        wanted = {y: arrange(torch.full_like(y, 1 + i)) for i, y in outputs if y.requires_grad}
        found.append(torch.autograd.grad(list(wanted), leaves, list(wanted.values())))
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-5)


@every_case
def test_each_weight_without_gradient(case: Case) -> None:
    count = sum(isinstance(a, Tensor) for a in arguments(case, maker("cpu")(5, 8), "cpu"))
    for frozen in range(1, count):
        args = arguments(case, maker("cpu")(5, 8), "cpu")
        [a for a in args if isinstance(a, Tensor)][frozen].requires_grad_(False)
        assert_as_eager(case, args)


@every_case
def test_only_one_gradient_is_wanted(case: Case) -> None:
    count = sum(isinstance(a, Tensor) for a in arguments(case, maker("cpu")(5, 8), "cpu"))
    for alone in range(count):
        args = arguments(case, maker("cpu")(5, 8), "cpu")
        for i, tensor in enumerate(a for a in args if isinstance(a, Tensor)):
            tensor.requires_grad_(i == alone)
        assert_same_gradients(case, args, Tensor.clone)


@every_case
def test_nothing_needs_a_gradient(case: Case) -> None:
    args = tuple(
        a.detach() if isinstance(a, Tensor) else a for a in arguments(case, maker("cpu")(5, 8), "cpu")
    )
    returned, expected = OPS[case.name].fused(*args), case.eager(*args)
    torch.testing.assert_close(returned, expected, rtol=2e-5, atol=2e-5)
    first = returned if isinstance(returned, Tensor) else returned[0]
    assert not first.requires_grad


def changed(args: tuple[Any, ...], index: int, change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return (*args[:index], change(args[index].detach()), *args[index + 1 :])


SENTENCES: dict[str, tuple[Callable[[tuple[Any, ...]], tuple[Any, ...]], str]] = {
    "inner sizes": (lambda args: changed(args, 0, lambda x: x.repeat(1, 2)), "differ in input features"),
    "input of another dtype": (lambda args: changed(args, 0, Tensor.bfloat16), "cast one, or call under"),
    "weight of another dtype": (lambda args: changed(args, 1, Tensor.half), "cast one, or call under"),
    "float64": (
        lambda args: tuple(a.double() if isinstance(a, Tensor) else a for a in args),
        "dtype float64 is none of float32, float16, bfloat16",
    ),
    "no dimension": (lambda args: changed(args, 0, lambda x: x.sum()), "needs a last dimension of features"),
    "a weight of three dimensions": (lambda args: changed(args, 1, lambda w: w[None]), "two dimensions"),
    "a weight of one dimension": (lambda args: changed(args, 1, lambda w: w[0]), "two dimensions"),
    "another device": (lambda args: changed(args, 1, lambda w: w.to("meta")), "different devices"),
    "integers": (
        lambda args: tuple(a.detach().long() if isinstance(a, Tensor) else a for a in args),
        "dtype int64 is none of float32, float16, bfloat16",
    ),
    "sparse": (lambda args: changed(args, 1, Tensor.to_sparse), "layout torch.sparse_coo is not strided"),
    "the last vector is too long": (
        lambda args: changed(args, _vector(args), lambda t: torch.cat((t, t))),
        "one value per output feature",
    ),
    "the last vector is of another dtype": (
        lambda args: changed(args, _vector(args), Tensor.half), "cast one, or call under",
    ),
}  # fmt: skip


def _vector(args: tuple[Any, ...]) -> int:
    return max(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() == 1)


@every_case
@pytest.mark.parametrize("wrong", SENTENCES)
def test_sentence(case: Case, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU without 16-bit products takes float32 weights beside a narrower input; others ask for a cast.
    from fusekit.kernels import feed_forward, linear_act, linear_cpu, qkv_linear

    for module in (linear_cpu, feed_forward, qkv_linear):
        monkeypatch.setattr(module, "mixes", lambda x, parameter: False)
    assert linear_act.linear_cpu is linear_cpu
    change, sentence = SENTENCES[wrong]
    args = change(arguments(case, maker("cpu")(5, 8), "cpu"))
    assert OPS[case.name].supports(*args)
    with pytest.raises(ValueError, match=f"^{case.name}: .*{sentence}"):
        OPS[case.name].fused(*args)
