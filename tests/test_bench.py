"""The benchmarks run from end to end on a CPU, with shapes of no meaning, and write whole files."""

import json
import sys
import time

import pytest
import torch
from rich.console import Console

from benchmarks import gpt_step, gpu
from benchmarks.clock import CpuClock, medians
from benchmarks.kernels import cases as op_suite
from fusekit.kernels import OPS
from fusekit.kernels.parity import results_and_grads


class FakeClock:
    """Each call costs what it returns."""

    def sample(self, calls):
        return [call() for call in calls]


def test_medians_take_turns_and_leave_the_first_round_out():
    order = []

    def call(name, seconds):
        return lambda: order.append(name) or next(seconds)

    slow_start = {
        "a": [call("a", iter([100.0, 1.0, 2.0, 9.0]))],
        "b": [call("b", iter([100.0, 5.0, 5.0, 5.0]))],
    }
    assert medians(slow_start, FakeClock(), rounds=3) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b"] * 4


def test_the_cpu_clock_counts_work_and_not_sleep():
    working, sleeping = CpuClock().sample([lambda: sum(range(300_000)), lambda: time.sleep(0.05)])
    assert working > sleeping


@pytest.mark.parametrize("name", OPS)
def test_what_an_op_is_measured_against_computes_the_same(name):
    if name not in op_suite.BASELINES:
        pytest.skip("measured against its reference")
    op = OPS[name]
    compared = 0
    for sample in op.samples("cpu", torch.float32):
        if sample.bench or op.supports(*sample.args) is not None or _random(sample.args):
            continue
        ours, theirs = (results_and_grads(fn, sample.args) for fn in (op.reference, op_suite.BASELINES[name]))
        if not all(t.isfinite().all() for t in theirs.values()):
            continue  # a fully masked row: PyTorch answers NaN or zero depending on the backend
        for key in ours:
            torch.testing.assert_close(theirs[key], ours[key], rtol=2e-3, atol=2e-3)
        compared += 1
    assert compared > 0


def _random(args):
    return any(isinstance(a, torch.Tensor) and a.dtype == torch.int64 and a.ndim == 0 for a in args) or any(
        isinstance(a, torch.Tensor) and a.dtype == torch.int64 for a in args
    )


def test_cases_start_with_every_op():
    first = [
        case.name for case, _ in zip(op_suite.cases(torch.device("cpu"), bench=False), OPS, strict=False)
    ]
    assert first == list(OPS)


def test_copies_keep_strides_and_gradients_in_other_memory():
    x = torch.randn(6, 4).t().requires_grad_()
    first, second = (args[0] for args in op_suite.copies((x, None, 3))[:2])
    assert second.stride() == first.stride() and second.requires_grad
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_the_gpu_suite_runs_dry(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(op_suite, "CACHE_BYTES", 1)
    first = [case for case, _ in zip(op_suite.cases(torch.device("cpu"), bench=False), OPS, strict=False)]
    monkeypatch.setattr(gpu, "cases", lambda device, bench: first)
    path = tmp_path / "dry.json"
    code = gpu.main(["--device=cpu", "--skip-tests", "--rounds=1", f"--out={path}", "--minutes=3"])
    results = json.loads(path.read_text())
    assert code == 0, capsys.readouterr().out
    assert {r["op"] for r in results["ops"]} == set(OPS)
    assert all(r["forward"].keys() == {"fused", "eager"} for r in results["ops"])
    assert results["gpt_step"].keys() == {"eager", "fusekit"}
    assert results["environment"]["torch"] == torch.__version__


def suite(tmp_path, minutes=3.0):
    return gpu.Suite(torch.device("cpu"), tmp_path / "r.json", gpu.Budget(minutes), Console(quiet=True))


def test_a_failing_op_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fail(case, clock, **_):
        raise ValueError("no such kernel\nwith details")

    monkeypatch.setattr(gpu, "measure", fail)
    first = [case for case, _ in zip(op_suite.cases(torch.device("cpu"), bench=False), OPS, strict=False)]
    monkeypatch.setattr(gpu, "cases", lambda device, bench: first)
    broken = suite(tmp_path)
    broken.run_ops(rounds=1)
    errors = [r["error"] for r in broken.results["ops"]]
    assert len(errors) >= len(OPS) and set(errors) == {"ValueError: no such kernel"}
    assert broken.failed and json.loads((tmp_path / "r.json").read_text())["ops"] == broken.results["ops"]
    gpu.table(broken.results)


def test_without_time_measurements_are_left_out_and_named(tmp_path):
    late = suite(tmp_path, minutes=1e-9)
    late.run_ops(rounds=1)
    late.run_step(gpu.GPT_2_SMALL, batch=1, steps=1)
    assert not late.results["ops"] and not late.results["gpt_step"]
    assert "gpt_step fusekit" in late.results["left_out"]


@pytest.mark.parametrize(
    ("script", "code"),
    [("print('3 passed')", 0), ("print('FAILED x::y - no'); print('1 failed'); raise SystemExit(1)", 1)],
)
def test_test_results_are_recorded(tmp_path, script, code):
    tested = suite(tmp_path)
    tested.run_tests([sys.executable, "-c", script])
    found = tested.results["tests"]
    assert found["exit_code"] == code and tested.failed == bool(code)
    assert found["failures"] == (["FAILED x::y - no"] if code else [])


def test_tests_that_hang_are_stopped(tmp_path):
    tested = suite(tmp_path, minutes=1 / 60)
    tested.run_tests([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"])
    assert tested.results["tests"]["exit_code"] is None and tested.failed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_says_so(capsys):
    assert gpu.main([]) == 1
    assert "no CUDA GPU" in capsys.readouterr().err


def test_the_cpu_figure_runs_with_a_tiny_model(tmp_path, capsys):
    path = tmp_path / "figure.json"
    options = ["--tiny", "--rounds=2", f"--out={path}", "--only", "eager float32", "fusekit bf16"]
    assert gpt_step.main(options) == 0
    written = json.loads(path.read_text())
    assert written["results"].keys() == {"eager float32", "fusekit bf16"}
    for result in written["results"].values():
        assert result["steps"] == 2 and result["step_cpu_seconds"] > 0 and result["peak_bytes"] > 0
    losses = [result["last_loss"] for result in written["results"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert "written to" in capsys.readouterr().out
