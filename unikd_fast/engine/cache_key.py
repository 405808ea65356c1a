"""Everything that decides what a teacher's cached outputs are."""

from dataclasses import asdict
from typing import Any

import torch

from unikd_fast.config import Config
from unikd_fast.data.augmentation import AUGMENTATION_VERSION, Augmentation
from unikd_fast.data.loader import Loader
from unikd_fast.data.manifest import hash_split
from unikd_fast.data.splits import DataSplits, TensorImages
from unikd_fast.data.view_windows import Windows
from unikd_fast.engine.inputs import teacher_constants
from unikd_fast.engine.sources import augmentation_of
from unikd_fast.methods import Method
from unikd_fast.models import FeatureExtractor, LogitsOnly
from unikd_fast.teacher import resolve_precision
from unikd_fast.teacher.cache import hash_tensors


def outputs_key(
    config: Config,
    splits: DataSplits,
    loader: Loader,
    network: FeatureExtractor | LogitsOnly,
    method: Method,
    device: torch.device,
) -> dict[str, Any]:
    """What the outputs of this run's teacher are made from, for a CacheKey.

    The student, the batch size and the loss are no part of it, so all students of a teacher share a cache; but a
    student whose weights ask for another interpolation shows other views, and a head that is fitted depends on the
    batches it is fitted to. Mean and deviation are those of the teacher's images, however the student's are normalised.
    World size, workers and device change rounding at most.

    Args:
        config: of a single run with a teacher.
        splits: the data set.
        loader: that shows its views.
        network: the teacher with its weights, as loaded.
        method: before its head is fitted.
        device: where the teacher runs, which decides precision "auto".
    """
    teacher = config.teacher
    assert teacher is not None
    mean, std = teacher_constants(config, splits)
    return {
        "teacher": {
            "model": teacher.model,
            "weights": hash_tensors(network.plain.state_dict()),
            "precision": _precision(config, device),
            "fold_batch_norm": teacher.fold_batch_norm,
            "compile": teacher.compile,
        },
        "data": {
            "samples": hash_split(splits.train),
            "image_size": splits.image_size,
            "mean": list(mean),
            "std": list(std),
            **loader.pixels,
        },
        "views": {
            **_views(augmentation_of(config), splits),
            "version": AUGMENTATION_VERSION,
            "seed": config.run.seed,
        },
        "head": _head(config, network, method),
    }


def _views(augmentation: Augmentation, splits: DataSplits) -> dict[str, Any]:
    """The settings that change a training view: what another kind of crop would use is left out."""
    views = asdict(augmentation)
    if augmentation.crop != "resized":
        del views["scale"], views["ratio"]
    if augmentation.crop != "pad":
        del views["padding"]
    del views["eval_resize"]
    if not any(augmentation.jitter):
        del views["jitter"]
    if augmentation.policy != "rand":
        del views["rand_ops"], views["rand_magnitude"]
    if augmentation.policy == "none":
        del views["policy"]
    if not augmentation.erase_probability:
        del views["erase_probability"], views["erase_scale"], views["erase_ratio"]
    if augmentation.crop != "resized" and not isinstance(splits.train, TensorImages):
        # Cut from the view for evaluation.
        windows = Windows.of(splits, augmentation)
        views["short_side"] = windows.short_side
        if windows.squash:
            views["squash"] = True
    return views


def _precision(config: Config, device: torch.device) -> str:
    assert config.teacher is not None
    asked = config.teacher.precision
    resolved = resolve_precision(asked, device)
    return "fp16, or bf16 where it overflows" if asked == "auto" and resolved == "fp16" else resolved


def _head(config: Config, network: FeatureExtractor | LogitsOnly, method: Method) -> dict[str, Any] | None:
    if method.fitted_head is None:
        return None
    assert isinstance(network, FeatureExtractor)
    return {
        "levels": list(network.level_names),
        "initial_weights": hash_tensors(method.fitted_head.state_dict()),
        "batch_size": config.train.global_batch_size // config.train.accumulation_steps,
        **method.head_settings,
    }
