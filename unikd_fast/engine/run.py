"""One run, or a comparison over methods and seeds, and its report: what `unikd train` does."""

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unikd_fast.config import Config, run_configs
from unikd_fast.config.effect import without_effect
from unikd_fast.config.load import override, run_path, teacher_config
from unikd_fast.engine.build import build_experiment, task_of
from unikd_fast.engine.describe import describe
from unikd_fast.engine.distributed import Processes, StopSignal, start_processes
from unikd_fast.engine.folder import REPORT, open_run_folder, read_result, require_same_config
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.preflight import describe_launch, program_facts, require_agreement
from unikd_fast.engine.teacher import evaluate_teacher
from unikd_fast.engine.trackers import require_trackers
from unikd_fast.engine.trainer import Trainer
from unikd_fast.engine.zero import check_engine
from unikd_fast.errors import LostProcess, RunError
from unikd_fast.io import write_file
from unikd_fast.report.table import TEACHER, markdown_report, results_table

_logger = logging.getLogger("unikd_fast")

Results = list[dict[str, Any]]

_LOST = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


@oom_hint("run")
def launch(config: Config, *, resume: bool = False, dry_run: bool = False) -> Path | None:
    """Run an experiment on all processes and return its folder, or None after a dry run.

    Args:
        config: configuration of the experiment.
        resume: whether to continue its folder; a finished experiment is shown, and nothing is written.
        dry_run: whether to print what would run, and stop.

    Raises:
        ConfigError: the configuration does not fit the data, the models, the processes or the folder.
        NonFiniteLoss, Interrupted: see `Trainer.run`.
        OutOfMemory: the memory is not sufficient; names the part and the remedies.
    """
    processes = start_processes(config.run.timeout_minutes)
    _show_log(processes)
    _logger.info(describe_launch(config, processes))
    require_agreement(processes, program_facts(config))
    if processes.is_first and (idle := without_effect(config)) is not None:
        _logger.warning(idle)
    if dry_run:
        text = describe(config, processes)
        if processes.is_first:
            print(text)
        return None
    if resume and (results := processes.from_first(lambda: _finished(config))) is not None:
        _show(config, results, processes)
        processes.leave()
        return Path(config.run.dir)
    # Before the folder exists:
    processes.from_first(lambda: require_trackers(config.run.trackers))
    for *_, single in run_configs(config):
        check_engine(single, processes)
    with (
        _as_lost_process(config),
        open_run_folder(config, processes, resume=resume) as folder,
        StopSignal(processes) as stop,
    ):
        results = _run_all(config, folder, processes, stop, resume=resume)
        report = markdown_report(config.model_dump(mode="json"), results)
        processes.from_first(lambda: write_file(folder / REPORT, report))
        _show(config, results, processes)
    processes.leave()
    return folder


def _show(config: Config, results: Results, processes: Processes) -> None:
    if processes.is_first:
        sys.stderr.flush()
        print(f"\n{results_table(results)}\n\nrun folder: {config.run.dir}", flush=True)
    processes.barrier()


@contextmanager
def _as_lost_process(config: Config) -> Iterator[None]:
    """Turn a backend's error about a broken connection or a missing answer into a LostProcess."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(words in str(error) for words in _LOST)
        if isinstance(error, RunError) or not lost:
            raise
        said = str(error).partition("\n")[0]
        raise LostProcess(
            f"another process of this run ended, or did not answer within {config.run.timeout_minutes:g} minutes "
            f"(run.timeout_minutes): {said}; its own last lines say why; continue with --resume auto"
        ) from error


def _show_log(processes: Processes) -> None:
    """Print log messages on the terminal, each once; from processes other than the first only warnings."""
    logger = logging.getLogger("unikd_fast")
    logger.setLevel(max(logger.level, logging.INFO if processes.is_first else logging.WARNING))  # a caller's is kept
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.addFilter(_Once())
        logger.addHandler(handler)


class _Once(logging.Filter):
    """Passes a message the first time only: the runs of a comparison have much in common."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._said
        self._said.add(message)
        return new


class _Unfinished(Exception):
    """A run of the experiment has no result."""


def _finished(config: Config) -> Results | None:
    """Return the results of a finished experiment, or None if it is not finished; nothing is written.

    Raises:
        ConfigError: the folder was made with another configuration.
        FileError: a result is damaged.
    """

    def kept(folder: Path) -> dict[str, Any]:
        if (result := read_result(folder)) is None:
            raise _Unfinished
        return result

    folder = Path(config.run.dir)
    try:
        if not (folder / REPORT).exists():
            return None
    except OSError:
        return None  # opening the folder reports the error
    require_same_config(folder, config)
    try:
        return _results(config, folder, lambda _, own, label: kept(own), lambda _, own, cost: kept(own))
    except _Unfinished:
        return None


def _run_all(config: Config, folder: Path, processes: Processes, stop: StopSignal, *, resume: bool) -> Results:
    """Do every run of the experiment, including the teachers'; with ``resume`` finished runs are read."""
    return _results(
        config,
        folder,
        lambda single, own, label: _run(single, own, processes, stop, label=label, resume=resume),
        lambda single, own, cost: evaluate_teacher(
            single, own, processes, task=task_of(single), label=TEACHER, with_cost=cost
        ),
    )


def _results(
    config: Config,
    folder: Path,
    run: Callable[[Config, Path, str], dict[str, Any]],
    evaluate: Callable[[Config, Path, bool], dict[str, Any]],
) -> Results:
    """Return the results of every run of an experiment, in the order of its table.

    Args:
        config: configuration of the experiment.
        folder: its folder.
        run: function from configuration, folder and label of a single run to its result.
        evaluate: function from configuration, folder and whether to measure the cost to the result of a run's teacher
            that was not trained.
    """
    results: Results = []
    teachers: dict[int, Path] = {}
    for label, seed, single in run_configs(config):
        home = folder / f"seed-{seed}" if config.compare else folder
        if single.distill.method != "none":
            assert single.teacher is not None
            if single.teacher.is_trained:
                if seed not in teachers:
                    results.append(run(teacher_config(single), home / "teacher", TEACHER))
                    teachers[seed] = Path(results[-1]["weights"])
                trained = {
                    "teacher.weights": str(teachers[seed]),
                    "teacher.weights_key": None,
                    "teacher.training": None,
                }
                single = override(single, trained, "teacher.training")
        results.append(run(single, folder / run_path(config, label, seed), label))
        if single.distill.method != "none" and not any(result["label"] == TEACHER for result in results):
            # After the run, whose cache may hold it already.
            results.insert(0, evaluate(single, folder / "teacher", "cost" in results[-1]))
    return results


def _run(
    config: Config, folder: Path, processes: Processes, stop: StopSignal, *, label: str, resume: bool
) -> dict[str, Any]:
    finished = processes.from_first(lambda: read_result(folder)) if resume else None
    if finished is not None:
        return finished
    gc.collect()  # networks of the run before refer to themselves, and would stay beside those of this one
    experiment = build_experiment(config, processes)
    return Trainer(experiment, folder, stop, label=label, resume=resume).run()
