"""Fused ops. OPS is the registry: tests, benchmarks, `fusekit ops` and the docs are loops over it."""

if __name__ == "fusekit.kernels":
    from fusekit.kernels import (
        add_layer_norm,
        add_rms_norm,
        attention,
        attention_fp8,
        gated_act,
        gated_mlp,
        linear_act,
        linear_cross_entropy,
        linear_fp8,
        mlp,
        qkv_linear,
        rms_norm_rope,
        rope,
    )
    from fusekit.kernels.op import Op

    OPS: dict[str, Op] = {
        "add_layer_norm": add_layer_norm.OP,
        "add_rms_norm": add_rms_norm.OP,
        "attention": attention.OP,
        "gated_act": gated_act.OP,
        "gated_mlp": gated_mlp.OP,
        "linear_act": linear_act.OP,
        "linear_cross_entropy": linear_cross_entropy.OP,
        "mlp": mlp.OP,
        "qkv_linear": qkv_linear.OP,
        "rms_norm_rope": rms_norm_rope.OP,
        "rope": rope.OP,
    }
    # Apart: rounding to FP8 is piecewise constant, so no derivative of a reference is the gradient, and what
    # they are judged by is in tests/test_linear_fp8.py and tests/test_attention_fp8.py. Rules use them only
    # where a recipe was asked for.
    FP8_OPS: dict[str, Op] = {"attention_fp8": attention_fp8.OP, "linear_fp8": linear_fp8.OP}
else:
    # Python started in a checkout finds this folder under the name of a Hugging Face package, for which
    # transformers probes. The probe must come back with "nothing usable"; anything more is refused.
    __version__ = "0"
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"no {name} here: the folder kernels of a checkout is the package fusekit.kernels; "
            "run `pip install -e .` and import that"
        )
