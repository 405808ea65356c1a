"""``unikd-reproduce``: runs the cells of one of the papers' tables, or those that are missing, and writes the ledger.

``python -m unikd_fast.reproduce.command`` is the same.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unikd_fast.command import run_command
from unikd_fast.config import ConfigError
from unikd_fast.errors import Interrupted, RunError
from unikd_fast.io import make_folder, write_file, write_json
from unikd_fast.reproduce.attempts import estimate_s, wall_s
from unikd_fast.reproduce.cells import TABLES, Cell, Table, student_cells, teacher_cells
from unikd_fast.reproduce.digits import stand_in
from unikd_fast.reproduce.execute import describe_failures, execute, write_configs
from unikd_fast.reproduce.ledger import Ledger, ledger_json, make_ledger
from unikd_fast.reproduce.ledger_text import duration, ledger_markdown, overviews
from unikd_fast.reproduce.page import write_page
from unikd_fast.reproduce.plan import Run, Teachers, plan_runs, teachers_environment
from unikd_fast.reproduce.requirements import missing_requirements
from unikd_fast.reproduce.study_page import study_markdown
from unikd_fast.reproduce.study_statistics import read_study, study_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing of a table.

    Returns:
        The exit code: 0; 1 if a run failed or a file could not be written; 2 for arguments that do not fit, and data or
        teachers that are not there; 128 + n after signal n.

    Example:
        >>> main(["table6", "--data", "digits", "--seeds", "1"])
        0
    """
    options = _parser().parse_args(arguments)
    return run_command("unikd-reproduce", lambda: _reproduce(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unikd-reproduce",
        description="Run the cells of a table that are missing, and write its ledger and page. "
        + "; ".join(f"{table.name}: {table.title}" for table in TABLES.values())
        + ".",
    )
    parser.add_argument("table", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="run seeds 0 to N-1 (default: 1)")
    parser.add_argument("--root", type=Path, help="folder of the data set (default: $CIFAR100_ROOT or $IMAGENET_ROOT)")
    parser.add_argument(
        "--teachers",
        metavar="FOLDER|train",
        help="folder of the published teachers (default: $CIFAR100_TEACHERS); train: train each here, once",
    )
    parser.add_argument("--data", choices=("digits",), help="a stand-in on scikit-learn's digits: minutes on a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="of all runs (default: %(default)s)")
    parser.add_argument(
        "--jobs", type=_jobs, default=None, metavar="N|auto", help="runs at a time (default: auto, as many as fit)"
    )
    parser.add_argument("--methods", type=_names, metavar="A,B", help="run only these rows")
    parser.add_argument("--pairs", type=_names, metavar="A,B", help="run only these columns")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="set it in every run, e.g. train.max_steps=3"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs, what is done and how long the rest takes"
    )
    return parser


def _reproduce(options: argparse.Namespace) -> int:
    table = TABLES[options.table]
    if options.data is not None:
        if not table.needs_files:
            raise ConfigError(f"--data {options.data}: {table.name} has data of its own, {table.data}; leave it out")
        table = stand_in(table)
    _check_names("--methods", options.methods, table.methods)
    _check_names("--pairs", options.pairs, [pair.name for pair in table.pairs])
    out = options.out.resolve()
    teachers, published = _teachers(table, options.teachers)
    root = _root(table, options.root)
    cells = student_cells(table, range(options.seeds), options.methods, options.pairs)
    students = plan_runs(cells, out, teachers=teachers, root=root, overrides=options.set)
    unfinished = [run for run in students if run.state != "done"]
    needed = teacher_cells(run.cell for run in unfinished) if teachers == "trained" else []
    runs = [*plan_runs(needed, out, teachers=teachers, root=root, overrides=options.set), *students]
    waiting = [run for run in runs if run.state != "done"]
    lacking = missing_requirements(waiting, teachers, published)
    if options.dry_run:
        print(_listing(runs, out))
    if lacking:
        raise ConfigError("\n\n".join([f"{table.name} cannot run yet", *lacking]))
    if options.dry_run:
        return 0
    write_configs(waiting)
    failed, number = execute(waiting, teachers_environment(out, table.data, published), options.jobs)
    home = out / table.data / table.name
    ledger = make_ledger(table, out, seeds=range(options.seeds), teachers=teachers, overrides=options.set)
    _write_ledger(ledger, home)
    if table.name == "defaults":
        study = read_study(out, range(options.seeds))
        write_file(home / "study.json", study_json(study))
        write_file(home / "study.md", study_markdown(study))
    print(f"\n{overviews(ledger)}\n\nledger: {home / 'ledger.md'}, {home / 'ledger.json'}", flush=True)
    if number:
        raise Interrupted(number, "stopped; start it again to continue")
    # Only now matplotlib, and what the page needs beside it.
    page = write_page(table, student_cells(table, range(options.seeds)), out, home / "report.html")
    if page is not None:
        print(f"page: {page}", flush=True)
    if failed:
        raise RunError(f"{len(failed)} runs failed\n\n{describe_failures(failed)}")
    return 0


def _teachers(table: Table, given: str | None) -> tuple[Teachers, Path | None]:
    """Whether teachers are published or trained here, and the folder of the published ones if it is given."""
    if not table.needs_files:
        if given not in (None, "train"):
            raise ConfigError(f"--teachers {given}: with {table.data} teachers are trained here; leave it out")
        return "trained", None
    if given == "train":
        return "trained", None
    if given is not None and table.data == "imagenet":
        raise ConfigError(
            f"--teachers {given}: the teachers on ImageNet are torchvision's, which are downloaded; leave it out, or "
            "give --teachers train"
        )
    return "published", None if given is None else Path(given).expanduser().resolve()


def _root(table: Table, given: Path | None) -> Path | None:
    if given is not None and not table.needs_files:
        raise ConfigError(f"--root {given}: {table.data} needs no files; leave it out")
    return None if given is None else given.expanduser().resolve()


def _check_names(option: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in given or ():
        if name not in known:
            raise ConfigError(f"{option} {name}: the table has no such, only {', '.join(known)}")


def _listing(runs: Sequence[Run], out: Path) -> str:
    """A line a run, and what remains."""
    width = max((len(run.name) for run in runs), default=0)
    lines = []
    finished: dict[Cell, float] = {}
    for run in runs:
        took = wall_s(run.folder) if run.state == "done" else None
        if took is not None:
            finished[run.cell] = took
        lines.append(f"{run.name:{width}}  {run.state}{'' if took is None else f', {duration(took)}'}")
    waiting = [run.cell for run in runs if run.state != "done"]
    lines.append(f"\n{len(runs)} runs in {out}: {len(runs) - len(waiting)} done, {len(waiting)} to run")
    if waiting:
        remaining = estimate_s(waiting, finished)
        said = "unknown before one is finished" if remaining is None else f"{duration(remaining)} one after the other"
        lines[-1] += f"; time: {said}"
    return "\n".join(lines)


def _write_ledger(ledger: Ledger, home: Path) -> None:
    make_folder(home)
    write_json(home / "ledger.json", ledger_json(ledger))
    write_file(home / "ledger.md", ledger_markdown(ledger))


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def _jobs(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    sys.exit(main())
