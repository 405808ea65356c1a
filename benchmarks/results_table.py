"""Write the performance tables of docs/kernels.md from the newest result of each GPU.

python benchmarks/results_table.py
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unikd_fast.io import write_file

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
NOTHING = "Nothing has been measured on a GPU yet."
COLUMNS = (
    "forward and gradient",
    "median (p20 to p80), ms",
    "GB/s",
    "of the copy",
    "launches",
    "CPU µs",
    "peak / held, MiB",
    "eager",
    "compiled",
    "Liger",
    "targets",
)
FUSION_COLUMNS = (
    "fusion",
    "median (p20 to p80), ms",
    "GB/s",
    "forward, of its floor",
    "backward, of its floor",
    "launches",
    "CPU µs",
    "extra peak, of the features",
    "eager",
    "compiled",
    "collapsed, eager",
    "targets",
)

Result = Mapping[str, Any]


def newest_results(folder: Path) -> list[dict[str, Any]]:
    """Return the newest result of each GPU, in the order of their names."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text())
        gpu = result["environment"]["gpu"]
        if gpu not in newest or result["date"] >= newest[gpu]["date"]:
            newest[gpu] = result
    return [newest[gpu] for gpu in sorted(newest)]


def render(results: Sequence[Result]) -> str:
    """Return the Markdown between the marks."""
    return "\n\n".join(_of_one_gpu(result) for result in results) if results else NOTHING


def replace_block(text: str, block: str) -> str:
    """Put the block between the marks.

    Raises:
        ValueError: the text has not exactly one pair of marks.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"results_table: the text needs {BEGIN} and then {END}, each once")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def _of_one_gpu(result: Result) -> str:
    environment = result["environment"]
    changed = {True: " with changes", False: "", None: ""}[environment["dirty"]]
    counts = result["tests"]["counts"]
    lines = [
        f"**{environment['gpu']}**, {result['date'][:10]}, commit {environment['commit']}{changed}, "
        f"torch {environment['torch']}, triton {environment['triton']}, Python {environment['python']}, "
        f"driver {environment['driver']}. GPU tests: {counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['skipped']} skipped, {counts['left_out'] + counts['unfinished']} not run to the end.",
    ]
    ours = [row for row in result["rows"] if row["variant"] == "ours"]
    lines += _table(COLUMNS, [_cells(row) for row in ours if "loss" in row])
    lines += _table(FUSION_COLUMNS, [_fusion_cells(row) for row in ours if "fusion" in row])
    for row in ours:
        if "percent_of_step" in row:
            lines += ["", _step(row)]
    copies = [f"{r['copy_gb_s']:.0f} ({r['dtype']} {r['rows']}x{r['classes']})" for r in result["roofs"]]
    if copies:
        lines += ["", f"Device copy in the same run, GB/s: {', '.join(copies)}."]
    return "\n".join(lines)


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    if not cells:
        return []
    head = ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return head + ["| " + " | ".join(row) + " |" for row in cells]


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['loss']} {row['rows']}x{row['classes']}, {row['dtype']}",
        _median(row),
        _whole(row["gb_s"]),
        _whole(row["percent_of_copy_roof"], " %"),
        str(row["launches"]),
        f"{row['cpu_us']:.0f}",
        f"{row['peak_mib']:.1f} / {row['retained_mib']:.1f}",
        *(_ratio(row.get(f"ratio_{peer}")) for peer in ("eager", "compile", "liger")),
        _targets(row),
    ]


def _fusion_cells(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['case']}, {row['dtype']}",
        _median(row),
        _whole(row["gb_s"]),
        _whole(row["forward_percent_of_floor"], " %"),
        _whole(row["backward_percent_of_floor"], " %"),
        str(row["launches"]),
        f"{row['cpu_us']:.0f}",
        f"{row['peak_percent_of_features']:.1f} %",
        *(_ratio(row.get(f"ratio_{peer}")) for peer in ("eager", "compile", "collapsed")),
        _targets(row),
    ]


def _step(row: Mapping[str, Any]) -> str:
    return (
        f"{row['case']}: AFF and FDP take {row['behind_teacher_ms']:.2f} ms behind the teacher and "
        f"{row['behind_student_ms']:.2f} ms behind the student, {row['percent_of_step']:.1f} % of the teacher's "
        f"forward pass ({row['teacher_ms']:.1f} ms) and the student's own step ({row['student_step_ms']:.1f} ms); "
        f"targets: {_targets(row)}."
    )


def _median(row: Mapping[str, Any]) -> str:
    return f"{row['median_ms']:.4f} ({row['p20_ms']:.4f} to {row['p80_ms']:.4f})"


def _targets(row: Mapping[str, Any]) -> str:
    targets = row["targets"]
    missed = [t["column"].replace("_", " ") for t in targets if not t["reached"]]
    return f"missed: {', '.join(missed)}" if missed else f"{len(targets)} of {len(targets)} reached"


def _whole(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.0f}{unit}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x"


def main() -> None:
    write_file(PAGE, replace_block(PAGE.read_text(), render(newest_results(RESULTS))))


if __name__ == "__main__":
    main()
