"""Three linears of one input stay as they were where joining them does not pay: undone before precision.

Undone later, as price undoes others, they would miss what precision does for a bare linear: tf32, and float32
products on a CPU that emulates 16-bit ones.
"""

from __future__ import annotations

from torch import fx

from fusekit.kernels.launch import on_gpu
from fusekit.kernels.op import LOW_PRECISION
from fusekit.passes.canonicalise import bodies
from fusekit.passes.cost import device_of, size
from fusekit.passes.precision import LOW_DTYPES
from fusekit.passes.price import put_back
from fusekit.passes.propagate import tensors_of
from fusekit.passes.region import Fusion, Region

# What three layers move beside qkv_linear, forward and backward, in elements of the input: two more reads of
# it, two more products for its gradient written, and two sums of those, each reads two and writes one.
PASSES = 10
LEAST_SHARE = 0.05  # of the products' time: a library's product may be faster than ours by a few percent


def decline_projections(region: Region) -> None:
    """Put back what does not pay, and refuse it with the figures."""
    for module in bodies(region.module):
        declined = False
        for node in list(module.graph.nodes):
            fusion: Fusion | None = node.meta.get("fusion")
            if fusion is None or fusion.op != "qkv_linear":
                continue
            reason = _reason(node, fusion, region.settings.precision)
            if reason is not None:
                put_back(module, node)
                region.fusions[:] = [f for f in region.fusions if f is not fusion]
                region.refuse(fusion.op, fusion.location, reason, fusion.rule)
                declined = True
        if declined:
            module.graph.lint()
            module.recompile()


def _reason(node: fx.Node, fusion: Fusion, precision: str) -> str | None:
    value = tensors_of(node.meta["val"])[0]
    if not on_gpu(value):
        return "on a CPU three linears of one input take as long one by one: the products are all of the time"
    device = device_of(value)
    low = precision in LOW_DTYPES or value.dtype in LOW_PRECISION
    rate = device.low if low else device.tf32 if precision == "tf32" else device.float32
    x = node.args[0]
    assert isinstance(x, fx.Node)
    moved = PASSES * size(x.meta["val"]) * (2 if low else 4)
    share = (moved / device.bandwidth) / (3 * fusion.flops / rate)  # backward has two products for each
    if share >= LEAST_SHARE:
        return None
    return (
        f"the traffic it saves is {share:.1%} of the products' time on {device.name}: "
        f"below {LEAST_SHARE:.0%} the library's products are left alone"
    )
