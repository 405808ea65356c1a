"""What ``launch_distill.py`` calls: one run, or a comparison over methods and seeds, and the report."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

from unikd_fast.config import Config, run_configs
from unikd_fast.config.load import override, teacher_config
from unikd_fast.engine.dry_run import describe
from unikd_fast.engine.processes import Processes, start_processes
from unikd_fast.engine.run_folder import open_run_folder, read_result
from unikd_fast.engine.sharding import deepspeed_config
from unikd_fast.engine.stop import StopSignal
from unikd_fast.engine.teacher_result import evaluate_teacher
from unikd_fast.engine.trainer import Trainer
from unikd_fast.report.table import TEACHER, markdown_report, results_table


def launch(config: Config, *, resume: bool = False, dry_run: bool = False) -> Path | None:
    """Runs the experiment of ``config`` on all processes and returns its folder.

    Raises:
        ConfigError: the configuration does not fit the data, the models, the processes or the folder.
        NonFiniteLoss, Interrupted: see Trainer.run.
    """
    processes = start_processes()
    _show_log(processes)
    if dry_run:
        text = describe(config, processes)
        if processes.is_first:
            print(text)
        return None
    for *_, single in run_configs(config):
        deepspeed_config(single, processes)  # before the folder exists
    with open_run_folder(config, processes, resume=resume) as folder, StopSignal(processes) as stop:
        results = _run_all(config, folder, processes, stop, resume=resume)
        if processes.is_first:
            (folder / "report.md").write_text(markdown_report(config.model_dump(mode="json"), results))
            sys.stderr.flush()
            print(f"\n{results_table(results)}\n\nrun folder: {folder}", flush=True)
        processes.barrier()
    processes.leave()
    return folder


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
        own_folder = home / re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") if config.compare else folder
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
