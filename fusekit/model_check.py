"""The whole model against a float64 copy of itself, beside eager's own error at the same precision.

Site by site everything may be right and the wiring between sites wrong: a swapped operand, a weight cast from
an old version. This is the check that sees it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fusekit.certificate import ModelCheck
from fusekit.exact_sdpa import BySoftmax
from fusekit.kernels.trial import failure
from fusekit.passes.logits import UnreadLogits

NOISE = 3.0  # two runs that round differently stand at different distances from float64; measured 1 to 2
UNIT = {"keep": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8": 2.0**-4}
LOW = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
SMALLEST_SHARE = 1e-3  # of the gradients' rms; below it a gradient is rounding noise (a key bias)


def check_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], precision: str
) -> tuple[tuple[ModelCheck, ...], str]:
    """Compare loss (or outputs) and gradients; returns the checks, or none and the reason as a sentence."""
    try:
        wide = copy.deepcopy(model).double()
    except Exception as error:  # whatever a user's module raises when copied
        return (), f"the whole model was not compared with float64: it cannot be copied ({error})"
    unread: set[int] = set()  # outputs the caller promised not to read, which the optimised model shows
    fused = _run(model, args, kwargs, precision, seed=0, unread=unread)
    with _eager():
        plain = _run(model, args, kwargs, precision, seed=0, unread=unread)
        if not _same(plain, _run(model, args, kwargs, precision, seed=1, unread=unread)):
            return (), (
                "the whole model was not compared with float64: it draws random numbers; "
                "set dropout to 0 or call model.eval() to compare it"
            )
        wide_args, wide_kwargs = _widen((args, kwargs))
        try:
            with BySoftmax():
                truth = _run(wide, wide_args, wide_kwargs, "keep", seed=0, unread=unread)
        except Exception as error:  # an op without float64, as the grouped products of experts
            return (
                (),
                f"the whole model was not compared with float64: it does not run in it ({failure(error)})",
            )
    return tuple(_compare(fused, plain, truth, _unit(model, precision))), ""


def _unit(model: nn.Module, precision: str) -> float:
    """The rounding unit that the model computes in; with "keep", its coarsest Parameters' or autocast's."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    devices = {p.device.type for p in model.parameters()}
    dtypes |= {torch.get_autocast_dtype(d) for d in devices if torch.is_autocast_enabled(d)}
    return max([UNIT[precision], *(torch.finfo(dtype).eps / 2 for dtype in dtypes)])


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    precision: str,
    seed: int,
    unread: set[int],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss or the outputs as a vector, and the gradients by every parameter, see `_values`."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad(), _autocast(model, precision):
        torch.manual_seed(seed)
        output = model(*args, **kwargs)
        unread |= {i for i, leaf in enumerate(pytree.tree_leaves(output)) if isinstance(leaf, UnreadLogits)}
        values, value = _values(output, unread)
    if not parameters or not value.requires_grad:
        return values, {}
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return values, {name: g for name, g in zip(parameters, grads, strict=True) if g is not None}


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    global _in_eager
    with torch.compiler.set_stance("force_eager"):
        _in_eager = True
        try:
            yield
        finally:
            _in_eager = False


_in_eager = False


def _autocast(model: nn.Module, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Eager's way to the same precision. The optimised model has its casts in the graph."""
    if precision not in LOW or not _in_eager:
        return contextlib.nullcontext()
    device = next((p.device.type for p in model.parameters()), "cpu")
    return torch.autocast(device, LOW[precision])


def _values(output: Any, unread: set[int]) -> tuple[Tensor, Tensor]:
    """What is compared, and the scalar that is differentiated: the loss, else the outputs combined at random.

    Outputs cancel in such a sum: its own error says more of chance than of the model.
    """
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.detach().reshape(-1), loss.sum()
    found = enumerate(pytree.tree_leaves(output))
    leaves = [t for i, t in found if i not in unread and isinstance(t, Tensor) and t.is_floating_point()]
    if not leaves:
        raise ValueError("verify: the model returns no floating tensor, so there is nothing to compare")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator).to(t) if t.ndim else 1.0 for t in leaves]
    total = torch.stack([(t * w).sum() for t, w in zip(leaves, weights, strict=True)]).sum()
    return torch.cat([t.detach().reshape(-1) for t in leaves]), total


def _widen(tree: Any) -> Any:
    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return pytree.tree_map(wide, tree)


def _same(a: tuple[Tensor, dict[str, Tensor]], b: tuple[Tensor, dict[str, Tensor]]) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(g, b[1][name]) for name, g in a[1].items())


def _compare(fused: Any, eager: Any, truth: Any, unit: float) -> Iterator[ModelCheck]:
    values, scale = truth[0], truth[0].norm().clamp_min(1e-30).item()
    errors = [(t[0].double() - values).norm().item() / scale for t in (fused, eager)]
    yield _check("loss or outputs", errors, unit)
    if missing := set(truth[1]) ^ set(fused[1]):
        yield ModelCheck(
            name=f"gradient of {min(missing)} missing", error=math.inf, eager_error=0.0, limit=0.0, ok=False
        )
    names = [name for name in truth[1] if name in fused[1] and name in eager[1]]
    if not names:
        return
    rms = math.sqrt(
        sum(truth[1][n].square().sum().item() for n in names) / sum(truth[1][n].numel() for n in names)
    )
    checks = [_gradient(name, fused[1][name], eager[1][name], truth[1][name], rms, unit) for name in names]
    yield max(checks, key=lambda c: c.error / c.limit)
    norms = [_norm_of_errors(run[1], truth[1], names) for run in (fused, eager)]
    yield _check("all gradients", norms, unit)


def _gradient(name: str, fused: Tensor, eager: Tensor, truth: Tensor, rms: float, unit: float) -> ModelCheck:
    smallest = SMALLEST_SHARE * rms * math.sqrt(truth.numel())
    scale = max(truth.norm().item(), smallest, 1e-300)
    errors = [(t.double() - truth).norm().item() / scale for t in (fused, eager)]
    return _check(f"worst gradient: {name}", errors, unit)


def _norm_of_errors(grads: dict[str, Tensor], truth: dict[str, Tensor], names: list[str]) -> float:
    squares = sum((grads[n].double() - truth[n]).square().sum().item() for n in names)
    whole = sum(truth[n].square().sum().item() for n in names)
    return math.sqrt(squares / max(whole, 1e-300))


def _check(name: str, errors: list[float], unit: float) -> ModelCheck:
    error, eager_error = errors
    limit = NOISE * max(eager_error, unit)
    return ModelCheck(name=name, error=error, eager_error=eager_error, limit=limit, ok=error <= limit)
