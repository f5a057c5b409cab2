"""The kernel suite on the tests' small shapes: cells, failures, resuming, comparing, the page."""

import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks.clock import samples
from benchmarks.kernels import comparison, plan, providers, rivals
from benchmarks.kernels import run as kernel_run
from benchmarks.kernels import suite as kernel_suite
from benchmarks.kernels.suite import Settings
from benchmarks.kernels.work import work
from benchmarks.report.plots import draw
from benchmarks.results_file import KERNEL_SCHEMA, read_kernels, write_results
from fusekit.ceilings import Ceilings, measure_ceilings
from fusekit.kernels import OPS

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e10, flops_per_second={"float32": 1e11, "bfloat16": 1e9})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(kernel_suite, "CPU_CACHE_BYTES", 1)
    monkeypatch.setattr(kernel_run, "measure_ceilings", lambda *_: CEILINGS)


def settings(**changes):
    given = {
        "device": CPU,
        "ops": tuple(OPS),
        "dtypes": (torch.float32,),
        "providers": ("eager", "fusekit"),
        "seconds": 1e-3,
        "small": True,
    }
    return Settings(**(given | changes))


def run(path, **changes):
    return kernel_run.run(settings(**changes), path, Console(quiet=True))


def test_every_op_gets_a_cell_per_direction_and_provider(tmp_path):
    path = tmp_path / "k.json"
    results = run(path)
    assert (
        read_kernels(path) == json.loads(json.dumps(results))
        and not path.with_name("k.json.partial").exists()
    )
    rows = kernel_run.grouped(results["cells"])
    assert len(rows) == 2 * len(OPS) and not kernel_run.failures(results)
    for row in rows.values():
        for cell in (row["eager"], row["fusekit"]):
            assert len(cell["samples"]) >= kernel_suite.LEAST_SAMPLES
            assert cell["quartiles"][0] <= cell["seconds"] <= cell["quartiles"][1]
            assert cell["bytes_per_second"] == pytest.approx(cell["bytes"] / cell["seconds"])
            assert 0 <= cell["error"] < 1e-5 and cell["share"] > 0
    assert len(results["done"]) == plan.count(settings()) == len(OPS)


def test_a_failing_and_a_wrong_provider_show_in_their_cells_and_the_run_goes_on(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel\nwith details")

    def wrong(x, *rest):
        y, h = OPS["add_rms_norm"].reference(x, *rest)
        return y * 1.001, h

    rows = {"broken": broken, "wrong": wrong}
    for name, fn in rows.items():
        rival = rivals.Rival("", {"add_rms_norm": fn})
        monkeypatch.setitem(rivals.RIVALS, name, rival)
    monkeypatch.setattr(rivals.Rival, "obstacle", lambda self, device: None)
    results = run(
        tmp_path / "k.json", ops=("add_rms_norm", "attention"), providers=("eager", *rows, "fusekit")
    )
    by_key = kernel_run.grouped(results["cells"])
    norm, attention = ([r for k, r in by_key.items() if k[0] == op] for op in ("add_rms_norm", "attention"))
    assert all(row["broken"]["failed"] == "RuntimeError: no such kernel" for row in norm)
    assert all(row["wrong"]["failed"].startswith("wrong result") for row in norm)
    assert all("seconds" not in row["wrong"] and "seconds" in row["fusekit"] for row in norm)
    assert all("no counterpart" in row["broken"]["skipped"] for row in attention)


def test_what_is_not_installed_is_skipped_with_what_to_do(monkeypatch):
    assert rivals.RIVALS["liger-kernel"].obstacle(CPU) == "needs a CUDA GPU"
    monkeypatch.setattr(rivals.Rival, "version", lambda self: None)
    assert "pip install liger-kernel" in rivals.RIVALS["liger-kernel"].obstacle(torch.device("cuda"))
    found = providers.survey(("eager", "quack"), CPU)
    assert found["eager"] == {"version": torch.__version__, "obstacle": None} and found["quack"]["obstacle"]


def test_an_interrupted_run_is_continued(tmp_path, monkeypatch):
    path, measure, calls = tmp_path / "k.json", kernel_run.measure, []

    def interrupted(case, *rest):
        calls.append(case.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(case, *rest)

    monkeypatch.setattr(kernel_run, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert not path.exists()
    with pytest.raises(ValueError, match="differs in settings: providers"):
        run(path, providers=("fusekit",))
    results = run(path)
    assert calls == [*list(OPS)[:2], *list(OPS)[1:]]
    assert len(results["cells"]) == 4 * len(OPS)


def test_without_time_cases_are_left_out_and_named(tmp_path):
    results = run(tmp_path / "k.json", minutes=1e-9)
    assert not results["cells"] and len(results["left_out"]) == len(OPS)
    assert all("--minutes" in reason for reason in results["left_out"].values())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ('{"ops": []}', "not a results file"),
        ('{"kind": "kernels", "schema": 0, "environment": {"commit": "abc"}}', "has schema 0.*abc"),
    ],
)
def test_foreign_and_old_files_are_refused(tmp_path, text, reason):
    path = tmp_path / "k.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_kernels(path)
    with pytest.raises(ValueError, match="No such file"):
        read_kernels(tmp_path / "none.json")


def recorded(scale=1.0, broken=False, **environment):
    """A results file of twenty cells, of which the first is `scale` times slower."""
    generator = np.random.default_rng(round(scale * 1000))
    cells = []
    for number in range(20):
        values = (1e-3 * (scale if number == 0 else 1.0) * generator.normal(1.0, 0.02, 20)).tolist()
        cell = {"op": "a", "sample": str(number), "dtype": "float32", "direction": "forward"}
        timed = {"seconds": float(np.median(values)), "samples": values}
        cells.append(cell | {"provider": "fusekit"} | ({"failed": "x"} if broken and number == 1 else timed))
    machine = {"device": "cpu", "cpu": "c", "threads": 1} | environment
    ceilings = {"bytes_per_second": 1e10, "flops_per_second": {"float32": 1e11}}
    head = {"kind": "kernels", "schema": KERNEL_SCHEMA}
    return head | {"cells": cells, "environment": machine, "ceilings": ceilings}


@pytest.mark.parametrize(
    ("new", "verdict", "code"),
    [
        (recorded(1.001), "same", 0),
        (recorded(1.2), "slower", 1),
        (recorded(0.8), "faster", 0),
        (recorded(1.03), "same", 0),  # significant, but within the threshold
    ],
)
def test_comparison_finds_what_changed_beyond_spread_and_threshold(tmp_path, capsys, new, verdict, code):
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    for path, content in zip(paths, (recorded(), new), strict=True):
        write_results(path, content)
    changes = comparison.compare(recorded(), new, threshold=0.05)
    assert [c.verdict for c in changes] == [verdict, *["same"] * 19]
    assert command.main(["--compare", *map(str, paths)]) == code
    assert "copies at 1.00×" in capsys.readouterr().out


def test_a_cell_that_broke_is_a_regression_and_other_machines_are_refused():
    changes = comparison.compare(recorded(), recorded(1.001, broken=True), threshold=0.05)
    assert [c.key[1] for c in comparison.regressions(changes)] == ["1"]
    with pytest.raises(ValueError, match="different machines: cpu"):
        comparison.compare(recorded(), recorded(cpu="other"), threshold=0.05)


def test_mann_whitney_agrees_with_counting_every_arrangement():
    from itertools import combinations

    a, b = np.array([1.0, 2.0, 3.0, 4.0, 5.5]), np.array([5.0, 6.0, 7.0, 8.0, 9.0])
    both, n = np.concatenate([a, b]), len(a)

    def u(first):
        second = np.delete(both, first)
        return sum((x > second).sum() for x in both[list(first)])

    middle = n * len(b) / 2
    found = abs(u(range(n)) - middle)
    each = [abs(u(chosen) - middle) >= found for chosen in combinations(range(len(both)), n)]
    assert comparison.mann_whitney(a, b) == pytest.approx(sum(each) / len(each), abs=0.01)
    assert comparison.mann_whitney(a, a) == 1.0


def test_samples_take_turns_within_their_time_and_name_who_failed():
    class FakeClock:
        def sample(self, calls):
            return [call() for call in calls]

    def fail():
        raise RuntimeError("gone")

    contenders = {"a": [lambda: 1.0, lambda: 2.0], "b": [fail]}
    found, failed = samples(contenders, FakeClock(), seconds=0.0, least=3, most=9)
    assert found["a"] == [1.0, 2.0, 1.0] and str(failed["b"]) == "gone"


def test_work_counts_an_expanded_mask_once_and_the_gradients():
    case = next(c for c in plan.plan(settings(ops=("linear_act",))))
    tasks = work(case)
    x, weight, bias, *_ = case.sample.args
    output = x.numel() // x.shape[-1] * weight.shape[0]
    assert tasks["forward"].moved == 4 * (x.numel() + weight.numel() + bias.numel() + output)
    assert tasks["backward"].moved == tasks["forward"].moved + 4 * (x.numel() + weight.numel() + bias.numel())
    assert tasks["backward"].flops == 2 * tasks["forward"].flops


def test_ceilings_are_measured_and_bound_the_time():
    found = measure_ceilings(CPU, (torch.float32,), copy_bytes=1 << 20, size=64)
    assert found.bytes_per_second > 1e6 and found.flops_per_second["float32"] > 1e5
    assert CEILINGS.least_seconds(1e11, 1e9, "float32") == 1.0
    assert CEILINGS.least_seconds(0, 1e10, "float32") == 1.0
    assert CEILINGS.products("bfloat16") == 1e11  # exactly as fast as converting and multiplying in float32


def test_the_page_holds_its_plots_and_escapes_what_providers_say(tmp_path):
    results = run(tmp_path / "k.json", ops=("add_layer_norm", "linear_act"))
    results["cells"][0] = {k: v for k, v in results["cells"][0].items() if k != "seconds"} | {"failed": "<b>"}
    page = command.write_report(results, tmp_path / "report").read_text()
    assert page.count("data:image/svg+xml;base64,") == len(list((tmp_path / "report").glob("*.png"))) >= 2
    assert "src='http" not in page and 'src="http' not in page and "&lt;b&gt;" in page
    assert all(math.isfinite(c["share"]) for c in results["cells"] if "share" in c)


def test_curves_over_columns_and_tokens_are_drawn_from_sweeps(tmp_path):
    cells = [
        {"op": op, "sample": f"sweep {n}", "dtype": dtype, "shapes": [[1, n, n]], "direction": direction}
        | {"provider": p, "seconds": 1e-3, "flops": 1, "bytes": 1, "share": 0.5, "error": 1e-7}
        | {"bytes_per_second": 1e9 + n, "flops_per_second": 1e12 + n}
        for op in ("add_rms_norm", "attention")
        for n in (256, 1024)
        for dtype in ("float32", "bfloat16")
        for direction in ("forward", "backward")
        for p in ("eager", "compile", "fusekit", "liger-kernel")
    ]
    ceilings = {"bytes_per_second": 1e10, "flops_per_second": {"float32": 1e11}}
    results = {"cells": cells, "ceilings": ceilings, "settings": {"dtypes": ["float32", "bfloat16"]}}
    drawn = {path.name for path in draw(results, tmp_path)}
    assert drawn == {p.name for p in tmp_path.glob("*.svg")} and {"columns.svg", "tokens.svg"} <= drawn
    assert {p.stem for p in tmp_path.glob("*.png")} == {p.stem for p in tmp_path.glob("*.svg")}


def test_the_command_measures_prints_and_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    path = tmp_path / "k.json"
    options = ["--device=cpu", "--small", "--seconds=0.001", "--ops", "add_rms_norm", f"--out={path}"]
    assert (
        command.main([*options, "--dtypes", "float32", "--providers", "eager", "fusekit", "liger-kernel"])
        == 0
    )
    output = capsys.readouterr().out
    assert "liger-kernel: skipped, needs a CUDA GPU" in output and "index.html" in output
    assert (tmp_path / "k" / "index.html").exists()
    assert command.main(["--report", str(tmp_path / "none.json")]) == 2
    assert command.main([*options, "--minutes=0"]) == 2
    assert "--minutes" in capsys.readouterr().err


def test_fp8_layers_are_measured_in_bf16_against_the_layer_without_fp8(tmp_path):
    """The baseline is not FP8's reference, which no one would train with."""
    both = settings(ops=("linear_fp8",), dtypes=(torch.float32, torch.bfloat16), small=False)
    titles = [(str(dtype), title) for _, dtype, _, title in plan.listing(both)]
    assert {dtype for dtype, _ in titles} == {"torch.bfloat16"}
    shapes = {title for _, title in titles}
    assert {"2048x1024x4096_fp8-tensorwise", "2048x1024x4096_weight-kept"} <= shapes
    baseline = providers.function("eager", "linear_fp8")
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    assert torch.equal(baseline(x, weight, None, "relu", "mxfp8"), (x @ weight.t()).relu())
    results = run(tmp_path / "k.json", ops=("linear_fp8",), dtypes=(torch.bfloat16,))
    assert len(results["cells"]) == 4 and not kernel_run.failures(results)
