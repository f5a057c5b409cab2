"""The gate of large tiles on sm_90: what it asks, of which builds, and what the record holds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.static import gate, large_tiles, record, specialisations, specialised
from fusekit.kernels import config_table

LARGE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
LOOP = {"limit": "half", "stalls": 1_000, "instructions": 100, "mufu": 0, "amount": 1_024 * 4_096}
FIGURES: dict[str, Any] = {
    "arch": 90, "registers": 168, "spills": 0, "advisories": [], "tensor_cores": True, "mix": {"wgmma": 4},
    "shared": 100_000, "tensor_columns": 0, "loop": LOOP,
}  # fmt: skip


def sentences(constants: dict[str, Any] = LARGE, **change: Any) -> list[str]:
    return large_tiles.wrong(gate.derive(FIGURES | change, 8), constants)


@pytest.mark.parametrize(("stalls", "passes"), [(200, True), (1_177, True), (1_179, False)])
def test_a_step_may_take_1_15_of_the_bound(stalls: int, passes: bool) -> None:
    assert (sentences(loop=LOOP | {"stalls": stalls}) == []) == passes


def test_a_large_tile_without_wgmma_fails() -> None:
    assert sentences(mix={}) == ["a large tile without wgmma"]


@pytest.mark.parametrize(
    ("constants", "arch"),
    [(LARGE | {"BLOCK_N": 64}, 90), ({"BLOCK_M": 128, "BLOCK_N": 128}, 90), (LARGE, 80), (LARGE, 100)],
    ids=["a small tile", "attention", "sm_80", "sm_100"],
)
def test_other_builds_are_not_judged(constants: dict[str, Any], arch: int) -> None:
    assert sentences(constants, arch=arch, loop=LOOP | {"stalls": 5_000}, mix={}) == []


def test_the_lane_fails_it_without_a_record() -> None:
    slow = FIGURES | {"loop": LOOP | {"stalls": 5_000}}
    found = {"k(": specialisations.Specialisation("m", "k", {}, LARGE, [], {"num_warps": 8})}
    ((key, version, arch, sentence),) = gate.judge(found, {"3.6": {("k(", 90): slow}}, {})
    assert (key, version, arch) == ("k(", "3.6", 90) and "1.15 is the limit" in sentence
    assert gate.judge(found, {"3.6": {("k(", 90): FIGURES}}, {}) == []


def test_every_large_tile_of_the_table_is_recorded_and_within_the_limit() -> None:
    """Issue figures: no spills, wgmma, and cycles, for each 16-bit dtype and for tf32."""
    tiles = large_tiles.tiles(record.read())
    assert all(t.ratio <= large_tiles.LIMIT and not t.spills and t.wgmma for t in tiles)
    held = {(t.operands, t.tile, t.stages) for t in tiles}
    for row in config_table.load("sm_90").rows:
        c = row.config
        if large_tiles.is_large({"BLOCK_M": c.m, "BLOCK_N": c.n, "BLOCK_K": c.k}):
            for operands in {"half": ("bf16", "fp16"), "tf32": ("fp32",)}.get(row.kind, ()):
                assert (operands, f"{c.m}×{c.n}×{c.k}", c.num_stages) in held


def test_it_is_drawn(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    path = large_tiles.draw(record.read(), tmp_path)
    assert path is not None and "128×256×64" in path.read_text(encoding="utf-8")
    assert large_tiles.draw({}, tmp_path) is None


def test_no_row_asks_for_warp_specialisation_and_the_evidence_says_why() -> None:
    """Where compilers one day make something better of it, the record is made anew and the test fails."""
    builds = json.loads(specialised.FILE.read_text(encoding="utf-8"))["builds"]
    assert set(builds) == {f"triton {v} {arch}" for v in ("3.6", "3.8") for arch in specialised.TARGETS}
    for by_tile in builds.values():
        pairs = [(by_tile[tile.removesuffix(", specialised")], figures) for tile, figures in by_tile.items()
                 if tile.endswith(", specialised")]  # fmt: skip
        assert len(pairs) == len(specialised.TILES)
        for plain, special in pairs:
            assert "error" in special or special["ratio"] >= plain["ratio"]
    for file in config_table.FOLDER.glob("*.json"):
        assert not any(row.config.specialise for row in config_table.load(file.stem).rows)
