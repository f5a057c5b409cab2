"""Pieces of a report page: sections with their contents, tables, lists, images held in the page itself."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #33383f; background: #fff; margin: 2rem auto;
       max-width: 76rem; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.4rem } h3 { font-size: 1rem }
img { max-width: 100%; display: block } figure { margin: 1rem 0 }
figcaption { color: #5d646c; font-size: 13px }
nav { border-left: 3px solid #d9dde3; padding-left: 1rem } nav ul { list-style: none; padding: 0; margin: 0 }
a { color: #2f6fb5 } code { font-size: 13px }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d9dde3; text-align: right; white-space: nowrap }
th:first-child, td:first-child, td.text, th.text { text-align: left }
.bad { color: #b3261e } .faint { color: #5d646c } ul { padding-left: 1.2rem }
"""
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


class Section(NamedTuple):
    """A heading and the HTML below it; a section without a body is left out of the page."""

    title: str
    body: str


def page(title: str, sections: Sequence[Section]) -> str:
    """A whole HTML page that needs no other file; the contents come first."""
    present = [section for section in sections if section.body]
    contents = "".join(f"<li><a href='#{_slug(s.title)}'>{escape(s.title)}</a></li>" for s in present)
    body = "".join(f"<section id='{_slug(s.title)}'><h2>{escape(s.title)}</h2>{s.body}</section>"
                   for s in present)  # fmt: skip
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<nav><ul>{contents}</ul></nav>{body}</body></html>\n"
    )


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, sections), encoding="utf-8")
    return path


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], *, text: int = 1) -> str:
    """Cells are HTML already: escape what others wrote. The first `text` columns are aligned to the left."""

    def line(tag: str, values: Sequence[Any]) -> str:
        cells = (f"<{tag}{' class=text' if i < text else ''}>{v}</{tag}>" for i, v in enumerate(values))
        return f"<tr>{''.join(cells)}</tr>"

    head = f"<thead>{line('th', headings)}</thead>" if any(headings) else ""
    body = "".join(line("td", row) for row in rows)
    return f"<div class=wide><table>{head}<tbody>{body}</tbody></table></div>" if body else ""


def facts(found: Mapping[str, Any]) -> str:
    """A table of names and values, unknown ones left out."""
    rows = [(escape(str(k)), escape(str(v))) for k, v in found.items() if v is not None]
    return table(("", ""), rows, text=2)


def bullets(entries: Iterable[str], style: str = "") -> str:
    """A list of sentences, escaped here; "bad" is the style of failures."""
    items = "".join(f"<li class='{style}'>{escape(entry)}</li>" for entry in entries)
    return f"<ul>{items}</ul>" if items else ""


def image(path: Path, caption: str) -> str:
    """A PNG or SVG file inside the page, with a caption that is also its alternative text."""
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{TYPES[path.suffix]};base64,{data}"
    words = escape(caption, quote=True)
    return f'<figure><img alt="{words}" src="{source}"><figcaption>{words}</figcaption></figure>'


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
