"""Starts of qkv_kernels.py: which configuration runs, settled once for each kind of call, as in gemm.py.

The tables' rows that serve the epilogue "qkv" were built with all four kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fusekit.kernels import config_table, gemm
from fusekit.kernels.config_table import Config
from fusekit.kernels.gemm import GROUP
from fusekit.kernels.launch import Plans, Repeated, kind_of
from fusekit.kernels.qkv_kernels import (
    persistent_columns_kernel,
    persistent_sum_kernel,
    tile_columns_kernel,
    tile_sum_kernel,
)

Three = list[Tensor]


class Plan(NamedTuple):
    """integers: the kernel's sizes and strides."""

    start: Repeated
    integers: tuple[int, ...]


_plans = Plans()


def project(
    x: Tensor,
    weights: Three,
    biases: list[Tensor | None],
    outputs: Three,
    tf32: bool,
    config: Config | None = None,
) -> None:
    """Write x @ weight.T + bias of each weight to its output.

    Args:
        x: (M, K), any strides.
        weights: three (N, K), N of their own, any strides.
        biases: (N,) contiguous or None, one for each weight.
        outputs: (M, N), contiguous.
        config: instead of the table's choice, for tuning and tests.
    """
    weights = _alike(weights)
    _start(False, [x], weights, [x, *weights, *outputs, *biases], tf32, config)


def sum_products(
    grads: Three, weights: Three, grad_input: Tensor, tf32: bool, config: Config | None = None
) -> None:
    """Write the sum of grad @ weight over the three to grad_input.

    Args:
        grads: three (M, N), N of their own, any strides.
        weights: (N, K), any strides.
        grad_input: (M, K), contiguous.
    """
    weights = _alike(weights)
    grads = [grad if grad.stride(1) == 1 else grad.contiguous() for grad in grads]
    _start(True, grads, weights, [*grads, *weights, grad_input], tf32, config)


def _alike(weights: Three) -> Three:
    """The weights with one pair of strides; those of three linear layers have it."""
    strides = weights[0].stride()
    if all(weight.stride() == strides for weight in weights):
        return weights
    return [weight.contiguous() for weight in weights]


def _start(
    summed: bool, inputs: Three, weights: Three, tensors: list[Any], tf32: bool, config: Config | None
) -> None:
    key = (summed, tf32, config, weights[0].get_device(), tensors[0].shape[0],
           *[weight.shape for weight in weights], *map(kind_of, tensors))  # fmt: skip
    plan = _plans(key, lambda: _plan(summed, inputs, weights, tf32, config))
    plan.start(*tensors, *plan.integers)


def _plan(summed: bool, inputs: Three, weights: Three, tf32: bool, config: Config | None) -> Plan:
    M, K = inputs[0].shape[0], weights[0].shape[1]
    features = [weight.shape[0] for weight in weights]
    x = inputs[0]
    kind = "half" if x.dtype.itemsize == 2 else "tf32" if tf32 else "ieee"
    table = gemm._table(x)
    read = (*inputs, *weights)
    regular = K > 0 and all(features) and gemm.aligned(*read) and all(gemm._letter(t) == "n" for t in read)
    if config is None:
        layout = ("nn" if summed else "nt") if regular else "s"
        N, depth = (K, sum(features)) if summed else (sum(features), K)
        config, _ = config_table.choose(table, kind, layout, "qkv", M, N, depth, False)
    columns = -(-K // config.n) if summed else sum(-(-n // config.n) for n in features)
    tiles = -(-M // config.m) * columns
    meta: dict[str, Any] = {
        "PRECISION": "tf32" if tf32 else "ieee",
        "BLOCK_M": config.m,
        "BLOCK_N": config.n,
        "BLOCK_K": config.k,
        "GROUP": GROUP,
        "PARTS": config.parts,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    rows = [t.stride(0) for t in inputs]
    if config.kernel == "persistent":
        kernel = persistent_sum_kernel if summed else persistent_columns_kernel
        start = Repeated(kernel, (min(tiles, table.sms),), scratch=True, **meta)
        return Plan(start, (M, *features, K, *rows, weights[0].stride(0)))
    even = all(depth % config.k == 0 for depth in (features if summed else (K,)))
    kernel = tile_sum_kernel if summed else tile_columns_kernel
    start = Repeated(kernel, (tiles,), EVEN_K=even, **meta)
    strides = rows if summed else x.stride()
    return Plan(start, (M, *features, K, *strides, *weights[0].stride()))
