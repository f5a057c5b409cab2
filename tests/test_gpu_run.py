"""`make gpu` without a GPU: every part dry, crashes, time limits, wheels, resuming, GPUs nobody knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import parts, run, summary, tested, wheels
from benchmarks.kernels import plan
from benchmarks.kernels import run as kernel_run
from benchmarks.kernels.cases import MEASURED
from benchmarks.kernels.suite import Settings
from benchmarks.results_file import CHECKOUT, read_kernels, write_results
from fusekit.gpu_check import remark
from fusekit.kernels import OPS

COMPLETE = {"status": "complete", "reason": "", "failures": []}


def a_run(folder: Path, minutes: float = 5.0, fresh: bool = False) -> run.Run:
    console = Console(quiet=True)
    return run.Run(folder=folder, slug="x", minutes=minutes, dry=True, fresh=fresh, console=console)


def a_job(folder: Path, **changes: object) -> parts.Job:
    given = {"out": folder / "r.json", "until": time.time() + 60, "dry": True, "fresh": False}
    return parts.Job(**(given | {"console": Console(quiet=True)} | changes))  # type: ignore[arg-type]


def in_this_process(self: run.Run, name: str, until: float, fresh: bool) -> tuple[int, dict]:
    """As `Run._process`, without importing PyTorch once more."""
    return parts._run(name, a_job(self.folder, out=self.file(name), fresh=fresh))


def test_the_whole_command_runs_dry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.Run, "_process", in_this_process)
    assert command.main(["--dry", "--minutes=9", f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "gpu_dry.json").read_text())["parts"]
    assert [found[name]["status"] for name in ("tests", "kernels", "models")] == ["complete"] * 3
    assert found["tests"]["counts"]["passed"] > 10
    cells = read_kernels(tmp_path / "kernels_dry.json")["cells"]
    assert {cell["op"] for cell in cells} == set(MEASURED) and all("seconds" in cell for cell in cells)
    shown = capsys.readouterr().out
    for word in ("passed", "forward eager", "attention", "GPT 17M", "overview: "):
        assert word in shown


def test_a_part_in_its_process_leaves_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, outcome = a_run(tmp_path)._process("tuning", time.monotonic() + 300, fresh=False)
    assert code == 0 and outcome["status"] in ("complete", "skipped"), outcome


def test_the_tuning_part_is_called_with_what_is_left_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = {}
    stub = types.ModuleType("benchmarks.tune")

    def tune(device: torch.device, path: Path, console: Console, *, minutes: float, dry: bool) -> dict:
        called.update(device=device, minutes=minutes)
        return {"left": [], "done": {}}

    stub.run, stub.failures = tune, lambda held: []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.tune", stub)
    assert parts._run("tuning", a_job(tmp_path))[1]["status"] == "complete"
    assert called["device"].type == "cpu" and 0.9 < called["minutes"] <= 1.0


def test_a_part_whose_package_is_missing_is_skipped_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(job: parts.Job) -> dict:
        return parts._module("some_package")  # type: ignore[return-value]

    monkeypatch.setitem(parts.PARTS, "tuning", needs)
    outcome = parts._run("tuning", a_job(tmp_path))[1]
    assert outcome["status"] == "skipped" and "pip install some_package" in outcome["reason"]


def processes(*answers: tuple[int | None, dict]) -> object:
    given = iter(answers)
    return lambda self, name, until, fresh: next(given)


def test_a_crash_costs_one_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(plan.plan(settings()))
    begun = kernel_run._start(settings()) | {"running": kernel_run._key(case) | {"label": "that case"}}
    write_results(tmp_path / "kernels_x.json.partial", begun)
    lost = run.LOST_DEVICE, {"status": "incomplete", "reason": "the GPU cannot be used after another"}
    monkeypatch.setattr(run.Run, "_process", processes((-11, {}), lost, (0, COMPLETE)))
    broken = a_run(tmp_path)
    broken.parts(["kernels"])
    part = broken.results["parts"]["kernels"]
    assert part["status"] == "complete" and broken.failed
    assert "that case: the process ended with signal 11" in part["failures"][0]
    assert "the GPU cannot be used" in part["failures"][1]
    partial = read_kernels(tmp_path / "kernels_x.json.partial")
    assert partial["done"] == ["that case"] and partial["cells"][0]["failed"].endswith("signal 11")


def test_a_part_that_only_crashes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.Run, "_process", lambda *_: (-9, {}))
    broken = a_run(tmp_path)
    broken.parts(["models"])
    assert broken.results["parts"]["models"]["status"] == "failed"
    lost = run.LOST_DEVICE, {"status": "incomplete", "reason": "lost"}
    monkeypatch.setattr(run.Run, "_process", lambda *_: lost)
    broken.parts(["kernels"])
    assert len(broken.results["parts"]["kernels"]["failures"]) == run.CRASHES


def test_time_goes_to_what_is_left_and_late_parts_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = a_run(tmp_path, minutes=10.0)
    names = list(run.PARTS)
    assert limited._limit(names) == pytest.approx(600 * run.PARTS["tests"], rel=0.01)
    assert limited._limit(names[-1:]) == pytest.approx(600, rel=0.01)
    late = a_run(tmp_path, minutes=0.01)
    late.parts(names)
    assert {part["status"] for part in late.results["parts"].values()} == {"left out"}
    assert not late.failed and "--minutes" in late.results["parts"]["tuning"]["reason"]


def test_what_is_complete_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(self: run.Run, name: str, until: float, fresh: bool) -> tuple[int, dict]:
        asked.append(name)
        return 0, COMPLETE | ({"status": "incomplete"} if name == "tuning" else {})

    monkeypatch.setattr(run.Run, "_process", answer)
    for fresh in (False, False, True):
        a_run(tmp_path, fresh=fresh).parts(["models", "tuning"])
    assert asked == ["models", "tuning", "tuning", "models", "tuning"]
    write_results(
        tmp_path / "gpu_x.json", {"kind": "gpu", "parts": {"models": COMPLETE}}
    )  # older, or foreign
    assert a_run(tmp_path).results["parts"] == {}


def test_a_process_over_its_time_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "GRACE_SECONDS", 0.0)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert run._wait(process, 0.5) is None and process.poll() is not None


def test_the_record_of_tests_survives_what_ends_them(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        textwrap.dedent("""
            import os, pytest
            def test_fine(): pass
            def test_wrong(): assert 1 == 2, "one is not two"
            def test_skipped(): pytest.skip("no reason")
            def test_death(): os.kill(os.getpid(), 9)
        """)
    )
    record = tmp_path / "r.jsonl"
    options = ["-q", "-c", "/dev/null", "-p", "benchmarks.gpu.recorder", "--record", str(record)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", str(tmp_path / "test_some.py"), *options],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    outcome = tested.outcome(record, run._wait(process, 60.0), 60.0)
    assert outcome["status"] == "failed" and "signal 9 after 3 tests" in outcome["reason"]
    assert outcome["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert "one is not two" in outcome["failures"][0]
    assert tested.outcome(record, None, 7.0)["status"] == "incomplete"


def test_gpu_tests_are_collected_without_the_packages_of_development() -> None:
    program = """
        import sys, torch
        torch.cuda.is_available = lambda: True
        for name in ("hypothesis", "expecttest", "transformers", "ttsem", "tokenizers", "matplotlib"):
            sys.modules[name] = None
        import benchmarks.gpu.parts, benchmarks.gpu.summary, pytest
        raise SystemExit(pytest.main(["tests/gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=CHECKOUT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "error" not in done.stdout, done.stdout + done.stderr
    assert "tests collected" in done.stdout


def wheel(folder: Path, name: str, files: tuple[str, ...] = ("module.py",), requires: str = "") -> Path:
    distribution, version = name.split("-")[:2]
    path, info = folder / name, f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for file in files:
            archive.writestr(f"{distribution}/{file}", "")
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{requires}"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize(
    ("name", "files", "reason"),
    [
        ("torch-9.0-py3-none-any.whl", ("a.py",), "torch stays as it is"),
        ("nvidia_cublas-9.0-py3-none-any.whl", ("a.py",), "stays as it is"),
        ("fast-1.0-cp312-cp312-linux_x86_64.whl", ("a.py",), "does not end in -none-any.whl"),
        ("sly-1.0-py3-none-any.whl", ("a.py", "_c.cpython-312-x86_64-linux-gnu.so"), "_c.cpython-312"),
        ("rival-1.0-py3-none-any.whl", ("a.py",), None),
    ],
)
def test_only_small_pure_python_wheels_are_installed(
    tmp_path: Path, name: str, files: tuple[str, ...], reason: str | None
) -> None:
    found = wheels.refusal(wheel(tmp_path, name, files))
    assert found is None if reason is None else reason in str(found)


def test_wheels_are_installed_one_by_one_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = wheel(
        tmp_path, "fusekit_rival_of_a_test-1.5-py3-none-any.whl", requires="Requires-Dist: nowhere>=2\n"
    )
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    target = tmp_path / "site"
    monkeypatch.setenv("PIP_TARGET", str(target))  # this environment stays as it is
    monkeypatch.syspath_prepend(str(target))
    found = wheels.install(tmp_path)
    assert found[good.name] == "installed 1.5; without nowhere, which it names"
    assert "not a whole zip archive" in found["broken-1.0-py3-none-any.whl"]
    assert "no such folder" in wheels.install(tmp_path / "none")[str(tmp_path / "none")]
    assert "no .whl files" in wheels.install(target)[str(target)]


def settings(**changes: object) -> Settings:
    given = {"device": torch.device("cpu"), "ops": tuple(OPS), "dtypes": (torch.bfloat16, torch.float32)}
    return Settings(**(given | {"providers": ("eager",), "small": True, "largest_first": True} | changes))  # type: ignore[arg-type]


def test_the_first_dtype_comes_first_and_the_largest_sample_of_each_op() -> None:
    many = len(OPS)
    assert [case.dtype for case in plan.plan(settings())] == [torch.bfloat16] * many + [torch.float32] * many
    norms = settings(small=False, ops=("add_rms_norm",), dtypes=(torch.bfloat16,))
    sizes = [case.sample.args[0].numel() for case in plan.plan(norms)]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == plan.count(norms)


@pytest.mark.parametrize(
    ("capability", "built", "words"),
    [
        ((9, 0), ["sm_80", "sm_90"], None),
        ((7, 5), ["sm_75"], "need 8.0 or newer"),
        ((12, 0), ["sm_90", "sm_120"], "checked for"),
        ((13, 7), ["sm_90", "compute_90"], "checked for"),
        ((13, 7), ["sm_80", "sm_90a"], "install a PyTorch build"),
        ((8, 6), ["sm_80"], "checked for"),
    ],
)
def test_a_gpu_that_nobody_checked_gets_a_sentence(
    capability: tuple[int, int], built: list[str], words: str | None
) -> None:
    found = remark(capability, built)
    assert found is None if words is None else words in str(found)


def test_the_summary_shows_what_a_killed_run_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = a_run(tmp_path)
    killed._record("kernels", {"status": "cut off", "reason": run.SENTENCES["running"]})
    cell = {"op": "attention", "sample": "s", "dtype": "bfloat16", "direction": "forward"}
    times = {"eager": 3e-3, "compile": 2e-3, "fusekit": 1e-3}
    cells = [cell | {"provider": name, "seconds": seconds} for name, seconds in times.items()]
    write_results(tmp_path / "kernels_x.json.partial", kernel_run._start(settings()) | {"cells": cells})
    summary.show(json.loads(killed.path.read_text()), Console(width=150))
    shown = capsys.readouterr().out
    assert "3.00×" in shown and "2.00×" in shown and "kernels_x.json.partial" in shown
    assert "the same command continues" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err
    assert command.main(["--minutes=0"]) == 2
