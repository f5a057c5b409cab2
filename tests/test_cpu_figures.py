"""benchmarks.cpu_figures: a contender's process, shares of the first one, and refused arguments."""

import io
import json

import pytest

from benchmarks import cpu_figures
from benchmarks.cpu_figures import FIGURES, Contender, rows


def test_every_contender_that_is_asked_something_exists():
    for figure in FIGURES.values():
        assert set(figure.asked) <= set(figure.contenders)


def test_a_contender_takes_a_step_when_told_to(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n\n"))
    cpu_figures.serve("attention", "fusekit")
    answers = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 3 and all(float(seconds) > 0 for seconds, _ in answers)
    assert int(answers[-1][1]) > 3 * 8 * 2048 * 64 * 2  # at least the three gradients


def test_a_contender_that_dies_is_an_error(monkeypatch):
    contender = Contender("attention", "nobody")
    with pytest.raises(RuntimeError, match="exit code 1"):
        contender.step()


def test_shares_are_of_the_first_contender():
    cells = {
        "eager autocast": {"seconds": 0.2, "peak_bytes": 200 << 20},
        "fusekit": {"seconds": 0.1, "peak_bytes": 150 << 20},
    }
    first, second = rows({"figures": {"mlp": cells}})
    assert first[:4] == (FIGURES["mlp"].title, "eager autocast", "200.0", "1.00")
    assert second == ("", "fusekit", "100.0", "0.50", "≤ 0.87", "150", "0.75", "≤ 0.75")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["nothing"], "nothing is none of mlp"), (["mlp", "--rounds", "1"], "2 at least")],
)
def test_arguments_that_make_no_sense(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        cpu_figures.main(arguments)
    assert sentence in capsys.readouterr().err


def test_a_run_of_some_figures_replaces_no_results_of_all(monkeypatch, tmp_path):
    measured = {"eager autocast": {"seconds": 1.0, "peak_bytes": 1}}
    monkeypatch.setattr(cpu_figures, "measure", lambda *_: measured)
    monkeypatch.setattr(cpu_figures, "RESULTS", tmp_path)
    assert cpu_figures.main(["mlp"]) == 0 and not list(tmp_path.iterdir())
    assert cpu_figures.main(["mlp", "--out", str(tmp_path / "mine.json")]) == 0
    assert json.loads((tmp_path / "mine.json").read_text())["figures"] == {"mlp": measured}
