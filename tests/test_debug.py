"""The four switches, seen from outside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusekit


def _fused(monkeypatch: pytest.MonkeyPatch, **switches: str) -> int:
    for name, value in switches.items():
        monkeypatch.setenv(name, value)
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU())
    fusekit.optimize(model)
    model(torch.randn(8, 32)).sum().backward()
    return len(fusekit.explain(model).fused)


def test_silent_without_switches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _fused(monkeypatch) == 2
    assert capsys.readouterr() == ("", "")


def test_debug_levels_add_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _fused(monkeypatch, FUSEKIT_DEBUG="3", FUSEKIT_VERIFY="1") == 2
    said = capsys.readouterr().err
    assert "linear_act_1 at 2 (Linear)" in said and "torch.nn.GELU" in said  # 1: lines
    assert "fuse: " in said and " MB" in said  # 2: time and bytes
    assert "torch.ops.fusekit.linear_act" in said and "def forward" in said  # 3: programs


@pytest.mark.parametrize(
    ("switch", "value", "left"),
    [("FUSEKIT_FUEL", "1", 1), ("FUSEKIT_FUEL", "0", 0), ("FUSEKIT_DISABLE", "linear_act", 0)],
)
def test_fuel_and_disable(switch: str, value: str, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fused(monkeypatch, **{switch: value}) == left


def test_a_switch_that_is_no_number_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="FUSEKIT_FUEL is a whole number, got 'few'"):
        _fused(monkeypatch, FUSEKIT_FUEL="few")
