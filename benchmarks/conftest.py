"""Options of `pytest benchmarks`, and the cells as parameters: op, sample, dtype, direction, provider."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.cell import Bench
from benchmarks.kernels.cases import gradients_of
from benchmarks.kernels.plan import listing
from benchmarks.kernels.providers import PROVIDERS, STANDARD
from benchmarks.kernels.rivals import RIVALS
from benchmarks.kernels.suite import Settings
from fusekit.kernels import OPS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("fusekit")
    group.addoption("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU if any")
    group.addoption("--providers", nargs="+", choices=PROVIDERS, help="default: as in fusekit bench")
    group.addoption("--dtypes", nargs="+", choices=list(DTYPES), help="default: as in fusekit bench")
    group.addoption("--small", action="store_true", help="the tests' shapes, of no meaning")
    group.addoption("--minutes", type=float, default=5.0, help="a cell may take 15 %% of them (default 5)")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("pytest benchmarks needs pytest-benchmark: pip install pytest-benchmark")


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """What the cells share: settings, ceilings, the case that was drawn last."""
    settings = _settings(request.config)
    threads = torch.get_num_threads()
    if settings.device.type == "cpu":
        torch.set_num_threads(1)
    yield Bench(settings)
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" not in metafunc.fixturenames:
        return
    settings = _settings(metafunc.config)
    cells, ids = [], []
    for op, dtype, index, name in listing(settings):
        for direction in ("forward", gradients_of(op)):
            for provider in settings.providers:
                cells.append((op, dtype, index, direction, provider))
                ids.append("-".join((op, name, str(dtype).removeprefix("torch."), direction, provider)))
    metafunc.parametrize("cell", cells, ids=ids)


def _settings(config: pytest.Config) -> Settings:
    device = config.getoption("--device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch finds no CUDA GPU here; `fusekit doctor` says more")
    rivals = tuple(RIVALS) if device == "cuda" else ()
    dtypes = config.getoption("--dtypes") or (["float32", "bfloat16"] if device == "cpu" else list(DTYPES))
    return Settings(
        device=torch.device(device),
        ops=tuple(OPS),
        dtypes=tuple(DTYPES[name] for name in dtypes),
        providers=tuple(config.getoption("--providers") or (*STANDARD, *rivals)),
        minutes=config.getoption("--minutes"),
        small=config.getoption("--small"),
    )
