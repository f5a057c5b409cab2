"""What is asked of every op, on any device: tests/test_ops.py and tests/gpu/test_ops.py loop over these."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fusekit.kernels import OPS
from fusekit.kernels.op import DTYPES, Op, Sample
from fusekit.kernels.parity import Verdict, check, longest_sum, results_and_grads, widen

every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def small_samples(op: Op, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Those for tests. The ones of real model size come last, so they are never allocated here."""
    return itertools.takewhile(lambda sample: not sample.bench, op.samples(device, dtype))


def smallest_sample(op: Op, device: str, dtype: torch.dtype = torch.float32) -> Sample:
    """The cheapest sample that computes something."""
    samples = [s for s in small_samples(op, device, dtype) if all(t.numel() for t in tensors(s.args))]
    return min(samples, key=lambda s: sum(t.numel() for t in tensors(s.args)))


def tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def set_argument(op: Op, args: tuple[Any, ...], name: str, value: Any) -> tuple[Any, ...] | None:
    """args with the op's argument `name` set; None where it has no such argument."""
    schema = op.fused._schema.arguments
    position = next((i for i, argument in enumerate(schema) if argument.name == name), None)
    if position is None:
        return None
    defaults = [argument.default_value for argument in schema[len(args) : position]]
    filled = [*args, *defaults]
    return (*filled[:position], value, *filled[position + 1 :])


def judge(op: Op, args: tuple[Any, ...], dtype: torch.dtype, tf32: bool = False) -> list[Verdict]:
    """The op against its reference in the same dtype and in float64."""
    truth = results_and_grads(op.reference, widen(args))
    eager = results_and_grads(op.reference, args)
    fused = results_and_grads(op.fused, args)
    return check(fused, eager, truth, dtype=dtype, terms=longest_sum(args), inherent=op.inherent, tf32=tf32)


def assert_parity(op: Op, device: str, dtype: torch.dtype) -> None:
    """Output and every gradient of every sample are as good as the dtype allows; some are not trivial."""
    lines, judged = [], 0
    for sample in small_samples(op, device, dtype):
        for verdict in judge(op, sample.args, dtype):
            judged += verdict.error > 0
            if not verdict.ok:
                lines.append(f"{sample.name}: {verdict.name}: {verdict.reason}")
    assert not lines, "\n".join(lines)
    assert judged


def layout(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, tuple(t.shape), t.stride()


def fake_args(mode: FakeTensorMode, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fake CPU tensors of the same shapes, strides and dtypes."""

    def fake(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        with mode:
            return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).requires_grad_(a.requires_grad)

    return tuple(map(fake, args))


def assert_fake_tells_the_truth(op: Op, device: str, dtype: torch.dtype) -> None:
    """Fake kernels predict dtype, shape and stride of outputs and gradients: Inductor relies on it."""
    for sample in small_samples(op, device, dtype):
        real = forward_and_backward(op.fused, sample.args)
        mode = FakeTensorMode()
        args = fake_args(mode, sample.args)
        with mode:
            fake = forward_and_backward(op.fused, args)
        assert [layout(t) for t in fake] == [layout(t) for t in real], sample.name


def forward_and_backward(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, then gradients, with contiguous gradients of the outputs."""
    returned = fn(*args)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    inputs = [a for a in tensors(args) if a.requires_grad]
    roots = [t for t in outputs if t.requires_grad]
    grads = torch.autograd.grad(roots, inputs, [torch.ones_like(t) for t in roots], allow_unused=True)
    return [*outputs, *(g for g in grads if g is not None)]


def assert_same(a: list[Tensor] | dict[str, Tensor], b: list[Tensor] | dict[str, Tensor]) -> None:
    """Bitwise."""
    names = a if isinstance(a, dict) else range(len(a))
    assert len(a) == len(b)
    for name in names:
        assert torch.equal(a[name], b[name]), name  # type: ignore[index]


def assert_gradients_may_be_expanded(op: Op, device: str, dtype: torch.dtype) -> None:
    """`loss.sum().backward()` hands over a gradient with stride 0, `.mT` one that is transposed."""
    sample = next(iter(small_samples(op, device, dtype)))
    inputs = [a for a in tensors(sample.args) if a.requires_grad]
    returned = op.fused(*sample.args)
    outputs = [t for t in ([returned] if isinstance(returned, Tensor) else returned) if t.requires_grad]

    def grads(make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        ones = [make(t) for t in outputs]
        found = torch.autograd.grad(outputs, inputs, ones, retain_graph=True, allow_unused=True)
        return [g for g in found if g is not None]

    plain = grads(torch.ones_like)
    assert_same(plain, grads(lambda t: torch.ones((), device=t.device, dtype=t.dtype).expand_as(t)))
    assert_same(plain, grads(lambda t: torch.ones_like(t.mT.contiguous()).mT))


def assert_refuses_what_it_does_not_support(op: Op, device: str) -> None:
    """A direct caller gets the sentence of `supports` as a ValueError."""
    args = smallest_sample(op, device).args
    meta = next(i for i, a in reversed(list(enumerate(args))) if isinstance(a, Tensor))
    elsewhere = (*args[:meta], args[meta].detach().to("meta"), *args[meta + 1 :])
    whole = (args[0].detach().to(torch.int64), *args[1:])
    cases = [widen(args), whole]
    if elsewhere[meta].device != args[0].device:  # the sanitizer says "cuda:0" of every tensor
        cases.append(elsewhere)
    for wrong in cases:
        sentence = op.supports(*wrong)
        assert sentence, "supports() takes what no kernel can run"
        with pytest.raises(ValueError) as caught:
            op.fused(*wrong)
        assert sentence in str(caught.value)


def assert_double_backward_is_refused(op: Op, device: str) -> None:
    """Also in a gradient penalty, where the incoming gradients need no gradient but the inputs do."""
    args = smallest_sample(op, device).args
    inputs = [a for a in tensors(args) if a.requires_grad]
    for differentiable in (True, False):
        returned = op.fused(*args)
        outputs = [t for t in ([returned] if isinstance(returned, Tensor) else returned) if t.requires_grad]
        grads = [torch.ones_like(t).requires_grad_(differentiable) for t in outputs]
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(outputs, inputs, grads, create_graph=True, allow_unused=True)


def assert_honours_autocast(op: Op, device: str, dtype: torch.dtype) -> None:
    """A direct call casts as the op was registered to: down to the autocast dtype, or up to float32."""
    sample = smallest_sample(op, device)
    with torch.autocast(device, dtype):
        results = results_and_grads(op.fused, sample.args)
    output = next(iter(results.values()))
    assert output.dtype in (dtype, torch.float32)

    computed_in = output.dtype if output.dim() else dtype  # a loss is float32 whatever its products are in

    def cast(a: Any) -> Any:
        return a.to(computed_in) if isinstance(a, Tensor) and a.is_floating_point() else a

    expected = results_and_grads(lambda *args: op.fused(*map(cast, args)), sample.args)
    assert_same(results, expected)
    for i, a in enumerate(sample.args):
        if f"grad_{i}" in results:
            assert results[f"grad_{i}"].dtype == a.dtype
