"""What ``launch_distill.py`` calls: one run, or a comparison over methods and seeds, and the report."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unikd_fast.config import Config, run_configs
from unikd_fast.config.effect import without_effect
from unikd_fast.config.load import override, run_path, teacher_config
from unikd_fast.engine.dry_run import describe
from unikd_fast.engine.launched import describe_launch, program_facts, require_agreement
from unikd_fast.engine.processes import Processes, start_processes
from unikd_fast.engine.run_folder import open_run_folder, read_result
from unikd_fast.engine.sharding import deepspeed_config
from unikd_fast.engine.stop import StopSignal
from unikd_fast.engine.teacher_result import evaluate_teacher
from unikd_fast.engine.trainer import Trainer
from unikd_fast.errors import LostProcess, RunError
from unikd_fast.report.table import TEACHER, markdown_report, results_table

_logger = logging.getLogger("unikd_fast")

_LOST = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


def launch(config: Config, *, resume: bool = False, dry_run: bool = False) -> Path | None:
    """Runs the experiment of ``config`` on all processes and returns its folder.

    Raises:
        ConfigError: the configuration does not fit the data, the models, the processes or the folder.
        NonFiniteLoss, Interrupted: see Trainer.run.
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
    for *_, single in run_configs(config):
        deepspeed_config(single, processes)  # before the folder exists
    with (
        _noticing_lost_processes(config),
        open_run_folder(config, processes, resume=resume) as folder,
        StopSignal(processes) as stop,
    ):
        results = _run_all(config, folder, processes, stop, resume=resume)
        if processes.is_first:
            (folder / "report.md").write_text(markdown_report(config.model_dump(mode="json"), results))
            sys.stderr.flush()
            print(f"\n{results_table(results)}\n\nrun folder: {folder}", flush=True)
        processes.barrier()
    processes.leave()
    return folder


@contextmanager
def _noticing_lost_processes(config: Config) -> Iterator[None]:
    """Turns what the backends say of a connection that broke, or of an answer that did not come, into a LostProcess."""
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
    """What the package has to say goes to the terminal, from all processes only what is a warning."""
    logger = logging.getLogger("unikd_fast")
    logger.setLevel(logging.INFO if processes.is_first else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())


def _run_all(
    config: Config, folder: Path, processes: Processes, stop: StopSignal, *, resume: bool
) -> list[dict[str, Any]]:
    """Every run of the experiment, the teachers' included; with ``resume`` finished runs are read back."""
    results: list[dict[str, Any]] = []
    teachers: dict[int, Path] = {}
    for label, seed, single in run_configs(config):
        home = folder / f"seed-{seed}" if config.compare else folder
        if single.distill.method != "none":
            assert single.teacher is not None
            if single.teacher.weights is None and single.teacher.training is not None:
                if seed not in teachers:
                    own = teacher_config(single)
                    results.append(_run(own, home / "teacher", processes, stop, label=TEACHER, resume=resume))
                    teachers[seed] = Path(results[-1]["weights"])
                trained = {"teacher.weights": str(teachers[seed]), "teacher.training": None}
                single = override(single, trained, "teacher.training")
        own_folder = folder / run_path(config, label, seed)
        results.append(_run(single, own_folder, processes, stop, label=label, resume=resume))
        if single.distill.method != "none" and not any(result["label"] == TEACHER for result in results):
            # After the run, whose cache may know it already.
            results.insert(0, evaluate_teacher(single, folder / "teacher", processes, label=TEACHER))
    return results


def _run(
    config: Config, folder: Path, processes: Processes, stop: StopSignal, *, label: str, resume: bool
) -> dict[str, Any]:
    finished: dict[str, Any] | None = processes.broadcast(read_result(folder) if resume else None)
    if finished is not None:
        return finished
    return Trainer(config, folder, processes, stop, label=label, resume=resume).run()
