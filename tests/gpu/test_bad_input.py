"""Input whose strides no sample of the GEMM ops has, through the Triton kernels."""

from __future__ import annotations

import pytest
from input_checks import CASES, Case, arguments, assert_as_eager, label, maker


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize(
    "layout", ["expanded rows", "expanded features", "column by column", "K = 0", "vector"]
)
def test_right_answer(case: Case, layout: str) -> None:
    make = maker("cuda")
    x = {
        "expanded rows": lambda: make(1, 16).detach().expand(5, 16),
        "expanded features": lambda: make(5, 1).detach().expand(5, 16),
        "column by column": lambda: make(16, 8).detach().t(),
        "K = 0": lambda: make(5, 0).detach(),
        "vector": lambda: make(16).detach(),
    }[layout]()
    assert_as_eager(case, arguments(case, x.requires_grad_(), "cuda"))
