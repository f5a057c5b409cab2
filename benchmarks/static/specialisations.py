"""Which kernels the ops of the registry start, and how each is specialised: what is to be compiled.

Ops run on fake tensors under `record()`, so no data is touched and no GPU is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.static import decoding, products, untailed
from fusekit.kernels import FP8_OPS, OPS, add_layer_norm, norm_fp8
from fusekit.kernels.fp8_history import DelayedScales
from fusekit.kernels.fp8_maxima import fp8_maxima
from fusekit.kernels.launch import Launch, record
from fusekit.kernels.op import DTYPES, LOW_PRECISION, Op
from fusekit.kernels.recipe import PRESETS, Recipe
from fusekit.kernels.row_reduction import MAX_COLUMNS

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}
ALIGNMENT = 16
ALL_TARGETS = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Specialisation:
    """One kernel as the compiler sees it; values that JSON cannot hold are encoded by `encode`.

    bench: a sample of real model size needs it, not only the small odd ones of the tests.
    source: a hash of the kernel's code and of all it calls.
    targets: the architectures that start it, for tables of configurations differ.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: list[str]
    options: dict[str, Any]
    bench: bool = True
    source: str = ""
    targets: tuple[str, ...] = ALL_TARGETS

    @property
    def key(self) -> str:
        """Stable name, without divisibility: the caller that comes first, an aligned one, stands for all."""
        types = ",".join(t for t in self.signature.values() if t != "constexpr")
        constants = " ".join(f"{k}={_brief(v)}" for k, v in sorted(self.constexprs.items()))
        options = " ".join(f"{k}={v}" for k, v in sorted(self.options.items()))
        return f"{self.module.rsplit('.', 1)[-1]}.{self.kernel}({types}) {constants} {options}"


def encode(value: Any) -> Any:
    """A constexpr as JSON: kernels by name, Triton's dtypes by theirs."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "fn"):
        return {"jit": [value.fn.__module__, value.fn.__name__]}
    if type(value).__name__ == "dtype":
        return {"dtype": value.name}
    raise TypeError(
        f"the static lane cannot write the constexpr {value!r} to JSON: add it to encode and decode"
    )


def _brief(value: Any) -> str:
    return value["jit"][1] if isinstance(value, dict) and "jit" in value else json.dumps(value)


def specialise(start: Launch, bench: bool = True) -> Specialisation:
    """What Triton's launcher would specialise the kernel on: types, None, ones, and multiples of 16."""
    kernel, runtime = start.kernel, list(start.args)
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible = []
    for parameter in kernel.params:
        name = parameter.name
        if name in start.meta:
            value, is_constant = start.meta[name], parameter.is_constexpr
        else:
            value, is_constant = runtime.pop(0), parameter.is_constexpr
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if is_constant or value is None or one:
            signature[name], constexprs[name] = "constexpr", encode(value)
            continue
        signature[name] = _type(value)
        if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment) and _aligned(value):
            divisible.append(name)
    assert not runtime, f"{kernel.fn.__name__}: {len(runtime)} arguments too many"
    options = {k: v for k, v in start.meta.items() if k not in signature}
    options.setdefault("num_warps", 4)
    called = [kernel, *(value for value in start.meta.values() if hasattr(value, "fn"))]
    source = " ".join(function.cache_key for function in called)
    return Specialisation(
        kernel.fn.__module__, kernel.fn.__name__, signature, constexprs, divisible, options, bench, source
    )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _aligned(value: Any) -> bool:
    if isinstance(value, Tensor):  # the allocator aligns storages
        return value.storage_offset() * value.element_size() % ALIGNMENT == 0
    return type(value) is int and value % ALIGNMENT == 0


def _calls(op: Op) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """Arguments of every sample in every dtype, those of real size first; tf32 too where the op has it."""
    overload: Any = op.fused
    schema = overload._schema.arguments
    tf32 = [i for i, argument in enumerate(schema) if argument.name == "tf32"]
    for dtype in DTYPES:
        samples = sorted(op.samples("cpu", dtype), key=lambda sample: not sample.bench)
        for sample in samples:
            yield sample.args, sample.bench
            if tf32 and dtype == torch.float32:
                args = (*sample.args, *(a.default_value for a in schema[len(sample.args) : tf32[0] + 1]))
                yield (*args[: tf32[0]], True, *args[tf32[0] + 1 :]), sample.bench


def forward_and_backward(op: Op, args: tuple[Any, ...]) -> None:
    returned = op.fused(*args)
    outputs = [t for t in ([returned] if isinstance(returned, Tensor) else returned) if t.requires_grad]
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    torch.autograd.grad(outputs, inputs, [torch.empty_like(t) for t in outputs], allow_unused=True)


def _move_histories() -> None:
    """What no op starts: an optimizer's step, of all slots, and of some unless it was skipped."""
    scales = DelayedScales([Recipe(delayed=True)])
    scales.update()
    scales.update(taken=scales.cursor, skip=scales.scale[:1])


def _norms_with_codes() -> None:
    """Norms that quantise what they make, which only the pass `quantise` calls; the widest row as well."""
    for op in (OPS["add_layer_norm"], OPS["add_rms_norm"]):
        overload: Any = op.fused
        calls = [args for args, bench in _calls(op) if bench or args[1] is None]
        x, weight = torch.empty(64, MAX_COLUMNS, dtype=torch.bfloat16), torch.empty(MAX_COLUMNS)
        calls.append((x, x, weight, *([weight] if overload is add_layer_norm.fused else []), 1e-6))
        for args in calls:
            defaults = [argument.default_value for argument in overload._schema.arguments[len(args) :]]
            for recipe in ("fp8-tensorwise", "fp8-rowwise"):
                if norm_fp8.why_not(args[0], Recipe.parse(recipe)) is None:
                    norm_fp8.WITH_CODES[overload](*args, *defaults, recipe, True)


def _layers_that_count() -> None:
    """Products that keep the largest magnitudes of what they write, for those who quantise it."""
    for dtype in LOW_PRECISION:
        x, weight = (torch.empty(rows, 1024, dtype=dtype) for rows in (2048, 4096))
        for name in PRESETS:
            for quantised_by in ("fp8-tensorwise", "fp8-rowwise"):
                maxima = fp8_maxima(x, weight.shape[0], quantised_by)
                scale = torch.empty(3) if PRESETS[name].delayed else None
                args = (x, weight, None, "gelu", name, scale, None, None, None, maxima)
                torch.ops.fusekit.linear_fp8(*args)


def _gates_that_count() -> None:
    for dtype in LOW_PRECISION:
        for gate, up in (
            (torch.empty(2048, 1408, dtype=dtype),) * 2,
            (torch.empty(2048, 2816, dtype=dtype), None),
        ):
            for quantised_by in ("fp8-tensorwise", "fp8-rowwise"):
                maxima = fp8_maxima(gate, 1408, quantised_by, False)
                torch.ops.fusekit.gated_act(gate, up, "silu", False, maxima)


def collect() -> dict[str, Specialisation]:
    """Every specialisation that a sample of an op, a row of a table or a decoding step needs, by key."""
    found: dict[str, Specialisation] = {}
    with FakeTensorMode():
        for op in (*OPS.values(), *FP8_OPS.values()):
            for args, bench in _calls(op):
                for target in ALL_TARGETS:
                    with record(target) as launches:
                        forward_and_backward(op, args)
                    for start in filter(lambda start: all(start.grid), launches):
                        _add(found, specialise(start, bench), target)
        for target in ALL_TARGETS:
            with record(target) as launches:
                _move_histories()
                _norms_with_codes()
                _layers_that_count()
                _gates_that_count()
            for start in filter(lambda start: all(start.grid), launches):
                _add(found, specialise(start), target)
        for target, row in products.tables():
            for dtype in products.dtypes(row):
                for start in products.launches(row, target, dtype):
                    _add(found, specialise(start), target)
        for target in ALL_TARGETS:
            for start in decoding.launches(target):
                _add(found, specialise(start), target)
            for start, bench in untailed.launches(target):
                if all(start.grid):
                    _add(found, specialise(start, bench), target)
    return found


def _add(found: dict[str, Specialisation], new: Specialisation, target: str) -> None:
    known = found.get(new.key)
    if known is None:
        found[new.key] = replace(new, targets=(target,))
    elif target not in known.targets:
        found[new.key] = replace(known, targets=(*known.targets, target))
