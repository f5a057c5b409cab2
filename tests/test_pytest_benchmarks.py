"""`pytest benchmarks`: cells from the registry, our fields in pytest-benchmark's JSON, skips and failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cell as cells
from benchmarks.kernels.suite import Settings
from benchmarks.results_file import CHECKOUT
from fusekit.kernels import OPS

pytest.importorskip("pytest_benchmark")
OPTIONS = [
    "--small",
    "--device=cpu",
    "--dtypes=float32",
    "-q",
    "-p",
    "no:cacheprovider",
    f"--rootdir={CHECKOUT}",
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "CPU_CACHE_BYTES", 1)


def collected(*arguments: str) -> int:
    return pytest.main([str(CHECKOUT / "benchmarks"), *OPTIONS, *arguments])


def test_every_op_runs_with_timing_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    assert collected("--benchmark-disable", "--providers=fusekit") == 0
    assert f"{2 * len(OPS)} passed" in capsys.readouterr().out


def test_the_json_holds_our_fields_and_the_missing_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b.json"
    chosen = ["--providers", "eager", "fusekit", "liger-kernel", "-k", "add_rms_norm and forward", "-rs"]
    assert collected(*chosen, f"--benchmark-json={path}") == 0
    assert "liger-kernel: needs a CUDA GPU" in capsys.readouterr().out
    found = {b["extra_info"]["provider"]: b for b in json.loads(path.read_text())["benchmarks"]}
    assert found.keys() == {"eager", "fusekit"}
    for benchmark in found.values():
        info = benchmark["extra_info"]
        assert benchmark["group"] == "add_rms_norm residual float32 forward"
        assert info["bytes_per_second"] == pytest.approx(info["bytes"] / benchmark["stats"]["median"])
        assert info["flops"] > 0 and info["share"] > 0 and 0 <= info["error"] < 1e-5
        assert info["torch"] == torch.__version__ and info["version"] and info["commit"]


def test_a_wrong_result_fails_its_cell_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cells.function

    def doubled(provider: str, op: str) -> Any:
        fn = real(provider, op)
        return fn if provider == "eager" else lambda *args: fn(*args)[0] * 1.01

    monkeypatch.setattr(cells, "function", doubled)
    settings = Settings(
        device=torch.device("cpu"),
        ops=("add_rms_norm",),
        dtypes=(torch.float32,),
        providers=("eager", "fusekit"),
        small=True,
    )
    bench = cells.Bench(settings)
    with pytest.raises(pytest.fail.Exception, match="wrong result"):
        bench.measure(("add_rms_norm", torch.float32, 0, "forward", "fusekit"), benchmark=None)
    assert bench._judged("eager", "forward")[1] < 1e-5
