"""The tables of README.md and docs/ say what the registry and the results files say."""

from __future__ import annotations

import pytest

from benchmarks import tables


@pytest.mark.parametrize("path", tables.FILES, ids=lambda path: path.name)
def test_tables_are_fresh(path) -> None:  # type: ignore[no-untyped-def]
    text = path.read_text(encoding="utf-8")
    assert tables.updated(text) == text, f"run python -m benchmarks.tables and commit {path.name}"


def test_every_marked_table_is_known_and_every_known_table_is_shown() -> None:
    marked = {block[2] for path in tables.FILES for block in tables.BLOCK.finditer(path.read_text())}
    assert marked == set(tables.TABLES)


def test_a_stale_table_is_noticed() -> None:
    assert (
        tables.updated("<!-- table: ops -->\nold\n<!-- end -->") != "<!-- table: ops -->\nold\n<!-- end -->"
    )


def test_what_was_not_measured_is_said(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for name in tables.TABLES.keys() - {"ops"}:
        text = tables.TABLES[name]()
        assert "not been" in text and text.endswith(".\n") and "|" not in text, name
