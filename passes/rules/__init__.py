"""Rules: rows of (op, pattern, source). A pattern is a plain function over the op's own arguments."""

from fusekit.passes.pattern import Rule
from fusekit.passes.rules import attention, gate, linear, loss, mlp, norm, qkv, rope

# Of equal size, the earlier row goes first: a sum joins the norm after it before the linear ahead of it.
RULES: list[Rule] = [
    *attention.RULES, *mlp.RULES, *norm.RULES, *rope.RULES, *loss.RULES, *gate.RULES, *linear.RULES,
    *qkv.RULES,
]  # fmt: skip
