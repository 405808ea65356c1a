"""Write the README's performance table from the newest result of each GPU.

python benchmarks/results_table.py
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
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

Result = Mapping[str, Any]


def newest_results(folder: Path) -> list[dict[str, Any]]:
    """Give the newest result of each GPU, in the order of their names."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text())
        gpu = result["environment"]["gpu"]
        if gpu not in newest or result["date"] >= newest[gpu]["date"]:
            newest[gpu] = result
    return [newest[gpu] for gpu in sorted(newest)]


def render(results: Sequence[Result]) -> str:
    """Give the Markdown between the marks."""
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
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in result["rows"] if row["variant"] == "ours"]
    copies = [f"{r['copy_gb_s']:.0f} ({r['dtype']} {r['rows']}x{r['classes']})" for r in result["roofs"]]
    if copies:
        lines += ["", f"Device copy in the same run, GB/s: {', '.join(copies)}."]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    targets = row["targets"]
    missed = [t["column"].replace("_", " ") for t in targets if not t["reached"]]
    return [
        f"{row['loss']} {row['rows']}x{row['classes']}, {row['dtype']}",
        f"{row['median_ms']:.4f} ({row['p20_ms']:.4f} to {row['p80_ms']:.4f})",
        "" if row["gb_s"] is None else f"{row['gb_s']:.0f}",
        "" if row["percent_of_copy_roof"] is None else f"{row['percent_of_copy_roof']:.0f} %",
        str(row["launches"]),
        f"{row['cpu_us']:.0f}",
        f"{row['peak_mib']:.1f} / {row['retained_mib']:.1f}",
        *(_ratio(row.get(f"ratio_{peer}")) for peer in ("eager", "compile", "liger")),
        f"missed: {', '.join(missed)}" if missed else f"{len(targets)} of {len(targets)} reached",
    ]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x"


def main() -> None:
    README.write_text(replace_block(README.read_text(), render(newest_results(RESULTS))))


if __name__ == "__main__":
    main()
