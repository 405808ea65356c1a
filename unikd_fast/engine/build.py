"""From a configuration to the objects of a run: data, networks, method, checked against each other."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unikd_fast.config import Config, ConfigError
from unikd_fast.config.load import teacher_config
from unikd_fast.data.loader import Loader
from unikd_fast.data.splits import DataSplits
from unikd_fast.engine.cache import OutputCache, open_output_cache
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.inputs import (
    as_config_errors,
    build_data,
    build_data_loader,
    log_inputs,
    network_size,
    preprocessing_of,
    teacher_affine,
)
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.networks import (
    StudentModule,
    TeacherNetwork,
    build_network,
    build_teacher_network,
    check_forward,
    first_network,
)
from unikd_fast.engine.preflight import require_agreement
from unikd_fast.engine.teacher import start_teacher
from unikd_fast.engine.zero import local_batch_size, zero_stage
from unikd_fast.methods import METHODS, Method, Needs, RunContext, build_method, needs_of
from unikd_fast.models import FeatureExtractor, LogitsOnly, StudentCard
from unikd_fast.models.blocks import split_at_levels
from unikd_fast.teacher import OnlineTeacher
from unikd_fast.values import NO_LABEL, Batch, Target


@dataclass(frozen=True)
class Experiment:
    """The objects of one run, built once by `build_experiment`.

    Attributes:
        config: configuration of this single run.
        processes: processes that train it.
        splits: data set.
        loader: this process's batches of it.
        student_module: student with what is trained alongside it.
        method: distillation method.
        teacher: teacher that runs online. If None, its outputs are cached, or the method needs no teacher.
        cache: teacher's outputs on disk. If None, the teacher runs online, or the method needs no teacher.
    """

    config: Config
    processes: Processes
    splits: DataSplits
    loader: Loader
    student_module: StudentModule
    method: Method[Any]
    teacher: OnlineTeacher | None = None
    cache: OutputCache | None = None

    @property
    def student(self) -> FeatureExtractor | LogitsOnly:
        """Return the network that is trained."""
        return cast(LogitsOnly, self.student_module.network)

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps in an epoch."""
        return self.loader.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Return the number of optimiser steps in the run."""
        return _total_steps(self.config, self.steps_per_epoch)

    @property
    def epochs(self) -> int:
        """Return the number of epochs that are trained; the last one may be incomplete."""
        return -(-self.total_steps // self.steps_per_epoch)

    @property
    def teacher_record(self) -> dict[str, Any] | None:
        """Return what the run folder says about the teacher, or None if the method needs no teacher."""
        source = self.cache or self.teacher
        return None if source is None else source.record

    def micro_batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, Target | None]]:
        """Return this process's micro-batches of an epoch from an optimiser step on, with their cached targets."""
        if self.cache is None:
            return ((batch, None) for batch in self.loader.train(epoch, start_step))
        return self.cache.micro_batches(self.loader, self.processes.device, epoch, start_step)


def build_experiment(config: Config, processes: Processes) -> Experiment:
    """Build data, teacher, student and method of a run.

    Raises:
        ConfigError: something does not exist or does not fit together, or the teacher does not match the network it
            was made from.
        OutOfMemory: it does not fit into memory.
    """
    with oom_hint("run"), as_config_errors():
        return _build(config, processes)


def _build(config: Config, processes: Processes) -> Experiment:
    batch = local_batch_size(config, processes)
    needs = needs_of(config.distill.settings)
    check_needs(config, needs)
    splits = usable(config, needs, build_data(config, processes))
    check_classes(config, needs, splits.num_classes)
    if processes.is_first:
        log_inputs(config, splits, config.data.first_augmentation)
    loader = build_data_loader(config, splits, processes, second_view=needs.second_view)
    total_steps = _total_steps(config, loader.steps_per_epoch)
    facts = {
        "training_samples": len(splits.train),
        "without_label": splits.unlabelled,
        "classes": splits.num_classes,
        "steps": total_steps,
    }
    require_agreement(processes, facts)

    torch.manual_seed(config.run.seed)
    student = build_network(config, "student", splits, needs=needs, batch=batch)
    network: TeacherNetwork | None = None
    cached = False
    if needs.teacher:
        assert config.teacher is not None
        cached = config.teacher.cache.mode != "off"
        with_weights = not cached or processes.is_first
        # A dry run sees the teacher before it is trained.
        trained = batch if needs.teacher_batch_statistics else None
        if config.teacher.training is not None:
            trained = local_batch_size(teacher_config(config), processes)
        network = build_teacher_network(config, splits, needs=needs, with_weights=with_weights, batch=trained)
    # The method's own weights come last, so that all methods of a comparison start from the same student.
    torch.manual_seed(config.run.seed + 2)
    first = None if network is None else first_network(network)
    features = first if isinstance(first, FeatureExtractor) else None
    context = RunContext(
        student=student if isinstance(student, FeatureExtractor) else None,
        teacher=features,
        teacher_blocks=None if features is None else lambda: split_at_levels(features),
        num_classes=splits.num_classes,
        sample_ids=torch.as_tensor(splits.train.sample_ids),
        sample_labels=torch.as_tensor(splits.train.labels),
        device=processes.device,
        total_steps=total_steps,
        steps_per_epoch=loader.steps_per_epoch,
        label_smoothing=config.loss.label_smoothing,
        impl=config.loss.impl,
    )
    with oom_hint("method"):
        method = build_method(config.distill.settings, context)
    autocast = torch.float16 if config.train.precision == "fp16" else None
    student_module = StudentModule(student, method.adapter, method.companion, autocast=autocast).to(processes.device)
    experiment = Experiment(config, processes, splits, loader, student_module, method)
    if network is not None and cached:
        experiment = replace(experiment, cache=open_output_cache(experiment, network))
    finished = experiment.cache is not None and not experiment.cache.missing  # then the head is not run
    head = None if method.head is None or finished else method.head.module
    if method.adapter is not None or head is not None:
        _check_method(experiment, network, head, batch)
    if network is not None and not cached:
        teacher = start_teacher(config, network, loader, processes, renormalise=teacher_affine(config, splits))
        experiment = replace(experiment, teacher=teacher)
    return experiment


def student_card(experiment: Experiment) -> StudentCard | None:
    """Return what one must know to use the student of a run, or None if its images' preprocessing is not known."""
    splits, student = experiment.splits, experiment.config.student
    preprocessing = preprocessing_of(splits, experiment.loader.schedule.augmentation)
    if preprocessing is None:
        return None
    return StudentCard(
        student.model,
        student.model_args,
        splits.num_classes,
        splits.class_names,
        replace(preprocessing, image_size=network_size(experiment.config, "student")),  # crop_pct is relative to it
    )


def _total_steps(config: Config, steps_per_epoch: int) -> int:
    steps, most = config.train.total_epochs * steps_per_epoch, config.train.max_steps
    return steps if most is None else min(steps, most)


def check_needs(config: Config, needs: Needs) -> None:
    """Refuse settings that the method of a run cannot do with.

    Raises:
        ConfigError: one of them.
    """
    mixing = config.data.mixing
    if needs.hard_labels and mixing.is_on:
        raise ConfigError(
            f"data.mixing.mixup_alpha = {mixing.mixup_alpha} and cutmix_alpha = {mixing.cutmix_alpha} with "
            f"distill.method = {config.distill.label!r}, which needs one class a sample; set both alphas to 0"
        )
    if needs.teacher_batch_statistics and config.teacher is not None and config.teacher.fold_batch_norm:
        raise ConfigError(
            "distill.ofd.teacher_batch_statistics = true with teacher.fold_batch_norm = true: a BatchNorm that is "
            "folded has no statistics of a batch; set teacher.fold_batch_norm = false"
        )
    if needs.whole_head and zero_stage(config) == 3:
        raise ConfigError(
            "distill.unikd.teacher_head = 'literal' with deepspeed.zero_optimization.stage = 3, which shards the "
            "head's weights where the loss needs them whole; set the stage to 2 or less"
        )


def usable(config: Config, needs: Needs, splits: DataSplits) -> DataSplits:
    """Return the data that the method of a run learns from: without a teacher that is the images with a label.

    Raises:
        ConfigError: the method, the training of the teacher or mixing needs labels that are not there.
    """
    without, total = splits.unlabelled, len(splits.train)
    if not without:
        return splits
    label, mixing = config.distill.label, config.data.mixing
    if without == total and (not needs.teacher or (config.teacher is not None and config.teacher.training is not None)):
        raise ConfigError(
            f"distill.method = 'none' and teacher.training learn from labels, and none of the {total} training images "
            "has one; give a teacher that is trained already (teacher.weights, without teacher.training)"
        )
    if not needs.teacher:
        return replace(splits, train=splits.train.select(np.flatnonzero(splits.train.labels != NO_LABEL)))
    if needs.labels:
        others = [name for name, kind in METHODS.items() if not kind.needs_of(kind.settings_class()).labels]
        key = "" if config.data.unlabeled_root is None else " (data.unlabeled_root = null)"
        raise ConfigError(
            f"distill.method = {label!r} needs the class of every training image, and {without} of {total} have no "
            f"label; leave them out{key}, or use a method that needs none: {', '.join(others)}"
        )
    if mixing.is_on and without < total:
        raise ConfigError(
            f"data.mixing.mixup_alpha = {mixing.mixup_alpha} and cutmix_alpha = {mixing.cutmix_alpha} mix labels, and "
            f"{without} of {total} training images have none; set both alphas to 0, or train without any label"
        )
    return splits


def check_classes(config: Config, needs: Needs, classes: int) -> None:
    """Refuse data of too few classes for the method of a run.

    Raises:
        ConfigError: one class, for a method that weighs classes against each other.
    """
    if needs.two_classes and classes < 2:
        raise ConfigError(
            f"distill.method = {config.distill.label!r} weighs classes against each other and needs at least 2, got "
            f"{classes} in data.name = {config.data.name!r}; train on more classes or use another method"
        )


def _check_method(
    experiment: Experiment,
    teacher: TeacherNetwork | None,
    head: nn.Module | None,
    batch: int,
) -> None:
    """Run what the method puts on top of both networks, which have been checked by themselves."""
    config, student_module, device = experiment.config, experiment.student_module, experiment.processes.device
    modes: dict[nn.Module, bool] = {student_module: True}
    if head is not None:
        modes[head] = True
    if teacher is not None:
        modes[teacher.to(device)] = False

    def run(images: Tensor) -> None:
        experiment.method.inside(student_module(images))
        if teacher is not None and head is not None:
            head(teacher(images))

    what = f"distill.method = {config.distill.label}"
    check_forward(run, modes, what=what, image_size=config.data.image_size, batch=batch, device=device)
