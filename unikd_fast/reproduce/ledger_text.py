"""The ledger as Markdown: the table as the paper has it, then every figure with what it was made with."""

from collections.abc import Sequence

from unikd_fast.report.accuracy import Spread
from unikd_fast.report.printed import Metric, Printed
from unikd_fast.reproduce.ledger import Entry, Ledger

_NONE, _MINUS = "–", "\u2212"


def ledger_markdown(ledger: Ledger) -> str:
    """The whole file."""
    table = ledger.table
    parts = [f"# {table.heading}", _preface(ledger)]
    for metric in table.metrics:
        entries = [entry for entry in ledger.entries if entry.metric == metric]
        parts += [f"## Test {_title(metric)} (%), best epoch", _overview(entries)]
        parts += [f"## Test {_title(metric)} in full", _details(entries)]
    notes = _notes(ledger.entries)
    if notes:
        parts += ["## Notes", notes]
    missing = _missing(ledger.entries)
    parts += ["## Missing", missing or "Nothing: every cell is finished for every seed."]
    parts += ["## Made with", _made_with(ledger.entries)]
    return "\n\n".join(parts) + "\n"


def overviews(ledger: Ledger) -> str:
    """The best epochs alone, as a terminal shows them."""
    of = {metric: [entry for entry in ledger.entries if entry.metric == metric] for metric in ledger.table.metrics}
    return "\n\n".join(f"Test {_title(metric)} (%), best epoch\n\n{_overview(own)}" for metric, own in of.items())


def duration(seconds: float | None) -> str:
    """A time as one reads it.

    Example:
        >>> duration(3.2), duration(100), duration(7300)
        ('3 s', '1 min 40 s', '2 h 2 min')
    """
    if seconds is None:
        return _NONE
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _title(metric: Metric) -> str:
    return metric.replace("top", "top-")


def _preface(ledger: Ledger) -> str:
    seeds = ", ".join(map(str, ledger.seeds))
    trained = "trained here, once each" if ledger.teachers == "trained" else "the published ones"
    sentences = [
        f"Data: {ledger.table.data}. Seeds: {seeds}. Teachers: {trained}.",
        "Mean ± sample standard deviation over seeds; best: the epoch with the highest accuracy on the validation "
        "split, which where there is none is the test split, as in the literature; last: the last epoch.",
    ]
    if ledger.table.is_mean:
        sentences.append("A seed counts once all pairs have it; the deviation is that of the means over pairs.")
    if ledger.overrides:
        sentences.append(f"Set otherwise than in the recipes: {', '.join(f'`{text}`' for text in ledger.overrides)}.")
    if ledger.table.data == "digits":
        sentences.append("A stand-in: no figures are printed for it, and it says nothing about the paper's.")
    return "\n".join(sentences)


def _overview(entries: Sequence[Entry]) -> str:
    """Methods down, pairs across, as the paper has it."""
    columns = list(dict.fromkeys(entry.pair for entry in entries))
    titles = list(dict.fromkeys(entry.title for entry in entries))
    found = {(entry.title, entry.pair): _short(entry) for entry in entries}
    return markdown_table(["", *columns], [[title, *(found[title, column] for column in columns)] for title in titles])


def _short(entry: Entry) -> str:
    if entry.best is None:
        return "missing"
    incomplete = f" ({len(entry.seeds)} of {len(entry.seeds) + len(entry.missing)} seeds)" if entry.missing else ""
    difference = "" if entry.differences is None else f" [{signed(entry.differences[0])}]"
    return f"{entry.best.text()}{difference}{incomplete}"


def _details(entries: Sequence[Entry]) -> str:
    header = ["method", "pair", "seeds", "best", "last", "printed", "best − printed", "last − printed", "time"]
    rows = []
    for entry in entries:
        differences = entry.differences
        over_printed = [_NONE, _NONE] if differences is None else [signed(value) for value in differences]
        seeds = f"{len(entry.seeds)} of {len(entry.seeds) + len(entry.missing)}"
        rows.append(
            [
                entry.title,
                entry.pair,
                seeds,
                _spread(entry.best),
                _spread(entry.last),
                _printed(entry),
                *over_printed,
                duration(entry.wall_s),
            ]
        )
    return markdown_table(header, rows)


def _printed(entry: Entry) -> str:
    own = [] if entry.printed is None else [f"{entry.printed.value:.2f}{'*' if entry.printed.note else ''}"]
    others = [f"{other.value:.2f} in {_tables(other)}" for other in entry.elsewhere]
    return "; ".join([*own, *others]) or _NONE


def _notes(entries: Sequence[Entry]) -> str:
    lines: dict[str, None] = {}
    for entry in entries:
        if entry.printed is not None and entry.printed.note:
            printed = f"{entry.printed.value:.2f}"
            lines[f"- {entry.title}, {entry.pair}: \\* {printed}: {entry.printed.note}."] = None
        if entry.remark:
            lines[f"- {entry.title}: {entry.remark}."] = None
    return "\n".join(lines)


def _missing(entries: Sequence[Entry]) -> str:
    lines = {
        f"- {entry.title}, {entry.pair}: seed{'s' if len(entry.missing) > 1 else ''} "
        f"{', '.join(map(str, entry.missing))}": None
        for entry in entries
        if entry.missing
    }
    return "\n".join(lines)


def _made_with(entries: Sequence[Entry]) -> str:
    hardware = dict.fromkeys(name for entry in entries for name in entry.hardware)
    commits = dict.fromkeys(name for entry in entries for name in entry.commits)
    if not hardware:
        return "Nothing has run yet."
    return "\n".join(
        [
            f"- Hardware: {'; '.join(hardware)}.",
            f"- Commit: {'; '.join(commits)}.",
            "- Time: of a whole run, from its start to its end, mean over seeds; runs that ran at a time shared the "
            "machine. The ledger's JSON names each run's folder, with its versions in environment.json.",
        ]
    )


def _spread(found: Spread | None) -> str:
    return "missing" if found is None else found.text()


def _tables(printed: Printed) -> str:
    return ", ".join(f"Table {table}" for table in printed.tables)


def signed(value: float) -> str:
    """A difference with its sign, as one sets it.

    Example:
        >>> signed(0.25), signed(0.001)
        ('+0.25', '0.00')
    """
    shown = f"{abs(value):.2f}"
    return shown if float(shown) == 0 else f"{'+' if value > 0 else _MINUS}{shown}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up as text, too."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
