"""What nodes cost: FLOPs, bytes and seconds, from shapes and a small table of devices.

A node takes the longer of its arithmetic and its memory traffic, plus what starting it costs: a roofline,
good enough to tell a saved pass over memory from the price of one more Python call, and no better than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fusekit.kernels import fp8_choice, fp8_maxima
from fusekit.kernels.fp8_library import LIBRARY, Call
from fusekit.kernels.launch import on_gpu
from fusekit.kernels.linear_cpu import multiplies
from fusekit.kernels.op import LOW_PRECISION
from fusekit.kernels.recipe import Recipe
from fusekit.passes.dtype_policy import Policy, policy_of
from fusekit.passes.propagate import tensors_of

aten = torch.ops.aten

# Seconds to start one op, forward pass: an ATen call, and a fused op (dispatcher, autograd.Function,
# launcher).
# The CPU pair was measured (one thread, tiny tensors); on a GPU the launch itself is added to both.
EAGER_OVERHEAD = {"cpu": 3e-6, "cuda": 6e-6}
FUSED_OVERHEAD = {"cpu": 12e-6, "cuda": 15e-6}


@dataclass(frozen=True, kw_only=True)
class Device:
    """Peak rates: FLOP/s of a matmul by dtype, bytes/s of memory."""

    name: str
    float32: float
    tf32: float
    low: float
    bandwidth: float


CPU = Device(name="CPU", float32=1.6e11, tf32=1.6e11, low=1.3e12, bandwidth=1e10)  # one thread, AMX
PLAIN_CPU = Device(name="CPU without 16-bit products", float32=6e10, tf32=6e10, low=6e10, bandwidth=1e10)
EMULATED = 8  # ATen's low matmuls there take 8 times as long as float32 ones: scalar code (AVX2, measured)
GPU = Device(name="unknown GPU", float32=2e13, tf32=8e13, low=1.6e14, bandwidth=1e12)
GPUS = [
    Device(name="A100", float32=1.95e13, tf32=1.56e14, low=3.12e14, bandwidth=1.9e12),
    Device(name="H100", float32=6.7e13, tf32=4.95e14, low=9.89e14, bandwidth=3.3e12),
    Device(name="H200", float32=6.7e13, tf32=4.95e14, low=9.89e14, bandwidth=4.8e12),
]


# Measured on an H100 (benchmarks/results/fp8_layers_h100.json), by the recipe's scaling: the speed of FP8
# products beside bf16's, which attain LOW_ATTAINED of the peak, and the bytes an element whose movement takes
# as long as its casts to both layouts. Of blocks the library's product, 1 x 128 by 128 x 128, was measured by
# itself, and a layer is the sum of its parts.
LOW_ATTAINED = 0.79
FP8_SPEED = {"tensor": 1.1, "row": 1.1, "block": 0.75, "mx": 0.26}
FP8_LIBRARY_SPEED = {"tensor": 1.8, "row": 1.7, "block": 1.6}  # torch._scaled_mm's, where it is taken
FP8_CAST_BYTES = {"tensor": 8, "row": 10, "block": 8, "mx": 13}
FP8_DELAYED_CAST_BYTES = 6  # the scale is known: one pass
# Of bf16's forward pass, from more than 64 features on and without documents: of the compiled kernels (static
# lane) bf16's is bound by its products, FP8's by the instructions of softmax.
FP8_ATTENTION_SPEED = 1.3
FP8_LEAST_GAIN = 1.05  # what is not this much faster stays: it would cost precision for nothing


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes moved of one or more nodes, and their time without what starting them costs."""

    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds)


def device_of(value: Any) -> Device:
    """The table's entry for the device a fake tensor is on."""
    tensors = tensors_of(value)
    if not tensors or not on_gpu(tensors[0]):
        return CPU if multiplies(torch.bfloat16) else PLAIN_CPU
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((device for device in GPUS if device.name in name), GPU)


def node_cost(node: fx.Node) -> Cost:
    """Forward cost of one unfused node; views and bookkeeping cost nothing."""
    value = node.meta.get("val")
    inputs = [t for n in node.all_input_nodes for t in tensors_of(n.meta.get("val"))]
    if node.op != "call_function" or not tensors_of(value) or _moves_nothing(node, inputs):
        return Cost()
    cost = roofline(node_flops(node), bytes_of([*inputs, *tensors_of(value)]), value)
    emulated = _is_matmul(node) and not on_gpu(inputs[0]) and inputs[0].dtype in LOW_PRECISION
    if emulated and not multiplies(inputs[0].dtype):
        return replace(cost, seconds=EMULATED * cost.seconds)
    return cost


def roofline(flops: int, moved: int, value: Any, tf32: bool = False) -> Cost:
    """Cost of `flops` and `moved` bytes on the device and in the dtype of `value`."""
    device, dtype = device_of(value), tensors_of(value)[0].dtype
    rate = device.tf32 if tf32 else device.low if dtype in (torch.float16, torch.bfloat16) else device.float32
    return Cost(flops, moved, max(flops / rate, moved / device.bandwidth))


def emulates_fp8(value: Any) -> bool:
    """Whether a value's device has no FP8 products: then FP8 costs time, and was asked for all the same."""
    if not on_gpu(tensors_of(value)[0]):
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)


def fp8_seconds(M: int, N: int, K: int, value: Any, recipe: Recipe) -> tuple[float, float]:
    """Forward and backward of a linear layer in bf16 and in FP8, the casts included."""
    device = device_of(value)
    product = 2 * M * N * K / (LOW_ATTAINED * device.low)
    operands = M * K + N * K + M * N
    started = EAGER_OVERHEAD["cuda"]
    calls = fp8_choice.calls((M, N, K), tensors_of(value)[0], torch.float32, recipe)
    products = (3 - len(calls)) * product + sum(product / _fp8_speed(call) for call in calls.values())
    moved = FP8_DELAYED_CAST_BYTES if recipe.delayed else FP8_CAST_BYTES[recipe.scaling]
    low = max(3 * product, 3 * 2 * operands / device.bandwidth) + 3 * started
    fp8 = max(products, 3 * operands / device.bandwidth)
    return low, fp8 + operands * moved / device.bandwidth + 9 * started


def _fp8_speed(call: Call) -> float:
    """Beside bf16's, by whoever computes it: as measured here, or without a GPU as on one not measured."""
    choice = fp8_choice.choose(call) if torch.cuda.is_available() else fp8_choice.unmeasured(call)
    return (FP8_LIBRARY_SPEED if choice.name == LIBRARY else FP8_SPEED)[call.scaling]


def why_fp8_does_not_pay(M: int, N: int, K: int, value: Any, recipe: Recipe) -> str | None:
    """None where FP8 is faster than bf16, or only emulated: then speed is not what it is asked for."""
    if emulates_fp8(value):
        return None
    low, fp8 = fp8_seconds(M, N, K, value, recipe)
    if low >= FP8_LEAST_GAIN * fp8:
        return None
    return (
        f"{M} x {K} x {N} would take {fp8 * 1e6:.0f} µs in FP8 with {recipe.scaling} scales, casts included, "
        f"and takes {low * 1e6:.0f} µs in bf16, forward and backward on {device_of(value).name}, as estimated"
    )


def fp8_activation_pays_apart(M: int, N: int, K: int, value: Any, recipe: Recipe) -> bool:
    """Whether a layer gains by leaving its activation to a pass of its own: a library then may compute it."""
    if not recipe.output or emulates_fp8(value):
        return False
    call = fp8_choice.calls((M, N, K), tensors_of(value)[0], torch.float32, recipe)["output"]
    product, device = 2 * M * N * K, device_of(value)
    own, apart = (
        product / (LOW_ATTAINED * device.low * s) for s in (FP8_SPEED[call.scaling], _fp8_speed(call))
    )
    moved = 3 if fp8_maxima.helps(recipe) else 2  # of a 16-bit M N: z, y, and y again for its maxima
    return apart + 2 * moved * M * N / device.bandwidth + EAGER_OVERHEAD["cuda"] < own


def fp8_attention_seconds(
    q: Tensor, k: Tensor, v: Tensor, flops: int, scaling: str, training: bool
) -> tuple[float, float]:
    """An attention of so many forward FLOPs in bf16 and with an FP8 forward pass, casts included; `training`
    with the backward pass, whose 5 products for the forward pass's 2 are 16-bit in both."""
    device = device_of(q)
    products, started = flops / device.low, EAGER_OVERHEAD["cuda"]
    operands = size(q) + size(k) + size(v)
    reads = 2 if scaling == "head" else 1  # the largest value of a head first
    casts = operands * (2 * reads + 1) / device.bandwidth + 3 * (2 * reads - 1) * started
    if training:  # codes are brought back to 16 bits
        casts += operands * (1 + 2) / device.bandwidth + 3 * started
    backward = 2.5 * products if training else 0.0
    return products + backward, products / FP8_ATTENTION_SPEED + backward + casts


def why_fp8_attention_does_not_pay(
    q: Tensor, k: Tensor, v: Tensor, flops: int, scaling: str, training: bool, packed: bool
) -> str | None:
    """None where an FP8 forward pass is faster, or only emulated. packed: scores are told by documents."""
    if emulates_fp8(q):
        return None
    if packed or (features := max(hint(x.shape[-1]) for x in (q, v))) <= 64:
        what = "documents are compared for every score" if packed else f"softmax of {features} features"
        return f"{what}, which takes longer than the products that FP8 would shorten"
    low, fp8 = fp8_attention_seconds(q, k, v, flops, scaling, training)
    if low >= FP8_LEAST_GAIN * fp8:
        return None
    passes = "forward and backward" if training else "forward"
    return (
        f"{hint(k.shape[-2])} keys would take {fp8 * 1e6:.0f} µs in FP8, casts included, and take "
        f"{low * 1e6:.0f} µs in bf16, {passes} on {device_of(q).name}, as estimated"
    )


def node_flops(node: fx.Node) -> int:
    """Multiply-adds counted twice; elementwise ops and reductions count one per element."""
    result = tensors_of(node.meta["val"])[0]
    values: list[Any] = []
    fx.map_arg((node.args, node.kwargs), lambda n: values.append(n.meta.get("val")))
    shapes = [v.shape for v in values if isinstance(v, Tensor)]
    packet = getattr(node.target, "overloadpacket", None)
    if packet in (aten.linear, aten.matmul, aten.mm, aten.bmm):
        return 2 * size(result) * hint(shapes[0][-1])
    if packet in (aten.addmm, aten.baddbmm):
        return 2 * size(result) * hint(shapes[1][-1])
    if packet in (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution):
        return 2 * size(result) * math.prod(hint(n) for n in shapes[1][1:])
    if packet is aten.scaled_dot_product_attention:
        keys, features = shapes[1][-2], shapes[0][-1]
        return 2 * size(result) * hint(keys) + 2 * math.prod(map(hint, shapes[0][:-1])) * hint(keys) * hint(
            features
        )
    return max([size(result), *(math.prod(map(hint, s)) for s in shapes)])


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' own elements; what is expanded is not there twice."""
    return sum(t.element_size() * _stored(t) for t in tensors)


def size(t: Tensor) -> int:
    return hint(t.numel())


def hint(number: Any) -> int:
    """A size as a number: a symbolic one by the value it was captured with."""
    return int(number.node.hint or 0) if isinstance(number, torch.SymInt) else int(number)


def _is_matmul(node: fx.Node) -> bool:
    return policy_of(node, torch.bfloat16) is Policy.LOW and node.target.namespace == "aten"  # type: ignore[union-attr]


def _stored(t: Tensor) -> int:
    return math.prod(
        hint(n) for n, stride in zip(t.shape, t.stride(), strict=True) if hint(stride) or hint(n) < 2
    )


def _moves_nothing(node: fx.Node, inputs: list[Tensor]) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return True  # getitem, grad mode
    memory = {t.untyped_storage()._cdata for t in inputs}
    results = tensors_of(node.meta["val"])
    return not node.target._schema.is_mutable and all(t.untyped_storage()._cdata in memory for t in results)
