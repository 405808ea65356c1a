"""The data set and the loader of a configuration, and how their images are preprocessed.

Mean, deviation, interpolation and crop are shared by teacher and student. They follow the student if its weights define
a preprocessing, else the teacher, else the data set, so that a student from scratch sees what its teacher sees. If a
teacher needs another mean and deviation, its images are renormalised on the device; another interpolation, crop or
resolution cannot be provided for the same images, and the log says so. Data sets in memory, and those whose own
transforms make tensors, keep their constants.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from unikd_fast.config import Config, ConfigError
from unikd_fast.config.load import single_teachers
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.loader import Loader, build_loader
from unikd_fast.data.roots import expand_weights
from unikd_fast.data.sets import open_data
from unikd_fast.data.splits import DataSplits
from unikd_fast.data.views import Windows
from unikd_fast.engine.distributed import Processes
from unikd_fast.errors import RunError
from unikd_fast.given import find, is_given
from unikd_fast.models import Preprocessing, attached_preprocessing, published_preprocessing, stored_preprocessing
from unikd_fast.teacher import Affine
from unikd_fast.values import Channels

_logger = logging.getLogger("unikd_fast")


def followed_preprocessing(config: Config) -> Preprocessing | None:
    """Return the preprocessing that the images of a run follow, or None if no weights define one.

    Raises:
        ValueError: an environment variable is not set, or the metadata of a weights file is damaged.
    """
    return next((wanted for _, _, wanted in _published(config)), None)


def follow(splits: DataSplits, wanted: Preprocessing | None) -> DataSplits:
    """Return a data set with this preprocessing; one that is not resized is returned as it is."""
    if wanted is None or not splits.is_resized:
        return splits
    return replace(
        splits,
        mean=wanted.mean,
        std=wanted.std,
        interpolation=wanted.interpolation,
        eval_resize=wanted.short_side(splits.image_size),
        squash=wanted.squash,
    )


def preprocessing_of(splits: DataSplits, augmentation: Augmentation) -> Preprocessing | None:
    """Return the preprocessing of a run's images, for users of its student, or None if it is not known."""
    if not splits.is_described:
        return None
    size, short_side, squash = splits.image_size, splits.eval_resize or splits.image_size, splits.squash
    if splits.is_resized:
        windows = Windows.of(splits, augmentation)
        short_side, squash = windows.short_side, windows.squash
    return Preprocessing(splits.mean, splits.std, splits.interpolation, size / short_side, squash, size)


def teacher_constants(config: Config, splits: DataSplits) -> tuple[Channels, Channels]:
    """Return the mean and deviation of the teacher's images, after they are renormalised for it."""
    wanted = _preprocessing(config, "teacher") if splits.is_resized else None
    return (splits.mean, splits.std) if wanted is None else (wanted.mean, wanted.std)


def network_size(config: Config, role: str) -> int:
    """Return the height and width of the images that the teacher or student sees."""
    section = config.student if role == "student" else config.teacher
    return config.data.image_size if section is None or section.image_size is None else section.image_size


def teacher_affine(config: Config, splits: DataSplits) -> Affine | None:
    """Return the scale and shift from the loader's images to the teacher's, or None if they are the same."""
    return affine_between((splits.mean, splits.std), teacher_constants(config, splits))


def affine_between(given: tuple[Channels, Channels], wanted: tuple[Channels, Channels]) -> Affine | None:
    """Return the scale and shift from images of one mean and deviation to those of another, None if they are equal."""
    if given == wanted:
        return None
    red, green, blue = (
        (own_std / to_std, (own_mean - to_mean) / to_std)
        for own_mean, own_std, to_mean, to_std in zip(*given, *wanted, strict=True)
    )
    return (red[0], green[0], blue[0]), (red[1], green[1], blue[1])


def log_inputs(config: Config, splits: DataSplits, augmentation: Augmentation) -> None:
    """Log in one line the preprocessing, the network it follows, and which network was trained with another."""
    found = list(_published(config))
    if not found or not splits.is_resized:
        return
    windows = Windows.of(splits, augmentation)
    shown = _resize(splits.interpolation, windows.short_side, squash=windows.squash)
    role, single, _ = found[0]
    name = f"{_named(single, role)}{_guessed(single, role)}"
    parts = [f"mean {_short(splits.mean)}, std {_short(splits.std)}, {shown}: those of {name}"]
    if teacher_affine(config, splits) is not None:
        mean, std = teacher_constants(config, splits)
        parts.append(f"renormalised for the teacher to mean {_short(mean)}, std {_short(std)}")
    for role, single, wanted in found:
        size = network_size(single, role)
        own = _resize(wanted.interpolation, wanted.short_side(splits.image_size), squash=wanted.squash)
        differs = [] if own == shown else [own]
        if wanted.image_size != size:
            differs.append(f"{wanted.image_size} px instead of {size}")
        if differs:
            parts.append(f"{_named(single, role)} was trained with {', '.join(differs)}")
    _log_once(f"images: {'; '.join(parts)}")


def _published(config: Config) -> Iterator[tuple[str, Config, Preprocessing]]:
    """Yield the networks whose weights define a preprocessing, the student first, and that preprocessing: each as its
    role in a configuration in which no other has this role."""
    teachers = [] if config.teacher is None else single_teachers(config)
    for role, single in (("student", config), *(("teacher", each) for each in teachers)):
        wanted = _preprocessing(single, role)
        if wanted is not None:
            yield role, single, wanted


def _named(config: Config, role: str) -> str:
    section = config.student if role == "student" else config.teacher
    assert section is not None
    return f"{role}.model = {section.model}"


def _guessed(config: Config, role: str) -> str:
    section = config.student if role == "student" else config.teacher
    assert section is not None and section.weights is not None
    path = Path(expand_weights(role, section.weights))
    is_silent = path.is_file() and stored_preprocessing(path) is None
    return " (its weights are a file: the default of its name)" if is_silent else ""


def _preprocessing(config: Config, role: str) -> Preprocessing | None:
    section = config.student if role == "student" else config.teacher
    if section is None or section.weights is None:
        return None
    if is_given(section.weights):  # of a student it is not known whether it is pretrained
        given = find(section.weights, f"{role}.weights")
        return attached_preprocessing(given) if role == "teacher" else None
    try:
        weights = expand_weights(role, section.weights)
    except ValueError:
        if role == "teacher" and config.distill.method == "none":
            return None  # such a run does without its teacher's file
        raise
    return published_preprocessing(section.model, weights, image_size=network_size(config, role))


def _resize(interpolation: str, short_side: int, *, squash: bool) -> str:
    return f"{interpolation}, {'both sides' if squash else 'short side'} {short_side} before the central crop"


def _short(values: Channels) -> str:
    return "/".join(f"{value:.3g}" for value in values)


@cache
def _log_once(message: str) -> None:
    _logger.info(message)


@contextmanager
def as_config_errors() -> Iterator[None]:
    """Turn errors of the lower layers about data, weights and models into a ConfigError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise error if isinstance(error, RunError) else ConfigError(str(error)) from error


def build_data(config: Config, processes: Processes) -> DataSplits:
    """Open the data set, with the preprocessing of the networks' weights; all processes must call it."""
    splits = open_data(config.data)
    if not splits.is_resized:
        return splits
    # On the first process: if outputs are cached, others may not have the teacher's file.
    return follow(splits, processes.from_first(lambda: followed_preprocessing(config)))


def build_data_loader(config: Config, splits: DataSplits, processes: Processes, *, second_view: bool = False) -> Loader:
    """Return this process's loader; with ``second_view`` it shows two views of each training sample."""
    return build_loader(splits, config.data, **loader_arguments(config, processes), second_view=second_view)


def loader_arguments(config: Config, processes: Processes) -> dict[str, Any]:
    """Return the arguments of this process's loader of any data."""
    return {
        "seed": config.run.seed,
        "global_batch_size": config.train.global_batch_size,
        "accumulation_steps": config.train.accumulation_steps,
        "rank": processes.rank,
        "world_size": processes.world_size,
        "device": processes.device,
        "channels_last": config.train.channels_last,
    }
