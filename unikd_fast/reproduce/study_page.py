"""The study as Markdown: every row against its baselines, and what each open choice is worth."""

import math
from collections.abc import Iterator, Mapping

from unikd_fast.recipes import ALPHAS, CHANGES, GATES, HEADS, MIDDLE, SAME_LOGIT_LOSS, STUDY, WIDTHS
from unikd_fast.report.accuracy import spread
from unikd_fast.reproduce.cells import TEACHER, title
from unikd_fast.reproduce.ledger_text import markdown_table, signed
from unikd_fast.reproduce.study_statistics import (
    Accuracies,
    Effect,
    Interval,
    Study,
    difference,
    effect,
    interval,
)

_BASELINES = tuple(row for row in STUDY if not row.startswith("unikd"))
_ABLATED = "kd_1_1"
"""What is left of Eq. 7 without the features."""


def study_markdown(study: Study) -> str:
    """The tables of the study, of the runs that are finished."""
    if not study.accuracies:
        return "Nothing has run yet.\n"
    strongest = strongest_baseline(study.accuracies)
    parts = ["### What it was made with", _preface(study)]
    parts += ["### Every row", _rows(study.accuracies, strongest)]
    parts += ["### What the features add to the same loss of the logits", _added(study.accuracies)]
    parts += ["### What each choice is worth", _effects(study.accuracies)]
    parts += ["### What a single change is worth", _changes(study.accuracies)]
    return "\n\n".join(parts) + "\n"


def strongest_baseline(accuracies: Accuracies) -> str | None:
    """That of the KD and DKD rows with the highest mean; None while there is none."""
    found = [row for row in _BASELINES if row in accuracies and row != "none"]
    return max(found, key=lambda row: interval(list(accuracies[row].values())).mean, default=None)


def effects(accuracies: Accuracies) -> Iterator[Effect]:
    """Of every factor over all combinations; and of the head and alpha, which act on one another, within the other."""
    heads, alphas = (HEADS[1], HEADS[0]), [(alpha, MIDDLE.alpha) for alpha in ALPHAS if alpha != MIDDLE.alpha]
    found = [
        effect(accuracies, "head", *heads),
        effect(accuracies, "gate", GATES[1], GATES[0]),
        *(effect(accuracies, "width", width, MIDDLE.width) for width in WIDTHS if width != MIDDLE.width),
        *(effect(accuracies, "alpha", *levels) for levels in alphas),
        *(effect(accuracies, "head", *heads, {"alpha": alpha}) for alpha in ALPHAS),
        *(effect(accuracies, "alpha", *levels, {"head": head}) for head in HEADS for levels in alphas),
    ]
    return (each for each in found if each is not None)


def _preface(study: Study) -> str:
    seeds = sorted({seed for of_seeds in study.accuracies.values() for seed in of_seeds})
    runs = sum(map(len, study.accuracies.values()))
    return "\n".join(
        [
            f"Seeds: {', '.join(map(str, seeds))}; each has generated images, a teacher and first weights of its own. "
            f"{runs} runs.",
            "Test accuracy in percent after the last epoch, mean ± sample standard deviation over seeds. Differences "
            "are taken within a seed; their 95 % confidence intervals are Student's over seeds, and do not allow for "
            "the number of comparisons: about one in twenty of rows that are alike would show a difference.",
            f"Made on {'; '.join(study.hardware)}, by commit {'; '.join(study.commits)}.",
        ]
    )


def _rows(accuracies: Accuracies, strongest: str | None) -> str:
    rows = []
    for row in (TEACHER, *STUDY):
        if row not in accuracies:
            rows.append([title(row), "missing", "", ""])
            continue
        values = list(accuracies[row].values())
        against = [_difference(accuracies, row, other) for other in (_ABLATED, strongest)]
        rows.append([title(row), f"{spread(values).text()}", *against])
    best = "the best baseline" if strongest is None else title(strongest)
    return markdown_table(["row", "accuracy", f"over {title(_ABLATED)}", f"over the best baseline, {best}"], rows)


def _difference(accuracies: Accuracies, row: str, other: str | None) -> str:
    found = None if other in (None, row) or row == TEACHER else difference(accuracies, row, str(other))
    return "" if found is None else interval_text(found)


def _added(accuracies: Accuracies) -> str:
    heading = ["row", "without the features", "difference", "told apart"]
    return markdown_table(heading, _against(accuracies, SAME_LOGIT_LOSS))


def _changes(accuracies: Accuracies) -> str:
    heading = ["row", "what is changed", "difference", "told apart"]
    return markdown_table(heading, _against(accuracies, {row: change.base for row, change in CHANGES.items()}))


def _against(accuracies: Accuracies, others: Mapping[str, str]) -> list[list[str]]:
    found = [(title(row), title(other), difference(accuracies, row, other)) for row, other in others.items()]
    return [
        [row, other, interval_text(by), "yes" if by.excludes_zero else "no"]
        for row, other, by in found
        if by is not None
    ]


def _effects(accuracies: Accuracies) -> str:
    rows = [
        [
            each.factor,
            f"{_level(each.level)} against {_level(each.against)}",
            ", ".join(f"{name} {_level(level)}" for name, level in each.among.items()) or "all combinations",
            interval_text(each.interval),
            "yes" if each.interval.excludes_zero else "no",
        ]
        for each in effects(accuracies)
    ]
    return markdown_table(["factor", "levels", "among", "difference", "told apart"], rows)


def interval_text(found: Interval) -> str:
    """A difference with its interval.

    Example:
        >>> interval_text(Interval(1.25, 0.5, 5))
        '+1.25 ± 0.50'
    """
    width = "" if math.isnan(found.half_width) else f" ± {found.half_width:.2f}"
    return f"{signed(found.mean)}{width}"


def _level(level: object) -> str:
    return f"{level:g}" if isinstance(level, float) else str(level)
