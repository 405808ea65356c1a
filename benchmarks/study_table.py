"""Write the study's tables of docs/defaults.md from its records, docs/study.json.

python benchmarks/study_table.py                        # the page alone
python benchmarks/study_table.py --runs runs/reproduce  # after the finished runs were added to the records
python benchmarks/study_table.py --costs                # after every row's step was timed
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import interleaved_times, ratio_quartiles

from unikd_fast.command import run_command
from unikd_fast.config import parse_config
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.distributed import start_processes
from unikd_fast.engine.step import train_step
from unikd_fast.engine.zero import start_engine
from unikd_fast.errors import ConfigError
from unikd_fast.io import write_file
from unikd_fast.recipes.experiments import experiment
from unikd_fast.recipes.pairs import Pair
from unikd_fast.recipes.study import CHANGES, IMAGES, STUDY, STUDY_PAIRS
from unikd_fast.recipes.study_results import Study, load_study, merged, read_study, study_json, study_markdown
from unikd_fast.values import Batch

ROOT = Path(__file__).resolve().parents[1]
PAGE, RECORDS = ROOT / "docs" / "defaults.md", ROOT / "docs" / "study.json"
BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
SEEDS = range(5)
ROUNDS = 9
_OVERRIDES = (
    "data.name=synthetic",
    "data.root=null",
    "data.loader=device",
    "data.synthetic_samples=128",
    "data.train_samples=null",
    "train.learning_rate=0.001",
)


def rewritten(page: str, study: Study) -> str:
    """Return the page with the study's tables between the marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"the page needs {BEGIN} and then {END}"
    return f"{before}{BEGIN}\n{study_markdown(study)}{END}{after}"


def measure_costs() -> dict[str, dict[str, list[float]]]:
    """Return the quartiles of each row's step over the student's, in processor time of one thread, by pair and row.

    A step is that of a run on the study's networks, batch and size: forward passes, losses, backward pass and update.
    Of the rows with a cache it takes the teacher's outputs from memory.
    """
    torch.set_num_threads(1)
    costs = {}
    for pair in STUDY_PAIRS:
        steps = {row: _step(row, pair) for row in STUDY}
        times = interleaved_times(steps, rounds=ROUNDS, clock=time.process_time)
        costs[pair.name] = {row: ratio_quartiles(times[row], times["none"]).rounded(3) for row in STUDY}
    return costs


def _step(row: str, pair: Pair) -> Callable[[], Any]:
    raw = experiment(row, pair)
    is_stored = row in CHANGES and bool(CHANGES[row].cache)
    if "teacher" in raw:
        raw["teacher"] = {**raw["teacher"], "weights": "random"}
        raw["teacher"].pop("cache", None)
    if "crd" in raw["distill"]:
        raw["distill"]["crd"]["negatives"] = 64  # no more than there are images
    processes = start_processes()
    overrides = (*_OVERRIDES, f"data.num_classes={IMAGES[pair.name].classes}")
    built = build_experiment(parse_config(raw, overrides, name=row, source=row), processes)
    method, teacher = built.method, built.teacher
    batch: Batch = next(built.loader.train(0))
    target = None
    if teacher is not None:
        method.prepare(teacher(batch.images) for _ in range(2))
        if is_stored:
            target = method.target(teacher(batch.images))
            teacher = None
    engine = start_engine(built.config, built.student_module, processes)
    engine.train()
    return lambda: train_step(engine, teacher, method, batch, *(() if target is None else (target,)), update=True).total


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="add the finished runs in it to the records")
    parser.add_argument("--costs", action="store_true", help="time a step of every row, and add that to the records")
    options = parser.parse_args(arguments)
    return run_command("study_table.py", lambda: _update(options.runs, costs=options.costs))


def _update(runs: Path | None, *, costs: bool) -> int:
    study = load_study(RECORDS) if RECORDS.exists() else Study({}, {}, (), ())
    if runs is not None:
        added = read_study(runs, SEEDS)
        if not added.accuracies:
            raise ConfigError(f"--runs {runs}: no run of the study is finished there; give the folder of all runs")
        study = merged(study, added)
    if costs:
        study = merged(study, Study({}, measure_costs(), (), ()))
    write_file(RECORDS, study_json(study))
    write_file(PAGE, rewritten(PAGE.read_text(), study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
