"""How long runs took: a line for each time that one was started, beside its folder."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unikd_fast.io import append_line
from unikd_fast.reproduce.cells import Cell


class Attempt(NamedTuple):
    """One start of a run.

    Args:
        wall_s: seconds from its start to its end.
        code: its exit code.
        beside: the most runs that ran beside it; they shared the machine.
    """

    wall_s: float
    code: int
    beside: int


def record_attempt(folder: Path, attempt: Attempt) -> None:
    """Writes it down beside the run's folder."""
    append_line(_file(folder), json.dumps(attempt._asdict()))


def read_attempts(folder: Path) -> list[Attempt]:
    """The attempts of the run in ``folder``; none if it was started by other means."""
    path = _file(folder)
    if not path.exists():
        return []
    attempts = []
    for line in path.read_text().splitlines():
        try:
            content: dict[str, Any] = json.loads(line)
            attempts.append(Attempt(float(content["wall_s"]), int(content["code"]), int(content["beside"])))
        except (ValueError, KeyError):
            continue  # cut off by a kill
    return attempts


def wall_s(folder: Path) -> float | None:
    """Seconds that the run in ``folder`` took, all attempts together; None where that is not known."""
    attempts = read_attempts(folder)
    return sum(attempt.wall_s for attempt in attempts) if attempts else None


def estimate_s(cells: Sequence[Cell], finished: Mapping[Cell, float]) -> float | None:
    """Seconds that these cells will take one after the other; None if nothing like them is finished.

    The mean of the same method and networks over other seeds, else of the same networks, else of all.

    Args:
        finished: cells and the seconds they took.
    """
    if not finished:
        return None

    def like(cell: Cell) -> float:
        same = [s for other, s in finished.items() if (other.method, other.networks) == (cell.method, cell.networks)]
        near = [s for other, s in finished.items() if other.networks == cell.networks]
        return statistics.mean(same or near or finished.values())

    return sum(map(like, cells))


def _file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.attempts.jsonl")
