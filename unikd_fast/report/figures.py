"""The figures: themes for a light and a dark page, labels that fit, and the drawing functions."""

import io
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import LoadFlags
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from unikd_fast.report.run_data import Line

WIDTH = 9.0
"""Inches; 864 CSS pixels."""


class Theme(NamedTuple):
    """Colours of a page and of its figures, as #rrggbb.

    Args:
        surface, ink, muted, grid: colours of the background, text, secondary text and axes, and grid lines.
        series: colours of lines and bars, in order.
        sequential: colour map from low to high.
        diverging: colour map from negative through zero to positive.
    """

    name: Literal["light", "dark"]
    surface: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    sequential: tuple[str, ...]
    diverging: tuple[str, ...]

    def line_style(self, index: int) -> dict[str, Any]:
        """Return colour and dashes of the line at ``index``; the first 24 all differ in one or the other."""
        rounds, place = divmod(index, len(self.series))
        return {"color": self.series[place], "linestyle": _DASHES[(place + rounds) % len(_DASHES)]}

    def color_map(self, kind: Literal["sequential", "diverging"]) -> Colormap:
        """Return a colour map; cells without a value take the colour of the grid."""
        colours = self.sequential if kind == "sequential" else self.diverging
        made = LinearSegmentedColormap.from_list(f"{kind}-{self.name}", list(colours))
        return made.with_extremes(bad=self.grid)


_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6)))

LIGHT = Theme(
    name="light",
    surface="#fcfcfb",
    ink="#1c1c1a",
    muted="#5a5955",
    grid="#dfded9",
    series=("#17198f", "#d46c18", "#149ca1", "#714fd4", "#93402f", "#591530"),
    sequential=("#f1f4f9", "#c6d7ed", "#8fb3de", "#4f84c4", "#245a9c", "#0d2f5e"),
    diverging=("#0d3f7e", "#5f8fca", "#b9cfe9", "#f3f3f1", "#eec9a5", "#cc8145", "#7d360a"),
)
DARK = Theme(
    name="dark",
    surface="#181817",
    ink="#ecebe6",
    muted="#aeada6",
    grid="#3a3936",
    series=("#4f74e0", "#da9138", "#86e8d6", "#50b1e9", "#c4476a", "#f6df63"),
    sequential=("#20242b", "#2b3f5e", "#35629a", "#5c91cf", "#9cc2ee", "#e6f1fd"),
    diverging=("#a9cdf7", "#4f86c9", "#2f4a6e", "#272725", "#6b4526", "#c07a3c", "#f5bd85"),
)

Draw = Callable[[Theme], Figure]


def render(draw: Draw, theme: Theme, file_format: Literal["svg", "png"]) -> bytes:
    """Draw a figure and encode it; the same figure always gives the same bytes.

    Args:
        draw: function that makes the figure.
        theme: colours of the figure.
        file_format: "svg" with text as outlines, or "png" at 200 dots per inch.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        for key, value in _settings(theme).items():
            matplotlib.rcParams[key] = value  # type: ignore[index]
        figure = draw(theme)
        FigureCanvasAgg(figure)
        file = io.BytesIO()
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(file, format=file_format, dpi=200, facecolor=theme.surface, metadata=metadata)
    content = file.getvalue()
    # Without the XML prologue and its doctype, which contains a URL.
    return content[content.index(b"<svg") :] if file_format == "svg" else content


def _settings(theme: Theme) -> dict[str, Any]:
    return {
        "svg.hashsalt": "unikd-report",
        "svg.fonttype": "path",
        "text.parse_math": False,  # a dollar sign in a name is a dollar sign
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.facecolor": theme.surface,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.9,
        "legend.frameon": False,
        "legend.handlelength": 2.8,
        "figure.facecolor": theme.surface,
    }


LONGEST_NAME = 40
_LONGEST_TITLE = 80
_MOST_COLUMNS = 6
_POINTS = 72.0  # per inch
_SUBPIXELS = 64.0  # FreeType's unit


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a name of at most ``longest`` letters; a longer one loses its middle, as names often differ at the end."""
    tail = longest // 2
    shown = name if len(name) <= longest else f"{name[: longest - tail - 1]}…{name[-tail:]}"
    return f"\u2009{shown}" if shown.startswith("_") else shown  # a legend leaves out what starts with an underscore


def fit(title: str, width: float, longest: int = _LONGEST_TITLE) -> str:
    """Return a title in one or two lines of at most ``width`` inches each; a longer title is shortened.

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
        # Break at a space, unless that leaves too much for the second line.
        for end in (shown.rfind(" ", 0, first + 1), first):
            if end > 0 and _width(shown[end:].lstrip()) <= width:
                return f"{shown[:end]}\n{shown[end:].lstrip()}"
        letters -= max(1, int(letters * (1 - 2 * width / whole)))  # two lines hold at most this many
    return title[:1]


def add_legend(figure: Figure, drawn: Sequence[Any], names: Sequence[str]) -> None:
    """Add a legend below the axes, with as many columns as fit; the figure grows by its height."""
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
    """Return the width of a title's line in inches, as measured by its font."""
    properties = FontProperties(size=matplotlib.rcParams["axes.titlesize"])
    font = get_font(findfont(properties))
    font.set_size(properties.get_size_in_points(), _POINTS)
    font.set_text(text, flags=LoadFlags.NO_HINTING)
    return float(font.get_width_height()[0]) / _SUBPIXELS / _POINTS


Floats = NDArray[np.float64]
Limits = tuple[float | None, float | None]

_MOST_CELLS = 256
_MARKED = 12
_PAD = 0.09
"""Inches around the axes: a title must not touch the label of the axis above it."""
_TITLE_ROW = 0.19
_NAMES = 2.9
"""Inches for the row names; the rest of the width is for the bars or marks."""


class Panel(NamedTuple):
    """One pair of axes with one line per group.

    Args:
        title, x_label, y_label: labels, with units.
        lines: lines to draw; a group has the same colour in every panel of a figure.
        x_limits, y_limits: limits of the axes. If None, they fit the lines; values over two decades or more then get a
            logarithmic y-axis, and a few values far from all others are marked at its edge.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_limits: Limits = (None, None)
    y_limits: Limits = (None, None)


class Matrix(NamedTuple):
    """A (K, K) array of one group."""

    name: str
    values: Floats


class Dots(NamedTuple):
    """One group's percentages: for each measure the mean, the lowest and the highest seed."""

    name: str
    measures: dict[str, tuple[float, float, float]]


class Bar(NamedTuple):
    """One group's bar: its parts in the order they are stacked."""

    name: str
    parts: dict[str, float]


def draw_curves(panels: Sequence[Panel], theme: Theme, names: Sequence[str]) -> Figure:
    """Draw panels in two columns with one legend; the band spans the seeds.

    Args:
        panels: at least one panel.
        theme: colours of the figure.
        names: names of all groups on the page, so that each has one colour in all its figures.
    """
    shown = {line.name for panel in panels for line in panel.lines}
    listed = [name for name in names if name in shown]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(WIDTH if columns == 2 else 0.72 * WIDTH, 2.7 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    drawn: dict[str, Any] = {}
    for panel, place in zip(panels, axes, strict=False):
        drawn |= _draw_panel(place, panel, names, theme, figure.get_figwidth() / columns - 0.8)
    for unused in axes[len(panels) :]:
        unused.remove()
    add_legend(figure, [drawn[name] for name in listed], [shorten(name) for name in listed])
    return figure


def draw_heatmaps(
    matrices: Sequence[Matrix],
    theme: Theme,
    *,
    kind: Literal["sequential", "diverging"],
    color_label: str,
    x_label: str,
    y_label: str,
) -> Figure:
    """Draw square heatmaps on one colour scale; more than 256 classes are averaged in square cells."""
    cells = [shrink(matrix.values) for matrix in matrices]
    classes = matrices[0].values.shape[0]
    finite = np.concatenate([np.abs(cell[np.isfinite(cell)]).ravel() for cell in cells])
    most = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    width = max(4.6, WIDTH * columns / 3)
    titles = [fit(matrix.name, width / columns - 1.0, LONGEST_NAME) for matrix in matrices]
    title = _TITLE_ROW * max(text.count("\n") for text in titles)
    figure = _figure(width, 0.55 + rows * (2.75 * (1.25 if columns < 3 else 1) + title))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    image: Any = None
    for index, (cell, place) in enumerate(zip(cells, axes, strict=False)):
        image = place.imshow(
            np.ma.masked_invalid(cell),
            cmap=theme.color_map(kind),
            vmin=0.0 if kind == "sequential" else -most,
            vmax=most,
            extent=(-0.5, classes - 0.5, classes - 0.5, -0.5),
            interpolation="none",
        )
        place.set_title(titles[index], loc="left")
        place.grid(visible=False)
        for axis in (place.xaxis, place.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        place.set_xlabel(x_label)
        place.set_ylabel(y_label if index % columns == 0 else "")
    for unused in axes[len(matrices) :]:
        unused.remove()
    bar = figure.colorbar(image, ax=list(figure.axes), shrink=0.85, aspect=30, pad=0.02)
    bar.set_label(color_label)
    bar.outline.set_visible(False)
    return figure


def draw_dots(groups: Sequence[Dots], theme: Theme, *, x_label: str) -> Figure:
    """Draw one row per group and one marker per measure, with a line from the lowest to the highest seed."""
    measures = list(dict.fromkeys(measure for group in groups for measure in group.measures))
    figure = _figure(0.8 * WIDTH, 0.95 + 0.42 * len(groups))
    place = figure.subplots()
    heights = np.arange(len(groups))[::-1]
    drawn: dict[str, Any] = {}
    for index, measure in enumerate(measures):
        colour = theme.series[index % len(theme.series)]
        known = [(y, *group.measures[measure]) for y, group in zip(heights, groups, strict=True)]
        y, mean, low, high = (np.array(column) for column in zip(*known, strict=True))
        offset = y + 0.12 * (0.5 * (len(measures) - 1) - index)
        place.hlines(offset, low, high, color=colour, linewidth=2)
        marker = "oDs^v<"[index % 6]
        (drawn[measure],) = place.plot(mean, offset, marker, color=colour, markersize=7, linestyle="none")
    place.set_yticks(heights, [fit(group.name, _NAMES, LONGEST_NAME) for group in groups])
    place.set_ylim(-0.6, len(groups) - 0.4)
    place.grid(visible=True, axis="both")
    place.set_xlabel(x_label)
    place.spines["left"].set_visible(False)
    place.tick_params(axis="y", length=0)
    add_legend(figure, list(drawn.values()), list(drawn))
    return figure


def draw_bars(bars: Sequence[Bar], theme: Theme, *, x_label: str) -> Figure:
    """Draw horizontal stacked bars, each with its sum at the end."""
    parts = list(dict.fromkeys(part for bar in bars for part in bar.parts))
    figure = _figure(WIDTH, 0.95 + 0.5 * len(bars))
    place = figure.subplots()
    heights = np.arange(len(bars))[::-1]
    left = np.zeros(len(bars))
    drawn: dict[str, Any] = {}
    for index, part in enumerate(parts):
        widths = np.array([bar.parts.get(part, 0.0) for bar in bars])
        colour = theme.series[index % len(theme.series)]
        drawn[part] = place.barh(
            heights, widths, left=left, height=0.58, color=colour, edgecolor=theme.surface, linewidth=1.4
        )
        left += widths
    for y, total in zip(heights, left, strict=True):
        place.annotate(f"{total:.3g}", (total, y), xytext=(5, 0), textcoords="offset points", va="center")
    place.margins(x=0.08)
    place.set_xlim(left=0.0)
    place.set_yticks(heights, [fit(bar.name, _NAMES, LONGEST_NAME) for bar in bars])
    place.grid(visible=True, axis="x")
    place.grid(visible=False, axis="y")
    place.set_xlabel(x_label)
    place.spines["left"].set_visible(False)
    place.tick_params(axis="y", length=0)
    add_legend(figure, list(drawn.values()), list(drawn))
    return figure


def shrink(values: Floats, most: int = _MOST_CELLS) -> Floats:
    """Return a matrix of at most ``most`` cells per side: means over squares, ignoring NaN."""
    size = len(values)
    side = -(-size // most)
    if side == 1:
        return values
    padded = np.full((-(-size // side) * side,) * 2, np.nan)
    padded[:size, :size] = values
    blocks = padded.reshape(len(padded) // side, side, len(padded) // side, side)
    known = np.isfinite(blocks)
    with np.errstate(invalid="ignore"):
        means: Floats = np.where(known, blocks, 0.0).sum(axis=(1, 3)) / known.sum(axis=(1, 3))
    return means


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, whose axes are laid out without overlap."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=_PAD, w_pad=_PAD))


def _draw_panel(place: Axes, panel: Panel, names: Sequence[str], theme: Theme, width: float) -> dict[str, Any]:
    """Draw a panel and return the drawn line of each group; titles wider than ``width`` inches take two lines."""
    drawn: dict[str, Any] = {}
    for line in panel.lines:
        style = theme.line_style(names.index(line.name))
        marker = "o" if len(line.x) <= _MARKED else None
        (drawn[line.name],) = place.plot(line.x, line.mean, marker=marker, markersize=3.5, **style)
        if line.seeds > 1:
            place.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.17, linewidth=0)
    place.set_title(fit(panel.title, width), loc="left")
    place.set_xlabel(panel.x_label)
    place.set_ylabel(panel.y_label)
    place.set_xlim(*panel.x_limits)
    if panel.y_limits != (None, None):
        place.set_ylim(*panel.y_limits)
        return drawn
    shown, limits = _without_outliers(panel.lines)
    if _spans_decades(shown):
        place.set_yscale("log")
        place.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.yaxis.set_minor_formatter(NullFormatter())
    if limits is not None:
        place.set_ylim(*limits)
        _mark_outside(place, panel.lines, limits, names, theme)
    return drawn


def _mark_outside(
    place: Axes, lines: Sequence[Line], limits: tuple[float, float], names: Sequence[str], theme: Theme
) -> None:
    """Mark, at the edge of the axes, where points lie outside of their limits, and write how far they reach."""
    for edge, marker, beyond, reach in ((limits[1], "^", np.greater, np.max), (limits[0], "v", np.less, np.min)):
        outside = [line.mean[beyond(line.mean, edge)] for line in lines]
        for line in lines:
            x = line.x[beyond(line.mean, edge)]
            colour = theme.line_style(names.index(line.name))["color"]
            (marks,) = place.plot(x, np.full(len(x), edge), marker, color=colour, markersize=6, clip_on=False)
            marks.set(linestyle="none", in_layout=False)
        if (found := np.concatenate(outside)).size:
            text = f"{'▲' if marker == '^' else '▼'} outside: {'up' if marker == '^' else 'down'} to {reach(found):.3g}"
            said = place.text(0.98, 0.94 if marker == "^" else 0.06, text, transform=place.transAxes, ha="right")
            said.set(va="center", in_layout=False, fontsize="small")
            said.set_bbox({"facecolor": theme.surface, "alpha": 0.8, "linewidth": 0.0, "pad": 1.0})


def _without_outliers(lines: Sequence[Line]) -> tuple[Floats, tuple[float, float] | None]:
    """Return the values that an axis should show, and its limits; None for those that fit all lines.

    A value is left out that lies beyond the quartiles by more than three times their distance, on the scale that the
    axis would have, if all such values together would leave the others less than a third of the axis.
    """
    ends = [values for line in lines for values in (line.low, line.high)] or [np.zeros(1)]
    values = np.concatenate(ends)
    values = values[np.isfinite(values)]
    if not values.size:
        return values, None
    scaled = np.log(values) if _spans_decades(values) else values
    low, high = np.percentile(scaled, (25, 75))
    inside = np.abs(scaled - np.clip(scaled, low, high)) <= 3 * (high - low)
    shown = values[inside]
    if 3 * np.ptp(scaled[inside]) >= np.ptp(scaled):
        return values, None
    if _spans_decades(shown):
        return shown, (float(shown.min() / 1.3), float(shown.max() * 1.3))
    room = 0.06 * float(np.ptp(shown)) or 0.06 * abs(float(shown[0])) or 1.0
    return shown, (float(shown.min()) - room, float(shown.max()) + room)


def _spans_decades(values: Floats) -> bool:
    """Return whether a linear axis would show most of the values as one: all are positive, over two decades or more."""
    return bool(values.size and values.min() > 0 and values.max() >= 100 * values.min())
