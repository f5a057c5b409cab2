import pytest


@pytest.fixture
def device() -> str:
    return "cpu"
