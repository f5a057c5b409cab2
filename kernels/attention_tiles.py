"""Device functions that the Triton kernels of `attention` share: rows in and out, scores, probabilities.

MASK says what a mask tensor holds (NO_MASK, BOOL_MASK, ADDITIVE_MASK), BAND which keys a query sees by its
place: all, those up to its own index, or low <= key - query <= high. CAP is how scores are capped.
ALIBI says what slopes are multiplied by, if there are any (NO_ALIBI, INDICES, PLACES); DOCUMENTS whether
queries and keys have document numbers; GLOBALS where the band does not hold for global tokens: nowhere,
behind its upper bound, or anywhere.
"""

from __future__ import annotations

from fusekit.kernels._triton import libdevice, tl, triton

LOG2E = 1.4426950408889634
NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2
FULL, CAUSAL, BAND = 0, 1, 2
UNCAPPED, CAPPED, CAPPED_EXACTLY = 0, 1, 2
NO_ALIBI, INDICES, PLACES = 0, 1, 2
NO_GLOBALS, BEHIND, AHEAD = 0, 1, 2


@triton.jit
def head_offset(stride_b, stride_h, batch, head):
    return batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def load_rows(base_ptr, rows, stride_row, stride_d, ROWS, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of one head; zero past the last row and past the last feature."""
    features = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + rows.to(tl.int64)[:, None] * stride_row + features[None, :] * stride_d
    if D == BLOCK_D:
        return tl.load(ptrs, mask=rows[:, None] < ROWS, other=0.0)
    return tl.load(ptrs, mask=(rows[:, None] < ROWS) & (features[None, :] < D), other=0.0)


@triton.jit
def store_rows(base_ptr, rows, stride_row, block, ROWS, D: tl.constexpr, BLOCK_D: tl.constexpr):
    features = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + rows.to(tl.int64)[:, None] * stride_row + features[None, :]
    inside = (rows[:, None] < ROWS) & (features[None, :] < D)
    tl.store(ptrs, block.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def mask_scores(
    scores, m, n, mask_ptr, stride_mm, stride_mn, slope, places_ptr, documents_ptr, key_documents_ptr,
    global_queries_ptr, global_keys_ptr, Tq, Tk, low, high, offset,
    MASK: tl.constexpr, BAND: tl.constexpr, BOUNDED: tl.constexpr,
    ALIBI: tl.constexpr, DOCUMENTS: tl.constexpr, GLOBALS: tl.constexpr,
):  # fmt: skip
    """Scores with ALiBi's bias, and what may not be attended at -inf. m and n broadcast to the tile, in
    either orientation."""
    if ALIBI == 1:
        scores += slope * (n - m - offset).to(tl.float32)
    if ALIBI == 2:
        scores += slope * tl.load(places_ptr + n, mask=n < Tk, other=0).to(tl.float32)
    if MASK != 0:
        ptrs = mask_ptr + m.to(tl.int64) * stride_mm + n.to(tl.int64) * stride_mn
        inside = (m < Tq) & (n < Tk)
        if MASK == 1:
            scores = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, scores, float("-inf"))
        else:
            added = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
            in_log2 = added * 1.4426950408889634
            # finfo.min leaves the range when scaled; as -inf it would no longer share a row out evenly.
            overflown = (in_log2 == float("-inf")) & (added != float("-inf"))
            scores += tl.where(overflown, -3.4028234663852886e38, in_log2)
    if BOUNDED:
        scores = tl.where(n < Tk, scores, float("-inf"))
    if BAND == 1:
        scores = tl.where(n <= m, scores, float("-inf"))
    if BAND == 2:
        near = n - m >= low
        if GLOBALS == 2:
            near = near & (n - m <= high)
        if GLOBALS != 0:
            query = tl.load(global_queries_ptr + m, mask=m < Tq, other=0)
            key = tl.load(global_keys_ptr + n, mask=n < Tk, other=0)
            near = near | (query != 0) | (key != 0)
        if GLOBALS != 2:
            near = near & (n - m <= high)
        scores = tl.where(near, scores, float("-inf"))
    if DOCUMENTS:
        ours = tl.load(documents_ptr + m, mask=m < Tq, other=0)
        theirs = tl.load(key_documents_ptr + n, mask=n < Tk, other=0)
        scores = tl.where(ours == theirs, scores, float("-inf"))
    return scores


@triton.jit
def slope_of(slopes_ptr, stride_sb, stride_sh, batch, head):
    """A head's slope, in units of log2."""
    return tl.load(slopes_ptr + batch * stride_sb + head * stride_sh).to(tl.float32) * 1.4426950408889634


@triton.jit
def within(first, last, ranges_ptr, batch, block, blocks, BLOCK: tl.constexpr):
    """(first, last) narrowed to where the documents of a block are; first stays a multiple of BLOCK."""
    ranges_ptr += (batch * blocks + block) * 2
    first = tl.maximum(first, tl.load(ranges_ptr) // BLOCK * BLOCK)
    return first, tl.minimum(last, tl.load(ranges_ptr + 1))


@triton.jit
def kept(seed, head_index, m, n, Tq, Tk, dropout):
    """Which elements dropout keeps: element (b, h, m, n) draws number ((b H + h) Tq + m) Tk + n."""
    return tl.rand(seed, (head_index.to(tl.int64) * Tq + m) * Tk + n) >= dropout


@triton.jit
def round_to_e4m3(x):
    """Values in [0, 448] to the nearest of e4m3, ties to even: adding 2^20 times the power of two below x
    leaves 3 bits of mantissa."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    magic = tl.maximum(power, 0.015625) * 1048576.0
    return (x + magic) - magic


@triton.jit
def probabilities(
    scores, stats_ptr, rows, inside, rows_total, MASK: tl.constexpr, ROUNDED: tl.constexpr = False
):
    """P of the forward pass again. rows broadcasts to the tile; outside, +inf makes it zero.
    ROUNDED: the forward pass was attention_fp8's."""
    p = scores - tl.load(stats_ptr + rows, mask=inside, other=float("inf"))
    if ROUNDED:
        return round_to_e4m3(tl.exp2(p)) * tl.load(stats_ptr + rows_total + rows, mask=inside, other=0.0)
    if MASK == 2:
        p -= tl.load(stats_ptr + rows_total + rows, mask=inside, other=0.0)
    return tl.exp2(p)


@triton.jit
def capped_scores(products, scale_log2, cap_log2, CAP: tl.constexpr):
    """Scores in units of log2 from q k^T. With a cap c: scale_log2 is scale / c, cap_log2 is c log2(e)."""
    scores = products * scale_log2
    if CAP != 0:
        scores = _tanh(scores, CAP) * cap_log2
    return scores


@triton.jit
def uncap(ds, scores, cap_log2, CAP: tl.constexpr):
    """The gradient before the cap: tanh'(x) = 1 - tanh(x)^2. scores are unmasked."""
    if CAP != 0:
        t = scores / cap_log2
        ds *= 1.0 - t * t
    return ds


@triton.jit
def _tanh(x, CAP: tl.constexpr):
    # 1 - 2 / (1 + e^2x) is off by 1e-7, next to 1 and next to 0: below the rounding of 16-bit probabilities
    # for any cap in use, and a quarter of the instructions.
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268)) if CAP == 1 else libdevice.tanh(x)


@triton.jit
def keys_seen(block, Tk, low, high, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """(first, last): the keys that a block of queries sees lie in between; first is a multiple of BLOCK_N."""
    first = 0
    last = Tk
    if BAND == 1:
        last = tl.minimum(Tk, (block + 1) * BLOCK_M)
    if BAND == 2:
        first = tl.maximum(0, block * BLOCK_M + low) // BLOCK_N * BLOCK_N
        last = tl.minimum(Tk, (block + 1) * BLOCK_M + high)
    return first, last


@triton.jit
def queries_seeing(block, Tq, low, high, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """(first, last): the queries that see any of a block of keys lie in between."""
    first = 0
    last = Tq
    if BAND == 1:
        first = block * BLOCK_N // BLOCK_M * BLOCK_M
    if BAND == 2:
        first = tl.maximum(0, block * BLOCK_N - high) // BLOCK_M * BLOCK_M
        last = tl.minimum(Tq, (block + 1) * BLOCK_N - low)
    return first, last
