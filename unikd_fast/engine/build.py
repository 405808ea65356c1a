"""From a configuration to the objects of a run: data, networks, method, checked against each other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unikd_fast.config import Config, ConfigError
from unikd_fast.data.augmentation import Augmentation, Crop
from unikd_fast.data.datasets import DataSplits, open_data
from unikd_fast.data.loader import Loader, build_loader
from unikd_fast.engine.online_teacher import start_teacher
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.sharding import local_batch_size
from unikd_fast.engine.student import StudentSide
from unikd_fast.methods import KD, Method, StudentAlone, UniKD
from unikd_fast.models import FeatureExtractor, LogitsOnly, build_model, extract_features
from unikd_fast.teacher import OnlineTeacher

CROP: dict[str, Crop] = {
    "digits": "pad",
    "cifar100": "pad",
    "synthetic": "none",
    "image_folder": "resized",
    "imagenet": "resized",
}
PADDING = {"digits": 1, "cifar100": 4}
FLIP = {"digits": 0.0}  # a mirrored 2 is no digit


@dataclass(frozen=True)
class Experiment:
    """The objects of one run. ``steps_per_epoch`` and ``total_steps`` count optimiser steps.

    ``teacher_record`` says how the teacher runs and how faithful it is to itself in fp32.
    """

    config: Config
    splits: DataSplits
    loader: Loader
    teacher: OnlineTeacher | None
    student: FeatureExtractor | LogitsOnly
    side: StudentSide
    method: Method
    steps_per_epoch: int
    total_steps: int
    teacher_record: dict[str, Any] | None = None


@contextmanager
def refusing_misfits() -> Iterator[None]:
    """Turns what the lower layers say about data, weights and models that do not fit into a ConfigError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def build_experiment(config: Config, processes: Processes) -> Experiment:
    """Builds data, teacher, student and method of a run.

    Raises:
        ConfigError: whatever does not exist or does not fit together, before training starts; a teacher that is not
            the network it was made of.
    """
    with refusing_misfits():
        return _build(config, processes)


def _build(config: Config, processes: Processes) -> Experiment:
    local_batch_size(config, processes)
    splits = build_data(config)
    loader = build_data_loader(config, splits, processes)
    steps_per_epoch = loader.steps_per_epoch
    total_steps = config.train.total_epochs * steps_per_epoch
    if config.train.max_steps is not None:
        total_steps = min(total_steps, config.train.max_steps)

    needs_levels = METHODS[config.distill.method].needs_levels
    torch.manual_seed(config.run.seed)
    student = build_network(config, "student", splits, levels=needs_levels)
    teacher_network = None
    if METHODS[config.distill.method].needs_teacher:
        torch.manual_seed(config.run.seed + 1)
        teacher_network = build_teacher_network(config, splits, levels=needs_levels)
    # The method's own weights come last, so that all methods of a comparison start from the same student.
    torch.manual_seed(config.run.seed + 2)
    method = build_method(
        config,
        student,
        teacher_network,
        splits,
        processes.device,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
    )
    side = StudentSide(student, method.adapter, method.companion).to(processes.device)
    teacher, record = None, None
    if teacher_network is not None:
        teacher, record = start_teacher(config, teacher_network, loader, processes)
    return Experiment(config, splits, loader, teacher, student, side, method, steps_per_epoch, total_steps, record)


def build_data(config: Config) -> DataSplits:
    """Opens the data set."""
    data = config.data
    return open_data(
        data.name,
        root=data.root,
        image_size=data.image_size,
        num_classes=data.num_classes,
        train_samples=data.train_samples,
        val_samples=data.val_samples,
        synthetic_samples=data.synthetic_samples,
        seed=data.seed,
    )


def build_data_loader(config: Config, splits: DataSplits, processes: Processes) -> Loader:
    """This process's loader; what the configuration leaves open about augmentation is the data set's usual recipe."""
    data, given = config.data, config.data.augmentation
    augmentation = Augmentation(
        crop=given.crop or CROP[data.name],
        padding=given.padding if given.padding is not None else PADDING.get(data.name, 0),
        scale=given.scale,
        ratio=given.ratio,
        flip_probability=given.flip_probability if given.flip_probability is not None else FLIP.get(data.name, 0.5),
        eval_resize=given.eval_resize,
    )
    return build_loader(
        splits,
        augmentation=augmentation,
        kind=data.loader,
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        accumulation_steps=config.train.accumulation_steps,
        rank=processes.rank,
        world_size=processes.world_size,
        device=processes.device,
        workers=data.workers,
        channels_last=config.train.channels_last,
    )


def build_network(config: Config, role: str, splits: DataSplits, *, levels: bool) -> FeatureExtractor | LogitsOnly:
    """Teacher or student with its weights; with ``levels`` its stage ends are returned as well."""
    section = config.student if role == "student" else config.teacher
    assert section is not None
    model = build_model(section.model, num_classes=splits.num_classes, weights=section.weights, role=role)
    if not levels:
        return LogitsOnly(model)
    network = extract_features(
        model, image_size=splits.image_size, max_levels=config.distill.max_levels, nodes=section.feature_nodes
    )
    if network.num_classes != splits.num_classes:
        raise ConfigError(
            f"{role}.model = {section.model} has {network.num_classes} classes, the data {splits.num_classes}; "
            "use a model or weights for this data"
        )
    return network


def build_teacher_network(config: Config, splits: DataSplits, *, levels: bool) -> FeatureExtractor | LogitsOnly:
    """The teacher with its weights; an untrained one must be asked for."""
    assert config.teacher is not None
    if config.teacher.weights is None:
        raise ConfigError(
            f"teacher.weights is not set, so teacher {config.teacher.model} would know nothing; give a file or an "
            "identifier, add teacher.training to train it first, or allow random weights with --set "
            "teacher.weights=random"
        )
    return build_network(config, "teacher", splits, levels=levels)


def build_method(
    config: Config,
    student: nn.Module,
    teacher: nn.Module | None,
    splits: DataSplits,
    device: torch.device,
    *,
    total_steps: int,
    steps_per_epoch: int,
) -> Method:
    """The distillation method of ``config.distill``."""
    build: Callable[..., Method] = METHODS[config.distill.method]
    options = METHOD_OPTIONS[config.distill.method](config, total_steps, steps_per_epoch)
    if config.distill.method != "unikd":
        return build(**options)
    assert isinstance(student, FeatureExtractor)
    assert isinstance(teacher, FeatureExtractor)
    return build(
        [shape[0] for shape in student.level_shapes],
        [shape[0] for shape in teacher.level_shapes],
        splits.num_classes,
        device=device,
        width=_fused_width(config, teacher),
        **options,
    )


def _fused_width(config: Config, teacher: FeatureExtractor) -> int:
    deepest = teacher.level_shapes[-1][0]
    width = config.distill.width
    return {"auto": min(256, deepest), "deepest": deepest}[width] if isinstance(width, str) else width


def _none_options(config: Config, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
    return {"label_smoothing": config.loss.label_smoothing}


def _kd_options(config: Config, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
    distill = config.distill
    return {
        "ce_weight": 0.1 if distill.ce_weight is None else distill.ce_weight,
        "beta": 0.9 if distill.beta is None else distill.beta,
        "temperature": distill.temperature,
        "scale_by_t2": distill.scale_by_t2,
        "label_smoothing": config.loss.label_smoothing,
        "impl": config.loss.impl,
    }


def _unikd_options(config: Config, total_steps: int, steps_per_epoch: int) -> dict[str, Any]:
    distill = config.distill
    ramp = distill.alpha_ramp_epochs
    return {
        **{name: getattr(distill, name) for name in ("fusion", "fusion_path", "fusion_impl")},
        **{name: getattr(distill, name) for name in ("gate", "upsample", "norm", "fdp_norm", "variance_floor")},
        **{name: getattr(distill, name) for name in ("teacher_head", "head_learning_rate", "alpha", "temperature")},
        **{name: getattr(distill, name) for name in ("scale_by_t2", "feature_reduction")},
        "beta": 1.0 if distill.beta is None else distill.beta,
        "head_steps": min(1000, total_steps) if distill.head_steps is None else distill.head_steps,
        "alpha_ramp_epochs": min(20.0, 0.08 * total_steps / steps_per_epoch) if ramp is None else ramp,
        "label_smoothing": config.loss.label_smoothing,
        "impl": config.loss.impl,
    }


METHODS: dict[str, type[Method]] = {"none": StudentAlone, "kd": KD, "unikd": UniKD}
METHOD_OPTIONS = {"none": _none_options, "kd": _kd_options, "unikd": _unikd_options}
