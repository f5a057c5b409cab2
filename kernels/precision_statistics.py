r"""How well FP8 would hold the three products of a linear layer, measured on a sample of its values.

    output = x w^T        grad_input = g w        grad_weight = g^T x

An operand as a product sees it has rows and a contraction. Per product, all of them worse when larger, so
that ranks and micro-batches combine by maximum:

    snr_loss      dB that the 5th percentile of the rows' signal-to-noise ratio lies below FP8's own of
                  Gaussian values (31.5 of e4m3, 25.5 of e5m2); the worse operand counts
    underflow     share of the values that are not zero and become zero
    saturation    share beyond the largest code, which only a scale of earlier steps allows
    error         95th percentile over rows of |Q(a)Q(b)^T - ab^T| / |ab^T|
    cosine_loss   1 - cos(Q(a)Q(b)^T, ab^T)
    nonfinite     1 where an operand has a NaN or an infinity anywhere
    amax          of the activation or gradient

Errors of whole tensors are blind: where tokens differ in scale the energy sits in the few that FP8 holds, and
underflow alone cries wolf. Rows tell (docs/precision.md has the figures).

The sample is of rows (tokens), evenly spaced; of products, ROWS x FEATURES results, in
the layer's own precision, whose rounding is a twentieth of FP8's. Scales are never those of
the sample: the largest value of the whole tensor, or of a whole column, makes them. Blocks of 128 along the
tokens are 128 tokens of the sample. Everything stays on the device; nothing waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusekit.kernels import fp8_cpu
from fusekit.kernels.fp8_format import dequantise, group_of, quantise, scale_of
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.linear_cpu import multiplies
from fusekit.kernels.recipe import LARGEST, Recipe

STATISTICS = ("snr_loss", "underflow", "saturation", "error", "cosine_loss", "nonfinite", "amax")
PRODUCTS = ("output", "grad_input", "grad_weight")
IDEAL_SNR = {torch.float8_e4m3fn: 31.5, torch.float8_e5m2: 25.5}  # dB, Gaussian values
ROWS, FEATURES = 128, 128  # of a product that are computed
BLOCK = 128  # rows of a weight that are taken together, so that its 128 x 128 groups are whole
WORST = 1e9  # stands for what is no number
_E4M3 = torch.float8_e4m3fn
_SWEPT = (torch.float32, torch.bfloat16, torch.float16)  # what fp8_cpu takes


class Sample(NamedTuple):
    """Rows of a tensor, and the largest magnitudes of all of it, in units that make `top` about 1.

    The unit is a power of two: it changes no code, and sums of squares neither over- nor underflow.
    """

    values: Tensor  # (R, C)
    unit: Tensor  # (), values = x * unit
    amax: Tensor  # (), of x
    columns: Tensor  # (C,), of x * unit

    @property
    def top(self) -> Tensor:
        return self.amax * self.unit


class _Operand(NamedTuple):
    """Rows of (rows, contraction), as they are and as FP8 has them."""

    values: Tensor
    rounded: Tensor
    saturated: Tensor
    ideal: float


def positions(count: int, limit: int, offset: int = 0, block: int = 1) -> tuple[int, int, int]:
    """Which of `count` rows: how many blocks, of how many, and by how many these are moved.

    At most `limit` rows, evenly spaced, in whole blocks.
    """
    blocks = -(-count // block)
    taken = min(blocks, max(1, limit // block))
    return taken, blocks, offset % max(1, blocks // max(taken, 1))


def chosen(x: Tensor, limit: int, offset: int = 0, block: int = 1, dim: int = 0) -> Tensor:
    """At most `limit` of the rows (or columns, dim 1) of x, see `positions`; x itself where that is all."""
    count = x.shape[dim]
    taken, blocks, moved = positions(count, limit, offset, block)
    if taken == blocks:
        return x
    # On the device and by arithmetic: a list of indices, or a mask, would make the host wait.
    starts = (torch.arange(taken, device=x.device) * blocks // taken + moved) * block
    indices = (starts[:, None] + torch.arange(block, device=x.device)).flatten()
    last = ((taken - 1) * blocks // taken + moved) * block
    return x.index_select(dim, indices[: (taken - 1) * block + min(block, count - last)])


def column_amax(x: Tensor) -> Tensor:
    """(C,) float32 largest magnitudes of the columns of (M, C), one pass over x; NaN where one is."""
    if not len(x):
        return x.new_zeros(x.shape[1], dtype=torch.float32)
    if not on_gpu(x) and x.dtype in _SWEPT:
        return fp8_cpu.amax_of(x.contiguous(), (len(x), 1))[0]
    smallest, largest = torch.aminmax(x, dim=0)
    return torch.maximum(smallest.abs(), largest.abs()).float()


def sample(x: Tensor, rows: int = 256, offset: int = 0, block: int = 1) -> Sample:
    """A sample of (M, C) floating x: `rows` of its rows, `positions` says which."""
    x = x.detach()
    return measured(chosen(x, rows, offset, block), column_amax(x))


def measured(rows: Tensor, columns: Tensor) -> Sample:
    """Rows of a tensor whose columns have these largest magnitudes."""
    amax = columns.amax()
    unit = scale_of(amax.reshape(1), _E4M3)[0] / 256  # amax * unit is in (0.875, 1.75]
    return Sample(rows * unit.to(rows.dtype), unit, amax, columns * unit)


def output_statistics(x: Sample, weight: Sample, recipe: Recipe, scale: Tensor | None = None) -> Tensor:
    """Of x w^T. weight: sampled in blocks of its rows, the output features.

    scale: (3,) float32 of earlier steps, where the recipe has delayed scales; 0 where no step was seen.
    """
    a = _operand(x, recipe, 0, _stale(scale, 0, x))
    b = _operand(weight, recipe, 1, _stale(scale, 1, weight))
    return _statistics(a, b, x, weight)


def grad_input_statistics(g: Sample, weight: Sample, recipe: Recipe, scale: Tensor | None = None) -> Tensor:
    """Of g w. weight: w^T, sampled in blocks of its rows, the input features."""
    a = _operand(g, recipe, 2, _stale(scale, 2, g))
    b = _operand(weight, recipe, 1, _stale(scale, 1, weight))
    return _statistics(a, b, g, weight)


def grad_weight_statistics(g: Sample, x: Sample, recipe: Recipe, scale: Tensor | None = None) -> Tensor:
    """Of g^T x over the sampled rows, which have to be the same of both."""
    a = _operand(_narrow(g), recipe, 2, _stale(scale, 2, g), transposed=True)
    b = _operand(_narrow(x), recipe, 0, _stale(scale, 0, x), transposed=True)
    return _statistics(a, b, g, x)


def _stale(scale: Tensor | None, which: int, of: Sample) -> Tensor | None:
    return None if scale is None else scale[which] / of.unit


def _narrow(of: Sample) -> Sample:
    """FEATURES of the columns, with all rows."""
    return of._replace(values=chosen(of.values, FEATURES, dim=1), columns=chosen(of.columns, FEATURES))


def _operand(
    of: Sample, recipe: Recipe, which: int, stale: Tensor | None, transposed: bool = False
) -> _Operand:
    """x (0), a weight's rows (1) or the gradient (2), with the scales that the whole tensor gives."""
    dtype = recipe.gradient if which == 2 else recipe.forward
    seen = of.values.t() if transposed else of.values
    group = group_of(recipe, (seen.shape[0], seen.shape[1]), weight=which == 1)
    scale = None
    if stale is not None:
        own = scale_of(of.top.reshape(1, 1), dtype)
        scale = torch.where(stale > 0, stale, own[0, 0]).reshape(1, 1)
    elif recipe.scaling == "tensor":
        scale = scale_of(of.top.reshape(1, 1), dtype)
    elif recipe.scaling == "row" and transposed:
        scale = scale_of(of.columns, dtype)[:, None]
    saturated = seen.new_zeros((), dtype=torch.float32)
    if stale is not None and scale is not None:
        saturated = (seen.float().abs() * scale > LARGEST[dtype]).float().mean()
    return _Operand(seen, _through_fp8(seen, dtype, group, scale), saturated, IDEAL_SNR[dtype])


def _through_fp8(x: Tensor, dtype: torch.dtype, group: tuple[int, int], scale: Tensor | None) -> Tensor:
    """Q(x) in x's dtype: codes over powers of two are numbers of bfloat16."""
    if not on_gpu(x) and x.dtype in _SWEPT:
        kept = x.dtype if x.dtype != torch.float16 else torch.float32
        return fp8_cpu.through_fp8(x.contiguous(), dtype, group, kept, True, scale)[0]
    return dequantise(quantise(x, dtype, group, True, scale), group, torch.float32)


def _statistics(a: _Operand, b: _Operand, sampled: Sample, other: Sample) -> Tensor:
    """The vector of STATISTICS of a b^T."""
    error, cosine_loss = _product_loss(a, b)
    finite = sampled.amax.isfinite() & other.amax.isfinite()
    found = torch.stack((
        torch.maximum(a.ideal - _row_snr(a), b.ideal - _row_snr(b)),
        torch.maximum(_underflow(a), _underflow(b)),
        torch.maximum(a.saturated, b.saturated),
        error, cosine_loss, (~finite).float(), sampled.amax,
    ))  # fmt: skip
    return found.nan_to_num(nan=WORST, posinf=WORST, neginf=-WORST)


def _row_snr(of: _Operand) -> Tensor:
    """dB, 5th percentile over rows; rows of zeros, and rows that lose nothing, count as 200."""
    values = of.values.float()
    signal, noise = (torch.linalg.vector_norm(t, dim=1) for t in (values, values - of.rounded))
    ratio = 20 * torch.log10(signal / noise)
    ratio = torch.where((signal == 0) | (noise == 0), torch.full_like(ratio, 200.0), ratio)
    return _percentile(ratio, 0.05, 200.0)


def _underflow(of: _Operand) -> Tensor:
    nonzero, left = torch.count_nonzero(of.values), torch.count_nonzero(of.rounded)  # what is 0 stays 0
    return (nonzero - left) / nonzero.clamp(min=1)


def _percentile(rows: Tensor, share: float, empty: float) -> Tensor:
    return torch.quantile(rows, share) if rows.numel() else rows.new_full((), empty)


def _product_loss(a: _Operand, b: _Operand) -> tuple[Tensor, Tensor]:
    """The 95th percentile of the rows' relative errors, and 1 - cosine of the whole."""
    low = a.values.dtype == torch.bfloat16 and (on_gpu(a.values) or multiplies(torch.bfloat16))
    dtype = torch.bfloat16 if low else torch.float32
    left, q_left = (chosen(t, ROWS).to(dtype) for t in (a.values, a.rounded))
    right, q_right = (chosen(t, FEATURES).to(dtype) for t in (b.values, b.rounded))
    exact, rounded = (left @ right.t()).float(), (q_left @ q_right.t()).float()
    length, q_length = (torch.linalg.vector_norm(t, dim=1) for t in (exact, rounded))
    errors = torch.linalg.vector_norm(rounded - exact, dim=1) / length
    errors = torch.where((length == 0) & (q_length == 0), torch.zeros_like(errors), errors)
    norm, q_norm = (torch.linalg.vector_norm(t) for t in (length, q_length))
    lost = 1 - torch.dot(exact.flatten(), rounded.flatten()) / (norm * q_norm)
    lost = torch.where(norm * q_norm == 0, (norm != q_norm).float(), lost)  # all of it gone, or nothing there
    return _percentile(errors, 0.95, 0.0), lost
