"""The page: whole in itself, well-formed, and harmless whatever the names in it are."""

import base64
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from unikd_fast.report.figures import DARK, LIGHT, Theme, render
from unikd_fast.report.page import Missing, Picture, Section, Table, write_html

NASTY = '"><script>alert(1)</script><img src=http://x.test/a onerror=alert(2)>&amp;'
VOID = {"meta", "link", "img", "source", "br"}


class Tree(HTMLParser):
    """Tags with their attributes; fails where one is not closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def draw(theme: Theme) -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], color=theme.series[0])
    return figure


def page_of(text: str) -> str:
    return write_html(
        text,
        text,
        [
            Section("first", text, (text, Table(text, ("", text), ((text, f"{text}\n{text}"),)), Missing(text))),
            Section("second", "Second", (Picture("p", text, text, draw),)),
            Section("empty", "Not shown", ()),
        ],
    )


def test_names_from_files_are_escaped() -> None:
    tree = Tree(page_of(NASTY))
    assert tree.all("script") == []
    assert [image["alt"] for image in tree.all("img")] == [NASTY]
    assert all("onerror" not in attributes for _, attributes in tree.tags)
    assert tree.text.count(NASTY) >= 10


def test_the_page_is_self_contained() -> None:
    page = page_of("plain")
    tree = Tree(page)
    addresses = [
        attributes[name] for _, attributes in tree.tags for name in ("src", "srcset", "href") if name in attributes
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"url\(|@import|https?:", page)
    (policy,) = [meta["content"] for meta in tree.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_pictures_come_in_both_colour_schemes() -> None:
    tree = Tree(page_of("plain"))
    (source,), (image,) = tree.all("source"), tree.all("img")
    assert source["media"] == "screen and (prefers-color-scheme: dark)"
    for address, theme in ((source["srcset"], DARK), (image["src"], LIGHT)):
        kind, _, content = address.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert base64.b64decode(content) == render(draw, theme, "svg")


def test_the_page_is_accessible_html() -> None:
    tree = Tree(page_of("plain"))
    assert tree.all("html") == [{"lang": "en-GB"}]
    assert len(tree.all("h1")) == len(tree.all("main")) == 1
    assert [link["href"] for link in tree.all("a")] == ["#first", "#second"]
    sections = tree.all("section")
    assert [section["id"] for section in sections] == ["first", "second"]
    assert [section["aria-labelledby"] for section in sections] == [heading["id"] for heading in tree.all("h2")]
    assert [cell["scope"] for cell in tree.all("th")] == ["col", "col", "row"]
    assert len(tree.all("caption")) == len(tree.all("table")) == 1
    assert len(tree.all("br")) == 1


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_page_and_figures_share_one_background(theme: Theme) -> None:
    assert f"--surface: {theme.surface};" in page_of("plain")
