"""Python started in a checkout sees the folders by their plain names."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.fixture
def shadow(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> object:
    monkeypatch.syspath_prepend(str(request.config.rootpath))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    module = importlib.import_module("kernels")
    monkeypatch.setitem(sys.modules, "kernels", module)
    return module


def test_the_folder_kernels_refuses_to_be_a_package_of_that_name(shadow: object) -> None:
    with pytest.raises(
        AttributeError, match=r"the folder kernels of a checkout is the package fusekit\.kernels"
    ):
        shadow.OPS  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("kernels.attention")


def test_transformers_probe_for_its_own_kernels_package_finds_nothing(shadow: object) -> None:
    probe = pytest.importorskip("transformers.utils.import_utils")
    probe.is_kernels_available.cache_clear()
    assert probe.is_kernels_available() is False


def test_the_folder_passes_refuses_too(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.syspath_prepend(str(request.config.rootpath))
    monkeypatch.delitem(sys.modules, "passes", raising=False)
    with pytest.raises(ImportError, match="pip install -e"):
        importlib.import_module("passes")
