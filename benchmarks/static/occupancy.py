"""What an SM offers, how many blocks of a kernel fit on it, and what its units do in a cycle.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; granularities: NVIDIA's
cuda_occupancy.h (registers by 256 a warp in each of four partitions, shared memory by 128 bytes and 1 KB of
the system's own a block). Tensor memory, sm_100: 512 columns, PTX ISA, "Tensor Memory".
Rates: products of 16-bit values are the published dense peak over SMs and boost clock (see DEVICES in
roofline.py); tf32 runs at half of that, 8-bit at twice, float32 on 64 (sm_80) or 128 lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

WARPS, BLOCKS = 64, 32  # resident on an SM at most, of sm_80, sm_90 and sm_100 alike
REGISTERS, PARTITIONS = 65_536, 4
TENSOR_COLUMNS = 512
MUFU_PER_CYCLE = 16  # results of ex2, rcp, … an SM gives in a cycle; Programming Guide, arithmetic throughput


@dataclass(frozen=True)
class Architecture:
    """shared, shared_per_block: bytes an SM has and a block may ask for. flops: an SM's, a cycle, by kind of
    operand. bytes_per_cycle: DRAM bandwidth an SM's share of it, published peak over SMs and boost clock."""

    shared: int
    shared_per_block: int
    bytes_per_cycle: float
    flops: dict[str, int] = field(hash=False)


ARCHITECTURES = {
    80: Architecture(164 << 10, 163 << 10, 13.4, {"half": 2048, "tf32": 1024, "fp32": 128}),
    90: Architecture(228 << 10, 227 << 10, 13.9, {"fp8": 8192, "half": 4096, "tf32": 2048, "fp32": 256}),
    100: Architecture(228 << 10, 227 << 10, 28.0, {"fp8": 16384, "half": 8192, "tf32": 4096, "fp32": 256}),
}


class Occupancy(NamedTuple):
    """blocks and warps that an SM holds at once, and what keeps it from holding more."""

    blocks: int
    warps: int
    limiter: str


def occupancy(arch: int, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> Occupancy:
    """For `registers` a thread, `shared` bytes and `warps` a block; 0 blocks: not even one fits."""
    found = ARCHITECTURES[arch]
    per_warp = round_up(max(registers, 1) * 32, 256)
    limits = {
        "warps": WARPS // warps,
        "blocks": BLOCKS,
        "registers": REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps,
        "shared memory": found.shared // (round_up(shared, 128) + 1024),
        "tensor memory": TENSOR_COLUMNS // tensor_columns if tensor_columns else BLOCKS,
    }
    if shared > found.shared_per_block:
        limits["shared memory"] = 0
    limiter = min(limits, key=lambda name: limits[name])  # the first of equals: of the SM before the kernel
    return Occupancy(limits[limiter], limits[limiter] * warps, limiter)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
