"""What each op does under a low precision: the tables that the precision pass reads.

The split follows torch.autocast where it has one (matmuls low; softmax, losses, exp, pow and reductions in
float32) and extends it to the nodes autocast leaves to type promotion, so that activations stay low between
matmuls.
"""

from __future__ import annotations

import math
from enum import Enum, auto
from typing import Any

import torch
from torch import fx

from fusekit.passes.canonicalise import require_gradient

aten = torch.ops.aten


class Policy(Enum):
    """How a node's floating inputs are brought to one dtype."""

    LOW = auto()  # a matmul: every float32 input is cast down
    NORM = auto()  # a fused norm: x and residual low, weights float32, statistics float32 inside
    ROPE = auto()  # x low, the tables as they come: an angle's cosine is not rounded for x's sake
    FP8 = auto()  # x and bias low, the weight as it comes: the op casts its master, and no copy of it is made
    FLOW = auto()  # elementwise: low as soon as one input is low, unless a float32 result takes part
    MOVE = auto()  # data movement: whatever comes in
    CAST = auto()  # a dtype the user wrote: it keeps its meaning
    FLOAT32 = auto()  # softmax, losses, reductions, and everything that is not in a table


_LOW = {
    aten.addbmm, aten.addmm, aten.addmv, aten.baddbmm, aten.bilinear, aten.bmm, aten.conv1d, aten.conv2d,
    aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d, aten.convolution,
    aten.einsum, aten.linear, aten.matmul, aten.mm, aten.mv, aten.scaled_dot_product_attention,
}  # fmt: skip

_FLOW = {
    aten.abs, aten.add, aten.celu, aten.clamp, aten.clamp_max, aten.clamp_min, aten.div, aten.dropout,
    aten.elu, aten.feature_dropout, aten.gelu, aten.hardsigmoid, aten.hardswish, aten.hardtanh,
    aten.leaky_relu, aten.lerp, aten.masked_fill, aten.maximum, aten.minimum, aten.mish, aten.mul,
    aten.neg, aten.relu, aten.relu6, aten.rsub, aten.sigmoid, aten.silu, aten.square, aten.sub, aten.tanh,
    aten.where,
}  # fmt: skip

_MOVE = {
    aten.adaptive_avg_pool2d, aten.avg_pool2d, aten.batch_norm, aten.bernoulli, aten.cat, aten.chunk,
    aten.clone, aten.constant_pad_nd, aten.contiguous, aten.empty_like, aten.flatten, aten.flip,
    aten.full_like, aten.gather, aten.index, aten.index_select, aten.max_pool2d, aten.new_empty,
    aten.new_full, aten.new_ones, aten.new_zeros, aten.ones_like, aten.pad, aten.rand_like,
    aten.randn_like, aten.repeat, aten.repeat_interleave, aten.reshape, aten.roll, aten.stack, aten.tile,
    aten.zeros_like,
}  # fmt: skip

_CAST = {aten.to, aten._to_copy, aten.type_as}

# Views of the bits: a pair of bfloat16 is no complex number, and other bits are other integers.
_BITS = {aten.view.dtype, aten.view_as_complex.default}

_FILLS = {aten.full, aten.full_like, aten.masked_fill, aten.new_full, aten.where}
_MASKING = {aten.add, aten.sub, aten.where}
_SOFTMAX = {aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax}

# Reductions that take the dtype they accumulate in: told so, they read the low tensor and no copy of it is
# made.
_OWN_DTYPE = {aten.cumsum, aten.log_softmax, aten.mean, aten.prod, aten.softmax, aten.sum}


def policy_of(node: fx.Node, low: torch.dtype) -> Policy:
    """The policy of a call_function node."""
    name = getattr(node.target, "__name__", "")
    if name == "getitem" or node.target is require_gradient:
        return Policy.MOVE
    if not isinstance(node.target, torch._ops.OpOverload):
        return Policy.FLOAT32
    if node.target.namespace == "fusekit":
        return _fusekit_policy(node.target._opname)
    packet = node.target.overloadpacket
    if packet in _CAST:
        return Policy.CAST
    if packet in _LOW:
        return Policy.LOW
    if overflows(node, low) or node.target in _BITS:
        return Policy.FLOAT32
    if packet in _FLOW:
        return Policy.FLOW
    if packet in _MOVE or _returns_view(node.target):
        return Policy.MOVE
    return Policy.FLOAT32


def takes_dtype(target: Any) -> bool:
    """Whether a float32-policy op has a `dtype` argument that makes it read low and accumulate in float32."""
    if not isinstance(target, torch._ops.OpOverload):
        return False  # a higher-order operator, such as a user's autograd.Function
    names = [argument.name for argument in target._schema.arguments]
    return target.overloadpacket in _OWN_DTYPE and "dtype" in names


_LOW_OPS = frozenset({
    "attention", "attention_fp8", "gated_mlp", "linear_act", "linear_cross_entropy", "mlp", "qkv_linear",
})  # fmt: skip


def _fusekit_policy(name: str) -> Policy:
    if name in _LOW_OPS:
        return Policy.LOW
    if name.endswith("rope"):
        return Policy.ROPE
    if name == "gated_act":
        return Policy.FLOW
    if name == "linear_fp8":
        return Policy.FP8
    return Policy.NORM if name.endswith("_norm") else Policy.FLOAT32


def _returns_view(target: torch._ops.OpOverload) -> bool:
    """A cast before an op that returns a view would cut the view off from its base."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)


def masks_scores(node: fx.Node) -> bool:
    """Whether this adds or chooses what a softmax reads: finfo(float32).min must not become infinite."""
    pending, seen = [node], {node}
    if _packet(node) not in _MASKING:
        return False
    while pending:
        for reader in pending.pop().users:
            if _packet(reader) in _SOFTMAX:
                return True
            if reader not in seen and _packet(reader) in _FLOW | _MOVE:
                seen.add(reader)
                pending.append(reader)
    return False


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def fills_beyond(node: fx.Node, low: torch.dtype) -> bool:
    """Whether this writes a finite literal that the low dtype does not hold into a tensor, as into masks."""
    return _packet(node) in _FILLS and overflows(node, low)


def enters_product(fill: fx.Node, low: torch.dtype) -> bool:
    """Whether a matmul multiplies what was filled, as Longformer does to spread its mask over a window.

    Cast down, finfo(float32).min would be minus infinity there, and a row of it NaN.
    """
    pending, seen = [fill], {fill}
    while pending:
        node = pending.pop()
        for reader in node.users:
            policy = policy_of(reader, low) if reader.op == "call_function" else None
            if policy is Policy.LOW and not is_mask(reader, node):
                return True
            if policy in (Policy.FLOW, Policy.MOVE, Policy.CAST) and reader not in seen:
                seen.add(reader)
                pending.append(reader)
    return False


def is_mask(node: fx.Node, source: fx.Node) -> bool:
    """An additive mask stays float32: finfo(float32).min would round to minus infinity. So do ALiBi's slopes
    and the places that they multiply: 2049 has no bfloat16."""
    if getattr(node.target, "overloadpacket", None) is aten.scaled_dot_product_attention:
        names: tuple[str, ...] = ("attn_mask",)
    elif getattr(node.target, "_opname", "") == "attention":
        names = ("mask", "slopes", "places")
    else:
        return False
    schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(schema, node.args, strict=False)), **node.kwargs}
    return any(given.get(name) is source for name in names)


def saturate(node: fx.Node, low: torch.dtype) -> None:
    """Bring literals that the low dtype cannot hold to the ends of its range."""
    limit = torch.finfo(low).max
    node.args = tuple(
        max(-limit, min(limit, a)) if isinstance(a, float) and math.isfinite(a) else a for a in node.args
    )


def overflows(node: fx.Node, low: torch.dtype) -> bool:
    """Whether a finite literal exceeds the low dtype's range: masks are filled with finfo(float32).min."""
    limit = torch.finfo(low).max
    numbers = [a for a in node.args if isinstance(a, float)]
    return any(math.isfinite(a) and abs(a) > limit for a in numbers)
