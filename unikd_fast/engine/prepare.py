"""A run before its next step: everything built, and restored where it goes on from a checkpoint."""

import copy
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unikd_fast.config import Config
from unikd_fast.engine import checkpoint as ckpt
from unikd_fast.engine.average import StudentAverage
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.capture import captures
from unikd_fast.engine.captured_steps import CapturedSteps
from unikd_fast.engine.export import BEST
from unikd_fast.engine.fill_cache import ready_cache
from unikd_fast.engine.gradient_watch import GradientWatch
from unikd_fast.engine.header import header
from unikd_fast.engine.local_engine import LocalEngine
from unikd_fast.engine.loss_scale import LossScale
from unikd_fast.engine.metrics import LossMeter
from unikd_fast.engine.optimizer_state import restore_optimizer_state
from unikd_fast.engine.out_of_memory import naming_part
from unikd_fast.engine.prepare_method import prepare_method
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.run_folder import write_teacher
from unikd_fast.engine.sharding import start_engine, zero_stage
from unikd_fast.engine.step_time import StepClock
from unikd_fast.engine.steps import EagerSteps, Parts, Steps
from unikd_fast.engine.stop import StopSignal
from unikd_fast.engine.teacher_accuracy import check_teacher
from unikd_fast.io import make_folder, remove_leftovers
from unikd_fast.models import FeatureExtractor, LogitsOnly

_logger = logging.getLogger("unikd_fast")

_REMOVE = "remove that folder and continue with --resume auto"


class Prepared(NamedTuple):
    """A run's parts, how many steps it has done, and where they are needed and known a copy of the student to evaluate,
    and the teacher's logits for this process's validation batches."""

    parts: Parts
    steps: Steps
    step: int
    copy: FeatureExtractor | LogitsOnly | None
    teacher_logits: dict[int, Tensor] | None


@naming_part("run")
def prepare(
    config: Config, folder: Path, processes: Processes, stop: StopSignal, *, name: str, resume: bool
) -> Prepared:
    """Builds a single run in its folder; all processes must call it.

    Args:
        name: of the run in what is said meanwhile.
        resume: take up the folder's newest checkpoint if there is one.

    Raises:
        OutOfMemory: it does not fit into memory; names the part.
    """
    experiment = build_experiment(config, processes)
    method, side = experiment.method, experiment.side
    newest = _newest_checkpoint(folder, side, processes) if resume else None
    saved = None if newest is None else ckpt.read_folder(newest)
    teacher_record = experiment.teacher_record
    if experiment.cache is not None:
        teacher_record = ready_cache(experiment.cache, side, stop, name, epochs=experiment.epochs)
        if saved is not None:
            ckpt.require_same_head(saved, method)
    logits = None
    if teacher_record is not None:
        logits = check_teacher(experiment, teacher_record, folder, processes, name, resume=resume)
    if newest is not None and saved is not None:
        with ckpt.restoring(newest, advice=_REMOVE):
            ckpt.restore_weights(saved, side, method, processes)
    if processes.is_first:
        _say_what_runs(config, experiment, teacher_record, name, processes)
    average = _start_average(experiment)
    # At ZeRO stage 3 nobody has whole weights to evaluate, and processes do not evaluate in step.
    needs_copy = zero_stage(config) == 3 and average is None
    whole = copy.deepcopy(experiment.student) if needs_copy else None
    captured = captures(config, experiment, processes)
    # Every step has the same shapes, so cuDNN times its algorithms once; where it has to be deterministic, its choice
    # would differ between runs.
    deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.benchmark = not deterministic
    with naming_part("optimiser"):
        engine = LocalEngine(config, side, processes.device) if captured else start_engine(config, side, processes)
    processes.from_first(lambda: _begin(folder, teacher_record))
    scale = LossScale() if config.train.precision == "fp16" else None
    if newest is None or saved is None:
        if experiment.teacher is not None:
            prepare_method(method, experiment.loader, experiment.teacher, processes, stop, name)
        torch.manual_seed(1_000_003 * (config.run.seed + 1) + processes.rank)  # dropout differs between processes
    else:
        with ckpt.restoring(newest, advice=_REMOVE):
            restore_optimizer_state(engine, saved["optimizer"])
            if average is not None:
                ckpt.restore_average(saved, average, processes)
            ckpt.restore_random_state(saved, processes)
            if scale is not None:
                scale.load_state_dict(saved["run"]["loss_scale"])
    skip = config.train.nonfinite == "skip"
    watch = GradientWatch(engine, skip=skip, scale=scale)
    # With fp16 gradients overflow now and then, and the loss scale sees to them.
    meter = LossMeter(processes, method.term_names, None if scale else watch, skip=skip)
    clock = StepClock(processes.device if processes.is_first else None, whole=captured)
    parts = Parts(experiment, engine, watch, meter, average, clock)
    required = config.train.cuda_graph == "on"
    steps: Steps = CapturedSteps(parts, required=required) if captured else EagerSteps(parts)
    return Prepared(parts, steps, 0 if saved is None else int(saved["run"]["step"]), whole, logits)


def _say_what_runs(
    config: Config, experiment: Experiment, teacher_record: dict[str, Any] | None, name: str, processes: Processes
) -> None:
    _logger.info("[%s] trains %s", name, config.student.model)
    for line in header(config, experiment, processes):
        _logger.info("  %s", line)
    teacher = config.teacher
    if teacher_record is None or teacher is None:
        return
    teacher_record = teacher_record.get("teacher", teacher_record)  # of one whose outputs are cached
    if teacher_record.get("fidelity") is not None:
        return
    if teacher.weights == "random" or teacher.fidelity.batches == 0:
        _logger.warning("the teacher's fidelity is not checked: %s", teacher_record["fidelity_skipped"])


def _newest_checkpoint(folder: Path, side: nn.Module, processes: Processes) -> Path | None:
    """Return the newest checkpoint that this run can go on from, chosen by the first process for all."""
    return processes.from_first(lambda: ckpt.find_newest(folder, lambda path: ckpt.require_usable(path, side)))


def _begin(folder: Path, teacher_record: dict[str, Any] | None) -> None:
    make_folder(folder)
    remove_leftovers(folder)
    if (folder / BEST).parent.is_dir():
        remove_leftovers((folder / BEST).parent)
    if teacher_record is not None:
        write_teacher(folder, teacher_record)


def _start_average(experiment: Experiment) -> StudentAverage | None:
    decay = experiment.config.train.ema_decay
    if decay is None:
        return None
    average = StudentAverage(experiment.student, decay)
    if experiment.config.train.channels_last and zero_stage(experiment.config) == 0:
        # As the engine's: tensors of two layouts are averaged one by one.
        average.module.to(memory_format=torch.channels_last)
    return average
