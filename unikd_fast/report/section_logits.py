"""What the test logits show: their distance from the teacher's (Fig 4), class structure (Fig 5), and agreement."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from unikd_fast.report.accuracy import spread
from unikd_fast.report.content import Missing, Part, Picture, Section, Table
from unikd_fast.report.curves import line
from unikd_fast.report.evidence import Material
from unikd_fast.report.figures import Dots, Matrix, Panel, draw_curves, draw_dots, draw_heatmaps
from unikd_fast.report.logits import DIFFERENCES, LogitComparison
from unikd_fast.report.run_files import TEST_LOGITS

_ALMOST_ALL = 0.999
_ANCHORS = (("differences", "Logit differences"), ("classes", "Class structure"), ("agreement", "Agreement"))
# Title, digits, and the figure of a comparison.
_MEASURES: tuple[tuple[str, int, Callable[[LogitComparison], float]], ...] = (
    ("agreement (%)", 2, lambda one: one.agreement),
    ("agreement where the teacher is right (%)", 2, lambda one: one.agreement_where_right),
    ("student top-1 (%)", 2, lambda one: one.student_accuracy),
    ("teacher top-1 (%)", 2, lambda one: one.teacher_accuracy),
    ("τ² KL, τ = 4 (nats)", 4, lambda one: one.probe_kl),
)


def logit_sections(materials: Sequence[Material]) -> list[Section]:
    """Three sections; one that says what is missing if no run has test logits."""
    usable = [material for material in materials if material.compared]
    reasons: dict[str, list[str]] = {}
    for material in materials:
        for seed in material.seeds:
            if seed.without:
                reasons.setdefault(seed.without, []).append(material.name_of(seed))
    left_out = ". ".join(f"{'; '.join(names)}: {reason}" for reason, names in reasons.items())
    missing = Missing(
        f"Left out are {left_out}. The logits' figures appear for runs of which the student's folder and the "
        f"teacher's both hold {TEST_LOGITS}."
    )
    if not usable:
        return [Section("differences", "Logits", (missing,))]
    figures = (_differences(usable, [material.name for material in materials]), _classes(usable), _agreement(usable))
    doubts = [Missing(f"{m.name_of(seed)}: {seed.doubt}") for m in usable for seed in m.seeds if seed.doubt]
    first: list[Part] = [*figures[0], *([missing] if reasons else []), *doubts]
    parts = (tuple(first), figures[1], figures[2])
    return [Section(anchor, title, own) for (anchor, title), own in zip(_ANCHORS, parts, strict=True)]


def _differences(materials: Sequence[Material], names: Sequence[str]) -> tuple[Part, ...]:
    """Fig 4; ``names`` are of all groups of the page."""
    lines = tuple(
        line(material.name, DIFFERENCES, np.stack([one.cdf for one in material.compared])) for material in materials
    )
    everywhere = np.min([one.low for one in lines], axis=0) >= _ALMOST_ALL
    end = float(DIFFERENCES[np.argmax(everywhere)]) if everywhere.any() else float(DIFFERENCES[-1])
    panel = Panel(
        "Distribution of logit differences",
        "|student logit − teacher logit|, logits",
        "share of entries (0–1)",
        lines,
        (0.0, max(end, float(DIFFERENCES[1]))),
        (0.0, 1.01),
    )
    medians = ", ".join(f"{one.name} {_median(one.mean)}" for one in lines)
    caption = (
        "Fig 4. Empirical distribution of |z_s − z_t| over all test samples and classes; the further to the left a "
        "curve rises, the nearer the student is to its teacher. A shift that softmax does not see counts as well."
    )
    beyond = [f"{one.name} {100 * (1 - one.mean[-1]):.2g} %" for one in lines if one.mean[-1] < _ALMOST_ALL]
    if beyond:
        caption += f" Beyond {DIFFERENCES[-1]:g} logits lie: {', '.join(beyond)}."
    alt = f"Line chart of cumulative shares. Medians in logits: {medians}."
    return (Picture("differences", caption, alt, lambda theme: draw_curves((panel,), theme, names)),)


def _median(cdf: np.ndarray) -> str:
    return f"{DIFFERENCES[np.argmax(cdf >= 0.5)]:.2f}" if cdf[-1] >= 0.5 else f"above {DIFFERENCES[-1]:g}"


def _classes(materials: Sequence[Material]) -> tuple[Part, ...]:
    means = [Matrix(material.name, material.compared[0].class_difference) for material in materials]
    correlations = [Matrix(material.name, material.compared[0].correlation_difference) for material in materials]
    several = any(len(material.seeds) > 1 for material in materials)
    seed = " Of the first seed." if several else ""
    size = len(means[0].values)
    if any(len(matrix.values) != size for matrix in means):
        return (
            Missing("The class structure is left out: the runs differ in their number of classes; report them apart."),
        )
    cells = " Each cell is the mean of a square of classes." if size > 256 else ""
    return (
        Picture(
            "class-means",
            "Fig 5. |M_s − M_t|: how far the student's mean logits for each true class are from the teacher's, the "
            f"diagonal set to zero. One scale for all.{cells}{seed}",
            f"Heatmaps of {size} x {size} classes. Mean difference in logits: {_averages(means)}.",
            lambda theme: draw_heatmaps(
                means,
                theme,
                kind="sequential",
                color_label="|difference|, logits",
                x_label="class of the logit",
                y_label="true class",
            ),
        ),
        Picture(
            "correlations",
            "Fig 5, as correlations: the correlation coefficients between the student's logits less those between the "
            f"teacher's. One scale for all, the same to both sides.{cells}{seed}",
            f"Heatmaps of {size} x {size} classes. Mean absolute difference: {_averages(correlations)}.",
            lambda theme: draw_heatmaps(
                correlations,
                theme,
                kind="diverging",
                color_label="student less teacher",
                x_label="class of the logit",
                y_label="class of the logit",
            ),
        ),
    )


def _averages(matrices: Sequence[Matrix]) -> str:
    """The mean absolute value of each off the diagonal, where there is one."""
    shown = []
    for matrix in matrices:
        off = np.abs(matrix.values[~np.eye(len(matrix.values), dtype=bool)])
        off = off[np.isfinite(off)]
        shown.append(f"{matrix.name} {off.mean():.3g}" if off.size else f"{matrix.name} undefined")
    return ", ".join(shown)


def _agreement(materials: Sequence[Material]) -> tuple[Part, ...]:
    rows = []
    dots = []
    for material in materials:
        values = [[of(one) for one in material.compared] for _, _, of in _MEASURES]
        texts = (spread(value).text(digits) for value, (_, digits, _) in zip(values, _MEASURES, strict=True))
        rows.append((material.name, *("–" if text.startswith("nan") else text for text in texts)))
        shown = {"all samples": values[0], "samples the teacher gets right": values[1]}
        if not any(math.isnan(one) for value in shown.values() for one in value):
            measures = {name: (sum(value) / len(value), min(value), max(value)) for name, value in shown.items()}
            dots.append(Dots(material.name, measures))
    table = Table(
        "Student and teacher on the test split, mean ± sample standard deviation over seeds; τ² KL is the common probe "
        "on the stored logits.",
        ("", *(title for title, _, _ in _MEASURES)),
        tuple(rows),
    )
    if not dots:
        return (table,)
    ends = ", ".join(f"{one.name} {one.measures['all samples'][0]:.2f} %" for one in dots)
    picture = Picture(
        "agreement",
        "How often the student gives its teacher's class. Marks are means over seeds, lines reach from the lowest "
        "seed to the highest.",
        f"Dot plot of agreement on all test samples: {ends}.",
        lambda theme: draw_dots(dots, theme, x_label="samples with the same top-1 class (%)"),
    )
    return (picture, table)
