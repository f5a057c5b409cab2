r"""Linear head and cross entropy in one, without the logits: the loss and its gradients from chunks of rows.

    z = x @ weight.T + bias
    loss_i = logsumexp(z_i) - (1 - s) z_i[target_i] - s mean(z_i),   summed or averaged over target != ignored
    dz_i = softmax(z_i) - (1 - s) onehot(target_i) - s / V,   dx = dz @ weight,   dweight = dz.T @ x

Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009, and Hsu et al.
2024, "Liger Kernel", arXiv:2410.10989, from which: the loss is the last thing a forward pass computes, so its
gradients are computed with it while a chunk's logits are at hand, and the backward pass only scales them.
M rows (tokens), V classes, K features, s label smoothing. Never more than a chunk of the M x V logits exists.
Saved for backward: dx and dweight, dbias of the *mean or sum*, in float32, so that multiplying them by the
incoming gradient (a loss scale, 1 / accumulation steps) is their one rounding. Logits stay in float32 where
eager rounds them to x's dtype; dz meets the tensor cores in x's dtype, unscaled: 1 / M would underflow fp16.
A forward pass without gradients computes the loss alone. Rows that are ignored cost what the others do.

GPU: products by gemm.py; one pass reads a row of logits, one writes dz. CPU: linear_cross_entropy_cpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusekit.kernels import linear_cpu, linear_cross_entropy_cpu
from fusekit.kernels._triton import tl, triton
from fusekit.kernels.gemm import matmul
from fusekit.kernels.launch import launch, on_gpu
from fusekit.kernels.library import Function, define, refuse_double_backward
from fusekit.kernels.linear_gpu import asks_tf32, use_tf32
from fusekit.kernels.op import Op, Sample, not_runnable

REDUCTIONS = ("mean", "sum")
# Of a chunk on a GPU: its products fill the device, and the weight's float32 sums, read and written once a
# chunk, take an eighth of its time on an H100 (of 512 rows, half).
LEAST_ROWS = 2048
ALIGNED = 64  # classes: rows of logits start where descriptors can load them, whatever the vocabulary
BLOCK_V = 4096


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The same in plain PyTorch, logits and all; accumulates in at least float32, and so is the loss."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return F.cross_entropy(
        logits.reshape(targets.shape[0], weight.shape[0]), targets, ignore_index=ignore_index,
        reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip


@triton.jit
def _row_kernel(
    logits_ptr, targets_ptr, losses_ptr, dz_ptr, V, pitch, ignored, smoothing,
    SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    counts = target != ignored
    columns = tl.arange(0, BLOCK_V)
    top = tl.full((BLOCK_V,), float("-inf"), tl.float32)  # of each lane, over its columns
    total = tl.zeros((BLOCK_V,), tl.float32)
    plain = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        inside = start + columns < V
        z = tl.load(logits_ptr + row * pitch + start + columns, mask=inside, other=float("-inf"))
        higher = tl.maximum(top, z)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no -inf - -inf
        total = total * tl.exp(top - base) + tl.exp(z - base)
        top = higher
        if SMOOTH:
            plain += tl.where(inside, z, 0.0)
    highest = tl.max(top, 0)
    sum_of_exp = tl.sum(total * tl.exp(top - highest), 0)
    # A target that is no class gives NaN: eager stops the device there.
    valid = counts & (target >= 0) & (target < V)
    z_target = tl.load(logits_ptr + row * pitch + tl.where(valid, target, 0), mask=valid, other=float("nan"))
    loss = tl.log(sum_of_exp) + highest - (1.0 - smoothing) * z_target
    if SMOOTH:
        loss -= smoothing / V * tl.sum(plain, 0)
    tl.store(losses_ptr + row, tl.where(counts, loss, 0.0))
    if dz_ptr is not None:
        for start in range(0, V, BLOCK_V):
            column = start + columns
            z = tl.load(logits_ptr + row * pitch + column, mask=column < V, other=0.0)
            dz = tl.exp(z - highest) / sum_of_exp
            if SMOOTH:
                dz -= smoothing / V
            dz = tl.where(column == target, dz - (1.0 - smoothing), dz)
            dz = tl.where(counts, dz, 0.0)
            tl.store(dz_ptr + row * pitch + column, dz.to(dz_ptr.dtype.element_ty), mask=column < V)


def _forward_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, smoothing: float,
    losses: Tensor, grad_x: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    (M, K), V = x.shape, weight.shape[0]
    rows = min(M, max(LEAST_ROWS, triton.next_power_of_2(triton.cdiv(M * K, V))))
    bias, targets = None if bias is None else bias.contiguous(), targets.contiguous()
    wanted = any(g is not None for g in (grad_x, grad_weight, grad_bias))
    pitch = triton.cdiv(V, ALIGNED) * ALIGNED
    logits = x.new_empty((rows, pitch), dtype=torch.float32)[:, :V]
    low = logits if x.dtype == torch.float32 else x.new_empty((rows, pitch))[:, :V]
    tf32 = use_tf32(x, False)
    for start in range(0, M, max(rows, 1)):
        here = slice(start, min(start + rows, M))
        count = here.stop - start
        z, dz = logits[:count], low[:count] if wanted else None
        matmul(x[here], weight.t(), z, bias=bias, tf32=tf32)
        launch(
            _row_kernel, (count,), z, targets[here], losses[here], dz, V, pitch, ignore_index, smoothing,
            SMOOTH=smoothing != 0.0, BLOCK_V=min(BLOCK_V, triton.next_power_of_2(V)), num_warps=8,
        )  # fmt: skip
        if dz is None:
            continue
        if grad_x is not None:
            matmul(dz, weight, grad_x[here], tf32=tf32)
        if grad_weight is not None:
            matmul(dz.t(), x[here], grad_weight, residual=grad_weight if start else None, tf32=tf32)
        if grad_bias is not None:
            partial = dz.sum(0, dtype=torch.float32)
            grad_bias.add_(partial) if start else grad_bias.copy_(partial)


def _empty_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str,
    label_smoothing: float, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    shapes = (x.shape, weight.shape, weight.shape[:1])
    grads = (
        x.new_empty(s if need else (0,), dtype=torch.float32) for s, need in zip(shapes, needs, strict=True)
    )
    return x.new_empty((), dtype=torch.float32), *grads


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int, reduction: str,
    label_smoothing: float, needs: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    results = _empty_forward(x, weight, bias, targets, ignore_index, reduction, label_smoothing, needs)
    loss, *grads = results
    grad_x, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    M, K = targets.shape[0], weight.shape[1]
    losses = x.new_zeros(M, dtype=torch.float32)
    if M == 0:
        for grad in grads:
            grad.zero_()
    counted = (targets != ignore_index).sum()
    share = None if reduction == "sum" else counted.clamp(min=1).to(torch.float32).reciprocal()
    arguments = (
        x.reshape(M, K), weight, bias, targets, ignore_index, label_smoothing,
        losses, None if grad_x is None else grad_x.view(M, K), grad_weight, grad_bias,
    )  # fmt: skip
    if on_gpu(x):
        _forward_triton(*arguments)
        if share is not None:
            for grad in grads:
                grad.mul_(share)
    else:
        linear_cross_entropy_cpu.forward(*arguments, 1.0 if share is None else float(share))
    total = losses.sum()
    loss.copy_(total if share is None else total / counted)  # no row counts: NaN, and the gradients are 0
    return results


_forward_op = define(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor? bias, Tensor targets, int ignore_index,"
    " str reduction, float label_smoothing, bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_forward,
    depends=asks_tf32,
)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *settings: Any
    ) -> Tensor:
        ctx.needs = [*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[2]]
        loss, *grads = _forward_op(x, weight, bias, targets, *settings, ctx.needs)
        ctx.save_for_backward(*grads)
        ctx.dtypes = x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        refuse_double_backward("linear_cross_entropy")
        scaled = (
            (saved * grad_output).to(dtype) if need else None
            for saved, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
        )
        return *scaled, None, None, None, None


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> str | None:
    """None, or why linear_cross_entropy does not run on these arguments."""
    if reduction not in REDUCTIONS:
        return f"reduction {reduction!r} is neither 'mean' nor 'sum'"
    if not 0.0 <= label_smoothing <= 1.0:
        return f"label_smoothing {label_smoothing} is not between 0 and 1"
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return f"x {_shape(x)} and weight {_shape(weight)} do not multiply; weight is (V, K), x (..., K)"
    V = weight.shape[0]
    if V == 0 or weight.shape[1] == 0:
        return f"weight {_shape(weight)} has an empty dimension"
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != V):
        return f"bias {_shape(bias)} is not ({V},), one value per class"
    if targets.dtype != torch.int64:
        return f"targets are {targets.dtype}; class indices are int64"
    if targets.dim() != 1 or targets.shape[0] != math.prod(x.shape[:-1]):
        return f"targets {_shape(targets)} is not one class for each row of x {_shape(x)}"
    if targets.device != x.device:
        return f"tensors are on different devices: {x.device} and {targets.device}"
    parameters = weight.dtype if linear_cpu.mixes(x, weight) else x.dtype
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != parameters:
            return f"x is {x.dtype} and {name} is {tensor.dtype}; cast one, or call under torch.autocast"
    return not_runnable(x, weight, bias)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _checked(*args: Any) -> tuple[Any, ...]:
    if reason := supports(*args):
        raise ValueError(f"linear_cross_entropy: {reason}")
    defaults = (-100, "mean", 0.0)
    return *args, *defaults[len(args) - 4 :]


def _infer(*args: Any) -> Tensor:
    return _forward_op(*_checked(*args), [False, False, False])[0]


def _differentiable(*args: Any) -> Tensor:
    return _LinearCrossEntropy.apply(*_checked(*args)) if torch.is_grad_enabled() else _infer(*args)


fused = define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets, int ignore_index=-100,"
    " str reduction='mean', float label_smoothing=0.0) -> Tensor",
    _infer,
    lambda *args: _checked(*args)[0].new_empty((), dtype=torch.float32),
    autograd=_differentiable,
    autocast="lower",
)


def flops(x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * math.prod(x.shape[:-1]) * weight.shape[0] * weight.shape[1]


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[Sample]:
    """Small: ragged, ignored rows, every option, no row. bench: heads of a small GPT and of GPT-2."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    def case(name: str, lead: tuple[int, ...], V: int, K: int, *options: Any, bias: bool = False,
             ignore: int = -100, bench: bool = False) -> Sample:  # fmt: skip
        x, weight, M = make(*lead, K), make(V, K, scale=2 * K**-0.5), math.prod(lead)
        targets = torch.randint(V, (M,), generator=generator)
        if not bench:
            targets[1::3] = ignore
        args = (x, weight, make(V) if bias else None, targets.to(device), ignore, *options)
        return Sample(args=args, name=name, bench=bench)

    yield case("mean", (3, 23), 150, 40)
    yield case("sum_bias", (65,), 67, 33, "sum", bias=True)
    yield case("smoothing", (2, 35), 72, 65, "mean", 0.1, bias=True, ignore=0)
    yield case("wide", (5,), 5000, 16, "mean", 0.0)
    x, weight = make(35, 2, 24), make(24, 50, scale=0.4)
    strided = (x.detach().transpose(0, 1).requires_grad_(), weight.detach().t().requires_grad_())
    yield Sample(args=(*strided, None, torch.arange(70, device=device) % 50), name="strided")
    yield case("empty_batch", (0, 5), 24, 16, "sum")
    for M, V, K in ((2048, 8192, 384), (2048, 50304, 768)):
        yield case(f"{M}x{V}x{K}", (M,), V, K, bench=True)


OP = Op(
    fused=fused, reference=reference, samples=samples, supports=supports, flops=flops, inherent=True
)  # fmt: skip
