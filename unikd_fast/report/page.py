"""The page: sections of text, tables and figures in one HTML file, without scripts and without network access."""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image

from unikd_fast.report.figures import DARK, LIGHT, Draw, Theme, render


class Table(NamedTuple):
    """A table whose first column names its rows.

    Args:
        caption: what the table shows.
        header: one cell per column.
        rows: one cell per column each; line breaks are kept.
        numbers: whether the columns after the first are numbers, to be right-aligned.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: bool = True


class Picture(NamedTuple):
    """A figure.

    Args:
        name: suffix of its PNG file, after the page's own name.
        caption: what the figure shows.
        alt: alternative text, with the final values.
        draw: function that draws it in the colours of a theme, or a PNG.
    """

    name: str
    caption: str
    alt: str
    draw: Draw | bytes


class Missing(NamedTuple):
    """A sentence in place of something that cannot be shown; it says what would make it appear."""

    text: str


Part = str | Table | Picture | Missing


class Section(NamedTuple):
    """A heading and the content under it; ``anchor`` is its id."""

    anchor: str
    title: str
    parts: tuple[Part, ...]


# Nothing is fetched and no script runs, whatever a name in a run folder contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; %(light)s }
@media screen and (prefers-color-scheme: dark) { :root { %(dark)s } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1.25rem 4rem; background: var(--surface); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--grid); }
p { margin: .6rem 0; max-width: 46rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: 1rem 0 0; padding: 0; list-style: none; }
a { color: inherit; text-decoration-color: var(--muted); text-underline-offset: .2em; }
a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.scroll { overflow-x: auto; margin: 1rem 0; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { caption-side: top; text-align: start; color: var(--muted); padding-bottom: .5rem;
  max-width: min(46rem, 100vw - 2.5rem); }
th, td { padding: .35rem .9rem .35rem 0; text-align: start; vertical-align: top; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; }
tbody th { font-weight: 400; }
.numbers th + th, .numbers td { text-align: end; padding: .35rem 0 .35rem 1.1rem; }
.numbers td { white-space: nowrap; }
tbody th { min-width: min(12rem, 40vw); }
thead th { vertical-align: bottom; line-height: 1.3; }
figure { margin: 1.25rem 0; }
figure img { display: block; max-width: 100%%; height: auto; }
figcaption { color: var(--muted); font-size: .92rem; margin-top: .5rem; max-width: 46rem; }
.missing { color: var(--muted); border-inline-start: 3px solid var(--grid); padding-inline-start: .8rem; }
@media (max-width: 40rem) { figure img { max-width: none; width: 40rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  figure, table { break-inside: avoid; } h2 { break-after: avoid; } .scroll { overflow: visible; } }
"""


def write_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML.

    Args:
        title, subtitle: heading of the page and the line below it.
        sections: sections in order; empty ones are left out.
    """
    shown = [section for section in sections if section.parts]
    links = "".join(f'<li><a href="#{_text(s.anchor)}">{_text(s.title)}</a></li>' for s in shown)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en-GB">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_text(title)}</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{_STYLE % {'light': _variables(LIGHT), 'dark': _variables(DARK)}}</style>",
            "</head>",
            "<body>",
            f"<header><h1>{_text(title)}</h1><p>{_text(subtitle)}</p>",
            f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>',
            "<main>",
            *(line for section in shown for line in _section(section)),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _section(section: Section) -> Iterator[str]:
    heading = f"{section.anchor}-heading"
    yield f'<section id="{_text(section.anchor)}" aria-labelledby="{_text(heading)}">'
    yield f'<h2 id="{_text(heading)}">{_text(section.title)}</h2>'
    for part in section.parts:
        yield _part(part)
    yield "</section>"


def _part(part: Part) -> str:
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Picture):
        return _picture(part)
    if isinstance(part, Missing):
        return f'<p class="missing">{_text(part.text)}</p>'
    return f"<p>{_text(part)}</p>"


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_lines(cell)}</td>" for cell in rest)}</tr>\n'
        for first, *rest in table.rows
    )
    kind = ' class="numbers"' if table.numbers else ""
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{_text(table.caption)}"><table{kind}>'
        f"<caption>{_text(table.caption)}</caption>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>"
    )


def _picture(picture: Picture) -> str:
    if isinstance(picture.draw, bytes):
        source, address = "", _image_address(picture.draw)
    else:
        address, dark = (_data_address("svg+xml", render(picture.draw, theme, "svg")) for theme in (LIGHT, DARK))
        source = f'<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
    return (
        '<figure><div class="scroll" tabindex="0" role="group" aria-label="Figure"><picture>'
        f'{source}<img alt="{_text(picture.alt)}" src="{address}"></picture></div>'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>"
    )


def _image_address(png: bytes) -> str:
    """Return the address of a PNG, as a JPEG if that is smaller: photographs are, several times."""
    file = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.convert("RGB").save(file, "JPEG", quality=90)
    kind, content = min(("png", png), ("jpeg", file.getvalue()), key=lambda each: len(each[1]))
    return _data_address(kind, content)


def _data_address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _variables(theme: Theme) -> str:
    values = {
        "surface": theme.surface,
        "ink": theme.ink,
        "muted": theme.muted,
        "grid": theme.grid,
        "accent": theme.series[0],
    }
    return " ".join(f"--{name}: {value};" for name, value in values.items())


def _lines(text: str) -> str:
    return "<br>".join(_text(line) for line in text.split("\n"))


def _text(text: str) -> str:
    return html.escape(text, quote=True)
