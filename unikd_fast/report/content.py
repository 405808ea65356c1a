"""What a page is made of: sections of paragraphs, tables and pictures. Plain text; the page escapes it."""

from typing import NamedTuple

from unikd_fast.report.figure_style import Draw


class Table(NamedTuple):
    """A table whose first column names its rows.

    Args:
        caption: what the figures are.
        header: one cell a column.
        rows: one cell a column each; a line break in a cell stays one.
        numbers: whether the columns after the first are numbers, which stand to the right.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: bool = True


class Picture(NamedTuple):
    """A figure.

    Args:
        name: of its PNG file, after the page's own.
        caption: what it shows.
        alt: what a reader who does not see it must know: the figures it ends at.
        draw: draws it in the colours of a theme.
    """

    name: str
    caption: str
    alt: str
    draw: Draw


class Missing(NamedTuple):
    """A sentence in the place of something that cannot be shown: what would make it appear."""

    text: str


Part = str | Table | Picture | Missing


class Section(NamedTuple):
    """A heading and what stands under it; ``anchor`` is its id."""

    anchor: str
    title: str
    parts: tuple[Part, ...]
