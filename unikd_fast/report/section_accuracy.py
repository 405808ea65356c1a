"""The accuracy table of the page, beside the printed figures, and every single run."""

from collections.abc import Callable, Sequence

from unikd_fast.report.accuracy import AccuracyRow, accuracy_rows, method_name
from unikd_fast.report.content import Missing, Part, Section, Table
from unikd_fast.report.printed import Metric, Printed
from unikd_fast.report.runs import Group, Run

_MINUS, _NONE = "\u2212", "–"
_METRICS: tuple[tuple[Metric, str], ...] = (("top1", "top-1"), ("top5", "top-5"))


def accuracy_section(groups: Sequence[Group], unfinished: Sequence[str]) -> Section:
    """The first section: what the runs came to."""
    parts: list[Part] = [_how_chosen([run for group in groups for run in group.runs])]
    remarks: dict[str, dict[str, None]] = {}
    for metric, title in _METRICS:
        rows = accuracy_rows(groups, metric)
        if not rows:
            continue
        parts.append(_table(rows, title))
        for row in rows:
            for remark in [*_notes(row.printed), *row.remarks]:
                remarks.setdefault(row.name, {})[remark] = None
        if metric == "top1" and not any(row.printed for row in rows):
            parts.append(Missing(_nothing_printed(groups)))
    if remarks:
        lines = tuple((name, "; ".join(found)) for name, found in remarks.items())
        parts.append(Table("On the printed figures and how far they compare", ("", "remarks"), lines, numbers=False))
    parts += [Missing(sentence) for sentence in unfinished]
    return Section("accuracy", "Accuracy", tuple(parts))


def single_runs_section(groups: Sequence[Group]) -> Section:
    """Every run by itself."""
    names = ("run", "seed", "method", "model", "best epoch", "top-1", "last epoch", "top-1", "top-5", "cross-entropy")
    header = tuple(name.replace("top-", "top\u2011") for name in names)  # a hyphen that does not break
    rows = tuple(_single(group.name, run) for group in groups for run in group.runs)
    caption = "Every run on the test split: top-1 (%) of both epochs, top-5 (%) and cross-entropy (nats) of the last."
    return Section("runs", "Single runs", (Table(caption, header, rows),))


def _table(rows: Sequence[AccuracyRow], metric: str) -> Table:
    compared = any(row.printed for row in rows)
    header: tuple[str, ...] = ("", "model", "seeds", "best epoch", "last epoch")
    if compared:
        header += ("printed", "best − printed", "last − printed")
    cells = []
    for row in rows:
        own: tuple[str, ...] = (row.name, row.model, str(row.best.seeds), row.best.text(), row.last.text())
        if compared:
            own += (
                _each(row.printed, lambda one: f"{one.value:.2f} ({_tables(one)})"),
                _each(row.printed, lambda one, mean=row.best.mean: _signed(mean - one.value)),  # type: ignore[misc]
                _each(row.printed, lambda one, mean=row.last.mean: _signed(mean - one.value)),  # type: ignore[misc]
            )
        cells.append(own)
    caption = f"Test {metric} accuracy (%), mean ± sample standard deviation over seeds"
    if compared:
        caption += "; printed: in the UniKD paper, T: its table; differences in percentage points"
    return Table(f"{caption}.", header, tuple(cells))


def _each(printed: Sequence[Printed], write: Callable[[Printed], str]) -> str:
    return "\n".join(map(write, printed)) or _NONE


def _notes(printed: Sequence[Printed]) -> list[str]:
    """Each note with the figures it is about."""
    about: dict[str, list[str]] = {}
    for one in printed:
        if one.note:
            about.setdefault(one.note, []).append(f"{one.value:.2f} ({_tables(one)})")
    return [f"{' and '.join(figures)}: {note}" for note, figures in about.items()]


def _tables(printed: Printed) -> str:
    return ", ".join(f"T{table}" for table in printed.tables)


def _signed(value: float) -> str:
    shown = f"{abs(value):.2f}"
    return shown if float(shown) == 0 else f"{'+' if value > 0 else _MINUS}{shown}"


def _how_chosen(runs: Sequence[Run]) -> str:
    on_test = {bool(run.result["test_is_val"]) for run in runs}
    if on_test == {True}:
        return (
            "There is no validation split: best epoch is the maximum on the test split, as the literature reports it; "
            "last epoch has no such choice."
        )
    chosen = "The best epoch was chosen on the validation split; the test split was used once, at the end."
    return chosen if on_test == {False} else f"{chosen} Runs without a validation split chose it on the test split."


def _nothing_printed(groups: Sequence[Group]) -> str:
    found: dict[str, None] = {}
    for run in (run for group in groups for run in group.runs if not run.is_teacher):
        teacher = (run.config.get("teacher") or {}).get("model", "no teacher")
        found[f"{(run.config.get('data') or {}).get('name')} with {teacher} to {run.result['model']}"] = None
    return (
        f"The paper prints nothing for {'; '.join(found)}. Printed figures appear for its pairs of networks on "
        "cifar100 and imagenet."
    )


def _single(name: str, run: Run) -> tuple[str, ...]:
    result = run.result
    best, last = result["best"], result["last"]
    epochs = [_NONE if part.get("epoch") is None else str(part["epoch"]) for part in (best, last)]
    return (
        name,
        str(run.seed),
        method_name(result["method"]),
        str(result["model"]),
        epochs[0],
        f"{best['test']['accuracy']:.2f}",
        epochs[1],
        f"{last['test']['accuracy']:.2f}",
        f"{last['test']['top5']:.2f}" if "top5" in last["test"] else _NONE,
        f"{last['test']['ce']:.4f}",
    )
