"""The task of image classification: what the engine does for it, and for no other task."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from unikd_fast import tasks
from unikd_fast.config import Config, ConfigError
from unikd_fast.data.loader import Loader
from unikd_fast.data.splits import DataSplits
from unikd_fast.engine.checked_teacher import make_teacher, start_teacher
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.evaluate import BatchLogits, evaluate, image_features, write_outputs
from unikd_fast.engine.inputs import (
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
from unikd_fast.engine.task import Task
from unikd_fast.engine.teacher import require_accuracy
from unikd_fast.engine.timing import UNTIMED, StepClock
from unikd_fast.methods import METHODS, OF_IMAGES, Method, Needs
from unikd_fast.models import FeatureExtractor, LogitsOnly, StudentCard
from unikd_fast.models.blocks import split_at_levels
from unikd_fast.teacher import OnlineTeacher
from unikd_fast.values import NO_LABEL, Batch, Features, Loss, Target


class Classification(Task):
    """Images with one class each."""

    figures = tasks.CLASSIFICATION

    def open_data(self, config: Config, needs: Needs, processes: Processes) -> DataSplits:
        if needs.near_objects:
            raise ConfigError(
                f"distill.method = {config.distill.label!r} with data.name = {config.data.name!r}: the method is for "
                "detection, and these images have no boxes; use fitnet, or data with boxes (coco, voc)"
            )
        splits = _usable(config, needs, build_data(config, processes))
        _check_classes(config, needs, splits.num_classes)
        if processes.is_first:
            log_inputs(config, splits, config.data.first_augmentation)
        return splits

    def build_loader(self, config: Config, splits: DataSplits, needs: Needs, processes: Processes) -> Loader:
        return build_data_loader(config, splits, processes, second_view=needs.second_view)

    def build_student(
        self, config: Config, splits: DataSplits, needs: Needs, batch: int
    ) -> FeatureExtractor | LogitsOnly:
        return build_network(config, "student", splits, needs=needs, batch=batch)

    def build_teacher(
        self,
        config: Config,
        splits: DataSplits,
        needs: Needs,
        *,
        with_weights: bool = True,
        batch: int | None = None,
    ) -> TeacherNetwork:
        return build_teacher_network(config, splits, needs=needs, with_weights=with_weights, batch=batch)

    def context(self, splits: DataSplits, student: nn.Module, teacher: nn.Module | None) -> dict[str, Any]:
        first = None if teacher is None else first_network(cast(TeacherNetwork, teacher))
        features = first if isinstance(first, FeatureExtractor) else None
        return {
            "student": student if isinstance(student, FeatureExtractor) else None,
            "teacher": features,
            "teacher_blocks": None if features is None else lambda: split_at_levels(features),
            "num_classes": splits.num_classes,
            "sample_ids": torch.as_tensor(splits.train.sample_ids),
            "sample_labels": torch.as_tensor(splits.train.labels),
        }

    def student_module(self, student: nn.Module, method: Method[Any], autocast: torch.dtype | None) -> StudentModule:
        return StudentModule(student, method.adapter, method.companion, autocast=autocast)

    def check_method(
        self,
        config: Config,
        student_module: nn.Module,
        method: Method[Any],
        teacher: nn.Module | None,
        head: nn.Module | None,
        batch: int,
        processes: Processes,
    ) -> None:
        modes: dict[nn.Module, bool] = {student_module: True}
        if head is not None:
            modes[head] = True
        if teacher is not None:
            modes[teacher.to(processes.device)] = False

        def run(images: Tensor) -> None:
            method.inside(student_module(images))
            if teacher is not None and head is not None:
                head(teacher(images))

        what = f"distill.method = {config.distill.label}"
        size, device = config.data.image_size, processes.device
        check_forward(run, modes, what=what, image_size=size, batch=batch, device=device)

    def start_teacher(
        self, config: Config, network: nn.Module, loader: Loader, splits: DataSplits, processes: Processes
    ) -> OnlineTeacher:
        return start_teacher(config, network, loader, processes, renormalise=teacher_affine(config, splits))

    def loss(
        self,
        engine: Any,
        teacher: nn.Module | None,
        method: Method[Any],
        batch: Batch,
        target: Target | None = None,
        clock: StepClock = UNTIMED,
    ) -> Loss:
        if target is None and teacher is not None:
            with oom_hint("teacher"):
                with torch.no_grad():
                    features = teacher(batch.images)
                    second = None if batch.second is None else teacher(batch.second)
                target = method.target(features, second)
        clock.mark("teacher")
        with oom_hint("student"):
            student = engine(batch.images) if batch.second is None else engine(batch.images, batch.second)
            clock.mark("student_forward")
            return method.loss(student, target, batch)

    def teacher_features(self, teacher: nn.Module, batch: Batch) -> tuple[Features, Tensor]:
        return image_features(teacher, batch)

    def evaluate(
        self,
        network: nn.Module,
        loader: Loader,
        splits: DataSplits,
        split: Literal["val", "test"],
        processes: Processes,
        *,
        autocast: torch.dtype | None = None,
        keep: list[BatchLogits] | None = None,
    ) -> dict[str, Any]:
        return evaluate(network, loader.evaluate(split), processes, autocast=autocast, keep=keep)

    def write_outputs(self, folder: Path, outputs: list[BatchLogits], splits: DataSplits, processes: Processes) -> None:
        write_outputs(folder, outputs, processes, split="test")

    def require_teacher(
        self, config: Config, found: dict[str, float], splits: DataSplits, processes: Processes, name: str
    ) -> None:
        require_accuracy(config, found, splits.num_classes, processes, name)

    def plain_teacher(self, config: Config, network: nn.Module, splits: DataSplits, processes: Processes) -> nn.Module:
        assert config.teacher is not None
        # "auto" is fp32 here, whose range needs no check. Not compiled: it runs once over the split.
        precision = "fp32" if config.teacher.precision == "auto" else config.teacher.precision
        affine = teacher_affine(config, splits)
        return make_teacher(config, network, processes.device, precision=precision, renormalise=affine)

    def card(self, config: Config, splits: DataSplits, loader: Loader) -> StudentCard | None:
        student = config.student
        preprocessing = preprocessing_of(splits, loader.schedule.augmentation)
        if preprocessing is None:
            return None
        return StudentCard(
            student.model,
            student.model_args,
            splits.num_classes,
            splits.class_names,
            replace(preprocessing, image_size=network_size(config, "student")),  # crop_pct is relative to it
        )


CLASSIFICATION = Classification()


def _usable(config: Config, needs: Needs, splits: DataSplits) -> DataSplits:
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
        others = [name for name in OF_IMAGES if not METHODS[name].needs_of(METHODS[name].settings_class()).labels]
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


def _check_classes(config: Config, needs: Needs, classes: int) -> None:
    """Refuse data of too few classes for the method of a run.

    Raises:
        ConfigError: one class, for a method that weighs classes against each other.
    """
    if needs.two_classes and classes < 2:
        raise ConfigError(
            f"distill.method = {config.distill.label!r} weighs classes against each other and needs at least 2, got "
            f"{classes} in data.name = {config.data.name!r}; train on more classes or use another method"
        )
