"""What the runs of the study say about each open choice: differences within a seed, with confidence intervals."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student_t  # type: ignore[import-untyped]

from unikd_fast.recipes import CHOICES, STUDY_PAIR
from unikd_fast.reproduce.cells import TABLES, TEACHER, Cell
from unikd_fast.reproduce.ledger import Finished, read_finished

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
        level, against: of it.
        among: levels of other factors that all of the combinations have; empty: all combinations.
        interval: of the difference in percentage points, over seeds.
    """

    factor: str
    level: Any
    against: Any
    among: Mapping[str, Any]
    interval: Interval


class Study(NamedTuple):
    """The finished runs of the study, its teachers among them, and what they were made with."""

    accuracies: Accuracies
    hardware: tuple[str, ...]
    commits: tuple[str, ...]


def read_study(out: Path, seeds: Iterable[int]) -> Study:
    """What has been run of it.

    Args:
        out: the folder of all runs.

    Raises:
        RunFileError: a file of a run is damaged.
    """
    accuracies: dict[str, dict[int, float]] = {}
    runs: list[Finished] = []
    seeds = list(seeds)
    for row in (TEACHER, *TABLES["defaults"].methods):
        for seed in seeds:
            run = read_finished(Cell(row, STUDY_PAIR, seed), out)
            if run is not None:
                accuracies.setdefault(row, {})[seed] = float(run.result["last"]["test"]["accuracy"])
                runs.append(run)
    hardware, commits = (tuple(dict.fromkeys(getattr(run, name) for run in runs)) for name in ("hardware", "commit"))
    return Study(accuracies, hardware, commits)


def study_json(study: Study) -> str:
    """All of it as a file keeps it; `parse_study` reads it back."""
    return json.dumps(study._asdict(), indent=1) + "\n"


def parse_study(text: str) -> Study:
    """What `study_json` wrote."""
    found = json.loads(text)
    accuracies = {row: {int(seed): value for seed, value in own.items()} for row, own in found["accuracies"].items()}
    return Study(accuracies, tuple(found["hardware"]), tuple(found["commits"]))


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value, with its confidence interval.

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
    """Of two rows, within each seed that both have; None if there is no such."""
    first, second = accuracies.get(row, {}), accuracies.get(against, {})
    seeds = sorted(first.keys() & second.keys())
    return interval([first[seed] - second[seed] for seed in seeds]) if seeds else None


def effect(
    accuracies: Accuracies, factor: str, level: Any, against: Any, among: Mapping[str, Any] | None = None
) -> Effect | None:
    """Of a factor's level, over the combinations of the others; None while no seed has all of them.

    Within a seed differences are averaged over combinations first: seeds are what is drawn at random.

    Args:
        among: levels of other factors; only combinations that have them are looked at.
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
