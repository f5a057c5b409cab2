"""The CPU path of linear_act: oneDNN or MKL products, activations over blocks of rows that stay in cache.

Where the processor multiplies x's low precision dtype (AMX, AVX512-BF16, AVX512-FP16), activation and
residual ride on the float32 sums, so y is rounded once: in cpu/linear.cpp where AVX512-BF16 is all there is,
else in oneDNN, where z is a second product, since the gelu of a rounded z is off by several roundings in its
tail. Elsewhere ATen emulates such products, and float32 ones over blocks of widened rows take their place:
2048 x 384 x 1536 in bfloat16, one thread of an AVX2 processor, 38 ms against 315 of eager's. No float32 copy
of a whole activation is made. There weight and bias may be float32 beside a narrower x: rounding them would
cost two passes a step and buy nothing, so the product reads the master weights and their gradients leave in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from fusekit.kernels import cpu_library
from fusekit.kernels.activations import ACTIVATIONS
from fusekit.kernels.launch import on_gpu

# Bytes of float32 z in a block. 2048 x 1024 x 4096, forward and backward, one thread of an AVX2 processor:
# 8 MiB 785 ms in bfloat16; 1, 2, 4 and 32 MiB 985, 930, 855 and 935 ms.
BLOCK_BYTES = 8 << 20
PASS_BYTES = 1 << 20  # where a block is only passed over: its temporaries stay in the second-level cache

# What oneDNN's epilogue calls them: name and algorithm. The others would square or gate a rounded z.
EPILOGUES = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("none", ""),  # and clamped after: oneDNN's own makes 0 of a NaN; both round y once
    "silu": ("swish", ""),
    "tanh": ("tanh", ""),
    "sigmoid": ("sigmoid", ""),
}
WIDENED = ACTIVATIONS.keys() - EPILOGUES.keys()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    y: Tensor,
    z: Tensor | None,
    z_scale: float = 1.0,
) -> None:
    """Write act(x @ weight.T + bias) + residual to y, and z_scale times the pre-activation to z.

    Args:
        x: (M, K); weight: (N, K); bias: (N,); residual: (M, N); any strides.
        act: a key of ACTIVATIONS.
        y, z: (M, N), contiguous.
        z_scale: 1 in float32.
    """
    if (act != "none" or residual is not None) and compiled(x, weight, act):  # oneDNN's own are as fast
        _forward_compiled(x, weight, bias, residual, act, y, z, z_scale)
    elif _widens(x, residual, act):
        _forward_widened(x, weight, bias, residual, act, y, z, z_scale)
    elif x.dtype == torch.float32:
        _affine(x, weight, bias, y if z is None else z)
        if act != "none" or residual is not None:
            _activate(y if z is None else z, residual, act, y)
    elif residual is not None:
        y.copy_(add_in_epilogue(x, weight, bias, residual))
    else:
        y.copy_(apply_with_epilogue(x, weight, bias, act))
        if z is not None:
            _affine(x, weight, bias, z, z_scale)


def _widens(x: Tensor, residual: Tensor | None, act: str) -> bool:
    """Whether only float32 products leave one rounding: no 16-bit ones, or no epilogue for what follows."""
    if x.numel() == 0 or not multiplies(x.dtype):
        return True
    return x.dtype != torch.float32 and (act in WIDENED or (act != "none" and residual is not None))


def compiled(x: Tensor, weight: Tensor, act: str) -> bool:
    """Whether cpu/linear.cpp takes this product, with act and residual on its float32 sums."""
    fits = x.dtype == weight.dtype == torch.bfloat16 and x.shape[1] % 2 == 0 and x.numel() > 0
    return fits and act in cpu_library.ACTIVATIONS and cpu_library.multiplies()


def _forward_compiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    y: Tensor,
    z: Tensor | None,
    z_scale: float = 1.0,
) -> None:
    x, weight = adjacent(x), adjacent(weight)
    residual = None if residual is None else adjacent(residual)
    cpu_library.call(
        "linear_forward", x, x.stride(0), weight, weight.stride(0), None if bias is None else bias.float(),
        residual, 0 if residual is None else residual.stride(0), cpu_library.ACTIVATIONS.index(act), y, z,
        z_scale, *y.shape, x.shape[1],
    )  # fmt: skip


def adjacent(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def column_sums(x: Tensor) -> Tensor:
    """x.sum(0) in float32; ATen's makes a float32 copy of a narrower x first."""
    if x.dtype != torch.bfloat16 or not cpu_library.available():
        return x.sum(0, dtype=torch.float32)
    x = adjacent(x)
    sums = x.new_empty(x.shape[1], dtype=torch.float32)
    cpu_library.call("column_sums", x, x.stride(0), sums, *x.shape)
    return sums


def apply_with_epilogue(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """act(x @ weight.T + bias) with the activation in oneDNN's epilogue, on its float32 accumulator."""
    name, algorithm = EPILOGUES[act]
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)
    return y.clamp_min_(0) if act == "relu" else y


def add_in_epilogue(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """x @ weight.T + bias + residual with the sum in oneDNN's epilogue, on its float32 accumulator."""
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


def _forward_widened(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str,
    y: Tensor,
    z: Tensor | None,
    z_scale: float = 1.0,
) -> None:
    weight, bias = weight.float(), None if bias is None else bias.float()
    for rows in _row_blocks(*y.shape):
        wide = y.new_empty(y[rows].shape, dtype=torch.float32)
        _affine(x[rows].float(), weight, bias, wide)
        if z is not None:
            z[rows] = wide * z_scale
        _finish(wide, None if residual is None else residual[rows], act, y[rows])


def _activate(z: Tensor, residual: Tensor | None, act: str, y: Tensor) -> None:
    for rows in _row_blocks(y.shape[0], y.shape[1], PASS_BYTES):
        _finish(z[rows], None if residual is None else residual[rows], act, y[rows])


def backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    saved: Tensor | None,
    act: str,
    grad_input: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write the gradients that are not None.

    Args:
        grad: (M, N), any strides.
        x: (M, K), needed for grad_weight only.
        weight: (N, K).
        saved: (M, N), what the activation's derivative reads; None for "none".
        act: a key of ACTIVATIONS.
        grad_input: (M, K); grad_weight: (N, K), weight's strides; grad_bias: (N,).
    """
    if multiplies(grad.dtype):
        dz = _dact(grad, saved, act, grad_bias)
        if grad_input is not None:
            torch.mm(dz, weight, out=grad_input)
        if grad_weight is not None and x is not None:
            torch.mm(dz.t(), x, out=grad_weight)
        return
    weight = weight.float()
    wide_weight, wide_bias = _accumulator(grad_weight), _accumulator(grad_bias)
    for rows in _row_blocks(*grad.shape):
        dz = _widened_dact(grad[rows], None if saved is None else saved[rows], act)
        if grad_input is not None:
            grad_input[rows] = dz @ weight
        if wide_weight is not None and x is not None:
            # beta=0 ignores what the new memory held: the first block need not find zeros
            wide_weight.addmm_(dz.t(), x[rows].float(), beta=0 if rows.start == 0 else 1)
        if wide_bias is not None:
            torch.sum(dz, 0, out=wide_bias) if rows.start == 0 else wide_bias.add_(dz.sum(0))
    for narrow, wide in ((grad_weight, wide_weight), (grad_bias, wide_bias)):
        if narrow is not None and wide is not None:
            if not len(grad):
                wide.zero_()
            if narrow is not wide:
                narrow.copy_(wide)


def _accumulator(grad: Tensor | None) -> Tensor | None:
    """float32 memory for a gradient summed over blocks: its own where it is float32."""
    return (
        grad if grad is None or grad.dtype == torch.float32 else torch.empty_like(grad, dtype=torch.float32)
    )


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor's own products of `dtype` beat float32's."""
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return native and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def mixes(x: Tensor, parameter: Tensor) -> bool:
    """Whether a product of x may read this parameter in float32: a CPU that would widen both anyway."""
    return parameter.dtype == torch.float32 and not on_gpu(x) and not multiplies(x.dtype)


def _row_blocks(M: int, N: int, size: int | None = None) -> Iterator[slice]:
    """Blocks of rows of equal length, but for the last."""
    most = max(64, (size or BLOCK_BYTES) // (4 * max(N, 1)))
    rows = max(64, -(-M // max(1, -(-M // most))))
    return (slice(start, min(start + rows, M)) for start in range(0, M, rows))


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, scale: float = 1.0) -> None:
    if bias is None and scale == 1.0:
        torch.mm(x, weight.t(), out=out)
    elif bias is None:  # beta=0 ignores what the memory held
        torch.addmm(out, x, weight.t(), alpha=scale, beta=0, out=out)
    else:
        torch.addmm(bias, x, weight.t(), alpha=scale, beta=scale, out=out)


def _finish(z: Tensor, residual: Tensor | None, act: str, y: Tensor) -> None:
    """Write act(z) + residual to y. z is float32, and scratch where y is narrower; it may be y."""
    out = y if y.dtype == torch.float32 else z
    ACTIVATIONS[act].cpu(z, out)
    if residual is not None:
        out += residual
    if out is not y:
        y.copy_(out)


def _widened_dact(grad: Tensor, saved: Tensor | None, act: str, out: Tensor | None = None) -> Tensor:
    """dz in float32: in `out`, or in memory of its own, or grad itself where nothing was saved."""
    wide = grad.float()
    if saved is None:
        return wide
    if out is None:
        out = torch.empty_like(wide) if wide is grad else wide
    ACTIVATIONS[act].cpu_backward(wide, saved.float(), out)
    return out


def _dact(grad: Tensor, saved: Tensor | None, act: str, grad_bias: Tensor | None) -> Tensor:
    """dz in grad's dtype, and its column sums to grad_bias; both from one float32 block at a time."""
    if saved is None:
        if grad_bias is not None:
            torch.sum(grad, 0, out=grad_bias)  # in float32, rounded once
        return grad
    dz = torch.empty(grad.shape, dtype=grad.dtype)
    in_place = dz.dtype == torch.float32
    total = torch.zeros(grad.shape[1]) if grad_bias is not None else None
    for rows in _row_blocks(grad.shape[0], grad.shape[1], PASS_BYTES):
        wide = _widened_dact(grad[rows], saved[rows], act, dz[rows] if in_place else None)
        if not in_place:
            dz[rows] = wide
        if total is not None:
            total += wide.sum(0)
    if grad_bias is not None and total is not None:
        grad_bias.copy_(total)
    return dz
