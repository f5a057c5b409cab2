"""What a kernel is made of, counted in its PTX or its amdgcn assembly. Needs no PyTorch."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

TENSOR_CORE = ("mma", "wgmma", "tcgen05")
_COUNTED = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "wgmma fp8": r"\bwgmma\.mma_async\S*\.e[45]m[23]\.e[45]m[23]\b",
    "tcgen05 fp8": r"\btcgen05\.mma\S*kind::f8f6f4",
    "ldmatrix": r"\bldmatrix\.",
    "stmatrix": r"\bstmatrix\.",
    "cp.async": r"\bcp\.async\.c[ag]\.",
    "tma load": r"\bcp\.async\.bulk\.tensor\S*\.shared\S*\.global",
    "tma store": r"\bcp\.(?:async|reduce\.async)\.bulk\.tensor\S*\.global\.shared",
    "atomic": r"\b(?:atom|red)\.",
    "fma": r"\bfma\.rn",
    "add": r"\badd(?:\.rn)?(?:\.f32|\.f32x2)\b",
    "mufu": r"\b(?:ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh)\.approx",
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in _COUNTED.items()}
_GLOBAL = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\b")
_AMD = {
    "vgpr": ".vgpr_count",
    "agpr": ".agpr_count",
    "sgpr": ".sgpr_count",
    "vgpr_spills": ".vgpr_spill_count",
    "sgpr_spills": ".sgpr_spill_count",
    "lds": ".group_segment_fixed_size",
}


def mix(ptx: str) -> dict[str, int]:
    """Instructions by kind, loads and stores of global memory by their width in bits; none, no entry."""
    found = Counter({name: len(pattern.findall(ptx)) for name, pattern in _PATTERNS.items()})
    for direction, lanes, bits in _GLOBAL.findall(ptx):
        found[f"{direction}{int(lanes or 1) * int(bits)}"] += 1
    return {name: n for name, n in sorted(found.items()) if n}


def casts_to_fp8(ptx: str) -> bool:
    return bool(re.search(r"\bcvt\S*\.e(?:4m3|5m2)x2\.f", ptx))


def amd(assembly: str) -> dict[str, Any]:
    """Registers, spilled registers and bytes of LDS from the metadata; `mfma`: matrix instructions."""
    values = {name: re.search(rf"{re.escape(text)}:\s+(\d+)", assembly) for name, text in _AMD.items()}
    found: dict[str, Any] = {name: int(value[1]) if value else 0 for name, value in values.items()}
    return found | {"mfma": len(re.findall(r"\bv_mfma_", assembly))}
