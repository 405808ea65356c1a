"""What the teacher knows, said before training: its accuracy on the validation split, which must be above chance."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unikd_fast.config import Config, ConfigError
from unikd_fast.data.loader import Loader
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.evaluate import evaluate
from unikd_fast.engine.outputs import Outputs
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.run_folder import VALIDATION, read_teacher
from unikd_fast.engine.sharding import autocast_dtype
from unikd_fast.teacher import OnlineTeacher

_logger = logging.getLogger("unikd_fast")

_DEVIATIONS = 2.33  # of a normal distribution: one time in a hundred
_RANDOM = (None, "random")


def measure_teacher(
    config: Config, teacher: OnlineTeacher, loader: Loader, processes: Processes, *, keep: list[Outputs] | None = None
) -> dict[str, float] | None:
    """Return the teacher's accuracy in percent on the validation split, and its samples; all processes must call it.

    Args:
        config: of a single run with a teacher.
        loader: of this process.
        keep: gets this process's outputs, batch by batch.

    Returns:
        None for a teacher that was asked to know nothing (``teacher.weights = "random"``, and no ``min_accuracy``), and
        where there are no validation images.
    """
    assert config.teacher is not None
    if config.teacher.weights in _RANDOM and not config.teacher.min_accuracy:
        return None
    with torch.random.fork_rng(devices=[]):  # from which a loader with workers draws
        found = evaluate(teacher, loader.evaluate("val"), processes, keep=keep)
    return {key: found[key] for key in ("accuracy", "samples")} if found["samples"] else None


def judge_teacher(config: Config, found: dict[str, float], classes: int, processes: Processes, name: str) -> None:
    """Say what the teacher knows, and refuse one that does not know enough.

    Enough is ``teacher.min_accuracy``. By default it is twice the odds of chance, 2 / (K + 1) of the images, less what
    the luck of the draw takes from such a teacher one time in a hundred.

    Args:
        found: its figures, as `measure_teacher` returned them once.
        classes: K.
        name: label used in log messages.

    Raises:
        ConfigError: on every process: the teacher's accuracy is below that.
    """
    assert config.teacher is not None
    share, images = found["accuracy"] / 100, int(found["samples"])
    usual = 2 / (classes + 1)
    asked = config.teacher.min_accuracy
    required = usual - _DEVIATIONS * math.sqrt(usual * (1 - usual) / images) if asked is None else asked
    said = f"{100 * share:.2f} % of {images:,} validation images"
    if share < required:
        but = f"chance is {100 / classes:.2f} %" if asked is None else f"teacher.min_accuracy is {asked:g}"
        raise ConfigError(
            f"the teacher, {config.teacher.model} of teacher.weights = {config.teacher.weights}, names the class of "
            f"{said} and {but}; check that the weights are those of these classes, in this order, or train from it "
            "nevertheless with --set teacher.min_accuracy=0"
        )
    if processes.is_first:
        _logger.info("[%s] the teacher names the class of %s", name, said)
        if share < usual:
            _logger.warning("[%s] the teacher knows little: chance is %.2f %%", name, 100 / classes)


def check_teacher(
    experiment: Experiment, record: dict[str, Any], folder: Path, processes: Processes, name: str, *, resume: bool
) -> dict[int, Tensor] | None:
    """Do both before a run starts, once: a resumed run finds the figures in its folder; compare with the student.

    Args:
        record: what the folder will say of the teacher; of an online one gets its figures.
        resume: whether the run may have been begun before.

    Returns:
        The logits (K,) of this process's validation images by sample id, where a probe will need them and the teacher
        was just asked.

    Raises:
        ConfigError: on every process: the teacher does not know enough, see `judge_teacher`.
    """
    config, teacher = experiment.config, experiment.teacher
    before = processes.from_first(lambda: read_teacher(folder)) if resume else None
    keep: list[Outputs] | None = [] if config.run.probe else None
    if teacher is None:  # its outputs are cached, and who built the cache has asked it
        found = record["teacher"].get(VALIDATION)
    elif before is not None and VALIDATION in before:
        found = record[VALIDATION] = before[VALIDATION]
    else:
        found = record[VALIDATION] = measure_teacher(config, teacher, experiment.loader, processes, keep=keep)
    if found is None:
        return None
    if not record.get("built_shards"):  # whoever builds says it before
        judge_teacher(config, found, experiment.splits.num_classes, processes, name)
    if before is None and config.student.weights not in _RANDOM:
        _compare(experiment, found, processes, name)
    return {int(i): row for each in keep for i, row in zip(each.sample_ids, each.logits, strict=True)} if keep else None


def _compare(experiment: Experiment, teacher: dict[str, float], processes: Processes, name: str) -> None:
    batches, dtype = experiment.loader.evaluate("val"), autocast_dtype(experiment.config.train.precision)
    with torch.random.fork_rng(devices=[]):
        student = evaluate(experiment.student, batches, processes, autocast=dtype)
    if not processes.is_first:
        return
    _logger.info("[%s] the student starts with %.2f %%", name, student["accuracy"])
    if teacher["accuracy"] < student["accuracy"]:
        _logger.warning(
            "[%s] the teacher knows less than the student that it is to teach: %.2f %% of the validation images, the "
            "student %.2f %%",
            name,
            teacher["accuracy"],
            student["accuracy"],
        )
