"""The products that `tune` measures: their operands, how one configuration starts, and what is exact.

plain, forward, backward    gemm.matmul with and without epilogue; all three of a linear are plain
gated                       gated_gemm.gated_matmul: M tokens, N hidden features
qkv                         qkv_gemm: layout nt is `project` to N features in all, nn `sum_products` of K
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusekit.kernels import config_table
from fusekit.kernels.config_table import Row
from fusekit.kernels.gated_gemm import gated_matmul
from fusekit.kernels.qkv_gemm import project, sum_products

Product = Callable[..., None]
Operands = dict[str, Any]


class Problem(NamedTuple):
    """One product to tune: what `config_table.choose` is asked."""

    kind: str
    layout: str
    epilogue: str
    M: int
    N: int
    K: int

    @property
    def key(self) -> str:
        return config_table.shape_key(*self)


def operands(problem: Problem, dtype: torch.dtype, device: torch.device) -> Operands:
    """By name, those of `matmul`; "output" is what is compared with `exact`, a list where it has parts."""
    _, layout, epilogue, M, N, K = problem

    def make(rows: int, columns: int, letter: str = "n") -> Tensor:
        shape = (rows, columns) if letter == "n" else (columns, rows)
        made = torch.randn(shape, device=device, dtype=dtype)
        return made if letter == "n" else made.t()

    def empty(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, device=device, dtype=dtype)

    if epilogue == "gated":
        weights = [make(N, K) * K**-0.5 for _ in range(2)]
        saved = [empty(M, N) for _ in range(2)]
        return {"x": make(M, K), "weights": weights, "output": empty(M, N), "saved": saved}
    if epilogue == "qkv" and layout == "nt":
        parts = features(N)
        weights = [make(n, K) * K**-0.5 for n in parts]
        return {"x": make(M, K), "weights": weights, "output": [empty(M, n) for n in parts]}
    if epilogue == "qkv":
        parts = features(K)
        weights = [make(n, N) * K**-0.5 for n in parts]
        return {"grads": [make(M, n) for n in parts], "weights": weights, "output": empty(M, N)}
    held = {"a": make(M, K, layout[0]), "b": make(K, N, layout[1]) * K**-0.5, "output": empty(M, N)}
    if epilogue == "forward":
        held |= {"bias": torch.randn(N, device=device, dtype=dtype), "z": empty(M, N)}
    if epilogue == "backward":
        held |= {"z": make(M, N), "grad_bias": torch.empty(N, device=device, dtype=dtype)}
    return held


def features(total: int) -> tuple[int, int, int]:
    """Of q, k and v: grouped-query attention, four query heads for each of keys and values."""
    grouped = max(8, total // 6 // 8 * 8)
    return total - 2 * grouped, grouped, grouped


def start(product: Product, problem: Problem, row: Row, splits: int, given: Operands) -> None:
    """Compute the problem by a row's configuration; `product` stands for `matmul`."""
    tf32 = problem.kind == "tf32"
    if problem.epilogue == "gated":
        x, weights, output, saved = given["x"], given["weights"], given["output"], given["saved"]
        gated_matmul(x, weights, [None, None], "silu", "gated", output, saved, tf32, row.config)
    elif problem.epilogue == "qkv" and "x" in given:
        project(given["x"], given["weights"], [None] * 3, given["output"], tf32, row.config)
    elif problem.epilogue == "qkv":
        sum_products(given["grads"], given["weights"], given["output"], tf32, row.config)
    else:
        act = {"forward": {"act": "gelu_tanh"}, "backward": {"dact": "gelu_tanh"}}.get(problem.epilogue, {})
        product(**given, **act, tf32=tf32, config=row.config, splits=splits)


def start_dry(product: Product, problem: Problem, row: Row, splits: int, given: Operands) -> None:
    """The same without a GPU: what has no stand-in is filled with the exact result."""
    if problem.epilogue not in ("gated", "qkv"):
        return start(product, problem, row, splits, given)
    outputs = given["output"] if isinstance(given["output"], list) else [given["output"]]
    parts = exact(problem, given).split([output.shape[1] for output in outputs], 1)
    for output, part in zip(outputs, parts, strict=True):
        output.copy_(part)


def result(given: Operands) -> Tensor:
    output = given["output"]
    return torch.cat(output, 1) if isinstance(output, list) else output


def exact(problem: Problem, given: Operands) -> Tensor:
    """The result in float64 for float32 operands; 16-bit ones multiply exactly in float32, which suffices."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        return _exact(problem, given, torch.float32 if problem.kind == "half" else torch.float64)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _exact(problem: Problem, given: Operands, wide: torch.dtype) -> Tensor:
    if problem.epilogue == "gated":
        gate, up = (given["x"].to(wide) @ weight.to(wide).t() for weight in given["weights"])
        return torch.nn.functional.silu(gate) * up
    if problem.epilogue == "qkv":
        weights = torch.cat(given["weights"]).to(wide)
        if "x" in given:
            return given["x"].to(wide) @ weights.t()
        return torch.cat(given["grads"], 1).to(wide) @ weights
    product = given["a"].to(wide) @ given["b"].to(wide)
    if problem.epilogue == "forward":
        return torch.nn.functional.gelu(product + given["bias"].to(wide), approximate="tanh")
    if problem.epilogue == "backward":
        return torch.ops.aten.gelu_backward(product, given["z"].to(wide), approximate="tanh")
    return product


def dry_product(a: Tensor, b: Tensor, output: Tensor, **options: Any) -> None:
    """`matmul` by PyTorch."""
    given = {"a": a, "b": b} | {k: v for k, v in options.items() if isinstance(v, Tensor)}
    epilogue = "forward" if "act" in options else "backward" if "dact" in options else "plain"
    kind = "half" if a.dtype != torch.float32 else "ieee"
    (M, K), N = a.shape, b.shape[1]
    output.copy_(exact(Problem(kind, "nn", epilogue, M, N, K), given))
