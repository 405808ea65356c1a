"""What is drawn, read back from the figures, against the arrays that went in."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from unikd_fast.report.figures import (
    DARK,
    LIGHT,
    Bar,
    Dots,
    Matrix,
    Panel,
    draw_bars,
    draw_curves,
    draw_dots,
    draw_heatmaps,
    render,
    shrink,
)
from unikd_fast.report.run_data import line

X = np.array([1.0, 2.0, 3.0])
A = line("a", X, np.array([[3.0, 2.0, 1.0], [5.0, 4.0, 3.0]]))
B = line("b", X, np.array([[9.0, 8.0, 7.0]]))


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_lines_are_the_means_and_bands_the_seeds() -> None:
    figure = draw_curves([Panel("one", "epoch", "nats", (A, B)), Panel("two", "epoch", "%", (B,))], LIGHT, ["a", "b"])
    first, second = figure.axes
    np.testing.assert_array_equal(first.lines[0].get_xydata(), [[1, 4], [2, 3], [3, 2]])
    np.testing.assert_array_equal(first.lines[1].get_xydata(), [[1, 9], [2, 8], [3, 7]])
    (band,) = first.collections  # none for the single seed
    corners = {tuple(vertex) for vertex in band.get_paths()[0].vertices}
    assert corners >= {(1, 3), (2, 2), (3, 1), (1, 5), (2, 4), (3, 3)}
    assert (first.get_title(loc="left"), first.get_xlabel(), first.get_ylabel()) == ("one", "epoch", "nats")
    assert legend_of(figure) == ["a", "b"]
    assert len(second.lines) == 1


def test_a_group_has_one_colour_in_all_figures() -> None:
    names = ["x", "a", "y", "b"]
    figure = draw_curves([Panel("one", "epoch", "nats", (B,)), Panel("two", "epoch", "%", (A, B))], DARK, names)
    assert [to_hex(drawn.get_color()) for drawn in figure.axes[1].lines] == [DARK.series[1], DARK.series[3]]
    assert to_hex(figure.axes[0].lines[0].get_color()) == DARK.series[3]
    assert legend_of(figure) == ["a", "b"]


def test_axis_limits_are_applied() -> None:
    (axes,) = draw_curves([Panel("one", "x", "y", (A,), (0.0, 5.0), (0.0, None))], LIGHT, ["a"]).axes
    assert axes.get_xlim() == (0.0, 5.0)
    assert axes.get_ylim()[0] == 0.0
    assert axes.get_ylim()[1] >= 5.0


def test_values_over_decades_get_a_logarithmic_axis() -> None:
    def scale(values: list[float], limits: tuple[float | None, float | None] = (None, None)) -> str:
        one = line("a", X, np.array([values]))
        (axes,) = draw_curves([Panel("one", "x", "y", (one,), y_limits=limits)], LIGHT, ["a"]).axes
        return axes.get_yscale()

    assert scale([200.0, 5.0, 2.0]) == "log"
    assert scale([199.0, 5.0, 2.0]) == "linear"
    assert scale([200.0, 5.0, 0.0]) == "linear"  # zero has no logarithm
    assert scale([200.0, 5.0, 2.0], (0.0, None)) == "linear"


def test_outliers_do_not_flatten_a_panel() -> None:
    x = np.arange(40.0)
    usual = 0.5 + 0.4 * np.exp(-x / 8)
    first = np.concatenate([[60.0], usual[1:]])

    def axes_of(*values: np.ndarray) -> Axes:
        lines = tuple(line(name, x, one[None]) for name, one in zip("ab", values, strict=False))
        (axes,) = draw_curves([Panel("one", "x", "y", lines)], LIGHT, ["a", "b"]).axes
        return axes

    axes = axes_of(first, usual)
    low, high = axes.get_ylim()
    assert usual.min() > low > 0.4 and 1.0 > high > usual.max() and axes.get_yscale() == "linear"
    marks = [one for one in axes.lines if one.get_marker() == "^" and len(one.get_xdata())]
    assert [list(one.get_xdata()) for one in marks] == [[0.0]]
    assert [text.get_text() for text in axes.texts] == ["▲ outside: up to 60"]
    for whole in (axes_of(usual), axes_of(100 * np.exp(-x / 4), usual), axes_of(np.ones(40))):
        assert not whole.texts  # a curve over decades is no outlier
    assert axes_of(-first).get_ylim()[0] > -1.0
    assert axes_of(np.where(x == 3, np.nan, first)).texts


def test_names_are_not_parsed_as_markup() -> None:
    names = ["_hidden", r"costs $\5 $6", "a" * 50 + "1", "a" * 50 + "2"]
    lines = tuple(line(name, X, np.array([[float(place)] * 3])) for place, name in enumerate(names))
    figure = draw_curves([Panel("p", "x", "y", lines)], LIGHT, names)
    shown = legend_of(figure)
    assert len(set(shown)) == 4
    assert shown[0].strip() == "_hidden"
    assert (shown[2][-1], shown[3][-1], len(shown[2])) == ("1", "2", 40)
    render(lambda theme: draw_curves([Panel("p", "x", "y", lines)], theme, names), LIGHT, "svg")


def test_heatmaps_share_one_colour_scale() -> None:
    first, second = np.array([[0.0, 1.0], [0.5, 0.0]]), np.array([[0.0, 4.0], [np.nan, 0.0]])
    figure = draw_heatmaps(
        [Matrix("a", first), Matrix("b", second)],
        LIGHT,
        kind="sequential",
        color_label="logits",
        x_label="class",
        y_label="true class",
    )
    images = [axes.images[0] for axes in figure.axes[:2]]
    np.testing.assert_array_equal(images[0].get_array(), first)
    np.testing.assert_array_equal(images[1].get_array().filled(np.nan), second)
    assert [image.get_clim() for image in images] == [(0.0, 4.0)] * 2
    assert figure.axes[2].get_ylabel() == "logits"
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["a", "b"]


def test_diverging_heatmaps_are_centred_at_zero() -> None:
    figure = draw_heatmaps(
        [Matrix("a", np.array([[0.0, -3.0], [2.0, 0.0]]))],
        DARK,
        kind="diverging",
        color_label="",
        x_label="",
        y_label="",
    )
    assert figure.axes[0].images[0].get_clim() == (-3.0, 3.0)


def test_all_zero_heatmaps_can_be_drawn() -> None:
    def draw(theme: object) -> Figure:
        return draw_heatmaps(
            [Matrix("a", np.zeros((3, 3)))], LIGHT, kind="sequential", color_label="", x_label="", y_label=""
        )

    assert render(draw, LIGHT, "svg")


def test_large_matrices_are_averaged_in_squares() -> None:
    values = np.arange(25.0).reshape(5, 5)
    values[0, 0] = np.nan
    # Squares of 2 classes; the last row and column of squares are cut off.
    expected = [[12 / 3, (2 + 3 + 7 + 8) / 4, (4 + 9) / 2], [13.0, 15.0, 16.5], [20.5, 22.5, 24.0]]
    np.testing.assert_allclose(shrink(values, 3), expected)
    assert shrink(values, 5) is values
    assert np.isnan(shrink(np.full((4, 4), np.nan), 2)).all()


def test_dots_are_means_with_lines_over_the_seed_range() -> None:
    groups = [
        Dots("a", {"all": (70.0, 60.0, 80.0), "right": (90.0, 90.0, 90.0)}),
        Dots("b", {"all": (50.0, 40.0, 55.0), "right": (75.0, 70.0, 80.0)}),
    ]
    (axes,) = draw_dots(groups, LIGHT, x_label="share (%)").axes
    assert [list(drawn.get_xdata()) for drawn in axes.lines] == [[70.0, 50.0], [90.0, 75.0]]
    spans = [[(segment[0][0], segment[1][0]) for segment in each.get_segments()] for each in axes.collections]
    assert spans == [[(60.0, 80.0), (40.0, 55.0)], [(90.0, 90.0), (70.0, 80.0)]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.lines[0].get_ydata()[0] > axes.lines[0].get_ydata()[1]  # the first on top


def test_bars_are_stacked_in_order_with_their_sums() -> None:
    bars = [Bar("a", {"data": 1.0, "loss": 2.0}), Bar("b", {"data": 0.5, "loss": 4.0})]
    figure = draw_bars(bars, LIGHT, x_label="ms")
    (axes,) = figure.axes
    drawn = [(patch.get_x(), patch.get_width()) for patch in axes.patches]
    assert drawn == [(0.0, 1.0), (0.0, 0.5), (1.0, 2.0), (0.5, 4.0)]
    assert [text.get_text() for text in axes.texts] == ["3", "4.5"]
    assert legend_of(figure) == ["data", "loss"]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_any_number_of_panels_and_heatmaps(count: int) -> None:
    panels = [Panel(str(place), "x", "y", (A,)) for place in range(count)]
    assert len(draw_curves(panels, LIGHT, ["a"]).axes) == count
    matrices = [Matrix(str(place), np.eye(3)) for place in range(count)]
    figure = draw_heatmaps(matrices, LIGHT, kind="sequential", color_label="", x_label="", y_label="")
    assert len(figure.axes) == count + 1  # and the colour bar
