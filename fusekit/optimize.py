"""`optimize` and `restore`: put a model's forward and backward pass onto fused ops, in place."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusekit.auto_precision import AutoPrecision
from fusekit.kernels import OPS
from fusekit.kernels.recipe import PRESETS, Recipe
from fusekit.passes import _compat
from fusekit.passes.capture import Failure
from fusekit.passes.config import Config
from fusekit.passes.delayed import ModelScales
from fusekit.passes.region import Settings
from fusekit.precision_controller import PrecisionController
from fusekit.precision_plan import PrecisionPlan
from fusekit.recipe_modules import kept_modules
from fusekit.session import SESSIONS, Hook, OptimisedCall, Session

PRECISIONS = ("keep", "tf32", "fp16", "bf16", "fp8", "auto")
REMAINDERS = ("auto", "eager", "inductor")
_SYNONYMS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "keep",
    "fp32": "keep",
    "none": "keep",
}


def optimize(
    model: nn.Module,
    *,
    precision: str | os.PathLike[str] | Recipe | AutoPrecision | PrecisionPlan = "keep",
    fuse: str | Iterable[str] = "all",
    remainder: str = "auto",
    verify: str | int | None = None,
    strict: bool = False,
    dynamic: bool | None = None,
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    keep_logits: bool = True,
    deterministic: bool = True,
) -> nn.Module:
    """Optimise a model in place: same object, same Parameters, same state_dict keys. Undone by `restore`.

    The first call captures; the model then trains exactly as before. A second `optimize` starts over with the
    new arguments. A deepcopy or a pickle of the model is a plain model: optimise it again.

    Args:
        model: any module. What cannot be captured runs as it was written, and one warning names the line.
        precision: "keep" changes no dtype; "tf32", "fp16" and "bf16" keep float32 Parameters as master
            weights and place casts in the graph. "fp8" does as "bf16" and casts the operands of linear
            layers to FP8, as a Recipe, or the name of one from PRESETS, says in detail. What delayed scales
            remember between steps is in `precision_state(model)`, and in no state_dict of the model's. "auto"
            decides for each product of each layer from samples of the run, as AutoPrecision says in detail; a
            PrecisionPlan, or the path of one (*.json), is followed from the first step.
        fuse: "all", "none", or names of ops from fusekit.kernels.OPS.
        remainder: what runs the nodes that no rule took; "auto" is Inductor on CUDA and eager elsewhere.
        verify: "first", or every N calls with gradients: check all sites against float64 on the caller's own
            batch, and revert those that fail.
        strict: raise UnfusedError where a frame is not captured or a site is refused.
        dynamic: as in torch.compile.
        example_inputs: (args, kwargs) to capture with now; random state and buffers are put back afterwards.
        keep_logits: False promises that only the loss of the model's output is read.
        deterministic: False gives up equal bits of two runs for speed: on a GPU a library may compute
            attention's backward pass where it is faster, held to the same errors. `explain` says where, which
            is nowhere under torch.use_deterministic_algorithms.

    Raises:
        ValueError: a bad argument, or a model whose devices or dtypes do not allow what was asked.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(_not_a_module(model))
    auto = _auto(precision)
    chosen, recipe = ("fp8", auto.recipe()) if auto else _precision(precision)
    controller = PrecisionController(auto, model) if auto else None
    settings = Settings(
        precision=chosen,
        recipe=recipe,
        levels=controller.levels() if controller else None,
        keep=kept_modules(model, recipe) if recipe else (),
        modules={str(id(module)): name for name, module in model.named_modules()},
        fuse=_ops(fuse),
        remainder=_choice("remainder", remainder, REMAINDERS),
        strict=bool(strict),
        keep_logits=bool(keep_logits),
        deterministic=_flag("deterministic", deterministic),
        scales=ModelScales(model, recipe) if recipe and recipe.delayed else None,
    )
    _check_tensors(model, settings.precision)
    hooks = _verify_hooks(verify)
    inputs = _example_inputs(example_inputs)

    restore(model)
    session = Session(model, settings, Config.from_environment())
    session.after_call += hooks
    if controller is not None:
        session.precision = controller
        controller.attach(session)
    session.replaced_call = model._compiled_call_impl
    SESSIONS[model] = session
    problem = _compat.self_test()
    if problem:
        session.capture.failures.append(Failure(location="", reason=problem))
        warnings.warn(f"{problem}; the model runs eagerly", stacklevel=2)
        return model
    compiled = _compat.compile_call(model, session.capture.backend, dynamic)
    model._compiled_call_impl = OptimisedCall(session, compiled)
    if inputs is not None:
        with session.own_calls():
            _capture_now(model, *inputs)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize`; a model that is not optimised is left as it is."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"restore takes a model, and got a {type(model).__name__}")
    session = SESSIONS.pop(model, None)
    if session is not None:
        model._compiled_call_impl = session.replaced_call
    return model


def _auto(precision: Any) -> AutoPrecision | None:
    """What was asked of "auto", in any of its spellings."""
    if isinstance(precision, AutoPrecision):
        return precision
    if isinstance(precision, str) and precision == "auto":
        return AutoPrecision()
    is_path = isinstance(precision, os.PathLike) or (
        isinstance(precision, str) and precision.endswith(".json")
    )
    return AutoPrecision(plan=precision) if is_path or isinstance(precision, PrecisionPlan) else None


def _precision(precision: Any) -> tuple[str, Recipe | None]:
    """The precision as `Settings` has it, and the recipe behind it."""
    if isinstance(precision, Recipe):
        recipe = precision
    elif precision == "fp8":
        recipe = PRESETS["fp8-tensorwise"]
    elif isinstance(precision, str) and precision in PRESETS:
        recipe = PRESETS[precision]
    else:
        return _choice("precision", precision, [*PRECISIONS, *PRESETS], _SYNONYMS), None
    return "fp8", recipe


def _not_a_module(model: Any) -> str:
    what = model.__name__ if isinstance(model, type) else type(model).__name__
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"optimize takes a model, and got the class {what}: make an instance first"
    return f"optimize takes a torch.nn.Module, and got a {what}"


def _choice(name: str, value: Any, allowed: Iterable[str], synonyms: Mapping[str, str] | None = None) -> str:
    allowed = list(allowed)
    if value in allowed:
        return value
    word = str(value).removeprefix("torch.")  # of a dtype
    meant = (synonyms or {}).get(word) or next(iter(difflib.get_close_matches(word, allowed, 1)), None)
    hint = f"; did you mean {meant!r}?" if meant else ""
    raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, and got {value!r}{hint}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is True or False, and got {value!r}")
    return value


def _ops(fuse: Any) -> frozenset[str] | None:
    if isinstance(fuse, str):
        if fuse in ("all", "none"):
            return None if fuse == "all" else frozenset()
        return frozenset({_choice("fuse", fuse, ["all", "none", *OPS])})
    if not isinstance(fuse, Iterable):
        raise ValueError(f'fuse is "all", "none" or names of ops, and got a {type(fuse).__name__}')
    return frozenset(_choice("an op in fuse", name, OPS) for name in fuse)


def _check_tensors(model: nn.Module, precision: str) -> None:
    named = [*model.named_parameters(), *model.named_buffers()]
    devices: dict[str, str] = {}
    for name, tensor in named:
        devices.setdefault(str(tensor.device), name)
    if "meta" in devices:
        raise ValueError(
            f"{devices['meta']} is on the meta device and has no values: materialise the model first, "
            "model.to_empty(device=...) and load its weights"
        )
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"the model is on several devices ({places}): move it to one with model.to(device)")
    if precision in ("fp16", "bf16", "fp8"):
        for name, tensor in model.named_parameters():
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ValueError(
                    f"precision={precision!r} keeps float32 Parameters as master weights, and {name} is "
                    f"{str(tensor.dtype).removeprefix('torch.')}: call model.float() first, "
                    'or use precision="keep"'
                )


def _verify_hooks(verify: Any) -> list[Hook]:
    if verify is None:
        return []
    if verify == "first":
        return [_Certifier(every=0)]
    if isinstance(verify, bool) or not isinstance(verify, int) or verify < 1:
        raise ValueError(f'verify is None, "first" or a positive number of calls, and got {verify!r}')
    return [_Certifier(every=verify)]


class _Certifier:
    """Runs the certificate on the caller's batch: on the first call with gradients, then on every n-th."""

    def __init__(self, every: int) -> None:
        self._every, self._calls, self._running = every, 0, False

    def __call__(self, session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running or not torch.is_grad_enabled():
            return  # the certificate itself calls the model
        due = self._calls % self._every == 0 if self._every else self._calls == 0
        self._calls += 1
        if not due:
            return
        from fusekit.verification import certify

        self._running = True
        try:
            certify(session, args, kwargs)
        finally:
            self._running = False


def _example_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if example_inputs is None:
        return None
    match example_inputs:
        case (list() | tuple() as args, dict() as kwargs):
            return tuple(args), kwargs
    raise ValueError(
        "example_inputs is a pair (args, kwargs), as in ((tokens,), {}), "
        f"and got a {'tensor' if isinstance(example_inputs, Tensor) else type(example_inputs).__name__}"
    )


def _capture_now(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """One forward pass whose traces in random state and buffers are wiped."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(), SESSIONS[model].own_calls():
            model(*args, **kwargs)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
