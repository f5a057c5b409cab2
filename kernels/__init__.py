"""Fused ops. OPS is the registry: tests, benchmarks, `fusekit ops` and the docs are loops over it."""

if __name__ != "fusekit.kernels":
    raise ImportError("the folder kernels is the package fusekit.kernels: pip install -e . and import that")

from fusekit.kernels import add_layer_norm, add_rms_norm, attention, linear_act
from fusekit.kernels.op import Op

OPS: dict[str, Op] = {
    "add_layer_norm": add_layer_norm.OP,
    "add_rms_norm": add_rms_norm.OP,
    "attention": attention.OP,
    "linear_act": linear_act.OP,
}
