"""What a measurement has to reach, and whether it did. Needs nothing but Python."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_KEPT = {"at_least": lambda value, limit: value >= limit, "at_most": lambda value, limit: value <= limit}


class TargetMissed(AssertionError):
    """A measured figure is on the wrong side of its target; what was measured is right, and recorded."""


@dataclass(frozen=True)
class Target:
    """A bound on one column of a benchmark's row."""

    column: str
    bound: str  # "at_least" or "at_most"
    limit: float

    def judge(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the target with what was measured. What could not be measured is not reached."""
        measured = row.get(self.column)
        reached = measured is not None and _KEPT[self.bound](measured, self.limit)
        return asdict(self) | {"measured": measured, "reached": bool(reached)}


def judge_all(targets: Iterable[Target], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [target.judge(row) for target in targets]


def describe(judged: Mapping[str, Any]) -> str:
    """Return one judged target as text: ``percent_of_copy_roof at least 90, measured 93.1``."""
    return f"{judged['column']} {judged['bound'].replace('_', ' ')} {judged['limit']:g}, measured {judged['measured']}"


def raise_if_missed(case: str, judged: Iterable[Mapping[str, Any]]) -> None:
    """Raise `TargetMissed` naming every target of the case that was not reached."""
    missed = [describe(target) for target in judged if not target["reached"]]
    if missed:
        raise TargetMissed(f"{case}: {'; '.join(missed)}")
