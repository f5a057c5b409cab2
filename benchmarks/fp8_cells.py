"""The measurements of benchmarks/fp8_layers.py: layers, casts, products, and the errors of sums."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.clock import Clock, CpuClock, CudaClock, samples
from benchmarks.results_file import environment
from fusekit.kernels import fp8_choice, fp8_gemm, fp8_library, fp8_trial
from fusekit.kernels.fp8_cast import cast, empty_operand
from fusekit.kernels.fp8_format import Operand, group_of, quantise
from fusekit.kernels.fp8_library import Call
from fusekit.kernels.linear_fp8 import OP
from fusekit.kernels.recipe import PRESETS, Recipe
from fusekit.kernels.trial import failure

ROWS = 256  # of both operands where errors are measured
SECONDS = 0.15  # of timing for one cell
TENSORS = ("x", "weight", "gradient")

Cell = dict[str, Any]


class Bench:
    """Results of one run. dry: tiny layers on a CPU, PyTorch in the place of the kernels."""

    def __init__(self, dry: bool, console: Console) -> None:
        self.dry, self.console = dry, console
        self.device = torch.device("cpu" if dry else "cuda")
        self.clock: Clock = CpuClock() if dry else CudaClock()
        self.cells: dict[str, Cell] = {}
        self.errors: dict[str, Cell] = {}
        self.chosen: dict[str, str] = {}

    def time(self, calls: Mapping[str, Callable[[], Any]], flops: float) -> None:
        """A cell for each call; one that raises says so in its own."""
        running = {}
        for name, call in calls.items():
            if reason := _failure(call):
                self.fail(name, reason)
            else:
                running[name] = [call]
        found, failed = samples(
            running, self.clock, seconds=SECONDS, least=1 if self.dry else 5, most=3 if self.dry else 50
        )
        for name, error in failed.items():
            self.fail(name, failure(error))
        for name, taken in found.items():
            if name not in failed:
                seconds = statistics.median(taken)
                self.cells[name] = {"seconds": seconds, "tflops": flops / seconds / 1e12}

    def fail(self, name: str, reason: str) -> None:
        self.cells[name] = {"failed": reason}
        self.console.print(f"{name}: {reason}", style="red", highlight=False, markup=False)

    def layer(self, M: int, K: int, N: int) -> None:
        """M tokens, K input and N output features."""
        x = torch.randn(M, K, device=self.device).bfloat16().requires_grad_()
        master = (torch.randn(N, K, device=self.device) * K**-0.5).requires_grad_()
        low = master.detach().bfloat16().requires_grad_()
        grad = torch.randn(M, N, device=self.device).bfloat16()
        name, flops = f"{M}x{K}x{N}", 2.0 * M * N * K

        def step(linear: Callable[..., Tensor], weight: Tensor, *rest: Any) -> Any:
            return torch.autograd.grad(linear(x, weight, *rest), (x, weight), grad)

        def forward(linear: Callable[..., Tensor], weight: Tensor, *rest: Any) -> Any:
            with torch.no_grad():
                return linear(x, weight, *rest)

        linear = torch.nn.functional.linear
        self.time({f"{name} bf16 forward": partial(forward, linear, low)}, flops)
        self.time({f"{name} bf16 forward+backward": partial(step, linear, low)}, 3 * flops)
        for preset, recipe in PRESETS.items():
            args: tuple[Any, ...] = (OP.fused, master, None, "none", preset)
            if recipe.delayed:
                state = torch.tensor([64.0, 512.0, 64.0], device=self.device)
                args = (*args, state, torch.zeros(3, device=self.device))
            here = f"{name} {preset}"
            self.time({f"{here} forward": partial(forward, *args)}, flops)
            self.time({f"{here} forward+backward": partial(step, *args)}, 3 * flops)
            if not self.dry:
                self.chosen[here] = fp8_choice.describe(x, master, None, "none", preset)
            self.casts(here, recipe, (x.detach(), master.detach(), grad), 3 * flops)
            self.products(here, recipe, (M, K, N), flops)

    def casts(self, name: str, recipe: Recipe, tensors: tuple[Tensor, Tensor, Tensor], flops: float) -> None:
        """Each tensor into both layouts, as a training step does."""
        scale = torch.full((1,), 64.0, device=self.device) if recipe.delayed else None
        calls = {}
        for tensor, what in zip(tensors, TENSORS, strict=True):
            dtype = recipe.gradient if what == "gradient" else recipe.forward
            calls[f"{name} cast {what}"] = partial(self.cast, tensor, dtype, recipe, what == "weight", scale)
        self.time(calls, flops)

    def cast(
        self, tensor: Tensor, dtype: torch.dtype, recipe: Recipe, weight: bool, scale: Tensor | None
    ) -> list[Operand]:
        if self.dry:
            return [_quantised(t, dtype, recipe, weight) for t in (tensor, tensor.t())]
        made = [empty_operand(tensor, recipe, weight, turned) for turned in (False, True)]
        cast(tensor, dtype, recipe, *made, weight=weight, scale=scale)
        return made

    def products(self, name: str, recipe: Recipe, sizes: tuple[int, int, int], flops: float) -> None:
        """By the own kernel and by the library; operands are made once."""
        M, K, N = sizes
        gradient, forward = recipe.gradient, recipe.forward
        wanted = {
            "output": ((M, N, K), (forward, forward, torch.bfloat16)),
            "grad_input": ((M, K, N), (gradient, forward, torch.bfloat16)),
            "grad_weight": ((N, K, M), (gradient, forward, torch.float32)),
        }
        for product, (extent, dtypes) in wanted.items():
            if getattr(recipe, product):
                call = Call(
                    self.device, _capability(self.device), extent, dtypes, recipe.scaling, "promote128",
                    square=recipe.scaling == "block" and product != "grad_weight",
                )  # fmt: skip
                self.product(f"{name} {product}", recipe, call, flops)

    def product(self, name: str, recipe: Recipe, call: Call, flops: float) -> None:
        try:
            a, b = (self.operand(call, recipe, side, call.square and side == 1) for side in range(2))
            output = torch.empty(call.sizes[:2], dtype=call.dtypes[2], device=self.device)
        except Exception as error:
            return self.fail(name, failure(error))
        calls = {f"{name} own": partial(self.own, a, b, output, recipe, call)}
        if fp8_library.unfit(call) is None:
            for accumulation in fp8_library.ACCUMULATIONS[: 1 if call.scaling == "block" else 2]:
                asked = call._replace(accumulation=accumulation)
                calls[f"{name} _scaled_mm {accumulation}"] = partial(fp8_library.run, a, b, output, asked)
        self.time(calls, flops)

    def operand(self, call: Call, recipe: Recipe, side: int, weight: bool) -> Operand:
        values = torch.randn(call.sizes[side], call.sizes[2], device=self.device).bfloat16()
        if self.dry:
            return _quantised(values, call.dtypes[side], recipe, weight)
        made = empty_operand(values, recipe, weight, False)
        cast(values, call.dtypes[side], recipe, made, None, weight=weight)
        return made

    def own(self, a: Operand, b: Operand, output: Tensor, recipe: Recipe, call: Call) -> None:
        dtypes, width = call.dtypes[:2], a.codes.shape[1]
        if self.dry:
            left = fp8_gemm.values(a, recipe, dtypes[0], width, False)
            output.copy_(left @ fp8_gemm.values(b, recipe, dtypes[1], width, call.square).t())
        else:
            fp8_gemm.product(
                a, b, output, recipe, dtypes, contraction=call.sizes[2], square=call.square,
                fast=recipe.accumulation == "fast",
            )  # fmt: skip

    def accumulation(self, K: int) -> None:
        """Relative errors of a float32 output against float64 sums of the same codes."""
        e4m3 = torch.float8_e4m3fn
        for signs in ("both signs", "one sign"):
            pair = [torch.randn(ROWS, K, device=self.device) * 60 for _ in range(2)]
            pair = [(t.abs() if signs == "one sign" else t).clamp(-448, 448).to(e4m3) for t in pair]
            exact = pair[0].double() @ pair[1].double().t()
            unit = torch.ones(1, 1, device=self.device)
            a, b = (Operand(t.view(torch.uint8), unit) for t in pair)
            for accumulation in ("fast", "promote128", "fp32"):
                recipe = Recipe(accumulation=accumulation)
                call = Call(
                    self.device, _capability(self.device), (ROWS, ROWS, K), (e4m3, e4m3, torch.float32),
                    "tensor", accumulation,
                )  # fmt: skip
                name, output = f"K={K} {signs} {accumulation}", torch.empty_like(exact, dtype=torch.float32)
                runs = {"own": partial(self.own, a, b, output, recipe, call)}
                if accumulation != "fp32":
                    runs["_scaled_mm"] = partial(fp8_library.run, a, b, output, call)
                for who, run in runs.items():
                    self.errors[f"{name} {who}"] = _error(run, output, exact)

    def results(self) -> dict[str, Any]:
        held = {"kind": "fp8_layers", "schema": 1, "environment": environment(), "dry": self.dry}
        held |= {"chosen": self.chosen, "trials": fp8_trial.outcomes()}
        return held | {"cells": self.cells, "errors": self.errors}


def _quantised(t: Tensor, dtype: torch.dtype, recipe: Recipe, weight: bool) -> Operand:
    """As the GPU's kernel lays it out: padded to 128, scales of groups first."""
    padded = torch.nn.functional.pad(t.contiguous(), (0, -t.shape[1] % 128))
    made = quantise(padded, dtype, group_of(recipe, (padded.shape[0], padded.shape[1]), weight))
    return Operand(made.codes.view(torch.uint8), made.inverse.t().contiguous())


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability() if device.type == "cuda" else (9, 0)


def _failure(call: Callable[[], Any]) -> str | None:
    """What the first call raises; it compiles as well."""
    try:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        return failure(error)
    return None


def _error(run: Callable[[], Any], output: Tensor, exact: Tensor) -> Cell:
    if reason := _failure(run):
        return {"failed": reason}
    difference = output.double() - exact
    norm = float(exact.norm())
    return {
        "relative": float(difference.norm()) / norm,
        "bias": float((difference * exact.sign()).sum() / exact.abs().sum()),
    }
