"""The model suite on models of no meaning: one run with real processes, the rest with scripted contenders."""

import json
import math
import sys
import time

import pytest
import torch
from rich.console import Console

from benchmarks.kernels import comparison
from benchmarks.models import __main__ as command
from benchmarks.models import contender, race, view
from benchmarks.models import providers as rows
from benchmarks.models import run as model_run
from benchmarks.models.cells import cell
from benchmarks.models.contender import Contender, Ended
from benchmarks.models.providers import PROVIDERS, REFERENCE
from benchmarks.models.run import Settings
from benchmarks.models.zoo import ZOO, described
from benchmarks.report.model_plots import draw
from benchmarks.results_file import MODEL_SCHEMA, read_results, write_results
from fusekit.ceilings import Ceilings

CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e10, flops_per_second={"float32": 1e11, "bfloat16": 1e9})
LOSSES = [5.0, 4.8, 4.6, 4.4]


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr(model_run, "measure_ceilings", lambda *_: CEILINGS)


def settings(**changes):
    given = {"device": CPU, "models": ("GPT 17M",), "small": True}
    return Settings(**(given | changes))


def run(path, **changes):
    return model_run.run(settings(**changes), path, Console(quiet=True))


class Scripted:
    """A contender without a process: steps of `seconds`, falling losses, and what `failing` says."""

    def __init__(self, model, provider, device, *, small, warm_up, folder):
        self.model, self.provider, self.answers, self.start_wall = model, provider, [], 1.0

    def step(self, seconds):
        self.log.append(self.provider)
        number = len(self.answers)
        for kind, at in self.failing.get(self.provider, {}).items():
            if number == at:
                raise KeyboardInterrupt if kind == "interrupt" else Ended(kind, f"{kind} there")
        loss = 5.0 * 0.96**number
        took = self.seconds[self.provider]
        answer = {"wall": took, "cpu": took, "loss": loss, "peak": 1 << 30, "before": 0, "footprint": 1 << 20}
        self.answers.append(answer | ({"start": 3.0, "sites": 5} if number == 0 else {}))

    @property
    def wall(self):
        return self.answers[-1]["wall"]

    def stop(self):
        self.log.append(f"{self.provider} stopped")


@pytest.fixture
def scripted(monkeypatch):
    script = type("Script", (Scripted,), {"seconds": dict.fromkeys(PROVIDERS, 0.5), "failing": {}, "log": []})
    monkeypatch.setattr(race, "Contender", script)
    monkeypatch.setattr(rows.Provider, "obstacle", lambda self, device: None)
    monkeypatch.setattr(rows.Provider, "emulated", lambda self, device: False)
    monkeypatch.setattr(rows.Provider, "start_seconds", {"cpu": 0.0, "cuda": 0.0}, raising=False)
    return script


def test_a_run_with_processes_measures_checks_and_reports(tmp_path, capsys):
    path = tmp_path / "models.json"
    options = ["--small", "--models", "GPT 17M", "--providers", "fusekit bf16", "--device=cpu"]
    assert command.main([*options, f"--out={path}", "--minutes=8"]) == 0
    results = read_results(path, "models")
    assert not path.with_name("models.json.partial").exists()
    cells = view.grouped(results)["GPT 17M"]
    assert list(cells) == [REFERENCE, "fusekit bf16"]
    for found in cells.values():
        assert len(found["samples"]) >= race.LEAST_ROUNDS
        assert 0 < found["quartiles"][0] <= found["seconds"] <= found["quartiles"][1]
        facts = results["models"]["GPT 17M"]
        assert found["units_per_second"] == pytest.approx(facts["units_per_step"] / found["seconds"])
        assert found["mfu"] == pytest.approx(facts["flops_per_step"] / found["seconds"] / 1e11)
        assert found["ceiling"] == "float32" and found["peak_bytes"] > 1 << 26
    ours = cells["fusekit bf16"]
    assert ours["sites"] > 0 and 0 < ours["loss_error"] < 1e-3 and ours["start_seconds"] > 0.1
    assert cells[REFERENCE]["losses"][0] == pytest.approx(math.log(128), rel=0.05)
    out = capsys.readouterr().out
    assert "fusekit bf16" in out and "reference" in out
    page = (tmp_path / "models" / "index.html").read_text()
    assert "GPT 17M" in page and page.count("<img") == 1 and 'src="http' not in page
    assert (tmp_path / "models" / "step_gpt_17m.png").stat().st_size > 10_000
    assert (
        comparison.compare(results, results, providers=("fusekit bf16",), threshold=0.05)[0].verdict == "same"
    )


@pytest.mark.parametrize("name", ZOO)
def test_flops_are_those_of_the_products(name):
    facts = described(ZOO[name], ZOO[name].sizes["small"])
    assert facts["parameters"] > 0 and facts["units_per_step"] > 0
    if name == "GPT 17M":  # per token and layer: 12 widths squared of weights, and two products of attention
        B, T, C, vocab = 2, 32, 32, 128
        products = B * T * (12 * C * C + C * vocab) + 2 * B * T * T * C
        assert facts["flops_per_step"] == 3 * 2 * products


def test_contenders_take_turns_after_the_warm_up(tmp_path, scripted):
    results = run(tmp_path / "m.json", providers=("eager bf16", "fusekit bf16"))
    entered = [name for name in scripted.log if not name.endswith("stopped")]
    order = rows.in_order([REFERENCE, "fusekit bf16", "eager bf16"], CPU)
    assert entered == [name for name in order for _ in range(2)] + order * race.MOST_ROUNDS["cpu"]
    found = view.grouped(results)["GPT 17M"]["fusekit bf16"]
    assert len(found["samples"]) == race.MOST_ROUNDS["cpu"] and found["start_seconds"] == 2.5
    assert "warm_start_seconds" not in found
    scripted.log.clear()
    again = run(tmp_path / "m.json", providers=("fusekit bf16",), warm=True)
    cells = view.grouped(again)["GPT 17M"]
    assert cells["fusekit bf16"]["warm_start_seconds"] == 2.5 and "warm_start_seconds" not in cells[REFERENCE]
    assert scripted.log[-4:] == [
        f"{REFERENCE} stopped", "fusekit bf16 stopped", "fusekit bf16", "fusekit bf16 stopped",
    ]  # fmt: skip


def test_a_provider_that_fails_shows_it_in_its_cell_and_the_run_goes_on(tmp_path, scripted):
    scripted.failing = {
        "eager bf16": {"failed": 0},
        "compile bf16": {"skipped": 0},
        "fusekit float32": {"failed": 4},
    }
    results = run(tmp_path / "m.json")
    cells = view.grouped(results)["GPT 17M"]
    assert cells["eager bf16"]["failed"] == cells["fusekit float32"]["failed"] == "failed there"
    assert cells["compile bf16"]["skipped"] == "skipped there"
    assert not any("seconds" in cells[name] for name in ("eager bf16", "compile bf16", "fusekit float32"))
    assert len(cells["fusekit bf16"]["samples"]) == race.MOST_ROUNDS["cpu"]
    assert [f.split(":")[0] for f in model_run.failures(results)] == [
        "GPT 17M eager bf16",
        "GPT 17M fusekit float32",
    ]
    stopped = [name for name in scripted.log if name.endswith("stopped")]
    assert len(stopped) == len(PROVIDERS)


def test_an_interrupted_run_is_continued_with_the_models_it_has_not_finished(tmp_path, scripted):
    path = tmp_path / "m.json"
    models = ("GPT 17M", "BERT-mini")
    step, seen = scripted.step, []

    def interrupted(self, seconds):
        seen.append(self.model)
        if seen.count("BERT-mini") == 4:
            raise KeyboardInterrupt
        step(self, seconds)

    scripted.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(path, models=models, providers=("fusekit bf16",))
    assert not path.exists()
    partial = json.loads(path.with_name("m.json.partial").read_text())
    assert partial["done"] == ["GPT 17M"]
    assert [c["provider"] for c in partial["cells"] if c["model"] == "BERT-mini"] == [REFERENCE]
    with pytest.raises(ValueError, match="differs in settings: providers"):
        run(path, models=models)
    results = run(path, models=models, providers=("fusekit bf16",))
    assert results["done"] == list(models) and seen.count("GPT 17M") == 2 * (2 + race.MOST_ROUNDS["cpu"])
    assert all(len(row) == 2 for row in view.grouped(results).values())


def test_without_time_contenders_are_left_out_and_named(tmp_path, scripted):
    scripted.start_seconds = {"cpu": 10.0}
    results = run(tmp_path / "m.json", minutes=1e-9)
    assert not scripted.log and len(results["left_out"]) == len(PROVIDERS)
    assert all("--minutes" in reason for reason in results["left_out"].values())
    assert draw(results, tmp_path) == {} and view.table(results).row_count == 1 + len(PROVIDERS)


def test_emulated_products_are_not_waited_for(tmp_path, scripted, monkeypatch):
    monkeypatch.setattr(
        rows.Provider, "emulated", lambda self, device: self.kind == "eager" and self.precision == "bf16"
    )
    slow = Ceilings(bytes_per_second=1e10, flops_per_second={"float32": 1e11, "bfloat16": 1e5})
    monkeypatch.setattr(model_run, "measure_ceilings", lambda *_: slow)
    results = run(tmp_path / "m.json", providers=("eager bf16", "fusekit bf16"), minutes=2.0)
    reason = results["left_out"]["GPT 17M eager bf16"]
    assert "emulates bf16 products, so that a step takes about 71 s" in reason
    assert "eager bf16" not in scripted.log and "fusekit bf16" in scripted.log


def test_a_step_that_turns_out_slow_is_measured_once(tmp_path, scripted):
    scripted.seconds["fusekit bf16"] = 50.0
    results = run(tmp_path / "m.json", providers=("fusekit bf16",), minutes=1.5)
    cells = view.grouped(results)["GPT 17M"]
    assert cells["fusekit bf16"]["samples"] == [50.0] and "a single step" in cells["fusekit bf16"]["note"]
    assert len(cells[REFERENCE]["samples"]) == race.MOST_ROUNDS["cpu"]


def judged(losses, provider="fusekit bf16", reference=LOSSES, peer=None):
    answers = [{"wall": 1.0, "cpu": 1.0, "loss": x, "peak": 1, "before": 0, "start": 2.0} for x in losses]
    facts = {"units_per_step": 1, "flops_per_step": 1}
    return cell(
        answers, PROVIDERS[provider], facts, CEILINGS, warm_up=2, clock="cpu", reference=reference, peer=peer
    )


@pytest.mark.parametrize(
    ("losses", "wrong_at"),
    [
        (LOSSES, None),
        ([5.003, 4.803, 4.597, 4.401], None),  # within a rounding of bfloat16
        ([5.0, 4.82, 4.61, 4.43], None),
        ([5.03, 4.8, 4.6, 4.4], 1),  # another loss
        ([5.0, 4.9, 4.8, 4.7], 2),  # half of the gradients missing
        ([5.0, 4.8, math.nan, math.nan], 3),
    ],
)
def test_other_losses_than_eagers_are_wrong_and_get_no_time(losses, wrong_at):
    found = judged(losses)
    if wrong_at is None:
        assert found["seconds"] == 1.0 and found["losses_compared"] == 4
    else:
        assert f"wrong losses: {losses[wrong_at - 1]:.5g} at step {wrong_at}," in found["failed"]
        assert "seconds" not in found and "samples" not in found
        json.loads(json.dumps(found, allow_nan=False))


def test_losses_of_eager_in_the_same_precision_are_right_too():
    """ResNet-50: rounding moves its first loss by 9e-3, eager's and ours alike."""
    peer = [5.06, 4.85, 4.65, 4.44]
    assert "seconds" in judged([5.061, 4.851, 4.649, 4.441], peer=peer)
    wrong = judged([5.061, 4.95, 4.9, 4.85], peer=peer)["failed"]
    assert "4.95 at step 2, where eager float32 has 4.8, and eager bf16 4.85" in wrong
    assert "failed" in judged([5.061, 4.851, 4.649, 4.441], peer=peer[:1])


def test_eager_bf16_comes_early_where_its_steps_are_quick(monkeypatch):
    names = ["fusekit fp8", "compile bf16", "fusekit bf16", "eager bf16", REFERENCE]
    for quick, place in ((True, 1), (False, 3)):
        monkeypatch.setattr(rows, "multiplies", lambda dtype, quick=quick: quick)
        order = rows.in_order(names, CPU)
        assert order.index("eager bf16") == place and order[0] == REFERENCE


def test_float32_is_held_to_less_and_an_unknown_reference_is_said():
    assert "failed" in judged([5.003, 4.803, 4.597, 4.401], "fusekit float32")
    unchecked = judged(LOSSES, reference=None)
    assert unchecked["loss_error"] is None and view.values({"provider": "x"} | unchecked, {})[-2] == "?"


@pytest.mark.parametrize(
    ("script", "kind", "sentence"),
    [
        ('print(\'{"failed": "ValueError: no such kernel"}\')', "failed", "ValueError: no such kernel"),
        ("import sys; print('noise'); sys.exit('out of luck')", "failed", "exit code 1: out of luck"),
        ("import os; os.kill(os.getpid(), 9)", "failed", "exit code -9"),
        ("import time; time.sleep(60)", "left_out", "its first step was not done after 1 s"),
    ],
)
def test_how_a_process_ends_is_what_its_cell_says(tmp_path, monkeypatch, script, kind, sentence):
    monkeypatch.setattr(contender, "COMMAND", ("-c", script))
    started = time.monotonic()
    one = Contender("GPT 17M", "eager bf16", CPU, small=True, warm_up=2, folder=tmp_path)
    try:
        with pytest.raises(Ended) as ended:
            one.step(1.0 if kind == "left_out" else 60.0)
    finally:
        one.stop()
    assert sentence in ended.value.cell[kind] and time.monotonic() - started < 50


def test_each_process_gets_caches_of_its_own(tmp_path):
    first, second = (contender._environment(CPU, tmp_path / name) for name in "ab")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert first[name] != second[name] and str(tmp_path) in first[name]


def test_fp8_trains_and_its_losses_are_compared(tmp_path):
    answers = run(tmp_path / "m.json", providers=("fusekit fp8",))
    found = view.grouped(answers)["GPT 17M"]["fusekit fp8"]
    assert found["sites"] >= 8 and found["refused"] >= 1 and 0 < found["loss_error"] < 1e-2


def test_what_cannot_be_measured_here_is_named_with_the_reason(monkeypatch):
    assert PROVIDERS["liger bf16"].obstacle(CPU) == "needs a CUDA GPU"
    assert PROVIDERS["compile-max bf16"].obstacle(CPU) == "needs a CUDA GPU"
    assert PROVIDERS["fusekit fp8"].obstacle(CPU) is None
    monkeypatch.setattr(rows.shutil, "which", lambda name: None)
    assert "g++" in PROVIDERS["fusekit bf16 inductor"].obstacle(CPU)
    assert PROVIDERS["fusekit bf16"].obstacle(CPU) is None
    monkeypatch.setattr(rows.Provider, "version", lambda self: None)
    assert "pip install liger-kernel" in PROVIDERS["liger bf16"].obstacle(torch.device("cuda"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--models", "GPT-9"], "no model 'GPT-9'; there are: GPT 17M"),
        (["--providers", "magic"], "no provider 'magic'"),
        (["--device=cpu", "--models", "Llama 1B"], "not measured on cpu"),
        (["--minutes=0"], "greater than 0"),
    ],
)
def test_bad_options_are_a_sentence(capsys, options, sentence):
    assert command.main(options) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_suite_says_so(capsys):
    assert command.main(["--device=cuda"]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def test_older_and_foreign_files_are_refused(tmp_path, capsys):
    path = tmp_path / "m.json"
    for content, reason in (
        ({"kind": "models", "schema": 0, "environment": {"commit": "abc"}}, "has schema 0.*abc"),
        ({"kind": "kernels", "schema": MODEL_SCHEMA}, "not a results file of the model suite"),
    ):
        write_results(path, content)
        with pytest.raises(ValueError, match=reason):
            read_results(path, "models")
    assert command.main(["--report", str(path)]) == 2
    assert command.main(["--compare", str(path), str(path)]) == 2
    assert capsys.readouterr().err.count("bench models: ") == 2
    partial = tmp_path / "r.json.partial"
    write_results(partial, {"kind": "models", "schema": 0, "environment": {}})
    with pytest.raises(ValueError, match="has schema 0"):
        run(tmp_path / "r.json")


def test_emulated_fp8_is_measured_against_what_multiplies_it(monkeypatch):
    rates = {"float32": 1e11, "bfloat16": 5e11}
    monkeypatch.setattr(
        sys.modules[__name__], "CEILINGS", Ceilings(bytes_per_second=1e10, flops_per_second=rates)
    )
    assert judged(LOSSES, "fusekit fp8")["ceiling"] == "bfloat16"
    assert judged(LOSSES, "fusekit float32")["ceiling"] == "float32"
