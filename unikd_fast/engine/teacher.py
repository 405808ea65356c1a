"""The teacher of a run: its accuracy, the fitting of the method's head to it, and its result in tables."""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unikd_fast.config import Config, ConfigError
from unikd_fast.config.load import cache_dir
from unikd_fast.data.splits import DataSplits, hash_split
from unikd_fast.data.views import Windows
from unikd_fast.engine.cost import cost_of
from unikd_fast.engine.distributed import Processes, StopSignal, average_buffers
from unikd_fast.engine.evaluate import BatchLogits, TeacherFeatures, image_features
from unikd_fast.engine.folder import VALIDATION, read_result, read_teacher, write_result
from unikd_fast.engine.inputs import as_config_errors
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.zero import autocast_dtype
from unikd_fast.errors import FileError, Interrupted
from unikd_fast.io import make_folder, read_json, write_json
from unikd_fast.methods import Method, Needs
from unikd_fast.teacher.cache.files import folder_lock
from unikd_fast.values import Features

if TYPE_CHECKING:
    from unikd_fast.engine.build import Experiment
    from unikd_fast.engine.task import Task

_logger = logging.getLogger("unikd_fast")

_DEVIATIONS = 2.33  # of a normal distribution: one in a hundred
_RANDOM = (None, "random")


def measure_teacher(
    experiment: "Experiment", teacher: nn.Module, *, keep: list[BatchLogits] | None = None
) -> dict[str, float] | None:
    """Return the teacher's accuracy in percent on the validation split, and its samples; all processes must call it.

    Args:
        experiment: run with a teacher.
        teacher: the teacher.
        keep: list to append this process's logits to. If None, they are not kept.

    Returns:
        None if the teacher is untrained on purpose (``teacher.weights = "random"``, and no ``min_accuracy``), or if
        there are no validation images.
    """
    section, task, splits = experiment.config.teacher, experiment.task, experiment.splits
    assert section is not None
    if section.weights in _RANDOM and not section.min_accuracy:
        return None
    with torch.random.fork_rng(devices=[]):  # from which a loader with workers draws
        found = task.evaluate(teacher, experiment.loader, splits, "val", experiment.processes, keep=keep)
    return {key: found[key] for key in (task.figures.main, "samples")} if found["samples"] else None


def require_accuracy(config: Config, found: dict[str, float], classes: int, processes: Processes, name: str) -> None:
    """Log the teacher's accuracy, and refuse a teacher whose accuracy is too low.

    The minimum is ``teacher.min_accuracy``. By default it is twice the odds of chance, 2 / (K + 1), less what such a
    teacher falls short of by chance once in a hundred draws of the images.

    Args:
        config: configuration of a single run with a teacher.
        found: result of `measure_teacher`.
        classes: number of classes K.
        processes: processes of the run.
        name: label used in log messages.

    Raises:
        ConfigError: on every process: the accuracy is below the minimum.
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
            f"the teacher, {config.teacher.label} with teacher.weights = {config.teacher.all_weights}, classifies "
            f"{said} correctly, and {but}; check that the weights are for these classes, in this order, or train from "
            "it nevertheless with --set teacher.min_accuracy=0"
        )
    if processes.is_first:
        _logger.info("[%s] the teacher classifies %s correctly", name, said)
        if share < usual:
            _logger.warning(
                "[%s] the teacher's accuracy is low: chance is %.2f %%; check that the weights are for these classes, "
                "in this order, or train it longer",
                name,
                100 / classes,
            )


def check_teacher(experiment: "Experiment", folder: Path, name: str, *, resume: bool) -> dict[int, Tensor] | None:
    """Measure and require the teacher's accuracy before a run starts, and compare it with the student's.

    A resumed run finds the metrics in its folder. They are added to an online teacher's record.

    Args:
        experiment: run with a teacher; its cache, if it has one, is ready.
        folder: run folder.
        name: label used in log messages.
        resume: whether the run may have been started before.

    Returns:
        The logits (K,) of this process's validation images by sample id, or None if the probe does not need them or
        the teacher was not run.

    Raises:
        ConfigError: on every process: the teacher's accuracy is too low, see `require_accuracy`.
    """
    config, processes, teacher, record = (
        experiment.config,
        experiment.processes,
        experiment.teacher,
        experiment.teacher_record,
    )
    assert record is not None
    before = processes.from_first(lambda: read_teacher(folder)) if resume else None
    keep: list[BatchLogits] | None = [] if config.run.probe and experiment.task.figures.has_logits else None
    if teacher is None:  # its outputs are cached, with its accuracy
        found = record["teacher"].get(VALIDATION)
    elif before is not None and VALIDATION in before:
        found = record[VALIDATION] = before[VALIDATION]
    else:
        found = record[VALIDATION] = measure_teacher(experiment, teacher, keep=keep)
    if found is None:
        return None
    if not record.get("built_shards"):  # otherwise required before building
        experiment.task.require_teacher(config, found, experiment.splits, processes, name)
    if before is None and config.student.weights not in _RANDOM:
        _compare(experiment, found, name)
    return {int(i): row for each in keep for i, row in zip(each.sample_ids, each.logits, strict=True)} if keep else None


def _compare(experiment: "Experiment", teacher: dict[str, float], name: str) -> None:
    task, processes = experiment.task, experiment.processes
    dtype = autocast_dtype(experiment.config.train.precision)
    with torch.random.fork_rng(devices=[]):
        student = task.evaluate(
            experiment.student, experiment.loader, experiment.splits, "val", processes, autocast=dtype
        )
    if not processes.is_first:
        return
    its, own = teacher[task.figures.main], student[task.figures.main]
    _logger.info("[%s] the student starts with %.2f %%", name, own)
    if its < own:
        _logger.warning(
            "[%s] the teacher is less accurate than the student at the start: its %s on the validation images is "
            "%.2f %%, the student's %.2f %%",
            name,
            task.figures.title,
            its,
            own,
        )


_STREAM = 1  # of augmentation views; training uses stream 0


@oom_hint("method")
def prepare_method(
    method: Method[Any],
    loader: Any,
    teacher: nn.Module,
    processes: Processes,
    stop: StopSignal,
    name: str,
    *,
    features: TeacherFeatures = image_features,
) -> None:
    """Fit the method's head, if it has one, to the teacher's features of augmented training batches.

    Each process fits it to its own batches, and its BatchNorms to their statistics, which are then averaged: all
    processes end with the same head.

    Args:
        method: method with the head.
        loader: this process's loader.
        teacher: the teacher.
        processes: processes of the run.
        stop: signals that stop the run.
        name: label used in log messages.
        features: see `Task.teacher_features`.

    Raises:
        Interrupted: SIGTERM or Ctrl-C.
        OutOfMemory: the memory is not sufficient for the head and its optimiser.
    """
    if method.fixed_head is not None and processes.is_first:
        _logger.info("[%s] the teacher's head is fitted first, on %d batches", name, method.fixed_head.steps)
    method.prepare(_features_without_end(loader, partial(features, teacher), stop, name))
    if method.fixed_head is not None:
        average_buffers(method.fixed_head.module, processes)


def _features_without_end(
    loader: Any, features_of: Callable[[Any], tuple[Features, Tensor]], stop: StopSignal, name: str
) -> Iterator[Features]:
    epoch = 0
    while True:
        for batch in loader.train(epoch, stream=_STREAM):
            if number := stop.agreed():
                said = f"[{name}] stopped while the teacher's head was fitted; nothing to save"
                raise Interrupted(number, f"{said}; start again with --resume auto")
            with oom_hint("teacher"):
                features, _ = features_of(batch)
            yield features
        epoch += 1


TEACHER_RESULT = "teacher_result.json"


@oom_hint("teacher")
def evaluate_teacher(
    config: Config, folder: Path, processes: Processes, *, task: "Task", label: str, with_cost: bool = False
) -> dict[str, Any]:
    """Return the accuracy of a given teacher on the test split, in the form of a run's result; it is kept in a folder.

    If the teacher's outputs are cached, the metrics are stored next to them, and later runs need not load the teacher.

    Args:
        config: configuration of a run with a teacher.
        folder: folder that keeps the result.
        processes: processes of the run.
        task: task of the run.
        label: name of the teacher in tables.
        with_cost: whether to measure what the teacher costs, where it is loaded.
    """
    known = processes.from_first(lambda: read_result(folder))
    if known is not None:
        return known
    assert config.teacher is not None
    with as_config_errors():
        splits = task.open_data(config, Needs(), processes)
        # Needed only for stored metrics; it reads every file, also those that were skipped.
        kept = _result_path(config) is not None
        test_split = processes.from_first(lambda: _test_images(config, splits)) if kept else ""
        found = processes.from_first(lambda: _read_figures(config, test_split))
        cost: dict[str, Any] = {}
        if found is None:
            network = task.build_teacher(config, splits, Needs())
            if with_cost and task.figures.has_logits:
                device = processes.device
                cost = processes.from_first(lambda: cost_of(network.to(device), config.data.image_size, device))
            outputs: list[Any] | None = [] if config.run.test_logits else None
            found = _evaluate(config, task, network, splits, processes, outputs)
            if outputs is not None:
                task.write_outputs(folder, outputs, splits, processes)
            processes.from_first(partial(_keep_figures, config, test_split, found))
    figures = {"epoch": None, "test": found}
    result = {
        "label": label,
        "seed": config.run.seed,
        "method": "given",
        "model": config.teacher.label,
        "steps": 0,
        "test_is_val": splits.test_is_val,
        "best": figures,
        "last": figures,
        "weights": config.teacher.weights,
        **cost,
    }

    def write() -> None:
        make_folder(folder)
        write_result(folder, result)

    processes.from_first(write)
    return result


def _evaluate(
    config: Config,
    task: "Task",
    network: nn.Module,
    splits: Any,
    processes: Processes,
    keep: list[BatchLogits] | None,
) -> dict[str, Any]:
    loader = task.build_loader(config, splits, Needs(), processes)
    teacher = task.plain_teacher(config, network, splits, processes)
    return task.evaluate(teacher, loader, splits, "val" if splits.test_is_val else "test", processes, keep=keep)


def _test_images(config: Config, splits: DataSplits) -> str:
    """Return what the metrics depend on: the samples, and how they are resized, which is not part of a cache's key."""
    samples = hash_split(splits.test)
    if not splits.is_resized:
        return samples
    windows = Windows.of(splits, config.data.first_augmentation)
    return f"{samples}, {'both sides' if windows.squash else 'short side'} {windows.short_side}"


def _result_path(config: Config) -> Path | None:
    assert config.teacher is not None
    # The key is compared before a run, so the cache of a finished run is this teacher's.
    return None if config.teacher.cache.mode == "off" else cache_dir(config) / TEACHER_RESULT


def _read_figures(config: Config, test_split: str) -> dict[str, float] | None:
    path = _result_path(config)
    try:
        kept = {} if path is None else read_json(path)
    except FileNotFoundError:
        return None
    except FileError as error:
        raise FileError(f"{error}; remove it, and the teacher is evaluated again") from error
    return kept.get("figures") if kept.get("test_split") == test_split else None


def _keep_figures(config: Config, test_split: str, figures: dict[str, float]) -> None:
    path = _result_path(config)
    assert config.teacher is not None
    if path is not None and config.teacher.cache.mode == "read_write":
        with folder_lock(path.parent):  # other runs remove leftovers there
            write_json(path, {"test_split": test_split, "figures": figures})
