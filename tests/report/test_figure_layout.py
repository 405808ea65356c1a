"""No text of a figure leaves it or lies on another, however many runs there are and however long their names."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from support.long_rounds import long
from unikd_fast.report.figures import (
    LIGHT,
    Bar,
    Dots,
    Draw,
    Matrix,
    Panel,
    draw_bars,
    draw_curves,
    draw_dots,
    draw_heatmaps,
    render,
)
from unikd_fast.report.run_data import line

NAMES = {
    "words": "student with a distilled and a rather long name, variant {}",
    "one word": "student_with_a_distilled_and_a_rather_long_name_{}",
    "wide": "W" * 60 + "{}",
}
X = np.arange(1.0, 4.0)
STEP = ("data", "teacher", "student forward", "loss", "backward", "optimiser")


def drawn_texts(figure: Figure) -> Iterator[Text]:
    """Every text that shows: a tick beyond the limits of its axis has one that does not."""
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        yield from (axes.title, axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True):
                if low <= place <= high:
                    yield label


def boxes(figure: Figure) -> dict[str, Bbox]:
    """Every text and pair of axes, and the pixels it takes once the figure is laid out."""
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    shown = [text for text in drawn_texts(figure) if text.get_text().strip()]
    found = {f"{place}: {text.get_text()}": text.get_window_extent() for place, text in enumerate(shown)}
    return found | {f"axes {place}": axes.get_window_extent() for place, axes in enumerate(figure.axes)}


def faults(figure: Figure) -> list[str]:
    """What leaves the figure, and what lies on what; a sum at the end of a bar may lie on its own axes."""
    found = boxes(figure)
    whole = figure.bbox.padded(0.5)
    outside = [f"{name} leaves the figure" for name, box in found.items() if not contains(whole, box)]
    sums = {text.get_text() for axes in figure.axes for text in axes.texts}
    overlapping = [
        f"{first} lies on {second}"
        for (first, one), (second, other) in itertools.combinations(found.items(), 2)
        if one.padded(-0.5).overlaps(other.padded(-0.5))
        and not (first.partition(": ")[2] in sums and second.startswith("axes"))
    ]
    return outside + overlapping


def contains(outer: Bbox, inner: Bbox) -> bool:
    return bool((outer.min <= inner.min).all() and (inner.max <= outer.max).all())


def figures(names: list[str]) -> dict[str, Draw]:
    """Every kind of figure of these runs, as the page draws it."""
    lines = tuple(line(name, X, np.array([X / (1 + place), X])) for place, name in enumerate(names))
    panels = [Panel("Common probe, validation split", "epoch", "τ² KL, τ = 4 (nats a sample)", lines)]
    panels += [Panel(f"{one.name}_kl, training", "epoch", "loss term", (one,)) for one in lines]
    matrices = [Matrix(name, np.arange(10000.0).reshape(100, 100)) for name in names]
    dots = [
        Dots(name, {"all samples": (50.0, 49.0, 51.0), "samples the teacher gets right": (70.0,) * 3}) for name in names
    ]
    bars = [Bar(name, dict.fromkeys(STEP, 123.4)) for name in names]
    return {
        "curves": lambda theme: draw_curves(panels, theme, names),
        "one panel": lambda theme: draw_curves(panels[:1], theme, names),
        "heatmaps": lambda theme: draw_heatmaps(
            matrices,
            theme,
            kind="diverging",
            color_label="student less teacher",
            x_label="class of the logit",
            y_label="class of the logit",
        ),
        "dots": lambda theme: draw_dots(dots, theme, x_label="samples with the same top-1 class (%)"),
        "bars": lambda theme: draw_bars(bars, theme, x_label="time of a step (ms)"),
    }


@pytest.mark.parametrize("kind", ["curves", "one panel", "heatmaps", "dots", "bars"])
@pytest.mark.parametrize("count", [1, long(3), 8])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_texts_do_not_overlap(name: str, count: int, kind: str) -> None:
    found: list[str] = []
    drawing = figures([name.format(place) for place in range(count)])[kind]

    def draw(theme: object) -> Figure:
        figure = drawing(LIGHT)
        found.extend(faults(figure))  # in the settings of the page
        return Figure(figsize=(1, 1))

    render(draw, LIGHT, "svg")
    assert found == []


def test_the_check_notices_a_misplaced_text() -> None:
    """Otherwise the test above could not fail."""
    figure = Figure(figsize=(4, 3), layout="constrained")
    first, second = figure.subplots(1, 2)
    first.set_title("a title of more than one pair of axes' width", loc="left")
    second.set_title("another", loc="left")
    figure.legend(first.plot([0, 1]), ["a legend entry " * 5], loc="outside lower left")
    said = faults(figure)
    assert any("a title of more" in one and one.endswith("another") for one in said)
    assert any("a legend entry" in one and one.endswith("leaves the figure") for one in said)
