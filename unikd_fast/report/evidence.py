"""What the files of each run hold for the figures, and the reason where they hold nothing."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from unikd_fast.report.logits import LogitComparison, compare_logits
from unikd_fast.report.records import read_records
from unikd_fast.report.run_files import TEST_LOGITS, StepTime, read_step_time, read_test_logits
from unikd_fast.report.runs import Group, Run

_OFF = 0.2  # percentage points; fp16 moves a few ties


class Evidence(NamedTuple):
    """One run's material.

    Args:
        run: which.
        records: of metrics.jsonl.
        comparison: of its test logits with its teacher's; None without them.
        without: why there is no comparison.
        doubt: what does not fit about it; empty if all does.
        step_time: None where it was not measured.
    """

    run: Run
    records: list[dict[str, Any]]
    comparison: LogitComparison | None
    without: str
    doubt: str
    step_time: StepTime | None


class Material(NamedTuple):
    """A group with the evidence of each of its seeds."""

    group: Group
    seeds: tuple[Evidence, ...]

    @property
    def name(self) -> str:
        return self.group.name

    def name_of(self, one: Evidence) -> str:
        return f"{self.name}, seed {one.run.seed}"

    @property
    def compared(self) -> list[LogitComparison]:
        return [one.comparison for one in self.seeds if one.comparison is not None]


def gather(groups: Sequence[Group]) -> list[Material]:
    """Reads what the runs of the groups hold.

    Raises:
        RunFileError: a file is damaged.
    """
    return [Material(group, tuple(_evidence(run) for run in group.runs)) for group in groups]


def _evidence(run: Run) -> Evidence:
    comparison, without, doubt = (None, "", "") if run.is_teacher else _compare(run)
    return Evidence(run, read_records(run.folder), comparison, without, doubt, read_step_time(run.folder))


def _compare(run: Run) -> tuple[LogitComparison | None, str, str]:
    if run.teacher is None:
        return None, "there is no teacher's folder beside it", ""
    own, other = read_test_logits(run.folder), read_test_logits(run.teacher)
    if own is None or other is None:
        lacking = [whose for whose, found in (("the student", own), ("its teacher", other)) if found is None]
        return None, f"no {TEST_LOGITS} of {' and of '.join(lacking)}", ""
    if own.logits.shape != other.logits.shape or (own.labels != other.labels).any():
        shapes = f"{own.logits.shape} on {own.split}, the teacher's {other.logits.shape} on {other.split}"
        return None, f"its logits are of other samples than its teacher's: {shapes}", ""
    try:
        comparison = compare_logits(own.logits, other.logits, own.labels)
    except ValueError as error:
        return None, str(error), ""
    return comparison, "", _doubt(run, own.split, comparison)


def _doubt(run: Run, split: str, comparison: LogitComparison) -> str:
    """Whether the logits are those that result.json speaks of."""
    reported = [run.result[which].get(split, {}).get("accuracy") for which in ("best", "last")]
    known = [value for value in reported if value is not None]
    if not known or any(abs(value - comparison.student_accuracy) <= _OFF for value in known):
        return ""
    figures = " and ".join(f"{value:.2f} %" for value in known)
    return (
        f"its {TEST_LOGITS} give {comparison.student_accuracy:.2f} % top-1 on {split}, result.json says "
        f"{figures} (best and last epoch): the file is of other weights or of another split."
    )
