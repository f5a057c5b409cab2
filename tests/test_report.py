"""Reports: one page with everything in it, plots as PNG and SVG, a provider's colour the same everywhere."""

from html.parser import HTMLParser

import pytest

from benchmarks.report import html, style

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Tags are closed in order; collects ids, links and image sources."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.sources = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.sources += [found["src"]] if "src" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text):
    """Well formed, in need of no other file, its contents lead to its sections. Returns what was found."""
    found = Checker(text)
    assert found.links == [f"#{name}" for name in found.ids] and len(set(found.ids)) == len(found.ids)
    assert all(source.startswith("data:image/") for source in found.sources)
    assert "<script" not in text
    return found


def test_a_page_has_contents_and_leaves_empty_sections_out():
    cells = html.table(("a", "b"), [("x", html.escape("<1>"))])
    sections = [html.Section("One & two", cells), html.Section("Empty", html.bullets([])),
                html.Section("Failures", html.bullets(["<b>"], "bad"))]  # fmt: skip
    text = html.page("Title <1>", sections)
    assert check_page(text).ids == ["one-two", "failures"]
    assert "&lt;b&gt;" in text and "Title &lt;1&gt;" in text


def test_plots_are_the_same_bytes_every_time_and_go_into_the_page(tmp_path):
    pytest.importorskip("matplotlib")

    def draw(folder):
        figure, ((axes,),) = style.figure(4, 3)
        axes.plot([256, 4096], [1.0, 2.0], style.marker("fusekit"), color=style.colour("fusekit"), label="y")
        style.sizes_axis(axes, [256, 4096])
        style.finish(axes, xlabel="columns", ylabel="GB/s", title="t")
        style.legend_below(figure, axes.lines)
        return style.save(figure, folder, "plot")

    paths = [draw(tmp_path / name) for name in "ab"]
    for kind in (".svg", ".png"):
        first, second = (path.with_suffix(kind).read_bytes() for path in paths)
        assert first == second and len(first) > 1000
    text = html.page("t", [html.Section("p", html.image(paths[0], 'GB/s "here"'))])
    assert check_page(text).sources[0].startswith("data:image/svg+xml;base64,")


def test_a_provider_has_one_colour_whatever_it_is_called():
    for name in ("fusekit", "fusekit bf16", "fusekit float32"):
        assert style.colour(name) == style.COLOURS["fusekit"]
    assert style.colour("torch.compile bf16") == style.colour("compile") != style.colour("compile-max")
    assert style.colour("eager bf16") == style.colour("eager autocast") != style.colour("eager")
    assert style.colour("a library nobody knows") not in style.COLOURS.values()
    assert style.seconds(0.0123) == "12.3 ms" and style.seconds(4.2e-6) == "4.2 µs"
