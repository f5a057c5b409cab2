"""Tests for device="cuda": run natively on a GPU, or by `python -m ttsem.sanitize pytest tests/gpu -q`."""

import sys

import pytest
import torch

from fusekit.kernels import tape

SANITIZER = "ttsem" in sys.modules

if not torch.cuda.is_available():  # the sanitizer makes it True
    collect_ignore_glob = ["*"]


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.fixture
def sanitizer() -> bool:
    """Whether kernels run in the sanitizer: a hundred times slower, and deterministic by construction."""
    return SANITIZER


@pytest.fixture(autouse=True)
def no_tapes() -> None:
    """A test that changes how an op chooses must not meet what an earlier one has settled."""
    tape.forget()
