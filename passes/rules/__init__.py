"""Rules: rows of (op, pattern, source). A pattern is a plain function over the op's own arguments."""

from fusekit.passes.pattern import Rule
from fusekit.passes.rules import attention, linear, norm

RULES: list[Rule] = [*attention.RULES, *norm.RULES, *linear.RULES]  # of equal size, the earlier row goes first
