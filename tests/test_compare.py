"""The side-by-side run: same data for all, whole reports, no contender stops the others or runs for ever."""

import io
import json
import os
import time

import pytest
from rich.console import Console

from fusekit import compare as module
from fusekit.compare import Comparison, compare, table
from fusekit.train_config import TrainConfig

SIZES = {"vocab": 300, "context": 16, "layers": 1, "heads": 2, "width": 16}


@pytest.fixture
def comparison(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and runs away. " * 80)
    config = TrainConfig(steps=6, batch=2, context=16, warmup=1)
    return Comparison(config=config, sizes=SIZES, folder=tmp_path / "runs", data=str(path), threads=1)


def run(comparison):
    output = io.StringIO()
    code = compare(comparison, Console(file=output, width=120))
    return code, output.getvalue(), json.loads((comparison.folder / "report.json").read_text())


def test_same_seed_and_data_in_every_process(comparison, monkeypatch):
    contenders = (
        ("eager", "eager", "float32"),
        ("again", "eager", "float32"),
        ("fused", "fusekit", "float32"),
    )
    monkeypatch.setattr(module, "CONTENDERS", contenders)
    code, output, report = run(comparison)
    assert code == 0, output
    eager, again, fused = report["runs"]
    assert eager["losses"] == again["losses"] and len(eager["losses"]) == 6
    assert eager["validation_loss"] == again["validation_loss"]
    assert fused["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    assert fused["parity"] is True and fused["certificate"]["ok"] is True
    assert all(r["peak_bytes"] > 1e8 and r["step_seconds"] > 0 for r in report["runs"])
    assert "ok, " in output and "comparison.png" in output
    assert (comparison.folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("able", [False, True])
def test_what_bf16_is_on_a_cpu_without_it_is_said(comparison, monkeypatch, able):
    monkeypatch.setattr(module, "CONTENDERS", (("eager", "eager", "float32"),))
    monkeypatch.setattr(module, "multiplies", lambda dtype: able)
    _, output, _ = run(comparison)
    assert ("has no bfloat16 matrix instructions" in output) is not able


def test_a_contender_that_fails_is_named_and_the_rest_goes_on(comparison, monkeypatch):
    broken = Comparison(**vars(comparison) | {"sizes": SIZES | {"width": 17}})
    monkeypatch.setattr(module, "CONTENDERS", (("first", "eager", "float32"), ("second", "eager", "float32")))
    code, output, report = run(broken)
    assert code == 1
    assert [r["name"] for r in report["runs"]] == ["first", "second"]
    assert all("width 17" in r["error"] for r in report["runs"])
    assert output.count("failed") == 2 and "Traceback" not in output


def test_a_contender_past_its_time_is_stopped(comparison, monkeypatch):
    monkeypatch.setattr(module, "CONTENDERS", (("slow", "eager", "float32"),))
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    started = time.monotonic()
    code, output, report = run(Comparison(**vars(comparison) | {"minutes": 1e-4}))
    assert code == 1 and time.monotonic() - started < 60
    assert "the time is over" in report["runs"][0]["error"] and "--minutes" in output


def test_a_check_past_the_time_leaves_what_was_measured(comparison, monkeypatch):
    """The child trains, starts to verify, and hangs there."""
    trained = {"step_seconds": 0.5, "step_cpu_seconds": 0.9, "peak_bytes": 5e8, "train_loss": 6.5, "steps": 3}
    trained |= {"validation_loss": 6.6, "first_step_seconds": 4.0, "threads": 1, "parameters": 17e6}
    script = f"import time; print('{json.dumps({'trained': trained})}', flush=True); time.sleep(60)"
    monkeypatch.setattr(module, "CONTENDERS", (("fusekit bf16", "fusekit", "bf16"),))
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    monkeypatch.setattr(module, "COMMAND", ("-c", script))
    code, output, report = run(Comparison(**vars(comparison) | {"minutes": 0.03}))
    assert code == 1 and report["runs"][0]["step_seconds"] == 0.5
    assert "not checked" in output and "--minutes gives more" in output


def test_a_dead_contender_is_an_error_and_not_a_hang(comparison, monkeypatch):
    monkeypatch.setattr(module, "CONTENDERS", (("dead", "eager", "float32"),))
    monkeypatch.setattr(module, "COMMAND", ("-c", "import os; os.abort()"))
    code, _, report = run(comparison)
    assert code == 1 and "exit code" in report["runs"][0]["error"]


def test_ctrl_c_reports_what_is_finished(comparison, monkeypatch):
    results = iter([{"error": "none"}])

    def fake(*_):
        try:
            return next(results)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(module, "_run", fake)
    code, _, report = run(comparison)
    assert code == 130 and len(report["runs"]) == 1


def test_the_table_fits_a_small_terminal():
    result = {"step_seconds": 0.5, "step_cpu_seconds": 0.9, "peak_bytes": 5e8, "train_loss": 6.5}
    result |= {"validation_loss": 6.6, "first_step_seconds": 41.0, "parity": True, "sites": 31, "threads": 2}
    result |= {"parameters": 17e6, "steps": 60}
    names = [name for name, _, _ in module.CONTENDERS]
    output = io.StringIO()
    Console(file=output, width=80).print(table([{"name": name} | result for name in names]))
    assert "…" not in output.getvalue() and all(name in output.getvalue() for name in names)


def test_minutes_are_positive(comparison):
    with pytest.raises(ValueError, match="--minutes"):
        Comparison(**vars(comparison) | {"minutes": 0.0})


def test_the_report_survives_a_full_disk(comparison, monkeypatch):
    monkeypatch.setattr(module, "_run", lambda *_: {"error": "none"})

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    from fusekit.checkpoint import CheckpointError

    with pytest.raises(CheckpointError, match=r"report\.json could not be written: No space left"):
        compare(comparison, Console(quiet=True))
