"""The quality experiment: pairs, intervals, and going on after a stop."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from benchmarks import precision_quality as quality
from benchmarks.results_file import environment


def result(precision: str, seed: int, loss: float, cpu: str = "") -> dict[str, Any]:
    place = {"precision": precision, "seed": seed, "cpu": cpu or environment()["cpu"], "commit": "abc"}
    return place | {"validation_loss": loss, "losses": [loss]}


def test_gaps_are_paired_by_seed_and_machine() -> None:
    runs = [
        result("bf16", 0, 2.0), result("mxfp8", 0, 2.02), result("mxfp8", 1, 9.0), result("bf16", 2, 4.0),
        result("mxfp8", 2, 5.0, "another"), result("bf16", 0, 3.0, "another"),
    ]  # fmt: skip
    assert quality.gaps(runs) == {"mxfp8": [pytest.approx(0.01)]}


def test_gaps_are_to_a_baseline_of_the_same_heads() -> None:
    runs = [result("bf16", 0, 2.0), result("bf16-3-heads", 0, 4.0), result("fp8-attention-head", 0, 4.04)]
    assert quality.gaps(runs) == {"fp8-attention-head": [pytest.approx(0.01)]}


def test_a_baseline_runs_again_where_another_machine_made_it() -> None:
    runs = [result("bf16", 0, 2.0, "another"), result("mxfp8", 0, 2.0, "another")]
    assert quality.planned(["mxfp8"], 1, runs, "this") == []
    assert quality.planned(["mxfp8", "auto"], 1, runs, "this") == [("bf16", 0), ("auto", 0)]
    assert quality.planned(["auto"], 1, [*runs, result("bf16", 0, 2.0, "this")], "this") == [("auto", 0)]


def test_intervals_are_students() -> None:
    mean, half, upper = quality.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert upper == pytest.approx(2.0 + 2.920 / math.sqrt(3))
    assert quality.interval([1.0])[1] == math.inf


def test_a_stopped_experiment_goes_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    done: list[tuple[str, int]] = []

    def train(corpus: Any, precision: str, seed: int, steps: int, advance: Any) -> dict[str, Any]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((precision, seed))
        return result(precision, seed, 2.0 + seed + (precision != "bf16") * (0.01 + 0.001 * seed))

    monkeypatch.setattr(quality, "train", train)
    monkeypatch.setattr(quality, "load_corpus", lambda *args, **kwargs: None)
    path = tmp_path / "quality.json"
    options = ["--recipes", "fp8-block", "--seeds", "2", "--out", str(path)]
    with pytest.raises(KeyboardInterrupt):
        quality.main(options)
    assert len(json.loads(path.read_text())["runs"]) == 3
    done.clear()
    assert quality.main(options) == 0
    assert done == [("fp8-block", 1)]
    assert "fp8-block" in capsys.readouterr().out and path.with_suffix(".svg").exists()
    with pytest.raises(SystemExit):
        quality.main([*options, "--steps", "7"])
    assert "other settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality.main([*options, "--seeds", "0"])


@pytest.mark.parametrize("name", ["fp8-tensorwise", "auto", "fp8-attention-head"])
def test_one_run_trains_the_model(name: str) -> None:
    import torch

    from fusekit.data import Corpus

    tokens = torch.arange(40000) * 7 % 61
    corpus = Corpus(train=tokens[:30000], validation=tokens[30000:], vocab=1024, digest="sevens")
    found = quality.train(corpus, name, seed=0, steps=3, advance=lambda: None)
    assert len(found["losses"]) == 3 and found["validation_loss"] < found["losses"][0]
