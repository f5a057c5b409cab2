"""Judge one fused site on real values: parity against float64 of output and gradients, and its speed.

The truth is the subgraph that was replaced, run in float64 on the values the site was called with. The op's
own reference would not do: it shares every misreading the rule may have made of the model.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.certificate import SiteCertificate
from fusekit.exact_sdpa import BySoftmax
from fusekit.fp8_check import check_attention_fp8, check_fp8
from fusekit.kernels import FP8_OPS, OPS, attention, linear_fp8
from fusekit.kernels.norm_fp8 import WITH_CODES
from fusekit.kernels.parity import Verdict, check, longest_sum, results_and_grads, widen
from fusekit.passes.price import EMULATED
from fusekit.passes.region import Fusion

ROUNDS = 5  # of fused and eager in turn; the medians are compared
# Timed, a norm quantises nothing: what it replaced did not either.
WITHOUT_CODES = {with_codes: norm for norm, with_codes in WITH_CODES.items()}
# Where a library computes and fails on a model's own values: ours from then on, before eager.
RETREAT: dict[str, Callable[..., str]] = {"attention": attention.retreat}
MEASURE: dict[str, Callable[..., Any]] = {"attention": attention.measure, "linear_fp8": linear_fp8.measure}


@dataclass(frozen=True, kw_only=True)
class SiteCall:
    """One call of a fused op inside the user's model.

    target: the op overload.
    args: every argument in the schema's order, defaults filled in; tensors as the model had them.
    extra: values of the graph inputs that `fusion.inputs` names.
    """

    fusion: Fusion
    target: Any
    args: tuple[Any, ...]
    extra: Mapping[str, Any]


def bind(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """All arguments of an op overload by position, defaults filled in."""
    given = dict(zip((a.name for a in target._schema.arguments), args, strict=False), **kwargs)
    return tuple(given.get(a.name, a.default_value) for a in target._schema.arguments)


def call_target(target: Any) -> Callable[..., Any]:
    """What a fused node runs. The seam where tests plant a broken kernel."""
    return target


def certify_site(call: SiteCall, *, timed: bool = True) -> SiteCertificate:
    """Compare a fused call with the subgraph it replaced, in the same dtype and in float64.

    Dropout is switched off in both: they draw different random numbers by design.
    """
    fusion, names = call.fusion, [a.name for a in call.target._schema.arguments]
    args = tuple(_private(a) for a in call.args)
    if timed and fusion.op in MEASURE:
        MEASURE[fusion.op](*args)  # what is certified below is whoever runs from now on
    if "dropout" in names:
        args = _replace(args, names.index("dropout"), 0.0)
    eager, fused = _Replaced(fusion, args, call.extra, names), call_target(call.target)
    checks = _checks(call, args, eager, fused)
    if fusion.op in RETREAT and (reason := _reason(checks)) and (left := RETREAT[fusion.op](reason, *args)):
        warnings.warn(
            f"{left} fails at {fusion.site} ({fusion.location}) on this batch: {reason}. fusekit's own "
            "kernels compute calls of its kind from now on", stacklevel=2,
        )  # fmt: skip
        checks = _checks(call, args, eager, fused)
    dtype = next(a.dtype for a in args if isinstance(a, Tensor))
    timed = timed and fusion.implementation != EMULATED  # nobody asks an emulation to be fast
    whole, alone = tuple(map(_without_operands, args)), fused
    if call.target in WITHOUT_CODES:
        alone = call_target(WITHOUT_CODES[call.target])
        whole = args[: len(WITHOUT_CODES[call.target]._schema.arguments)]
    seconds = _times(lambda: _step(alone, whole), lambda: eager.step(args)) if timed else (None, None)
    return SiteCertificate(
        site=fusion.site, op=fusion.op, rule=fusion.rule, location=fusion.location, dtype=_name(dtype),
        shapes=tuple(tuple(args[i].shape) for i in eager.positions), checks=tuple(checks),
        fused_seconds=seconds[0], eager_seconds=seconds[1], bytes_saved=fusion.bytes_saved,
        reason=_reason(checks),
    )  # fmt: skip


def _checks(
    call: SiteCall, args: tuple[Any, ...], eager: _Replaced, fused: Callable[..., Any]
) -> list[Verdict]:
    fused_results = results_and_grads(fused, args)
    eager_results = eager.results(args, like=fused_results)
    truth, repeated = eager.truth(args), _repeated(call.args)
    for results in (fused_results, eager_results, truth):
        _add_up(results, repeated)
    op = call.fusion.op
    if op in FP8_OPS:
        return (check_fp8 if op == "linear_fp8" else check_attention_fp8)(args, fused_results, truth)
    names = [a.name for a in call.target._schema.arguments]
    return check(
        {name: fused_results[name] for name in eager_results}, eager_results, truth,
        dtype=next(a.dtype for a in args if isinstance(a, Tensor)), terms=longest_sum(args),
        inherent=OPS[op].inherent, tf32=_is_tf32(names, args),
    )  # fmt: skip


def _reason(checks: list[Verdict]) -> str:
    return "; ".join(f"{c.name}: {c.reason}" for c in checks if not c.ok)


class _Replaced:
    """The nodes a fusion replaced, callable with the fused op's arguments."""

    def __init__(
        self, fusion: Fusion, args: tuple[Any, ...], extra: Mapping[str, Any], names: list[str]
    ) -> None:
        assert fusion.eager is not None
        self.module = _rewritten(fusion.eager, _dropout_off)
        self.wide = _rewritten(self.module, _widen_literals)
        positions = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        # What later passes gave the fused node, delayed scales, comes after what it was matched with.
        self.positions = positions[: fusion.inputs.count(None)]
        self.extra = tuple(extra[name] for name in fusion.inputs if name is not None)
        self.apart = self._made_for_the_op(names)

    def _made_for_the_op(self, names: list[str]) -> set[int]:
        """A mask that joins several of the model's: what was replaced reads those, and has no gradient for
        it. Theirs are checked in the whole model."""
        inputs = self.module.graph.find_nodes(op="placeholder")[: len(self.positions)]
        return {i for i, own in enumerate(inputs) if not own.users and names[self.positions[i]] == "mask"}

    def _inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*(args[i] for i in self.positions), *self.extra)

    def step(self, args: tuple[Any, ...]) -> None:
        _step(self.module, self._inputs(args))

    def results(self, args: tuple[Any, ...], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs and gradients under the fused op's names, in the fused op's dtypes."""
        try:
            found = results_and_grads(self.module, self._inputs(args))
        except RuntimeError:  # ATen has no kernel for a low-precision input with float32 weights
            found = results_and_grads(self.module, self._inputs(_one_dtype(args)))
        return {name: t.to(like[name].dtype) for name, t in self._renamed(found, like).items()}

    def truth(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        with BySoftmax():
            found = results_and_grads(self.wide, widen(self._inputs(args)))
        return self._renamed(found, None)

    def _renamed(self, found: dict[str, Tensor], like: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        if like is not None:
            self._tuple = "output0" in like
        results = {}
        for name, t in found.items():
            if name.startswith("grad_"):
                position = int(name.removeprefix("grad_"))
                if position >= len(self.positions) or position in self.apart:
                    continue  # a graph input beside the op's arguments: nothing to compare with
                name = f"grad_{self.positions[position]}"
            elif name == "output" and self._tuple:
                name = "output0"
            results[name] = t
        return results


def _rewritten(module: fx.GraphModule, change: Callable[[fx.Node], None]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        change(node)
    return fx.GraphModule(module, graph)


def _widen_literals(node: fx.Node) -> None:
    """`x.to(torch.float32)` in the model's code must not round the float64 truth."""

    def wide(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    if node.op == "call_function":
        node.args = tuple(fx.node.map_aggregate(node.args, wide))
        node.kwargs = dict(fx.node.map_aggregate(node.kwargs, wide))


def _dropout_off(node: fx.Node) -> None:
    if node.target is torch.ops.aten.dropout.default:
        node.args = (node.args[0], 0.0, False)
    elif node.target is torch.ops.aten.scaled_dot_product_attention.default:
        if len(node.args) > 4:
            node.args = (*node.args[:4], 0.0, *node.args[5:])
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "dropout_p"}


def _repeated(args: tuple[Any, ...]) -> dict[str, str]:
    """Gradients of one tensor that is two arguments, as in attention(h, h, h): the later by the first."""
    first: dict[int, int] = {}
    tensors = ((i, a) for i, a in enumerate(args) if isinstance(a, Tensor))
    pairs = ((i, first.setdefault(id(a), i)) for i, a in tensors)
    return {f"grad_{i}": f"grad_{j}" for i, j in pairs if i != j}


def _add_up(results: dict[str, Tensor], repeated: Mapping[str, str]) -> None:
    """Only the sum is defined: the replaced nodes read the tensor as one of the arguments, whichever."""
    for name, first in repeated.items():
        if name in results and first in results:
            results[first] = results[first] + results.pop(name)


def _private(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _without_operands(value: Any) -> Any:
    """Timed, a layer quantises its own operands: that they came quantised was somebody's time too."""
    return None if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value) else value


def _replace(args: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*args[:position], value, *args[position + 1 :])


def _one_dtype(args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(a.dtype for a in args if isinstance(a, Tensor))

    def cast(a: Any) -> Any:
        if isinstance(a, Tensor) and a.is_floating_point():
            return a.detach().to(dtype).requires_grad_(a.requires_grad)
        return a

    return tuple(map(cast, args))


def _is_tf32(names: list[str], args: tuple[Any, ...]) -> bool:
    return "tf32" in names and bool(args[names.index("tf32")])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _step(fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Forward and backward once, gradients thrown away."""
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    with torch.enable_grad():
        returned = fn(*args)
    outputs = [t for t in ((returned,) if isinstance(returned, Tensor) else returned) if _differentiable(t)]
    if inputs and outputs:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _times(fused: Callable[[], None], eager: Callable[[], None]) -> tuple[float | None, float | None]:
    """Median seconds of each, measured in turn so that a drifting clock speed meets both."""
    clock = _cuda_clock if torch.cuda.is_available() else time.process_time
    samples: tuple[list[float], list[float]] = ([], [])
    try:
        for round_ in range(ROUNDS + 1):
            for found, run in zip(samples, (fused, eager), strict=True):
                start = clock()
                run()
                if round_:  # the first compiles kernels and fills caches
                    found.append(clock() - start)
    except RuntimeError:  # eager itself cannot run on these dtypes: there is no time to compare with
        return None, None
    return median(samples[0]), median(samples[1])


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
