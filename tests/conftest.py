import pytest
import torch

from fusekit.passes import cost


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture(autouse=True)
def free_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting an op costs nothing: at the sizes of tests no fusion would pay, and all would be reverted."""
    for name in ("EAGER_OVERHEAD", "FUSED_OVERHEAD"):
        monkeypatch.setattr(cost, name, {"cpu": 0.0, "cuda": 0.0})


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are checked after every pass, nothing was captured before, and random numbers are the same."""
    monkeypatch.setenv("FUSEKIT_VERIFY", "1")
    torch._dynamo.reset()
    torch.manual_seed(0)
