"""Results of runs as a table: mean and standard deviation over seeds, at the best and the last epoch."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from unikd_fast.tasks import figures_of

TEACHER = "teacher"
NONE = "–"
HEADER = ("", "model", "best epoch", "last epoch", "seeds")


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of the task's main figure on the test split, one row per label, also aligned as text.

    Args:
        results: contents of result.json files; several with one label are seeds of one run.
    """
    rows = [_row(label, group) for label, group in _by_label(results).items()]
    return f"{_caption(results)}\n\n{markdown_table(HEADER, rows)}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns also line up as text."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def markdown_report(config: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """Return report.md: the table, every single run, and what the columns mean."""
    data, train = config["data"], config["train"]
    known = figures_of(results[0]["last"]["test"])
    heading = ["run", "seed", "best epoch", f"test {known.columns[0][1]}", "last epoch"]
    heading += [f"test {name}" for _, name, _ in known.columns]
    singles = [
        [
            r["label"],
            str(r["seed"]),
            _epoch(r["best"]),
            f"{r['best']['test'][known.main]:.2f}",
            _epoch(r["last"]),
            *figure_cells(r["last"]["test"], known.columns),
        ]
        for r in results
    ]
    unlabelled = max((result.get("unlabelled", 0) for result in results), default=0)
    further = f" and {unlabelled:,} without a label" if unlabelled else ""
    return "\n".join(
        [
            f"# {data['name']}: {config['student']['model']}",
            "",
            results_table(results),
            "",
            f"{data['train_samples'] or 'All'} training samples{further}, {train['total_epochs']} epochs, batch "
            f"{train['global_batch_size']}. The configuration is in config.json, versions and hardware in "
            "environment.json (of later starts in starts.jsonl), each run's course in its metrics.jsonl.",
            "",
            "## Single runs",
            "",
            f"| {' | '.join(heading)} |",
            "|" + "---|" * len(heading),
            *(f"| {' | '.join(row)} |" for row in singles),
            "",
        ]
    )


def _caption(results: Sequence[dict[str, Any]]) -> str:
    title = figures_of(results[0]["last"]["test"]).title
    if any(result["test_is_val"] for result in results):
        return (
            f"Test {title} (%), mean ± standard deviation over seeds. One split is for validation and the test: "
            "best epoch is the maximum on it, as the literature reports it; last epoch has no such choice."
        )
    return (
        f"Test {title} (%), mean ± standard deviation over seeds. The best epoch was chosen on the validation "
        "split; the test split was used once, at the end."
    )


def _by_label(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["label"] != TEACHER):
        groups.setdefault(result["label"], []).append(result)
    return groups


def _row(label: str, group: list[dict[str, Any]]) -> tuple[str, ...]:
    main = figures_of(group[0]["last"]["test"]).main
    best = [result["best"]["test"][main] for result in group]
    last = [result["last"]["test"][main] for result in group]
    return label, group[0]["model"], _spread(best), _spread(last), str(len(group))


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def figure_cells(figures: Mapping[str, Any], columns: Sequence[tuple[str, str, str]]) -> tuple[str, ...]:
    """Return the figures of `Figures.columns` as they are shown; one that is not there is a dash."""
    return tuple(format(figures[name], shown) if name in figures else NONE for name, _, shown in columns)


def _epoch(part: dict[str, Any]) -> str:
    return NONE if part.get("epoch") is None else str(part["epoch"])
