"""From a configuration to the objects of a run: data, networks, method, checked against each other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from unikd_fast.config import Config
from unikd_fast.data.datasets import DataSplits
from unikd_fast.data.loader import Loader
from unikd_fast.engine.networks import build_network, build_teacher_network
from unikd_fast.engine.online_teacher import start_teacher
from unikd_fast.engine.output_cache import OutputCache, open_output_cache
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.sharding import local_batch_size
from unikd_fast.engine.sources import build_data, build_data_loader, refusing_misfits
from unikd_fast.engine.student import StudentSide
from unikd_fast.methods import KD, Method, StudentAlone, UniKD
from unikd_fast.models import FeatureExtractor, LogitsOnly
from unikd_fast.teacher import OnlineTeacher
from unikd_fast.values import Batch, Target


@dataclass(frozen=True)
class Experiment:
    """The objects of one run. ``steps_per_epoch`` and ``total_steps`` count optimiser steps.

    The teacher answers online (``teacher``) or from disk (``cache``); methods without one have neither.
    ``teacher_record`` says how the online teacher runs and how faithful it is to itself in fp32.
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
    cache: OutputCache | None = None

    @property
    def epochs(self) -> int:
        """That are trained, the last one perhaps not to its end."""
        return -(-self.total_steps // self.steps_per_epoch)

    def micro_batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, Target | None]]:
        """This process's micro-batches of an epoch from an optimiser step on, with the target where it is cached."""
        if self.cache is None:
            return ((batch, None) for batch in self.loader.train(epoch, start_step))
        return self.cache.micro_batches(epoch, start_step)


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
    cached = False
    if METHODS[config.distill.method].needs_teacher:
        assert config.teacher is not None
        cached = config.teacher.cache.mode != "off"
        with_weights = not cached or processes.is_first
        teacher_network = build_teacher_network(config, splits, levels=needs_levels, with_weights=with_weights)
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
    teacher, record, cache = None, None, None
    if teacher_network is not None and cached:
        epochs = -(-total_steps // steps_per_epoch)
        cache = open_output_cache(config, splits, loader, teacher_network, method, processes, epochs=epochs)
    elif teacher_network is not None:
        teacher, record = start_teacher(config, teacher_network, loader, processes)
    return Experiment(
        config, splits, loader, teacher, student, side, method, steps_per_epoch, total_steps, record, cache
    )


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
