"""`fusekit doctor`: what is missing is named with its remedy; odd and broken GPUs get a sentence."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels import rivals
from fusekit import doctor
from fusekit.ceilings import Ceilings

PROPERTIES = {"mem_get_info": (2 << 30, 8 << 30), "get_device_capability": (7, 5), "get_arch_list": ["sm_75"]}


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Ceilings(bytes_per_second=1e10, flops_per_second={"float32": 1e11})
    monkeypatch.setattr(doctor, "measure_ceilings", lambda device: found)


def test_everything_missing_is_named_with_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.examine() == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "needs pytest, triton, ttsem: pip install",
        "needs a CUDA GPU, and is not installed: pip install liger-kernel",
        "apt-get install g++",
        "pip install pytest; pip install pytest-benchmark",
        "copy 10 GB/s; product float32 100 GFLOP/s",
    ):
        assert words in shown, shown


def test_the_doctor_knows_every_rival_of_the_suite() -> None:
    assert set(doctor.RIVALS) == {row.package for row in rivals.RIVALS.values() if row.package}


def test_a_gpu_that_nobody_checked_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in PROPERTIES.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    found = doctor._gpu()
    assert found["compute capability"] == "7.5" and found["gpu memory"] == "8.0 GiB, 2.0 free"
    assert "need 8.0 or newer" in found["remark"]


def test_a_gpu_in_trouble_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nwith details")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert doctor._gpu() == {"gpu trouble": "CUDA error: no kernel image is available"}
    monkeypatch.setattr(doctor, "measure_ceilings", broken)
    assert doctor._ceilings() == "ceilings of cuda: not measured, CUDA error: no kernel image is available"


def test_an_old_pytorch_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu126")
    assert doctor.examine() == 1
    assert "2.10.1+cu126 is too old" in capsys.readouterr().err
