"""The ledger of a table: the results of its runs beside the printed figures, as JSON and as Markdown.

Every figure is read from the folders of finished runs and names its origin.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unikd_fast.recipes.pairs import TEACHER, Pair
from unikd_fast.recipes.runs import Teachers, total_seconds
from unikd_fast.recipes.tables import Cell, Table, printed_row, setting, teacher_cells, title
from unikd_fast.report.accuracy import Spread, signed, spread
from unikd_fast.report.printed import FIGURES, MEAN, Metric, Printed, is_known, printed, printed_anywhere
from unikd_fast.report.run_files import RunFileError, read_json, read_result
from unikd_fast.report.table import markdown_table
from unikd_fast.units import duration

_EPOCHS = ("best", "last")
_NONE = "–"


class Finished(NamedTuple):
    """A finished run.

    Args:
        folder: folder of the run.
        result: its result.json.
        seconds: wall time, all starts together. If None, it is not known.
        hardware: the GPU, or the processor.
        commit: commit of the code that ran.
    """

    folder: Path
    result: dict[str, Any]
    seconds: float | None
    hardware: str
    commit: str


class Figures(NamedTuple):
    """Test figures of a table's cell over seeds.

    Args:
        best, last: percent at the best epoch and at the last one. If None, no seed is finished.
        epochs: best epoch by seed; empty for means and for published teachers.
        seeds: finished seeds.
        missing: other seeds. A row that cannot run has neither.
    """

    best: Spread | None
    last: Spread | None
    epochs: tuple[int, ...]
    seeds: tuple[int, ...]
    missing: tuple[int, ...]


class Origin(NamedTuple):
    """What figures were made with.

    Args:
        seconds: wall time of a run, mean over the runs whose time is known. If None, no time is known.
        hardware: hardware of the runs, each once.
        commits: commits of the code, each once.
        folders: folders of the runs.
    """

    seconds: float | None
    hardware: tuple[str, ...]
    commits: tuple[str, ...]
    folders: tuple[str, ...]


class Entry(NamedTuple):
    """One figure of the table.

    Args:
        method: the row, or TEACHER.
        pair: name of the column; of a mean, how many pairs.
        metric: what the figures are.
        figures: results of the runs.
        printed: figure that this table prints. If None, it prints none.
        elsewhere: other figures that the paper prints for the same.
        origin: what the figures were made with.
        remark: what to know about the method's figures.
    """

    method: str
    pair: str
    metric: Metric
    figures: Figures
    printed: Printed | None
    elsewhere: tuple[Printed, ...]
    origin: Origin
    remark: str

    @property
    def title(self) -> str:
        return title(self.method)

    @property
    def differences(self) -> tuple[float, float] | None:
        """Return the best and the last epoch minus the printed figure, in percentage points."""
        best, last = self.figures.best, self.figures.last
        if best is None or last is None or self.printed is None:
            return None
        return best.mean - self.printed.value, last.mean - self.printed.value


class Ledger(NamedTuple):
    """A table as far as it is reproduced.

    Args:
        table: table that is reproduced.
        seeds: seeds that are wanted.
        teachers: whether teachers are published, or trained here.
        overrides: settings that differ from the recipes.
        entries: in the table's order, the teachers first.
    """

    table: Table
    seeds: tuple[int, ...]
    teachers: Teachers
    overrides: tuple[str, ...]
    entries: tuple[Entry, ...]


def read_finished(cell: Cell, out: Path) -> Finished | None:
    """Return the run of a cell, or None if it is not finished.

    Raises:
        RunFileError: a file of it is damaged.
    """
    folder = cell.folder(out)
    if not (folder / "result.json").exists():
        return None
    path = folder / "environment.json"
    made = read_json(path) if path.exists() else {}
    gpus = made.get("gpus") or []
    if not isinstance(gpus, list):
        raise RunFileError(f"{path}: gpus must be a list, got {gpus!r}")
    hardware = ", ".join(dict.fromkeys(map(str, gpus))) or str(made.get("cpu", "unknown"))
    result = read_result(folder / "result.json")
    return Finished(folder, result, total_seconds(folder), hardware, str(made.get("commit", "unknown")))


def make_ledger(
    table: Table, out: Path, *, seeds: Sequence[int], teachers: Teachers, overrides: Sequence[str] = ()
) -> Ledger:
    """Read the runs of a table.

    Args:
        out: folder of all runs.

    Raises:
        RunFileError: a file of a finished run is damaged.
    """
    cells = [Cell(method, pair, seed) for method in table.methods for pair in table.pairs for seed in seeds]
    if teachers == "trained":
        cells += _trained_teachers(table.pairs, seeds)
    read = ((cell.name, read_finished(cell, out)) for cell in cells)
    found = {name: finished for name, finished in read if finished is not None}
    entries: list[Entry] = []
    for metric in table.metrics:
        if table.is_mean:
            entries += [_mean(table, method, metric, seeds, found) for method in table.methods]
            continue
        entries += [_teacher(table, pair, metric, seeds, teachers, found) for pair in table.pairs]
        entries += [
            _student(table, method, pair, metric, () if method in table.left_out else seeds, found)
            for method in (*table.methods, *table.left_out)
            for pair in table.pairs
        ]
    return Ledger(table, tuple(seeds), teachers, tuple(overrides), tuple(entries))


def _trained_teachers(pairs: Sequence[Pair], seeds: Sequence[int]) -> list[Cell]:
    """Return the teachers that are trained here, also where none of the students needs one."""
    return teacher_cells(Cell(TEACHER, pair, seed) for pair in pairs for seed in seeds)


def _student(
    table: Table, method: str, pair: Pair, metric: Metric, seeds: Sequence[int], found: Mapping[str, Finished]
) -> Entry:
    runs = {seed: found.get(Cell(method, pair, seed).name) for seed in seeds}
    own, elsewhere = _printed(table, printed_row(method), (pair.teacher, pair.student), metric)
    figures, remark = _figures(runs, metric), setting(method).remark_for(pair.data)
    return Entry(method, pair.name, metric, figures, own, elsewhere, _origin(_done(runs).values()), remark)


def _teacher(
    table: Table, pair: Pair, metric: Metric, seeds: Sequence[int], teachers: Teachers, found: Mapping[str, Finished]
) -> Entry:
    """Return its own run, or, of a published one, the evaluation that a student's run keeps of it."""
    own, elsewhere = _printed(table, TEACHER, (pair.teacher, pair.student), metric)
    if teachers == "trained":
        runs = {cell.seed: found.get(cell.name) for cell in _trained_teachers([pair], seeds)}
        figures = _figures(runs, metric)
        remark = "trained here by the recipe of a student alone; the last epoch teaches"
    else:
        runs = {0: _published_teacher(table, pair, seeds, found)}
        figures = _figures(runs, metric)._replace(missing=())
        remark = ""
    return Entry(TEACHER, pair.name, metric, figures, own, elsewhere, _origin(_done(runs).values()), remark)


def _published_teacher(
    table: Table, pair: Pair, seeds: Sequence[int], found: Mapping[str, Finished]
) -> Finished | None:
    for cell in (Cell(method, pair, seed) for method in table.methods for seed in seeds if method != "none"):
        run = found.get(cell.name)
        if run is not None and (run.folder / TEACHER / "result.json").exists():
            return run._replace(result=read_result(run.folder / TEACHER / "result.json"), seconds=None)
    return None


def _mean(table: Table, method: str, metric: Metric, seeds: Sequence[int], found: Mapping[str, Finished]) -> Entry:
    """Average over the pairs, for those seeds that all pairs have; the spread is that of these means."""
    runs = {seed: [found.get(Cell(method, pair, seed).name) for pair in table.pairs] for seed in seeds}
    complete = {seed: [run for run in own if run is not None] for seed, own in runs.items() if None not in own}
    own, elsewhere = _printed(table, printed_row(method), MEAN, metric)
    best, last = (
        _spread_of([statistics.mean(_accuracy(run, which, metric) for run in of) for of in complete.values()])
        for which in _EPOCHS
    )
    figures = Figures(best, last, (), tuple(complete), tuple(seed for seed in seeds if seed not in complete))
    origin = _origin([run for of in complete.values() for run in of])
    column, remark = f"mean of {len(table.pairs)} pairs", setting(method).remark_for(table.data)
    return Entry(method, column, metric, figures, own, elsewhere, origin, remark)


def _done(runs: Mapping[int, Finished | None]) -> dict[int, Finished]:
    return {seed: run for seed, run in runs.items() if run is not None}


def _figures(runs: Mapping[int, Finished | None], metric: Metric) -> Figures:
    done = _done(runs)
    best, last = (_spread_of([_accuracy(run, which, metric) for run in done.values()]) for which in _EPOCHS)
    epochs = (run.result["best"].get("epoch") for run in done.values())
    missing = tuple(seed for seed in runs if seed not in done)
    return Figures(best, last, tuple(int(epoch) for epoch in epochs if epoch is not None), tuple(done), missing)


def _accuracy(run: Finished, which: str, metric: Metric) -> float:
    return float(run.result[which]["test"][FIGURES[metric]])


def _printed(
    table: Table, row: str, pair: tuple[str, str], metric: Metric
) -> tuple[Printed | None, tuple[Printed, ...]]:
    """Return what the table prints, and other figures of other tables; nothing for networks that are in none."""
    own = None
    if table.number is not None and is_known(table.number, row, pair, metric):
        own = printed(table.number, row, pair, metric)
    return own, tuple(other for other in printed_anywhere(row, pair, metric) if own is None or other.value != own.value)


def _spread_of(values: Sequence[float]) -> Spread | None:
    return spread(values) if values else None


def _origin(runs: Iterable[Finished]) -> Origin:
    runs = list(runs)
    times = [run.seconds for run in runs if run.seconds is not None]
    return Origin(
        statistics.mean(times) if times else None,
        tuple(dict.fromkeys(run.hardware for run in runs)),
        tuple(dict.fromkeys(run.commit for run in runs)),
        tuple(str(run.folder) for run in runs),
    )


def ledger_json(ledger: Ledger) -> dict[str, Any]:
    """Return the ledger as JSON has it; what is not known is null."""
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
            {"method": entry.method, "pair": entry.pair, "seeds": list(entry.figures.missing)}
            for entry in ledger.entries
            if entry.figures.missing and entry.metric == table.metrics[0]
        ],
        "remarks": {pair.name: pair.remark for pair in table.pairs if pair.remark},
        "left_out": {method: setting(method).remark_for(table.data) for method in table.left_out},
    }


def _entry_json(entry: Entry) -> dict[str, Any]:
    figures, origin, differences = entry.figures, entry.origin, entry.differences
    return {
        "method": entry.method,
        "title": entry.title,
        "pair": entry.pair,
        "metric": entry.metric,
        "best": _spread_json(figures.best),
        "last": _spread_json(figures.last),
        "best_epochs": list(figures.epochs),
        "printed": None if entry.printed is None else entry.printed._asdict(),
        "printed_elsewhere": [other._asdict() for other in entry.elsewhere],
        "best_minus_printed": None if differences is None else round(differences[0], 4),
        "last_minus_printed": None if differences is None else round(differences[1], 4),
        "seeds": list(figures.seeds),
        "missing_seeds": list(figures.missing),
        "wall_s": None if origin.seconds is None else round(origin.seconds, 3),
        "hardware": list(origin.hardware),
        "commits": list(origin.commits),
        "folders": list(origin.folders),
        "remark": entry.remark,
    }


def _spread_json(found: Spread | None) -> dict[str, Any] | None:
    if found is None:
        return None
    std = None if math.isnan(found.deviation) else round(found.deviation, 4)
    return {"mean": round(found.mean, 4), "std": std, "seeds": found.seeds}


def ledger_markdown(ledger: Ledger) -> str:
    """Return the ledger as Markdown: the table as the paper has it, then every figure with its origin."""
    parts = [f"# {ledger.table.heading}", _preface(ledger)]
    for metric, entries in _by_metric(ledger).items():
        parts += [f"## Test {_name(metric)} (%), best epoch", _overview(entries)]
        parts += [f"## Test {_name(metric)} in full", _details(entries)]
    notes = _notes(ledger)
    if notes:
        parts += ["## Notes", notes]
    parts += ["## Missing", _missing(ledger.entries) or "Nothing: every cell is finished for every seed."]
    parts += ["## Made with", _made_with(ledger.entries)]
    return "\n\n".join(parts) + "\n"


def overviews(ledger: Ledger) -> str:
    """Return the best epochs alone, for the terminal."""
    of = _by_metric(ledger).items()
    return "\n\n".join(f"Test {_name(metric)} (%), best epoch\n\n{_overview(entries)}" for metric, entries in of)


def _by_metric(ledger: Ledger) -> dict[Metric, list[Entry]]:
    return {metric: [entry for entry in ledger.entries if entry.metric == metric] for metric in ledger.table.metrics}


def _name(metric: Metric) -> str:
    return metric.replace("top", "top-").replace("ap", "AP")


def _preface(ledger: Ledger) -> str:
    seeds = ", ".join(map(str, ledger.seeds))
    trained = "trained here, once each" if ledger.teachers == "trained" else "the published ones"
    figure = "AP" if ledger.table.metrics[0] == "ap" else "accuracy"
    sentences = [
        f"Data: {ledger.table.data}. Seeds: {seeds}. Teachers: {trained}.",
        f"Mean ± sample standard deviation over seeds; best: the epoch with the highest {figure} on the validation "
        "split, which where there is none is the test split, as in the literature; last: the last epoch.",
    ]
    if ledger.table.is_mean:
        sentences.append("A seed counts once all pairs have it; the deviation is that of the means over pairs.")
    if ledger.overrides:
        sentences.append(f"Settings that differ from the recipes: {', '.join(f'`{o}`' for o in ledger.overrides)}.")
    if ledger.table.data in ("digits", "toy_scenes"):
        sentences.append("A stand-in: no figures are printed for it, and it says nothing about the paper's.")
    return "\n".join(sentences)


def _overview(entries: Sequence[Entry]) -> str:
    """Return methods down, pairs across, as the paper has it."""
    columns = list(dict.fromkeys(entry.pair for entry in entries))
    titles = list(dict.fromkeys(entry.title for entry in entries))
    found = {(entry.title, entry.pair): _short(entry) for entry in entries}
    return markdown_table(["", *columns], [[title, *(found[title, column] for column in columns)] for title in titles])


def _short(entry: Entry) -> str:
    figures = entry.figures
    if figures.best is None:
        return _absent(entry)
    incomplete = f" ({_finished_seeds(figures)} seeds)" if figures.missing else ""
    difference = "" if entry.differences is None else f" [{signed(entry.differences[0])}]"
    return f"{figures.best.text()}{difference}{incomplete}"


def _absent(entry: Entry) -> str:
    return "missing" if entry.figures.missing or entry.method == TEACHER else "not run"


def _details(entries: Sequence[Entry]) -> str:
    header = ["method", "pair", "seeds", "best", "last", "printed", "best − printed", "last − printed", "time"]
    rows = []
    for entry in entries:
        figures, seconds, differences = entry.figures, entry.origin.seconds, entry.differences
        rows.append(
            [
                entry.title,
                entry.pair,
                _finished_seeds(figures),
                *(_absent(entry) if found is None else found.text() for found in (figures.best, figures.last)),
                _printed_text(entry),
                *([_NONE, _NONE] if differences is None else [signed(value) for value in differences]),
                _NONE if seconds is None else duration(seconds),
            ]
        )
    return markdown_table(header, rows)


def _finished_seeds(figures: Figures) -> str:
    return f"{len(figures.seeds)} of {len(figures.seeds) + len(figures.missing)}"


def _printed_text(entry: Entry) -> str:
    own = [] if entry.printed is None else [f"{entry.printed.value:.2f}{'*' if entry.printed.note else ''}"]
    others = [f"{other.value:.2f} in {_tables(other)}" for other in entry.elsewhere]
    return "; ".join([*own, *others]) or _NONE


def _tables(printed: Printed) -> str:
    return ", ".join(f"Table {table}" for table in printed.tables)


def _notes(ledger: Ledger) -> str:
    lines = {f"- {pair.name}: {pair.remark}.": None for pair in ledger.table.pairs if pair.remark}
    for entry in ledger.entries:
        if entry.printed is not None and entry.printed.note:
            printed = f"{entry.printed.value:.2f}"
            lines[f"- {entry.title}, {entry.pair}: \\* {printed}: {entry.printed.note}."] = None
        if entry.remark:
            lines[f"- {entry.title}: {entry.remark}."] = None
    return "\n".join(lines)


def _missing(entries: Sequence[Entry]) -> str:
    lines = {
        f"- {entry.title}, {entry.pair}: seed{'s' if len(entry.figures.missing) > 1 else ''} "
        f"{', '.join(map(str, entry.figures.missing))}": None
        for entry in entries
        if entry.figures.missing
    }
    return "\n".join(lines)


def _made_with(entries: Sequence[Entry]) -> str:
    hardware = dict.fromkeys(name for entry in entries for name in entry.origin.hardware)
    commits = dict.fromkeys(name for entry in entries for name in entry.origin.commits)
    if not hardware:
        return "Nothing has run yet."
    return "\n".join(
        [
            f"- Hardware: {'; '.join(hardware)}.",
            f"- Commit: {'; '.join(commits)}.",
            "- Time: wall time of a whole run, mean over seeds; runs at the same time (--jobs) shared the machine. The "
            "ledger's JSON names each run's folder, with its versions in environment.json.",
        ]
    )
