"""What a table's runs came to, beside what is printed: read from their folders, each figure with its origin."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unikd_fast.recipes import Pair
from unikd_fast.report.accuracy import Spread, spread
from unikd_fast.report.printed import MEAN, Metric, Printed, printed, printed_anywhere, rows
from unikd_fast.report.run_files import read_json, read_result
from unikd_fast.reproduce.attempts import wall_s
from unikd_fast.reproduce.cells import TEACHER, Cell, Table, printed_row, setting, teacher_cells, title
from unikd_fast.reproduce.plan import Teachers

_KEYS: dict[Metric, str] = {"top1": "accuracy", "top5": "top5"}


class Finished(NamedTuple):
    """A finished run.

    Args:
        folder: of the run.
        result: its result.json.
        wall_s: seconds it took, all attempts together; None where that is not known.
        hardware: the GPU, or the processor.
        commit: of the code that ran.
    """

    folder: Path
    result: dict[str, Any]
    wall_s: float | None
    hardware: str
    commit: str


class Entry(NamedTuple):
    """One figure of the table.

    Args:
        method: the row, or TEACHER.
        pair: its name; of a mean, how many pairs.
        metric: top1 or top5.
        best, last: accuracy in percent over seeds, of the best epoch and of the last one; None if no seed is finished.
        epochs: of the best epoch, by seed; empty for means and for teachers that were given.
        printed: what this table prints; None if it prints nothing.
        elsewhere: other figures that the paper prints for the same.
        seeds: that are finished.
        missing: seeds that are not.
        wall_s: seconds of a run, mean over those whose time is known.
        hardware: of the runs, each once.
        commits: of the code, each once.
        folders: of the runs.
        remark: on the method's figures.
    """

    method: str
    pair: str
    metric: Metric
    best: Spread | None
    last: Spread | None
    epochs: tuple[int, ...]
    printed: Printed | None
    elsewhere: tuple[Printed, ...]
    seeds: tuple[int, ...]
    missing: tuple[int, ...]
    wall_s: float | None
    hardware: tuple[str, ...]
    commits: tuple[str, ...]
    folders: tuple[str, ...]
    remark: str

    @property
    def title(self) -> str:
        return title(self.method)

    @property
    def differences(self) -> tuple[float, float] | None:
        """Of best and last epoch from the printed figure, in percentage points."""
        if self.best is None or self.last is None or self.printed is None:
            return None
        return self.best.mean - self.printed.value, self.last.mean - self.printed.value


class Ledger(NamedTuple):
    """A table as far as it is reproduced.

    Args:
        table: which.
        seeds: that are wanted.
        teachers: published or trained here.
        overrides: what was set otherwise than in the recipes.
        entries: in the table's order, the teachers first.
    """

    table: Table
    seeds: tuple[int, ...]
    teachers: Teachers
    overrides: tuple[str, ...]
    entries: tuple[Entry, ...]


def read_finished(cell: Cell, out: Path) -> Finished | None:
    """The run of a cell; None if it is not finished.

    Raises:
        RunFileError: a file of it is damaged.
    """
    folder = cell.folder(out)
    if not (folder / "result.json").exists():
        return None
    path = folder / "environment.json"
    made = read_json(path) if path.exists() else {}
    gpus = list(dict.fromkeys(made.get("gpus") or []))
    hardware = ", ".join(gpus) or str(made.get("cpu", "unknown"))
    return Finished(
        folder, read_result(folder / "result.json"), wall_s(folder), hardware, str(made.get("commit", "unknown"))
    )


def make_ledger(
    table: Table, out: Path, *, seeds: Sequence[int], teachers: Teachers, overrides: Sequence[str] = ()
) -> Ledger:
    """Reads the runs of a table.

    Args:
        out: the folder of all runs.

    Raises:
        RunFileError: a file of a finished run is damaged.
    """
    found: dict[str, Finished] = {}
    for cell in _cells(table, seeds, teachers):
        finished = read_finished(cell, out)
        if finished is not None:
            found[cell.name] = finished
    entries: list[Entry] = []
    for metric in table.metrics:
        if table.is_mean:
            entries += [_mean(table, method, metric, seeds, found) for method in table.methods]
            continue
        entries += [_teacher(table, pair, metric, seeds, teachers, found) for pair in table.pairs]
        entries += [
            _student(table, method, pair, metric, seeds, found) for method in table.methods for pair in table.pairs
        ]
    return Ledger(table, tuple(seeds), teachers, tuple(overrides), tuple(entries))


def _cells(table: Table, seeds: Sequence[int], teachers: Teachers) -> list[Cell]:
    students = [Cell(method, pair, seed) for method in table.methods for pair in table.pairs for seed in seeds]
    return [*students, *(_teachers(table.pairs, seeds) if teachers == "trained" else [])]


def _teachers(pairs: Sequence[Pair], seeds: Sequence[int]) -> list[Cell]:
    """Those that are trained here, also where none of the students needs one."""
    return teacher_cells(Cell(TEACHER, pair, seed) for pair in pairs for seed in seeds)


def _student(
    table: Table, method: str, pair: Pair, metric: Metric, seeds: Sequence[int], found: Mapping[str, Finished]
) -> Entry:
    runs = {seed: found.get(Cell(method, pair, seed).name) for seed in seeds}
    own, elsewhere = _printed(table, printed_row(method), (pair.teacher, pair.student), metric)
    done = {seed: run for seed, run in runs.items() if run is not None}
    best, last = (_spread([run.result[which]["test"][_KEYS[metric]] for run in done.values()]) for which in _EPOCHS)
    epochs = tuple(int(run.result["best"]["epoch"]) for run in done.values())
    missing = tuple(seed for seed in seeds if seed not in done)
    origin, remark = _origin(list(done.values())), setting(method).remark_for(pair.data)
    return Entry(method, pair.name, metric, best, last, epochs, own, elsewhere, tuple(done), missing, *origin, remark)


def _teacher(
    table: Table, pair: Pair, metric: Metric, seeds: Sequence[int], teachers: Teachers, found: Mapping[str, Finished]
) -> Entry:
    """Its own run, or, of one that was given, the evaluation that a student's run keeps of it."""
    own, elsewhere = _printed(table, TEACHER, (pair.teacher, pair.student), metric)
    if teachers == "trained":
        of_seeds = {cell.seed: found.get(cell.name) for cell in _teachers([pair], seeds)}
        remark = "trained here by the recipe of a student alone; the last epoch teaches"
    else:
        of_seeds = {0: _given_teacher(table, pair, seeds, found)}
        remark = ""
    runs = {seed: run for seed, run in of_seeds.items() if run is not None}
    best, last = (_spread([run.result[which]["test"][_KEYS[metric]] for run in runs.values()]) for which in _EPOCHS)
    epochs = (run.result["best"]["epoch"] for run in runs.values())
    return Entry(
        TEACHER,
        pair.name,
        metric,
        best,
        last,
        tuple(int(epoch) for epoch in epochs if epoch is not None),
        own,
        elsewhere,
        tuple(runs),
        tuple(seed for seed in of_seeds if seed not in runs) if teachers == "trained" else (),
        *_origin(list(runs.values())),
        remark,
    )


def _given_teacher(table: Table, pair: Pair, seeds: Sequence[int], found: Mapping[str, Finished]) -> Finished | None:
    for cell in (Cell(method, pair, seed) for method in table.methods for seed in seeds if method != "none"):
        run = found.get(cell.name)
        if run is not None and (run.folder / TEACHER / "result.json").exists():
            return run._replace(result=read_result(run.folder / TEACHER / "result.json"), wall_s=None)
    return None


def _mean(table: Table, method: str, metric: Metric, seeds: Sequence[int], found: Mapping[str, Finished]) -> Entry:
    """Over the pairs, of those seeds that all pairs have; their spread is that of these means."""
    runs = {seed: [found.get(Cell(method, pair, seed).name) for pair in table.pairs] for seed in seeds}
    complete = {seed: [run for run in own if run is not None] for seed, own in runs.items() if None not in own}
    own, elsewhere = _printed(table, printed_row(method), MEAN, metric)
    best, last = (
        _spread([statistics.mean(run.result[which]["test"][_KEYS[metric]] for run in of) for of in complete.values()])
        for which in _EPOCHS
    )
    missing = tuple(seed for seed in seeds if seed not in complete)
    origin = _origin([run for of in complete.values() for run in of])
    column, remark = f"mean of {len(table.pairs)} pairs", setting(method).remark_for(table.data)
    return Entry(method, column, metric, best, last, (), own, elsewhere, tuple(complete), missing, *origin, remark)


_EPOCHS = ("best", "last")


def _printed(
    table: Table, row: str, pair: tuple[str, str], metric: Metric
) -> tuple[Printed | None, tuple[Printed, ...]]:
    """What the table prints, and what other tables print otherwise; nothing for networks that are in none."""
    own = None
    if table.number is not None and row in rows(table.number):
        own = printed(table.number, row, pair, metric)
    return own, tuple(other for other in printed_anywhere(row, pair, metric) if own is None or other.value != own.value)


def _spread(values: Sequence[float]) -> Spread | None:
    return spread(values) if values else None


def _origin(runs: Sequence[Finished]) -> tuple[float | None, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Time, hardware, commits and folders."""
    times = [run.wall_s for run in runs if run.wall_s is not None]
    return (
        statistics.mean(times) if times else None,
        tuple(dict.fromkeys(run.hardware for run in runs)),
        tuple(dict.fromkeys(run.commit for run in runs)),
        tuple(str(run.folder) for run in runs),
    )


def ledger_json(ledger: Ledger) -> dict[str, Any]:
    """The ledger as JSON has it; what is not known is null."""
    table = ledger.table
    return {
        "table": table.name,
        "title": table.title,
        "data": table.data,
        "seeds": list(ledger.seeds),
        "teachers": ledger.teachers,
        "settings": list(ledger.overrides),
        "entries": [_entry_json(entry) for entry in ledger.entries],
        "missing": [
            {"method": entry.method, "pair": entry.pair, "seeds": list(entry.missing)}
            for entry in ledger.entries
            if entry.missing and entry.metric == "top1"
        ],
    }


def _entry_json(entry: Entry) -> dict[str, Any]:
    differences = entry.differences
    return {
        "method": entry.method,
        "title": entry.title,
        "pair": entry.pair,
        "metric": entry.metric,
        "best": _spread_json(entry.best),
        "last": _spread_json(entry.last),
        "best_epochs": list(entry.epochs),
        "printed": None if entry.printed is None else entry.printed._asdict(),
        "printed_elsewhere": [other._asdict() for other in entry.elsewhere],
        "best_minus_printed": None if differences is None else round(differences[0], 4),
        "last_minus_printed": None if differences is None else round(differences[1], 4),
        "seeds": list(entry.seeds),
        "missing_seeds": list(entry.missing),
        "wall_s": None if entry.wall_s is None else round(entry.wall_s, 1),
        "hardware": list(entry.hardware),
        "commits": list(entry.commits),
        "folders": list(entry.folders),
        "remark": entry.remark,
    }


def _spread_json(found: Spread | None) -> dict[str, Any] | None:
    if found is None:
        return None
    std = None if math.isnan(found.deviation) else round(found.deviation, 4)
    return {"mean": round(found.mean, 4), "std": std, "seeds": found.seeds}
