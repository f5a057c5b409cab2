"""Tuning without a GPU: what it writes, what it refuses, what it survives."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as bench
from benchmarks import tune, tune_products
from fusekit.kernels import config_table
from fusekit.kernels.config_table import Config, Row, Table

CPU, QUIET = torch.device("cpu"), Console(quiet=True)


class Favourite:
    """A clock on which the configuration named last to it is the fastest."""

    def __init__(self) -> None:
        self.calls = 0

    def sample(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        for call in calls:
            call()
        self.calls += len(calls)
        return [1.0 / self.calls for _ in calls]


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="--dry tries it without"):
        tune.run(CPU, None, QUIET)
    if not torch.cuda.is_available():
        assert bench.main(["--tune"]) == 2


def test_dry_run_from_the_command_line_writes_a_table_that_loads(tmp_path, monkeypatch) -> None:
    path = tmp_path / "dry.json"
    assert bench.main(["--tune", "--dry", "--only", "half", "--out", str(path)]) == 0
    held = json.loads(path.read_text())
    assert held["shapes"] and held["environment"]["torch"] and set(held["shapes"]) == set(held["done"])
    for file in config_table.FOLDER.glob("sm_*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr(config_table, "FOLDER", tmp_path)
    config_table.load.cache_clear()
    table = config_table.load("dry")
    for key, (index, splits) in held["shapes"].items():
        kind, layout, epilogue, _ = key.split()
        shape = held["done"][key]["shape"]
        chosen = config_table.choose(table, kind, layout, epilogue, *shape, splittable=True)
        assert chosen == (Config(**held["rows"][index]["config"]), splits)
    config_table.load.cache_clear()


def test_the_fastest_candidate_is_the_one_written(tmp_path) -> None:
    clock = Favourite()
    held = tune.run(CPU, tmp_path / "t.json", QUIET, only="half nt plain", dry=True, clock=clock)
    (key,) = held["shapes"]
    times = held["done"][key]["microseconds"]
    assert clock.calls and len(times) > 1
    row, splits = held["shapes"][key]
    won = config_table._row(held["rows"][row])
    assert min(times, key=times.__getitem__) == tune._label(won, splits)


def test_a_wrong_or_failing_candidate_is_named_and_never_timed(tmp_path) -> None:
    table = config_table.load("sm_90")
    problem = next(p for p in tune.problems(((64, 48, 32),)) if p.key.startswith("half nt plain"))
    bad, broken, *good = (row.config for row, _ in tune._candidates(table, problem))

    def product(a, b, output, *, config, **options: Any) -> None:
        if config == broken:
            raise RuntimeError("out of resources")
        tune.dry_product(a, b, output, **options)
        if config == bad:
            output[7] *= 1.5

    held = tune.run(CPU, tmp_path / "t.json", QUIET, only="half nt plain", dry=True, product=product)
    times = held["done"][problem.key]["microseconds"]
    reasons = [v for v in times.values() if isinstance(v, str)]
    assert any("wrong" in reason for reason in reasons) and any("out of resources" in r for r in reasons)
    assert len(reasons) == 2 and len(times) == 2 + len(good)
    assert Config(**held["rows"][0]["config"]) in good


@pytest.mark.parametrize("epilogue", ["gated", "qkv"])
def test_products_of_several_weights_are_tuned_and_checked(epilogue, tmp_path, monkeypatch) -> None:
    started = []

    def first_is_wrong(product, problem, row, splits, given) -> None:
        started.append(row.config)
        tune_products.start_dry(product, problem, row, splits, given)
        if row.config == started[0]:
            part = given["output"][-1] if isinstance(given["output"], list) else given["output"]
            part[5] *= 1.5

    monkeypatch.setattr(tune, "start_dry", first_is_wrong)
    held = tune.run(CPU, tmp_path / "t.json", QUIET, only=f"half nt {epilogue}", dry=True)
    ((key, done),) = held["done"].items()
    reasons = [outcome for outcome in done["microseconds"].values() if isinstance(outcome, str)]
    assert len(reasons) == 1 and "wrong" in reasons[0] and key in held["shapes"]
    assert all(epilogue in row["epilogues"] for row in held["rows"])


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path) -> None:
    path, seen = tmp_path / "t.json", []

    def product(a, b, output, **options: Any) -> None:
        seen.append(options)
        if len(seen) > 6:
            raise KeyboardInterrupt
        tune.dry_product(a, b, output, **options)

    with pytest.raises(KeyboardInterrupt):
        tune.run(CPU, path, QUIET, only="half", dry=True, product=product)
    before = json.loads(path.read_text())
    assert before["done"] and not before["complete"]
    after = tune.run(CPU, path, QUIET, only="half", dry=True)
    assert before["done"].items() <= after["done"].items() and len(after["done"]) > len(before["done"])


@pytest.mark.parametrize(
    ("change", "sentence"), [({"only": "quarter"}, "no bucket's key"), ({"minutes": 0.0}, "greater than 0")]
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        tune.run(CPU, tmp_path / "t.json", QUIET, dry=True, **change)


def test_refuses_a_table_of_another_device(tmp_path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"schema": 1, "device": "another", "complete": True}))
    with pytest.raises(ValueError, match="move it away"):
        tune.run(CPU, path, QUIET, dry=True)


def row(m: int, n: int, cycles: float, **change: Any) -> Row:
    tile = Config("tile", m, n, 64, 8, 3)
    return replace(Row("half", ("nt",), ("plain",), tile, cycles), **change)


def test_prediction_prefers_large_tiles_for_large_products_and_splits_long_ones() -> None:
    table = Table("t", 132, (row(128, 256, 1024), row(64, 64, 128, resident=2)), {})
    assert config_table.choose(table, "half", "nt", "plain", 8192, 8192, 4096, False)[0].n == 256
    assert config_table.choose(table, "half", "nt", "plain", 64, 4096, 1024, False)[0].n == 64
    assert config_table.choose(table, "half", "nt", "plain", 256, 256, 65536, True)[1] > 1
    with pytest.raises(LookupError, match="no configuration"):
        config_table.choose(table, "half", "tn", "plain", 64, 64, 64, True)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_every_product_has_a_configuration(target: str) -> None:
    """And shared memory that the smallest device of the table has, for the pipeline's stages."""
    table = config_table.load(target)
    for kind in ("half", "tf32", "ieee"):
        for layout in ("nn", "nt", "tn", "tt", "s"):
            for epilogue in ("plain", "forward", "backward", "dropout"):
                assert config_table.choose(table, kind, layout, epilogue, 512, 512, 512, False)
        for layout in ("nn", "nt", "s"):
            for epilogue in ("qkv", "gated"):
                assert config_table.choose(table, kind, layout, epilogue, 512, 512, 512, False)
    for entry in table.rows:
        tile, size = entry.config, 2 if entry.kind == "half" else 4
        columns = 2 * tile.n if tile.kernel == "gated" else tile.n
        shared = tile.num_stages * (tile.m + columns) * tile.k * size
        assert shared <= (config_table.SHARED_MEMORY_OF_ALL if target == "sm_80" else 232_448)


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 0), "sm_80")],
)
def test_devices_without_a_table_use_one_whose_kernels_they_run(capability, target) -> None:
    assert config_table.target_of(capability) == target


def test_buckets_are_powers_of_two_within_bounds() -> None:
    sizes = {0: 0, 1: 16, 16: 16, 17: 32, 4096: 4096, 4097: 8192, 10**6: 16384}
    assert {size: config_table.bucket(size) for size in sizes} == sizes
