import pytest

from fusekit.passes import cost


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture(autouse=True)
def free_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting an op costs nothing: at the sizes of tests no fusion would pay, and all would be reverted."""
    for name in ("EAGER_OVERHEAD", "FUSED_OVERHEAD"):
        monkeypatch.setattr(cost, name, {"cpu": 0.0, "cuda": 0.0})
