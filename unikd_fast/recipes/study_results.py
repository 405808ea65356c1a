"""What the runs of the study say about each open choice: differences within a seed, with confidence intervals.

`study_markdown` is the page: every row against its baselines, and what each choice is worth.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student_t  # type: ignore[import-untyped]

from unikd_fast.recipes.ledger import Finished, read_finished
from unikd_fast.recipes.pairs import TEACHER
from unikd_fast.recipes.study import (
    ALPHAS,
    CHANGES,
    CHOICES,
    GATES,
    HEADS,
    MIDDLE,
    SAME_LOGIT_LOSS,
    STUDY,
    STUDY_PAIR,
    WIDTHS,
)
from unikd_fast.recipes.tables import Cell, title
from unikd_fast.report.accuracy import signed, spread
from unikd_fast.report.table import markdown_table

_CONFIDENCE = 0.95

Accuracies = Mapping[str, Mapping[int, float]]
"""Test accuracy in percent of the last epoch, by row and seed."""


class Interval(NamedTuple):
    """A mean over seeds and half the width of its 95 % confidence interval, by Student's t; NaN of a single seed."""

    mean: float
    half_width: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width


class Effect(NamedTuple):
    """What one level of a factor is worth against another, the other factors alike.

    Args:
        factor: field of `Choice`.
        level, against: its two levels.
        among: levels of other factors that the combinations have; empty for all combinations.
        interval: difference in percentage points over seeds.
    """

    factor: str
    level: Any
    against: Any
    among: Mapping[str, Any]
    interval: Interval


class Study(NamedTuple):
    """The finished runs of the study with its teachers, their hardware and commits."""

    accuracies: Accuracies
    hardware: tuple[str, ...]
    commits: tuple[str, ...]


def read_study(out: Path, seeds: Iterable[int]) -> Study:
    """Read the runs of the study that are finished.

    Args:
        out: folder of all runs.

    Raises:
        RunFileError: a file of a run is damaged.
    """
    accuracies: dict[str, dict[int, float]] = {}
    runs: list[Finished] = []
    seeds = list(seeds)
    for row in (TEACHER, *STUDY):
        for seed in seeds:
            run = read_finished(Cell(row, STUDY_PAIR, seed), out)
            if run is not None:
                accuracies.setdefault(row, {})[seed] = float(run.result["last"]["test"]["accuracy"])
                runs.append(run)
    hardware, commits = (tuple(dict.fromkeys(getattr(run, name) for run in runs)) for name in ("hardware", "commit"))
    return Study(accuracies, hardware, commits)


def study_json(study: Study) -> str:
    """Return the study as the content of a file; `parse_study` reads it back."""
    return json.dumps(study._asdict(), indent=1) + "\n"


def parse_study(text: str) -> Study:
    """Return the study that `study_json` wrote."""
    found = json.loads(text)
    accuracies = {row: {int(seed): value for seed, value in own.items()} for row, own in found["accuracies"].items()}
    return Study(accuracies, tuple(found["hardware"]), tuple(found["commits"]))


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least one value, with its confidence interval.

    Example:
        >>> round(interval([1.0, 2.0, 3.0]).half_width, 3)
        2.484
    """
    count = len(values)
    if count == 1:
        return Interval(values[0], math.nan, 1)
    quantile = float(student_t.ppf((1 + _CONFIDENCE) / 2, count - 1))
    return Interval(statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(count), count)


def difference(accuracies: Accuracies, row: str, against: str) -> Interval | None:
    """Return the difference of two rows within the seeds that both have; None if there are none."""
    first, second = accuracies.get(row, {}), accuracies.get(against, {})
    seeds = sorted(first.keys() & second.keys())
    return interval([first[seed] - second[seed] for seed in seeds]) if seeds else None


def effect(
    accuracies: Accuracies, factor: str, level: Any, against: Any, among: Mapping[str, Any] | None = None
) -> Effect | None:
    """Return the effect of a factor's level over the combinations of the others; None while no seed has all of them.

    Within a seed differences are averaged over combinations first, because only seeds are drawn at random.

    Args:
        among: levels of other factors that a combination must have to count.
    """
    wanted = {**(among or {}), factor: level}
    chosen = [(choice, choice._replace(**{factor: against})) for choice in CHOICES]
    pairs = [(a.name, b.name) for a, b in chosen if a._asdict().items() >= wanted.items() and b in CHOICES]
    if not pairs:
        raise ValueError(f"effect: no combinations differ by {factor} {level!r} and {against!r} alone, of {among}")
    of_rows = [accuracies.get(row, {}).keys() for pair in pairs for row in pair]
    seeds = sorted(set(of_rows[0]).intersection(*of_rows))
    if not seeds:
        return None
    means = [statistics.mean(accuracies[row][seed] - accuracies[other][seed] for row, other in pairs) for seed in seeds]
    return Effect(factor, level, against, dict(among or {}), interval(means))


_BASELINES = tuple(row for row in STUDY if not row.startswith("unikd"))
_ABLATED = "kd_1_1"
"""What is left of Eq. 7 without the features."""


def study_markdown(study: Study) -> str:
    """Return the tables of the study, from the runs that are finished."""
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
    """Return the KD or DKD row with the highest mean; None while there is none."""
    found = [row for row in _BASELINES if row in accuracies and row != "none"]
    return max(found, key=lambda row: interval(list(accuracies[row].values())).mean, default=None)


def effects(accuracies: Accuracies) -> Iterator[Effect]:
    """Yield the effect of every factor; of head and alpha, which interact, also within each level of the other."""
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
    """Return a difference with its interval.

    Example:
        >>> interval_text(Interval(1.25, 0.5, 5))
        '+1.25 ± 0.50'
    """
    width = "" if math.isnan(found.half_width) else f" ± {found.half_width:.2f}"
    return f"{signed(found.mean)}{width}"


def _level(level: object) -> str:
    return f"{level:g}" if isinstance(level, float) else str(level)
