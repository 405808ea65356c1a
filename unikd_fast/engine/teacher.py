"""The teacher of a run: compared with itself in fp32, asked what it knows, and studied by the method beforehand."""

import copy
import logging
import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unikd_fast.config import Config, ConfigError
from unikd_fast.config.load import cache_dir
from unikd_fast.data.loader import Loader
from unikd_fast.data.splits import DataSplits, TensorImages, hash_split
from unikd_fast.data.views import Windows
from unikd_fast.engine.distributed import Processes, StopSignal, average_buffers
from unikd_fast.engine.evaluate import BatchLogits, evaluate, write_outputs
from unikd_fast.engine.folder import VALIDATION, read_result, read_teacher, write_result
from unikd_fast.engine.inputs import as_config_errors, build_data, build_data_loader, teacher_affine
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.networks import build_teacher_network
from unikd_fast.engine.zero import autocast_dtype, local_batch_size
from unikd_fast.errors import FileError, Interrupted
from unikd_fast.io import make_folder, read_json, write_json
from unikd_fast.methods import Method, Needs
from unikd_fast.teacher import (
    Affine,
    OnlineTeacher,
    check_fidelity,
    measure_fidelity,
    pool_fidelity,
    resolve_precision,
)
from unikd_fast.teacher.cache.files import folder_lock
from unikd_fast.values import Features

if TYPE_CHECKING:
    from unikd_fast.engine.build import Experiment


def make_teacher(
    config: Config,
    network: nn.Module,
    device: torch.device,
    *,
    precision: str,
    renormalise: Affine | None,
    compile_mode: str | None = None,
    batch_size: int | None = None,
) -> OnlineTeacher:
    """The teacher that ``config.teacher`` describes, not compared with anything.

    Args:
        network: maps images to Features, in fp32; moved and changed in place.
        precision, renormalise, compile_mode, batch_size: see OnlineTeacher.
    """
    assert config.teacher is not None
    return OnlineTeacher(
        network.to(device).eval(),
        precision=precision,
        fold=config.teacher.fold_batch_norm,
        compile_mode=compile_mode,
        channels_last=config.train.channels_last or device.type == "cuda" or not _as_given(config, precision),
        batch_size=batch_size,
        renormalise=renormalise,
    )


@oom_hint("teacher")
def start_teacher(
    config: Config,
    network: nn.Module,
    loader: Loader,
    processes: Processes,
    *,
    renormalise: Affine | None,
    precision: str | None = None,
    batch_size: int | None = None,
) -> OnlineTeacher:
    """Make the teacher that ``config.teacher`` describes and compares it with the network on training batches.

    All processes come to one decision: the first one resolves precision "auto", fp16 gives way to bf16 everywhere if
    it is not finite on any of them, and the figures are pooled.

    Args:
        config: with a teacher.
        network: maps images to Features, in fp32; changed in place.
        loader: of this process's training batches.
        renormalise: see OnlineTeacher.
        precision: None for that of the configuration.
        batch_size: images of one call of the network; None: that of a micro-batch if it is compiled, any otherwise.

    Returns:
        The teacher, whose `record` says how it runs, and its fidelity or why there is none.

    Raises:
        ValueError: the teacher is not the network it was made of, or cannot be compiled; see `check_fidelity`.
    """
    section = config.teacher
    assert section is not None
    device = processes.device
    unsettled = precision is None and section.precision == "auto"
    precision = processes.broadcast(resolve_precision(precision or section.precision, device))
    unsettled = unsettled and precision == "fp16"
    network = network.to(device).eval()
    unchecked = _why_unchecked(config, precision)
    reference = None if unchecked else copy.deepcopy(network).requires_grad_(False)
    if batch_size is None and section.compile is not None:
        batch_size = local_batch_size(config, processes)
    teacher = make_teacher(
        config,
        network,
        device,
        precision="auto" if unsettled else precision,
        renormalise=renormalise,
        compile_mode=section.compile,
        batch_size=batch_size,
    )
    first_call = unsettled or section.compile is not None
    needed = section.fidelity.batches if reference is not None else int(first_call)
    batches = [batch.images for batch in islice(loader.train(0), needed)] if needed else []
    if first_call:  # compiles here, and not in the first step
        teacher.settle(all(processes.gather(teacher.is_finite(batches))))
    teacher.record |= {
        "model": section.model,
        "weights": section.weights,
        "precision": teacher.precision,
        "folded_batch_norms": teacher.folded,
        "compile": section.compile,
        "fidelity": None,
        "fidelity_skipped": unchecked,
    }
    if reference is None:
        return teacher
    found = pool_fidelity(processes.gather(measure_fidelity(teacher, reference, batches)))
    check_fidelity(found, teacher, min_agreement=section.fidelity.min_agreement)
    teacher.record["fidelity"] = found._asdict()
    return teacher


def describe_teacher(record: dict[str, Any]) -> list[str]:
    """How the teacher runs and how faithful it is, for ``--dry-run``."""
    lines = [
        f"          runs in {record['precision']}, {record['folded_batch_norms']} BatchNorms folded, compile "
        f"{record['compile'] or 'off'}"
    ]
    found = record["fidelity"]
    if found is None:
        return [*lines, f"          fidelity not checked: {record['fidelity_skipped']}"]
    levels = ", ".join(f"{error:.1e}" for error in found["feature_errors"]) or "none"
    return [
        *lines,
        f"          against fp32 on {found['images']} images: logits {found['relative_logit_error']:.1e}, same class "
        f"{100 * found['top1_agreement']:.2f} % ({found['near_ties']} near ties), levels {levels}",
    ]


def _why_unchecked(config: Config, precision: str) -> str | None:
    section = config.teacher
    assert section is not None
    if section.weights == "random":
        return "teacher.weights=random, whose classes mean nothing"
    if section.fidelity.batches == 0:
        return "teacher.fidelity.batches=0"
    if _as_given(config, precision):
        return "the teacher runs as it was given, in fp32 and eagerly"
    return None


def _as_given(config: Config, precision: str) -> bool:
    section = config.teacher
    assert section is not None
    return precision == "fp32" and not section.fold_batch_norm and section.compile is None


_logger = logging.getLogger("unikd_fast")

_DEVIATIONS = 2.33  # of a normal distribution: one time in a hundred
_RANDOM = (None, "random")


def measure_teacher(
    config: Config,
    teacher: OnlineTeacher,
    loader: Loader,
    processes: Processes,
    *,
    keep: list[BatchLogits] | None = None,
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


def require_accuracy(config: Config, found: dict[str, float], classes: int, processes: Processes, name: str) -> None:
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


def check_teacher(experiment: "Experiment", folder: Path, name: str, *, resume: bool) -> dict[int, Tensor] | None:
    """Do both before a run starts, once: a resumed run finds the figures in its folder; compare with the student.

    An online teacher's record gets its figures.

    Args:
        experiment: a run with a teacher; its cache, if it has one, is ready.
        folder: of the run.
        name: label used in log messages.
        resume: whether the run may have been begun before.

    Returns:
        The logits (K,) of this process's validation images by sample id, where a probe will need them and the teacher
        was just asked.

    Raises:
        ConfigError: on every process: the teacher does not know enough, see `require_accuracy`.
    """
    config, processes, teacher, record = (
        experiment.config,
        experiment.processes,
        experiment.teacher,
        experiment.teacher_record,
    )
    assert record is not None
    before = processes.from_first(lambda: read_teacher(folder)) if resume else None
    keep: list[BatchLogits] | None = [] if config.run.probe else None
    if teacher is None:  # its outputs are cached, and who built the cache has asked it
        found = record["teacher"].get(VALIDATION)
    elif before is not None and VALIDATION in before:
        found = record[VALIDATION] = before[VALIDATION]
    else:
        found = record[VALIDATION] = measure_teacher(config, teacher, experiment.loader, processes, keep=keep)
    if found is None:
        return None
    if not record.get("built_shards"):  # whoever builds says it before
        require_accuracy(config, found, experiment.splits.num_classes, processes, name)
    if before is None and config.student.weights not in _RANDOM:
        _compare(experiment, found, name)
    return {int(i): row for each in keep for i, row in zip(each.sample_ids, each.logits, strict=True)} if keep else None


def _compare(experiment: "Experiment", teacher: dict[str, float], name: str) -> None:
    processes, batches = experiment.processes, experiment.loader.evaluate("val")
    dtype = autocast_dtype(experiment.config.train.precision)
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


_STREAM = 1  # of augmentation views; training uses stream 0


@oom_hint("method")
def prepare_method(
    method: Method, loader: Loader, teacher: OnlineTeacher, processes: Processes, stop: StopSignal, name: str
) -> None:
    """Fits the method's head, if it has one, to the teacher's features of augmented training batches.

    Each process fits it to batches of its own, and its BatchNorms to their statistics, of which the mean is taken: what
    is frozen then is one head.

    Args:
        name: of the run, before its lines.

    Raises:
        Interrupted: SIGTERM or Ctrl-C.
        OutOfMemory: the head and its optimiser do not fit into memory.
    """
    if method.fitted_head is not None and processes.is_first:
        _logger.info("[%s] the teacher's head is fitted first", name)
    method.prepare(_features_without_end(loader, teacher, stop, name))
    if method.fitted_head is not None:
        average_buffers(method.fitted_head, processes)


def _features_without_end(loader: Loader, teacher: OnlineTeacher, stop: StopSignal, name: str) -> Iterator[Features]:
    epoch = 0
    while True:
        for batch in loader.train(epoch, stream=_STREAM):
            if number := stop.agreed():
                said = f"[{name}] stopped while the teacher's head was fitted; nothing to save"
                raise Interrupted(number, f"{said}; start again with --resume auto")
            with oom_hint("teacher"):
                features = teacher(batch.images)
            yield features
        epoch += 1


TEACHER_RESULT = "teacher_result.json"


@oom_hint("teacher")
def evaluate_teacher(config: Config, folder: Path, processes: Processes, *, label: str) -> dict[str, Any]:
    """Accuracy of the given teacher on the test split, in the form of a run's result; kept in ``folder``.

    Where the teacher's outputs are cached, the figures are kept beside them, and no later run loads it for them.
    """
    known = processes.from_first(lambda: read_result(folder))
    if known is not None:
        return known
    assert config.teacher is not None
    with as_config_errors():
        splits = build_data(config, processes)
        # Only figures that are kept need it, and it wants every file, also those that were skipped.
        kept = _result_path(config) is not None
        test_split = processes.from_first(lambda: _test_images(config, splits)) if kept else ""
        found = processes.from_first(lambda: _read_figures(config, test_split))
        if found is None:
            outputs: list[BatchLogits] | None = [] if config.run.test_logits else None
            found = _evaluate(config, splits, processes, outputs)
            if outputs is not None:
                write_outputs(folder, outputs, processes, split="test")
            processes.from_first(partial(_keep_figures, config, test_split, found))
    figures = {"epoch": None, "test": found}
    result = {
        "label": label,
        "seed": config.run.seed,
        "method": "given",
        "model": config.teacher.model,
        "steps": 0,
        "test_is_val": splits.test_is_val,
        "best": figures,
        "last": figures,
        "weights": config.teacher.weights,
    }

    def write() -> None:
        make_folder(folder)
        write_result(folder, result)

    processes.from_first(write)
    return result


def _evaluate(
    config: Config, splits: DataSplits, processes: Processes, keep: list[BatchLogits] | None
) -> dict[str, float]:
    assert config.teacher is not None
    network = build_teacher_network(config, splits, needs=Needs())
    loader = build_data_loader(config, splits, processes)
    # With "auto" in fp32, which needs no check of its range. Not compiled: it runs once over the split.
    precision = "fp32" if config.teacher.precision == "auto" else config.teacher.precision
    teacher = make_teacher(
        config, network, processes.device, precision=precision, renormalise=teacher_affine(config, splits)
    )
    return evaluate(teacher, loader.evaluate("val" if splits.test_is_val else "test"), processes, keep=keep)


def _test_images(config: Config, splits: DataSplits) -> str:
    """What the figures are of: the samples, and how they are brought to size, which a cache of training views leaves
    open."""
    samples = hash_split(splits.test)
    if isinstance(splits.test, TensorImages):
        return samples
    windows = Windows.of(splits, config.data.first_augmentation)
    return f"{samples}, {'both sides' if windows.squash else 'short side'} {windows.short_side}"


def _result_path(config: Config) -> Path | None:
    assert config.teacher is not None
    # Its key is compared before a run, so the folder of a finished run is that of this teacher.
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
        with folder_lock(path.parent):  # which another run may remove the leftovers of
            write_json(path, {"test_split": test_split, "figures": figures})
