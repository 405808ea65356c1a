"""Names in figures: cut, broken and laid out so that none leaves its place, by their measured widths."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import LoadFlags

LONGEST_NAME = 40
_LONGEST_TITLE = 80
_MOST_COLUMNS = 6
_POINTS = 72.0  # an inch
_SUBPIXELS = 64.0  # FreeType's unit


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """A name of at most ``longest`` letters; one that is longer loses its middle, since the end may tell it apart."""
    tail = longest // 2
    shown = name if len(name) <= longest else f"{name[: longest - tail - 1]}…{name[-tail:]}"
    return f"\u2009{shown}" if shown.startswith("_") else shown  # a legend leaves out what starts with an underscore


def fit(title: str, width: float, longest: int = _LONGEST_TITLE) -> str:
    """A title in one line, or two, of at most ``width`` inches each; one with too many letters is shortened.

    Example:
        >>> fit("student with KD and warm-up", 1.5)
        'student with KD\\nand warm-up'
    """
    letters = min(len(title), longest)
    while letters > 1:
        shown = shorten(title, letters)
        whole = _width(shown)
        if whole <= width:
            return shown
        first = bisect_right([_width(shown[:end]) for end in range(1, len(shown))], width)
        # At a space, unless that leaves too much for the second line.
        for end in (shown.rfind(" ", 0, first + 1), first):
            if end > 0 and _width(shown[end:].lstrip()) <= width:
                return f"{shown[:end]}\n{shown[end:].lstrip()}"
        letters -= max(1, int(letters * (1 - 2 * width / whole)))  # two lines hold no more than that
    return title[:1]


def add_legend(figure: Figure, drawn: Sequence[Any], names: Sequence[str]) -> None:
    """A legend below everything, in as many columns as the figure is wide for; the figure grows by its height."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(min(_MOST_COLUMNS, len(drawn)), 0, -1):
        legend = figure.legend(drawn, names, loc="outside lower left", ncols=columns)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar sign in a name is a dollar sign
        box = legend.get_window_extent(renderer)
        if box.width <= figure.bbox.width or columns == 1:
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
            return
        legend.remove()


def _width(text: str) -> float:
    """Inches of a line of a title, as its font says."""
    properties = FontProperties(size=matplotlib.rcParams["axes.titlesize"])
    font = get_font(findfont(properties))
    font.set_size(properties.get_size_in_points(), _POINTS)
    font.set_text(text, flags=LoadFlags.NO_HINTING)
    return float(font.get_width_height()[0]) / _SUBPIXELS / _POINTS
