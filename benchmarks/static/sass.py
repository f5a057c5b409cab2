"""The hot loop of a kernel, read from its machine code (SASS) as nvdisasm writes it. Needs no PyTorch.

ptxas fixes when instructions issue: bits 41-44 of an instruction's upper word hold the cycles until the
warp's next one may (Jia et al. 2018, "Dissecting the Volta Architecture", arXiv:1804.06826, section 2.1; so
up to sm_90; not verified for sm_100). Their sum over a loop's body is the time that one warp needs for one
iteration when it never waits for memory or for a product: a lower bound, exact for what it counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

VERIFIED = (80, 90)
_LABEL = re.compile(r"^(\.L\w+):")
_CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_UPPER = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_HGMMA = re.compile(r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)\.")
_HMMA = re.compile(r"[HQ]MMA\.(16)(8)(\d+)\.")
_GLOBAL = re.compile(r"(?:LDG|STG|LDGSTS)\.")


class Instruction(NamedTuple):
    """stall: cycles until the next one may issue. target: the label it may jump to."""

    predicated: bool
    opcode: str
    operands: str
    stall: int
    target: str | None


class Block(NamedTuple):
    instructions: list[Instruction]
    successors: list[int]


def blocks(listing: str) -> list[Block]:
    """Basic blocks of the first function in nvdisasm's `-c -hex` listing, entry first."""
    bodies: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    pending: re.Match[str] | None = None
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            if bodies[-1]:
                bodies.append([])
            labels[label[1]] = len(bodies) - 1
        elif code := _CODE.search(line):
            pending = code
        elif pending and (upper := _UPPER.match(line)):
            bodies[-1].append(_instruction(pending, int(upper[1], 16)))
            if _ends_block(bodies[-1][-1]):
                bodies.append([])
            pending = None
    return [Block(body, list(_successors(body, i, labels, len(bodies)))) for i, body in enumerate(bodies)]


def _instruction(code: re.Match[str], upper: int) -> Instruction:
    target = _TARGET.search(code[3])
    return Instruction(bool(code[1]), code[2], code[3], upper >> 41 & 15, target[1] if target else None)


def _ends_block(instruction: Instruction) -> bool:
    return instruction.opcode.split(".")[0] in ("BRA", "EXIT", "RET")


def _successors(body: list[Instruction], index: int, labels: dict[str, int], count: int) -> Iterator[int]:
    last = body[-1] if body else None
    jumps = last is not None and _ends_block(last)
    if last and jumps and last.target in labels:
        yield labels[last.target]
    # A condition is a predicate before the opcode, or an operand before the target: `BRA.U UP0, (.L_x_1)`.
    always = last and not last.predicated and (last.target is None or last.operands.startswith("`"))
    if not (jumps and always) and index + 1 < count:
        yield index + 1


def loops(found: list[Block]) -> list[frozenset[int]]:
    """Natural loops that the entry reaches: blocks that come to a back edge without leaving by its header."""
    before: list[list[int]] = [[] for _ in found]
    back: dict[int, set[int]] = {}
    state = [0] * len(found)  # 1: on the path from the entry, 2: done
    path = [(0, iter(found[0].successors))] if found else []
    state[:1] = [1]
    while path:
        node, rest = path[-1]
        following = next(rest, None)
        if following is None:
            state[node] = 2
            path.pop()
            continue
        before[following].append(node)
        if state[following] == 1:
            back.setdefault(following, set()).add(node)
        elif state[following] == 0:
            state[following] = 1
            path.append((following, iter(found[following].successors)))
    return [_natural(header, tails, before) for header, tails in back.items()]


def _natural(header: int, tails: set[int], before: list[list[int]]) -> frozenset[int]:
    members, waiting = {header}, list(tails)
    while waiting:
        node = waiting.pop()
        if node not in members:
            members.add(node)
            waiting += before[node]
    return frozenset(members)


_HALF = re.compile(r"R(\d+), R\1, 0xffff, RZ, 0xc0, !PT$")
_WRITES = re.compile(r"^(?:P\w+, )?R(\d+)\b")
_NO_RESULT = (
    "ST",
    "RED",
    "BAR",
    "BRA",
    "EXIT",
    "SYNCS",
    "LDGSTS",
    "ISETP",
    "FSETP",
    "PLOP3",
    "R2UR",
    "WARPSYNC",
)


def lost_casts(listing: str) -> int:
    """Halves of registers that are read before anything wrote the register, in the order of the code.

    ptxas 12.8 (Triton 3.6) dropped casts to FP8 whose bytes then cross threads, and stored whatever the
    registers held: float32 tiles with a transposed copy on an H100. What it leaves behind are
    `LOP3.LUT R52, R52, 0xffff` of registers without a value.
    """
    written: set[int] = set()
    lost = 0
    for code in _CODE.finditer(listing):
        opcode, operands = code[2], code[3]
        if opcode.startswith("LOP3") and (half := _HALF.match(operands)) and int(half[1]) not in written:
            lost += 1
        if not opcode.startswith(_NO_RESULT) and (register := _WRITES.match(operands)):
            first = int(register[1])
            wide = 4 if ".128" in opcode or "MMA" in opcode or "LDSM" in opcode else 2
            written.update(range(first, first + (128 if "GMMA" in opcode else wide)))
    return lost


def hot_loop(listing: str, warps: int, products: bool) -> dict[str, Any] | None:
    """The innermost loop that does most, and of equals the shortest; None if no loop does anything.

    Most: of tensor-core FLOPs; without them, of float32 multiply-adds if the kernel has `products`; else of
    bytes from and to global memory.

    Returns:
        instructions, stalls (cycles), mufu: of one warp's iteration; limit ("half", "tf32", "fp8", "fp32",
        "memory") and amount: FLOPs or bytes of the block's iteration, all lanes active.
    """
    code = blocks(listing)
    bodies = {members: [i for b in members for i in code[b].instructions] for members in loops(code)}
    work = {members: _work(body, warps) for members, body in bodies.items()}
    kinds = ("fp8", "half", "tf32", *(("fp32",) if products else ("memory",)))
    kind = next((k for k in kinds if any(w.get(k) for w in work.values())), None)
    if kind is None:
        return None
    busy = [m for m in work if work[m].get(kind)]
    inner = [m for m in busy if not any(other < m for other in busy)]
    hot = min(inner, key=lambda m: (-work[m][kind], len(bodies[m])))
    return {
        "instructions": len(bodies[hot]),
        "stalls": sum(max(i.stall, 1) for i in bodies[hot]),
        "mufu": sum(i.opcode.startswith("MUFU") for i in bodies[hot]),
        "limit": kind,
        "amount": work[hot][kind],
    }


def _work(body: list[Instruction], warps: int) -> dict[str, int]:
    """FLOPs by kind of operand and bytes of global memory, of all warps of a block."""
    found: dict[str, int] = {}

    def count(kind: str, amount: int) -> None:
        found[kind] = found.get(kind, 0) + amount

    for instruction in body:
        opcode = instruction.opcode
        if shape := _HGMMA.match(opcode):  # of a warpgroup, four warps
            m, n, k = map(int, shape.groups())
            count(_operand(opcode), 2 * m * n * k * max(warps // 4, 1))
        elif shape := _HMMA.match(opcode):
            m, n, k = map(int, shape.groups())
            count(_operand(opcode), 2 * m * n * k * warps)
        elif opcode.startswith("FFMA"):
            count("fp32", 2 * 32 * warps)
        elif _GLOBAL.match(opcode):
            count("memory", _bytes(opcode) * 32 * warps)
    return found


def _operand(opcode: str) -> str:
    if opcode.startswith("Q"):
        return "fp8"
    return "tf32" if "TF32" in opcode else "half"


def _bytes(opcode: str) -> int:
    parts = opcode.split(".")
    wide = [int(part) // 8 for part in parts if part in ("64", "128", "256")]
    return wide[0] if wide else 2 if {"U16", "S16"} & set(parts) else 1 if {"U8", "S8"} & set(parts) else 4
