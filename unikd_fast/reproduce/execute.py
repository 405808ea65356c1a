"""Runs as jobs: started, watched, timed and told about."""

import os
import sys
from collections.abc import Mapping, Sequence

from unikd_fast.reproduce.attempts import Attempt, estimate_s, record_attempt, wall_s
from unikd_fast.reproduce.cells import TEACHER, Cell, teacher_cells
from unikd_fast.reproduce.ledger_text import duration
from unikd_fast.reproduce.plan import Run
from unikd_fast.reproduce.room import CpuRoom, GpuRoom, find_gpus, largest_memory_gib
from unikd_fast.reproduce.schedule import Ended, Job, Room, Schedule, Started

ENGINE = (sys.executable, "-m", "unikd_fast", "train")
"""What trains one run: the engine's command as a process, which needs no script beside the installed package."""


def execute(runs: Sequence[Run], environment: Mapping[str, str], jobs: int | None) -> tuple[list[Ended], int]:
    """Runs them, in order and several at a time, and says what happens.

    Args:
        runs: that are not done, teachers first.
        environment: variables that name the teachers.
        jobs: at a time; None for as many as fit.

    Returns:
        Those that failed or could not be started, and the signal that ended it early, or 0.
    """
    if not runs:
        return [], 0
    by_name = {run.name: run for run in runs}
    started: list[Run] = []
    room = _room(jobs, started)
    schedule = Schedule([_job(run, environment) for run in runs], room)
    took: dict[Cell, float] = {}
    failed: list[Ended] = []
    print(f"{len(runs)} runs to do, {room}", flush=True)
    for event in schedule.run():
        run = by_name[event.job.name]
        if isinstance(event, Started):
            started.append(run)
            continue
        if event.code is not None:
            record_attempt(run.folder, Attempt(round(event.wall_s, 1), event.code, event.beside))
        if event.code == 0:
            took[run.cell] = wall_s(run.folder) or event.wall_s
        elif not event.again and not schedule.signal:
            failed.append(event)
        remaining = [each.cell for each in runs if each.cell not in took and each.name not in _names(failed)]
        print(f"{_outcome(event, schedule.signal)}; {_remaining(remaining, took)}", flush=True)
    return failed, schedule.signal


def write_configs(runs: Sequence[Run]) -> None:
    """Writes what the runs are started with."""
    for run in runs:
        run.write_config()


def _job(run: Run, environment: Mapping[str, str]) -> Job:
    trained_here = run.config.teacher is not None and run.cell.method != TEACHER
    needs = tuple(teacher.name for teacher in teacher_cells([run.cell])) if trained_here else ()
    command = (*ENGINE, "--config", str(run.config_file), "--resume", "auto")
    return Job(run.name, command, run.log, needs, environment)


def _room(jobs: int | None, started: Sequence[Run]) -> Room:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = find_gpus()
    if not gpus:
        return CpuRoom(jobs, cores)
    return GpuRoom(gpus, jobs, cores, lambda: largest_memory_gib([run.folder for run in started]))


def _names(events: Sequence[Ended]) -> set[str]:
    return {event.job.name for event in events}


def _outcome(event: Ended, stopped_by: int) -> str:
    name, time = event.job.name, duration(event.wall_s)
    if event.code == 0:
        return f"{name}: done in {time}"
    if event.code is None:
        return f"{name}: {event.last_lines[-1]}"
    if event.again:
        return f"{name}: out of memory beside {event.beside} more, to be started again with fewer"
    if stopped_by:
        return f"{name}: stopped after {time}"
    return f"{name}: FAILED after {time} (exit code {event.code}), see {event.job.log}"


def _remaining(cells: Sequence[Cell], took: Mapping[Cell, float]) -> str:
    if not cells:
        return "none left"
    time = estimate_s(cells, took)
    return f"{len(cells)} left" + ("" if time is None else f", {duration(time)} of one after the other")


def describe_failures(failed: Sequence[Ended]) -> str:
    """What failed, with the last lines of each."""
    parts = []
    for event in failed:
        lines = "\n".join(f"  {line}" for line in event.last_lines)
        code = "was not started" if event.code is None else f"failed with exit code {event.code}; {event.job.log} ends"
        parts.append(f"{event.job.name} {code}\n{lines}")
    return "\n\n".join(parts)
