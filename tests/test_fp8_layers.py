"""benchmarks.fp8_layers: tried without a GPU, refused without --dry, and failures that stop nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import fp8_cells, fp8_layers
from fusekit.kernels.recipe import PRESETS


def run(path) -> dict:
    assert fp8_layers.main(["--dry", "--out", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_cell_is_there(tmp_path):
    found = run(tmp_path / "found.json")
    failed = [name for name, cell in found["cells"].items() if "failed" in cell]
    assert not [name for name in failed if "row" not in name and "block" not in name]  # not on a CPU
    for preset in PRESETS:
        for what in ("forward", "forward+backward", "cast x", "cast weight", "cast gradient", "output own"):
            assert found["cells"][f"32x48x64 {preset} {what}"]["seconds"] > 0
    for product in ("output", "grad_input", "grad_weight"):
        assert f"32x48x64 fp8-tensorwise {product} _scaled_mm promote128" in found["cells"]
    assert "32x48x64 fp8-rowwise-bf16-wgrad grad_weight own" not in found["cells"]
    sums = [f"K=256 one sign {a} own" for a in ("fast", "promote128", "fp32")]
    assert all(found["errors"][name]["relative"] < 1e-6 for name in sums)


def test_a_failure_is_a_cell_and_stops_no_other(tmp_path, monkeypatch):
    def fails(*args: object) -> None:
        raise RuntimeError("no algorithm\nand more")

    monkeypatch.setattr(fp8_cells.fp8_library, "run", fails)
    found = run(tmp_path / "found.json")
    cell = found["cells"]["32x48x64 fp8-tensorwise output _scaled_mm promote128"]
    assert cell == {"failed": "RuntimeError: no algorithm"}
    assert found["errors"]["K=256 one sign fast _scaled_mm"] == {"failed": "RuntimeError: no algorithm"}
    assert "seconds" in found["cells"]["32x48x64 fp8-tensorwise output own"]
    monkeypatch.setattr(fp8_cells.Bench, "accumulation", fails)
    assert "seconds" in run(tmp_path / "again.json")["cells"]["32x48x64 mxfp8 forward"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu(capsys):
    assert fp8_layers.main([]) == 2
    assert "measures a CUDA GPU" in capsys.readouterr().out
