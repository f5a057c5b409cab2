"""Training steps in a row: the program, on a CPU with small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_steps


def test_a_provider_is_measured_and_one_that_fails_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = gpu_steps.Step

    def step(model, batch, provider, device):  # type: ignore[no-untyped-def]
        if provider == "eager bf16":
            raise RuntimeError("out of luck\nand more")
        return real(model, batch, provider, device)

    monkeypatch.setattr(gpu_steps, "Step", step)
    out = tmp_path / "steps.json"
    providers = ["eager float32", "eager bf16", "fusekit float32"]
    assert gpu_steps.main(["--dry", "--out", str(out), "--providers", *providers]) == 1
    eager, failed, ours = json.loads(out.read_text())["cells"]
    assert failed == {"model": "GPT-2 124M", "provider": "eager bf16", "failed": "RuntimeError: out of luck"}
    assert len(eager["losses"]) == len(ours["losses"]) == gpu_steps.WARM_UP + 4 and ours["sites"] > 0
    assert eager["losses"][-1] < eager["losses"][0]
    assert ours["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert 0 < ours["host_ms"] <= ours["waited_ms"] and ours["in_a_row_ms"] > 0 and ours["peak_bytes"] > 0
    printed = capsys.readouterr().out
    assert "RuntimeError: out of luck" in printed and "of no meaning" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_steps.main([]) == 2 and "--dry tries it without" in capsys.readouterr().out
