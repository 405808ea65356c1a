"""`unikd reproduce`: run the missing cells of one of the papers' tables, and write its ledger and page."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unikd_fast.errors import ConfigError, Interrupted, RunError
from unikd_fast.io import make_folder, write_file, write_json
from unikd_fast.recipes.experiments import recipe_names
from unikd_fast.recipes.tables import TABLES, Cell, Table, left_out, stand_in, student_cells, teacher_cells, title
from unikd_fast.units import duration

if TYPE_CHECKING:
    from unikd_fast.recipes.runs import Run, Teachers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's description and options to a parser."""
    parser.epilog = (
        "exit codes: 0 done; 1 a run failed, or a file could not be written; 2 the arguments do not fit, or data or "
        "teachers are missing; 128 + n stopped by signal n"
    )
    parser.description = "Run the cells of a table that are missing, and write its ledger and page. " + (
        "; ".join(f"{table.name}: {table.title}" for table in TABLES.values()) + "."
    )
    parser.add_argument("table", nargs="?", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument(
        "--list",
        nargs="?",
        const="",
        metavar="PREFIX",
        help="list the recipes whose names begin with PREFIX, and stop",
    )
    parser.add_argument("--seeds", type=_positive, default=1, metavar="N", help="run seeds 0 to N-1 (default: 1)")
    parser.add_argument(
        "--root",
        type=Path,
        help="folder of the data set (default: $CIFAR100_ROOT, $IMAGENET_ROOT, $COCO_ROOT or $STUDY_ROOT)",
    )
    parser.add_argument(
        "--teachers",
        metavar="FOLDER|train",
        help="folder of the published teachers (default: $CIFAR100_TEACHERS or $DETECTRON2_ZOO); train: train each "
        "here, once",
    )
    parser.add_argument(
        "--data",
        choices=("digits", "toy_scenes"),
        help="a stand-in with small networks, minutes on a CPU: on scikit-learn's digits, or for table4 on generated "
        "scenes",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reproduce"), help="folder of all runs (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--methods", type=_names, metavar="A,B", help="run only these rows")
    parser.add_argument("--pairs", type=_names, metavar="A,B", help="run only these columns")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="set it in every run, e.g. train.max_steps=3"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs, what is done and how long the rest takes, and stop"
    )


def run(options: argparse.Namespace) -> int:
    """Run what the options ask for, and return 0.

    Raises:
        ConfigError: the options do not fit, or data or teachers are missing.
        RunError: a run failed; the others have been run.
        Interrupted: a signal stopped it.
    """
    if options.list is not None:
        print("\n".join(_listed(options.list)))
        return 0
    if options.table is None:
        raise ConfigError(f"no table is given; give one of {', '.join(TABLES)}, or --list for the recipes")
    # Only now pydantic and the schema.
    from unikd_fast.recipes.runs import Training, missing_requirements, plan_runs, teachers_environment

    table = TABLES[options.table]
    if options.data is not None:
        if table.trains_teachers:
            raise ConfigError(f"--data {options.data}: {table.name} has data of its own, {table.data}; leave it out")
        table = stand_in(table)
        if table.data != options.data:
            raise ConfigError(f"--data {options.data}: the stand-in of {table.name} is on {table.data}; give that")
    _check_names("--methods", options.methods, table.methods)
    _check_names("--pairs", options.pairs, [pair.name for pair in table.pairs])
    out, seeds = options.out.resolve(), range(options.seeds)
    teachers, published = _teachers(table, options.teachers)
    root = _root(table, options.root)
    cells = student_cells(table, seeds, options.methods, options.pairs)
    students = plan_runs(cells, out, teachers=teachers, root=root, overrides=options.set)
    # The ledger has the table's other rows too, if they are finished: of other settings they are refused as well.
    finished = [cell for cell in student_cells(table, seeds) if (cell.folder(out) / "result.json").exists()]
    plan_runs(finished, out, teachers=teachers, root=root, overrides=options.set)
    unfinished = [run for run in students if run.state != "done"]
    needed = teacher_cells(run.cell for run in unfinished) if teachers == "trained" else []
    runs = [*plan_runs(needed, out, teachers=teachers, root=root, overrides=options.set), *students]
    waiting = [run for run in runs if run.state != "done"]
    lacking = missing_requirements(waiting, teachers, published)
    if options.dry_run:
        print("\n".join([_listing(runs, out), *left_out(table)]))
    if lacking:
        raise ConfigError("\n\n".join([f"{table.name} cannot run yet", *lacking]))
    if options.dry_run:
        return 0
    # Only now numpy and matplotlib, and not after the runs: where one is missing, that is said before they start.
    from unikd_fast.recipes.ledger import ledger_json, ledger_markdown, make_ledger, overviews

    if waiting:
        print(f"{len(waiting)} runs to do, {options.jobs} at a time", flush=True)
    training = Training(waiting, teachers_environment(out, table.data, published), options.jobs)
    training.run()
    home = out / table.data / table.name
    make_folder(home)
    ledger = make_ledger(table, out, seeds=seeds, teachers=teachers, overrides=options.set)
    write_json(home / "ledger.json", ledger_json(ledger))
    write_file(home / "ledger.md", ledger_markdown(ledger))
    if table.data == "study":
        from unikd_fast.recipes.study_results import read_study, study_json, study_markdown

        study = read_study(out, seeds, options.set)
        write_file(home / "study.json", study_json(study))
        write_file(home / "study.md", study_markdown(study))
    print(f"\n{overviews(ledger)}\n\nledger: {home / 'ledger.md'}, {home / 'ledger.json'}", flush=True)
    if training.signal:
        raise Interrupted(training.signal, "stopped; start it again to continue")
    page = _write_page(table, student_cells(table, seeds), out, home / "report.html")
    if page is not None:
        print(f"page: {page}", flush=True)
    if training.failures:
        told = "\n\n".join(map(str, training.failures))
        raise RunError(f"{len(training.failures)} runs failed; start it again to run these alone\n\n{told}")
    return 0


def _listed(prefix: str) -> list[str]:
    names = recipe_names(prefix)
    if not names:
        starts = dict.fromkeys(name.partition("/")[0] + "/" for name in recipe_names())
        raise ConfigError(f"--list {prefix}: no recipe begins with it; their names begin with {' or '.join(starts)}")
    return names


def _teachers(table: Table, given: str | None) -> "tuple[Teachers, Path | None]":
    """Return whether teachers are published or trained here, and the folder of the published ones if it is given."""
    if table.trains_teachers:
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


def _listing(runs: "Sequence[Run]", out: Path) -> str:
    """Return a line a run, and what remains."""
    from unikd_fast.recipes.runs import expected_seconds, total_seconds

    width = max((len(run.name) for run in runs), default=0)
    lines: list[str] = []
    took: list[float] = []
    for run in runs:
        seconds = total_seconds(run.folder) if run.state == "done" else None
        took += [] if seconds is None else [seconds]
        lines.append(f"{run.name:{width}}  {run.state}{'' if seconds is None else f', {duration(seconds)}'}")
    waiting = sum(run.state != "done" for run in runs)
    last = f"\n{len(runs)} runs in {out}: {len(runs) - waiting} done, {waiting} to run"
    if waiting:
        expected = expected_seconds(waiting, took)
        known = "unknown before one is finished" if expected is None else f"{duration(expected)} one after the other"
        last += f"; time: {known}"
    return "\n".join([*lines, last])


def _write_page(table: Table, cells: Iterable[Cell], out: Path, target: Path) -> str | None:
    """Write the page of the finished runs of these students, and return a line about it, or None if no run is finished.

    Runs have the labels of the table; a teacher that many runs share is shown once.
    """
    # Only now matplotlib.
    from unikd_fast.report.command import write_report
    from unikd_fast.report.runs import Found, find_runs

    runs: list[Any] = []
    teachers: dict[str, Any] = {}
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
    if not runs:
        return None
    found = Found((*teachers.values(), *runs), tuple(unfinished))
    return write_report(found, target, title=table.heading, force=True)


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:  # a variable of a shell that is not set would run nothing, and say that it is done
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}; leave it out for all")
    return names
