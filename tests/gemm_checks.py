"""Operands and exact results of matrix products: what the tests of their kernels share."""

from __future__ import annotations

import torch
from torch import Tensor

from fusekit.kernels import config_table
from fusekit.kernels.config_table import Config, Row

DTYPES = {"half": (torch.bfloat16, torch.float16), "tf32": (torch.float32,), "ieee": (torch.float32,)}


def rows(epilogue: str = "plain") -> list[Row]:
    """Each distinct configuration of all tables that serves the epilogue once, with all it serves."""
    found: dict[tuple[str, Config], Row] = {}
    for file in sorted(config_table.FOLDER.glob("*.json")):
        for row in config_table.load(file.stem).rows:
            if epilogue not in row.epilogues:
                continue
            before = found.get((row.kind, row.config))
            if before is None or len(row.epilogues) > len(before.epilogues):
                found[row.kind, row.config] = row
    return list(found.values())


def label(row: Row) -> str:
    c = row.config
    return f"{row.kind}-{c.kernel}-{c.m}x{c.n}x{c.k}-w{c.num_warps}-s{c.num_stages}-{'-'.join(row.layouts)}"


def tensor(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to("cuda", dtype)


def operand(rows: int, columns: int, letter: str, dtype: torch.dtype, seed: int) -> Tensor:
    """(rows, columns): n is row-major, t column-major, s has no two elements side by side."""
    if letter == "t":
        return tensor(columns, rows, dtype=dtype, seed=seed).t()
    if letter == "s":
        return tensor(rows, columns, 2, dtype=dtype, seed=seed)[:, :, 1]
    return tensor(rows, columns, dtype=dtype, seed=seed)


def rounded(x: Tensor, tf32: bool) -> Tensor:
    """float64 of what the tensor cores read."""
    return x.double() if not tf32 else (x.view(torch.int32) & ~0x1FFF).view(torch.float32).double()


def assert_close(found: Tensor, exact: Tensor, K: int, tf32: bool = False) -> None:
    """Within 1.1 roundings to the dtype plus float32 accumulation, over all and in the worst row."""
    eps = 2.0**-10 if tf32 else torch.finfo(torch.float32).eps * max(K, 1) ** 0.5
    error = found.double() - exact
    floor = exact.to(found.dtype).double() - exact
    assert torch.isfinite(found).all()
    assert error.norm() <= 1.1 * floor.norm() + eps * exact.norm()
    assert (error.norm(dim=-1) <= 1.6 * floor.norm(dim=-1) + 4 * eps * exact.norm(dim=-1)).all()
