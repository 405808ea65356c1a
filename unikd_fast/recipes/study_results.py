"""What the runs of the study say: the search, the methods over seeds, and each of UniKD's choices with its cost.

Differences are within a seed, with confidence intervals. `study_markdown` writes the tables of `docs/defaults.md`.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student_t  # type: ignore[import-untyped]

from unikd_fast.errors import FileError
from unikd_fast.io import read_json
from unikd_fast.recipes.ledger import read_finished
from unikd_fast.recipes.pairs import TEACHER, Pair
from unikd_fast.recipes.runs import plan_runs
from unikd_fast.recipes.study import (
    CANDIDATES,
    CHANGES,
    CHOSEN,
    IMAGES,
    STUDY,
    STUDY_PAIRS,
    TUNING,
    as_chosen,
    candidate_row,
    chosen_row,
)
from unikd_fast.recipes.tables import Cell, title
from unikd_fast.report.accuracy import signed, spread
from unikd_fast.report.run_files import RunFileError, is_number
from unikd_fast.report.table import markdown_table

_CONFIDENCE = 0.95

Accuracies = Mapping[str, Mapping[int, float]]
"""Accuracy in percent of the last epoch, by row and seed: on held-out images of the search, else on test images."""


class Interval(NamedTuple):
    """A mean over seeds and half the width of its 95 % confidence interval, by Student's t; NaN of a single seed."""

    mean: float
    half_width: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width


class Study(NamedTuple):
    """Finished runs of the study.

    Args:
        accuracies: accuracies by the name of the pair.
        costs: time of a step over that of the student alone, the median and its quartiles, by pair and row.
        hardware, commits: what the runs were made on and by.
    """

    accuracies: Mapping[str, Accuracies]
    costs: Mapping[str, Mapping[str, Sequence[float]]]
    hardware: tuple[str, ...]
    commits: tuple[str, ...]


def read_study(out: Path, seeds: Iterable[int], overrides: Sequence[str] = ()) -> Study:
    """Read the runs of the study and of its search that are finished.

    Args:
        out: folder of all runs.
        overrides: settings that differ from the recipes.

    Raises:
        ConfigError: a run has other settings than its row, such as a candidate that is not the chosen one any more.
        RunFileError: a file of a run is damaged.
    """
    seeds = list(seeds)
    cells = [Cell(row, pair, seed) for pair in STUDY_PAIRS for row in (TEACHER, *TUNING, *STUDY) for seed in seeds]
    found = [(cell, run) for cell in cells if (run := read_finished(cell, out)) is not None]
    plan_runs([cell for cell, _ in found], out, teachers="trained", overrides=overrides)  # refuses other settings
    accuracies: dict[str, dict[str, dict[int, float]]] = {}
    for cell, run in found:
        of_row = accuracies.setdefault(cell.pair.name, {}).setdefault(cell.method, {})
        of_row[cell.seed] = float(run.result["last"]["test"]["accuracy"])
    hardware, commits = (
        tuple(dict.fromkeys(getattr(run, name) for _, run in found)) for name in ("hardware", "commit")
    )
    return Study(accuracies, {}, hardware, commits)


def merged(first: Study, second: Study) -> Study:
    """Return the runs of both; those of the second count where both have one."""
    accuracies = {
        pair: {
            row: {**first.accuracies.get(pair, {}).get(row, {}), **second.accuracies.get(pair, {}).get(row, {})}
            for row in (TEACHER, *TUNING, *STUDY)
            if row in first.accuracies.get(pair, {}) or row in second.accuracies.get(pair, {})
        }
        for pair in {**first.accuracies, **second.accuracies}
    }
    costs = {
        pair: {**first.costs.get(pair, {}), **second.costs.get(pair, {})} for pair in {**first.costs, **second.costs}
    }
    hardware, commits = (tuple(dict.fromkeys(one + two)) for one, two in zip(first[2:], second[2:], strict=True))
    return Study(accuracies, costs, hardware, commits)


def study_json(study: Study) -> str:
    """Return the study as the content of a file; `load_study` reads it back."""
    return json.dumps(study._asdict(), indent=1) + "\n"


def load_study(path: Path) -> Study:
    """Return the study that `study_json` wrote to a file.

    Raises:
        RunFileError: it is damaged, or holds something else.
        FileNotFoundError: it is missing.
    """
    try:
        found = read_json(path)
        accuracies = {
            pair: {row: {int(seed): _figure(value) for seed, value in own.items()} for row, own in rows.items()}
            for pair, rows in found["accuracies"].items()
        }
        costs = {pair: {row: _quartiles(own) for row, own in rows.items()} for pair, rows in found["costs"].items()}
        return Study(accuracies, costs, tuple(map(str, found["hardware"])), tuple(map(str, found["commits"])))
    except (FileError, AttributeError, KeyError, TypeError, ValueError) as error:
        said = f"there is no {error}" if isinstance(error, KeyError) else error
        raise RunFileError(f"{path} does not hold the records of a study: {said}; restore it") from error


def _quartiles(values: Iterable[object]) -> list[float]:
    low, median, high = map(_figure, values)
    return [low, median, high]


def _figure(value: object) -> float:
    if not (is_number(value) and math.isfinite(value)):
        raise ValueError(f"figures must be finite numbers, got {value!r}")
    return value


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


def best_candidate(accuracies: Accuracies, method: str) -> int | None:
    """Return the number of the candidate with the highest mean accuracy, the first of equal ones; None if one lacks."""
    found = [accuracies.get(candidate_row(method, number)) for number in range(len(CANDIDATES[method][1]))]
    means = [statistics.mean(of_row.values()) for of_row in found if of_row]
    return means.index(max(means)) if len(means) == len(found) else None


def cheapest_equal(rows: Sequence[str], accuracies: Accuracies, costs: Mapping[str, Sequence[float]]) -> str | None:
    """Return the cheapest of these rows that its seeds do not tell from the one with the highest mean accuracy.

    Rows without a measured cost, or with fewer seeds than the others, do not count. None if there are no two such
    rows, or no two seeds.
    """
    most = max((len(accuracies.get(row, ())) for row in rows), default=0)
    known = [row for row in rows if row in costs and len(accuracies.get(row, ())) == most]
    if most < 2 or len(known) < 2:
        return None
    best = max(known, key=lambda row: statistics.mean(accuracies[row].values()))
    by_best = {row: difference(accuracies, row, best) for row in known}
    equal = [row for row, by in by_best.items() if row == best or (by is not None and not by.excludes_zero)]
    return min(equal, key=lambda row: costs[row][1])


def choices() -> dict[str, list[str]]:
    """Return the rows of each of UniKD's choices, the one that is chosen first."""
    found: dict[str, list[str]] = {}
    for row, change in CHANGES.items():
        found.setdefault(change.choice, [chosen_row("unikd")]).append(row)
    return found


def study_markdown(study: Study) -> str:
    """Return the tables of the study, from the runs that are finished."""
    if not study.accuracies:
        return "Nothing has run yet.\n"
    parts = [_preface(study)]
    for pair in STUDY_PAIRS:
        if pair.name in study.accuracies:
            parts += _of_pair(pair, study.accuracies[pair.name], study.costs.get(pair.name, {}))
    return "\n\n".join(parts) + "\n"


def _preface(study: Study) -> str:
    runs = sum(len(own) for rows in study.accuracies.values() for own in rows.values())
    return (
        "Accuracy in percent after the last epoch, mean ± sample standard deviation over seeds. Differences are taken "
        "within a seed; their 95 % confidence intervals are Student's over seeds, and do not allow for the number of "
        "comparisons: about one in twenty of rows that are alike would show a difference. "
        f"{runs} runs on {'; '.join(study.hardware)}, by commit {'; '.join(study.commits)}."
    )


def _of_pair(pair: Pair, accuracies: Accuracies, costs: Mapping[str, Sequence[float]]) -> list[str]:
    images = IMAGES[pair.name]
    teacher = accuracies.get(TEACHER)
    right = "" if not teacher else spread(list(teacher.values())).text()
    of_teacher = right and f"; the teacher gets {right} % of the held-out ones right"
    return [
        f"### {pair.remark}",
        f"{pair.teacher} to {pair.student}, {images.student_samples:,} training images, {images.student_epochs} epochs"
        f"{of_teacher}.",
        "#### The search, on held-out images",
        _search(pair, accuracies),
        "#### Every method as chosen",
        _methods(accuracies, costs),
        "#### UniKD's choices",
        _choices(pair, accuracies, costs),
    ]


def _search(pair: Pair, accuracies: Accuracies) -> str:
    rows, not_run = [], []
    for method, (method_title, candidates) in CANDIDATES.items():
        if not any(candidate_row(method, number) in accuracies for number in range(len(candidates))):
            not_run.append(method_title)
            continue
        cells = []
        for number, candidate in enumerate(candidates):
            found = accuracies.get(candidate_row(method, number))
            figure = f"{statistics.mean(found.values()):.2f}" if found else "missing"
            cells.append(f"{candidate.text}: {f'**{figure}**' if CHOSEN[pair.name][method] == number else figure}")
        rows.append([method_title, *cells])
    most = max(map(len, rows), default=1) - 1
    return _table(["method", *(f"candidate {number + 1}" for number in range(most))], rows, not_run)


def _methods(accuracies: Accuracies, costs: Mapping[str, Sequence[float]]) -> str:
    against = (chosen_row("kd"), chosen_row("unikd"))
    of_methods = ["none", *map(chosen_row, CANDIDATES)]
    rows = [
        [
            title(row),
            _accuracy(accuracies, row),
            *(_difference(accuracies, row, other) for other in against),
            _cost(costs, row),
        ]
        for row in of_methods
        if row in accuracies
    ]
    not_run = [title(row) for row in of_methods if row not in accuracies]
    return _table(["method", "test accuracy", "over KD", "over UniKD", "step, of the student's"], rows, not_run)


def _choices(pair: Pair, accuracies: Accuracies, costs: Mapping[str, Sequence[float]]) -> str:
    rows, not_run = [], []
    base = chosen_row("unikd")
    for choice, of_choice in choices().items():
        cheapest = cheapest_equal(of_choice, accuracies, costs)
        known = [row for row in of_choice if row in accuracies]
        not_run += [f"{choice}: {CHANGES[row].text}" for row in of_choice[1:] if row not in known]
        for row in known if known != [base] else ():
            text = as_chosen(pair, choice) if row == base else CHANGES[row].text
            accuracy = _accuracy(accuracies, row)
            by, cost = _difference(accuracies, row, base), _cost(costs, row)
            rows.append([choice, text, accuracy, by, cost, "x" if row == cheapest else ""])
    heading = [
        "choice",
        "settled as",
        "test accuracy",
        "over UniKD as chosen",
        "step, of the student's",
        "cheapest of the best",
    ]
    return _table(heading, rows, not_run)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], not_run: Sequence[str]) -> str:
    """Return a table, and below it what would be in it and has not run."""
    said = f"Not run: {'; '.join(not_run)}." if not_run else ""
    return "\n\n".join(filter(None, (markdown_table(heading, rows) if rows else "", said)))


def _accuracy(accuracies: Accuracies, row: str) -> str:
    """Return the mean over seeds with its deviation, and how many seeds there are if other rows have more."""
    found = list(accuracies[row].values())
    most = max(map(len, accuracies.values()))
    return f"{spread(found).text()}{f', {len(found)} of {most} seeds' if len(found) < most else ''}"


def _difference(accuracies: Accuracies, row: str, other: str) -> str:
    found = None if row == other else difference(accuracies, row, other)
    return "" if found is None else f"{interval_text(found)}{', told apart' if found.excludes_zero else ''}"


def _cost(costs: Mapping[str, Sequence[float]], row: str) -> str:
    if row not in costs:
        return ""
    low, median, high = costs[row]
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def interval_text(found: Interval) -> str:
    """Return a difference with its interval.

    Example:
        >>> interval_text(Interval(1.25, 0.5, 5))
        '+1.25 ± 0.50'
    """
    width = "" if math.isnan(found.half_width) else f" ± {found.half_width:.2f}"
    return f"{signed(found.mean)}{width}"
