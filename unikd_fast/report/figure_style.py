"""How figures look, on a light page and on a dark one, and the files they become.

The series colours of each theme have a contrast of 3:1 or more with its surface, and stay apart for protanopia,
deuteranopia and tritanopia (tests/report/test_figure_style.py); dashes tell lines apart as well.
"""

import io
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

WIDTH = 9.0
"""Inches; 864 CSS pixels."""


class Theme(NamedTuple):
    """Colours of a page and of the figures on it, as #rrggbb.

    Args:
        surface, ink, muted, grid: background, text, lesser text and axes, grid lines.
        series: of lines and bars, in this order.
        sequential: steps of a colour map from nothing to much.
        diverging: steps from less, through nothing, to more.
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
        """Colour and dashes of the line at ``index``; no two of the first 24 have both in common."""
        rounds, place = divmod(index, len(self.series))
        return {"color": self.series[place], "linestyle": _DASHES[(place + rounds) % len(_DASHES)]}

    def color_map(self, kind: Literal["sequential", "diverging"]) -> Colormap:
        """Cells without a value take the colour of the grid."""
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
    """Draws a figure and encodes it; the same figure always gives the same bytes.

    Args:
        draw: makes the figure.
        theme: its colours.
        file_format: svg with letters as outlines, or png at 200 dots an inch.
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
    # Without the XML prologue and its document type, which names an address.
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
