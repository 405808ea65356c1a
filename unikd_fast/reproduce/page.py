"""The report's page of a table's runs, by their names in the table."""

from collections.abc import Iterable
from pathlib import Path

from unikd_fast.report.command import write_report
from unikd_fast.report.runs import Found, Run, find_runs
from unikd_fast.reproduce.cells import Cell, Table, title


def write_page(table: Table, cells: Iterable[Cell], out: Path, target: Path) -> str | None:
    """Writes the page of those of these students that are finished, and says what in a line; None if none is.

    Args:
        cells: of students.
        out: the folder of all runs.
        target: the page; one that is there is replaced, with its figures.

    Raises:
        ReportError: matplotlib is not installed.
        RunFileError: a file of a run is damaged.
    """
    found = _named(cells, out)
    if not found.runs:
        return None
    return write_report(found, target, title=table.heading, force=True)


def _named(cells: Iterable[Cell], out: Path) -> Found:
    """The runs, labelled as the table has them; of the same teacher in many runs the first."""
    runs: list[Run] = []
    teachers: dict[str, Run] = {}
    unfinished: list[str] = []
    for cell in cells:
        name = f"{title(cell.method)}, {cell.networks}"
        if not (cell.folder(out) / "result.json").exists():
            unfinished.append(f"{name}, seed {cell.seed} is not finished and is left out.")
            continue
        for run in find_runs([cell.folder(out)]).runs:
            if run.is_teacher:
                teachers.setdefault(str(run.result["model"]), run)
            else:
                runs.append(run._replace(result={**run.result, "label": name}))
    return Found((*teachers.values(), *runs), tuple(unfinished))
