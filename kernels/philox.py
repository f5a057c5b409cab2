r"""The random numbers of Triton's `tl.rand`, in plain PyTorch, bit for bit.

Philox4x32-10 turns a 64-bit seed and a 64-bit element index into four 32-bit words, of which `tl.rand` keeps
the first. Nothing is stored or stepped, so a backward pass draws the forward pass's numbers again.

Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", SC '11.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
TO_UNIT = 4.6566127342e-10  # the largest float32 that keeps 2**31 - 1 below one
CHUNK = 1 << 15  # elements at a time, so that the state stays in the cache; 1 << 13 is 1.7 times slower


def uniform(
    seed: Tensor, count: int, device: torch.device, *, start: int = 0, seed_offset: int = 0
) -> Tensor:
    """What `tl.rand(seed + seed_offset, start + i)` returns for i in 0..count-1.

    Args:
        seed: one int64 element.
        count: how many numbers.
        device: where to draw them.
        start: index of the first element.
        seed_offset: added to the seed, so that one seed serves several sites.

    Returns:
        (count,) float32 in [0, 1).
    """
    key = int(seed) + seed_offset
    out = torch.empty(count, dtype=torch.float32, device=device)
    for first in range(0, count, CHUNK):
        last = min(first + CHUNK, count)
        index = torch.arange(start + first, start + last, dtype=torch.int64, device=device)
        out[first:last] = _to_unit(_first_word(key, index))
    return out


def _first_word(key: int, index: Tensor) -> Tensor:
    # Words are unsigned 32-bit numbers held in int64: products wrap modulo 2**64, keeping every bit, and
    # masking after the arithmetic shift yields the upper half.
    multiply_a, multiply_b = MULTIPLIERS
    k0, k1 = key & WORD, (key >> 32) & WORD
    c0, c1, c2, c3 = index & WORD, (index >> 32) & WORD, torch.zeros_like(index), torch.zeros_like(index)
    for _ in range(ROUNDS):
        a, b = c0 * multiply_a, c2 * multiply_b
        c0 = (b >> 32).bitwise_and_(WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (a >> 32).bitwise_and_(WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = b.bitwise_and_(WORD), a.bitwise_and_(WORD)
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0


def _to_unit(word: Tensor) -> Tensor:
    signed = torch.where(word >= 1 << 31, WORD - word, word)  # -x - 1 of the word read as a signed number
    return signed.to(torch.float32) * TO_UNIT
