"""Every configuration of the tables of matrix products, with each layout and epilogue that its row serves.

Samples of ops reach only the configurations that their shapes choose; a table may choose any of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fusekit.kernels import config_table
from fusekit.kernels.config_table import Row
from fusekit.kernels.gated_gemm import gated_matmul
from fusekit.kernels.gemm import matmul
from fusekit.kernels.launch import Launch, record
from fusekit.kernels.qkv_gemm import project, sum_products

M, N, K = 1024, 1536, 2048


def tables() -> Iterator[tuple[str, Row]]:
    """Rows of every shipped table with the architecture that they are for."""
    for file in sorted(config_table.FOLDER.glob("*.json")):
        for row in config_table.load(file.stem).rows:
            yield config_table.architecture(file.stem), row


def launches(row: Row, target: str, dtype: torch.dtype) -> Iterator[Launch]:
    """What the row's products start on that architecture; to be called under FakeTensorMode."""
    for layout in row.layouts:
        for epilogue in row.epilogues if layout == row.layouts[0] else row.epilogues[:1]:
            for splits in (1, 2) if epilogue == "plain" else (1,):
                with record(target) as found:
                    _product(row, layout, epilogue, splits, dtype)
                yield from found


def dtypes(row: Row) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16) if row.kind == "half" else (torch.float32,)


def _product(row: Row, layout: str, epilogue: str, splits: int, dtype: torch.dtype) -> None:
    """The widest of the epilogue: the most operands, and the activation that takes the most registers."""
    if epilogue == "qkv":
        return _three_products(row, layout, dtype)
    if epilogue == "gated":
        return _two_products(row, layout, dtype)
    options = {"tf32": row.kind == "tf32", "config": row.config, "splits": splits}
    a, b = _operand(M, K, layout[0], dtype), _operand(K, N, layout[-1], dtype)
    output, z, h = (torch.empty(M, N, dtype=dtype) for _ in range(3))
    bias, seed = torch.empty(N, dtype=dtype), torch.empty(1, dtype=torch.int64)
    forward = {"bias": bias, "residual": h, "z": z, "act": "gelu"}
    backward = {"dact": "gelu", "z": z, "h": h, "grad_bias": bias}
    if epilogue == "plain":
        matmul(a, b, output, **options)  # type: ignore[arg-type]
        if layout == "tn":  # of a weight's gradient, on which the bias's rides
            matmul(a, b, output, row_sums=torch.empty(M, dtype=dtype), **options)  # type: ignore[arg-type]
    elif epilogue == "forward":
        matmul(a, b, output, **forward, **options)  # type: ignore[arg-type]
    elif epilogue == "backward":
        matmul(a, b, output, **backward, **options)  # type: ignore[arg-type]
    else:
        for form in (forward, backward):
            matmul(a, b, output, **form, dropout=0.1, seed=seed, **options)  # type: ignore[arg-type]


def _three_products(row: Row, layout: str, dtype: torch.dtype) -> None:
    """Of grouped-query attention: q is wider than k and v."""
    features = (N, N // 3, N // 3)
    weights = [_operand(n, K, "s" if layout == "s" else "n", dtype) for n in features]
    grads, biases = [torch.empty(M, n, dtype=dtype) for n in features], [torch.empty(n) for n in features]
    x = _operand(M, K, "s" if layout == "s" else "n", dtype)
    tf32, biases = row.kind == "tf32", [bias.to(dtype) for bias in biases]
    project(x, weights, [*biases], grads, tf32, row.config)
    sum_products(grads, weights, torch.empty(M, K, dtype=dtype), tf32, row.config)


def _two_products(row: Row, layout: str, dtype: torch.dtype) -> None:
    x = _operand(M, K, layout[0], dtype)
    weights = [_operand(K, N, layout[-1], dtype).t() for _ in range(2)]
    h, gate, up = (torch.empty(M, N, dtype=dtype) for _ in range(3))
    bias = torch.empty(N, dtype=dtype)
    tf32 = row.kind == "tf32"
    gated_matmul(x, weights, [bias, bias], "gelu", "gated", h, [gate, up], tf32, row.config)


def _operand(rows: int, columns: int, letter: str, dtype: torch.dtype) -> torch.Tensor:
    if letter == "t":
        return torch.empty(columns, rows, dtype=dtype).t()
    if letter == "s":
        return torch.empty(rows, columns + 1, dtype=dtype)[:, :columns]
    return torch.empty(rows, columns, dtype=dtype)
