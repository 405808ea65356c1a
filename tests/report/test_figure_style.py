"""The colours: contrast with the page, and distance for the three kinds of colour blindness."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from unikd_fast.report.figures import DARK, LIGHT, Theme, render

# Machado, Oliveira and Fernandes 2009, complete deficiency, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# OKLab (Ottosson 2020).
TO_CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]
APART = 0.12
"""Distance in OKLab; 0.02 is about what can just be seen side by side."""


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """Of WCAG 2."""
    darker, lighter = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (first, second))
    return (lighter + 0.05) / (darker + 0.05)


def seen(colour: str, vision: str) -> np.ndarray:
    cones = np.array(TO_CONES) @ np.clip(np.array(VISION[vision]) @ linear(colour), 0, 1)
    return np.array(TO_LAB) @ np.cbrt(cones)


def test_contrast_ratio() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_text_and_lines_contrast_with_the_page(theme: Theme) -> None:
    assert contrast(theme.ink, theme.surface) >= 7
    assert contrast(theme.muted, theme.surface) >= 4.5
    assert min(contrast(colour, theme.surface) for colour in theme.series) >= 3


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_series_differ_for_colour_blind_readers(theme: Theme, vision: str) -> None:
    pairs = itertools.combinations(theme.series, 2)
    nearest = min(float(np.linalg.norm(seen(a, vision) - seen(b, vision))) for a, b in pairs)
    assert nearest >= APART


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_colour_maps_are_monotonic_in_lightness(theme: Theme) -> None:
    """So that they read in grey as well; a diverging one does so to both sides."""
    steps = np.diff([seen(colour, "normal")[0] for colour in theme.sequential])
    assert (steps < 0).all() or (steps > 0).all()
    lightness = [seen(colour, "normal")[0] for colour in theme.diverging]
    middle = len(lightness) // 2
    away = -1 if theme.name == "light" else 1
    assert all(away * step > 0 for step in np.diff(lightness[middle:]))
    assert all(away * step > 0 for step in np.diff(lightness[middle::-1]))


def test_24_line_styles_are_distinct() -> None:
    styles = [str(sorted(LIGHT.line_style(index).items())) for index in range(24)]
    assert len(set(styles)) == 24


def draw(theme: Theme) -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().set_title("costs $5 and $6, 7 < 8")
    return figure


def test_figures_are_reproducible_and_contain_no_urls() -> None:
    first = render(draw, LIGHT, "svg")
    assert render(draw, LIGHT, "svg") == first
    assert first.startswith(b"<svg")
    assert b"<!DOCTYPE" not in first
    assert render(draw, LIGHT, "png") == render(draw, LIGHT, "png")
    assert render(draw, LIGHT, "png")[:8] == b"\x89PNG\r\n\x1a\n"
    assert render(draw, DARK, "svg") != first
    assert DARK.surface.encode() in render(draw, DARK, "svg")


def test_user_matplotlib_settings_are_ignored_and_kept() -> None:
    import matplotlib

    expected = render(draw, LIGHT, "svg")
    with matplotlib.rc_context({"font.size": 30.0, "axes.linewidth": 9.0, "xtick.direction": "in"}):
        assert render(draw, LIGHT, "svg") == expected
        assert matplotlib.rcParams["font.size"] == 30.0
