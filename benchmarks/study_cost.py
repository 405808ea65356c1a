"""The time of a training step of every row of the study, over that of the student alone."""

import time
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved_times, ratio_quartiles

from unikd_fast.config import parse_config
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.distributed import start_processes
from unikd_fast.engine.step import train_step
from unikd_fast.engine.zero import start_engine
from unikd_fast.recipes.experiments import experiment
from unikd_fast.recipes.pairs import Pair
from unikd_fast.recipes.study import CHANGES, STUDY, STUDY_PAIRS
from unikd_fast.values import Batch

ROUNDS = 9
_OVERRIDES = (
    "data.name=synthetic",
    "data.root=null",
    "data.loader=device",
    "data.synthetic_samples=128",
    "data.train_samples=null",
    "data.num_classes=10",
    "train.learning_rate=0.001",
)


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
    built = build_experiment(parse_config(raw, _OVERRIDES, name=row, source=row), processes)
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
