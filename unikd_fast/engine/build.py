"""From a configuration to the objects of a run: data, networks, method, checked against each other."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from unikd_fast.config import Config, ConfigError
from unikd_fast.config.load import teacher_config
from unikd_fast.engine.cache import OutputCache, open_output_cache
from unikd_fast.engine.classification import CLASSIFICATION
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.inputs import as_config_errors
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.networks import TeacherNetwork
from unikd_fast.engine.preflight import require_agreement
from unikd_fast.engine.task import Task
from unikd_fast.engine.zero import local_batch_size, zero_stage
from unikd_fast.methods import Method, Needs, RunContext, build_method, needs_of
from unikd_fast.models import FeatureExtractor, LogitsOnly
from unikd_fast.values import Batch, Target

DETECTION_SETS = ("coco", "voc", "toy_scenes")


@dataclass(frozen=True)
class Experiment:
    """The objects of one run, built once by `build_experiment`.

    Attributes:
        config: configuration of this single run.
        processes: processes that train it.
        task: what differs between tasks.
        splits: data set.
        loader: this process's batches of it.
        student_module: student with what is trained alongside it.
        method: distillation method.
        teacher: teacher that runs online. If None, its outputs are cached, or the method needs no teacher.
        cache: teacher's outputs on disk. If None, the teacher runs online, or the method needs no teacher.
    """

    config: Config
    processes: Processes
    task: Task
    splits: Any
    loader: Any
    student_module: Any
    method: Method[Any]
    teacher: Any = None
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


def task_of(config: Config) -> Task:
    """Return the task of a configuration, which its data set decides on."""
    if config.data.name not in DETECTION_SETS:
        return CLASSIFICATION
    from unikd_fast.engine.detection import DETECTION  # torchvision, half a second

    return DETECTION


def _build(config: Config, processes: Processes) -> Experiment:
    batch = local_batch_size(config, processes)
    needs = needs_of(config.distill.settings)
    check_needs(config, needs)
    task = task_of(config)
    splits = task.open_data(config, needs, processes)
    loader = task.build_loader(config, splits, needs, processes)
    total_steps = _total_steps(config, loader.steps_per_epoch)
    facts = {
        "training_samples": len(splits.train),
        "without_label": splits.unlabelled,
        "classes": splits.num_classes,
        "steps": total_steps,
    }
    require_agreement(processes, facts)

    torch.manual_seed(config.run.seed)
    student = task.build_student(config, splits, needs, batch)
    network: nn.Module | None = None
    cached = False
    if needs.teacher:
        assert config.teacher is not None
        cached = config.teacher.cache.mode != "off"
        with_weights = not cached or processes.is_first
        # A dry run sees the teacher before it is trained.
        trained = batch if needs.teacher_batch_statistics else None
        if config.teacher.training is not None:
            trained = local_batch_size(teacher_config(config), processes)
        network = task.build_teacher(config, splits, needs, with_weights=with_weights, batch=trained)
    # The method's own weights come last, so that all methods of a comparison start from the same student.
    torch.manual_seed(config.run.seed + 2)
    context = RunContext(
        **task.context(splits, student, network),
        device=processes.device,
        total_steps=total_steps,
        steps_per_epoch=loader.steps_per_epoch,
        label_smoothing=config.loss.label_smoothing,
        impl=config.loss.impl,
    )
    with oom_hint("method"):
        method = build_method(config.distill.settings, context)
    autocast = torch.float16 if config.train.precision == "fp16" else None
    student_module = task.student_module(student, method, autocast).to(processes.device)
    experiment = Experiment(config, processes, task, splits, loader, student_module, method)
    if network is not None and cached:
        experiment = replace(experiment, cache=open_output_cache(experiment, cast(TeacherNetwork, network)))
    finished = experiment.cache is not None and not experiment.cache.missing  # then the head is not run
    head = None if method.head is None or finished else method.head.module
    if method.adapter is not None or head is not None:
        task.check_method(config, student_module, method, network, head, batch, processes)
    if network is not None and not cached:
        teacher = task.start_teacher(config, network, loader, splits, processes)
        experiment = replace(experiment, teacher=teacher)
    return experiment


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
