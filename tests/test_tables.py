"""The README's tables say what the registry and the results files say."""

from __future__ import annotations

from benchmarks import tables


def test_readme_is_fresh() -> None:
    text = tables.README.read_text()
    assert tables.updated(text) == text, "run python -m benchmarks.tables and commit the README"


def test_every_marked_table_is_known_and_every_known_table_is_shown() -> None:
    marked = {block[2] for block in tables.BLOCK.finditer(tables.README.read_text())}
    assert marked == set(tables.TABLES)


def test_a_stale_table_is_noticed() -> None:
    assert (
        tables.updated("<!-- table: ops -->\nold\n<!-- end -->") != "<!-- table: ops -->\nold\n<!-- end -->"
    )
