"""What `unikd init` does: look at a folder of images, and write a configuration that trains on it as it is."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from unikd_fast.config import ConfigError, parse_config
from unikd_fast.data.images import FORMATS
from unikd_fast.data.sets import open_data
from unikd_fast.data.sets.image_folder import EXTENSIONS
from unikd_fast.data.settings import DataSettings
from unikd_fast.data.splits import DataSplits, ImageFiles
from unikd_fast.io import write_file
from unikd_fast.models import has_published_weights

_LOOKED_AT = 64
_SIZES = (32, 64, 96, 128, 160, 224)
_PRETRAINED_FROM = 96  # pixels: smaller images get networks of the CIFAR family, unless others are named
_BATCHES = (8, 16, 32, 64)
_STEPS = 3000  # of optimisation that a small network needs from pretrained weights, about
_VAL_SHARE = 0.15


@dataclass(frozen=True)
class Folder:
    """What a folder of images holds.

    Attributes:
        splits: its images.
        unlabelled: folder of further training images without labels. If None, there is none.
        val_samples: number of images held out of it; 0 if it has a val folder.
        sizes: smallest, median and largest short side in pixels, of some of the training images.
    """

    splits: DataSplits
    unlabelled: Path | None
    val_samples: int
    sizes: tuple[int, int, int]

    @property
    def labelled(self) -> int:
        """Return the number of training images with a label."""
        return len(self.splits.train) - self.splits.unlabelled

    def __str__(self) -> str:
        without = f" ({self.splits.unlabelled:,} without a label)" if self.splits.unlabelled else ""
        counts = f"{len(self.splits.train):,} training{without} and {len(self.splits.val):,} validation images"
        held_out = ", held out of the same folders" if self.val_samples else ""
        low, middle, high = self.sizes
        return f"{self.splits.num_classes} classes, {counts}{held_out}; short sides {low} to {high} px, median {middle}"


def look(root: Path, unlabelled: Path | None = None) -> Folder:
    """Look at a folder with train/<class> and val/<class>, with <class> alone, or with images in train and val/<class>.

    Args:
        root: folder.
        unlabelled: folder of further training images without labels. If None, ``unlabeled`` in the root, if it exists.

    Raises:
        ConfigError: it holds neither, or too few images.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder; give the folder of your images")
    if unlabelled is None and (root / "unlabeled").is_dir():
        unlabelled = root / "unlabeled"
    try:
        val_samples = 0
        if not ((root / "val").is_dir() and (unlabelled is not None or (root / "train").is_dir())):
            val_samples = _held_out(root, unlabelled)
        data = DataSettings(
            name="image_folder",
            root=str(root),
            unlabeled_root=None if unlabelled is None else str(unlabelled),
            image_size=32,
            val_samples=val_samples,
        )
        splits = open_data(data)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    assert isinstance(splits.train, ImageFiles)
    return Folder(splits, unlabelled, val_samples, _sizes(splits.train.paths))


def _held_out(root: Path, unlabelled: Path | None) -> int:
    """Return how many images to hold out of a folder of class folders."""
    entries = [entry for entry in sorted(root.iterdir()) if entry.is_dir()]
    if unlabelled is not None:
        entries = [entry for entry in entries if not unlabelled.samefile(entry)]
    counts = [
        sum(name.lower().endswith(EXTENSIONS) for *_, names in os.walk(entry) for name in names) for entry in entries
    ]
    if len(counts) < 2 or min(counts) < 2:
        raise ConfigError(
            f"{root} has no train and val, and {len(counts)} folders of classes, the smallest with "
            f"{min(counts, default=0)} images; it must hold train/<class>/<image> and val/<class>/<image>, or at least "
            "two folders <class>/<image> with two images each"
        )
    return max(len(counts), round(_VAL_SHARE * sum(counts)))


def _sizes(paths: Sequence[str]) -> tuple[int, int, int]:
    from PIL import Image

    sides = []
    for path in paths[:: max(1, len(paths) // _LOOKED_AT)]:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sides.append(min(image.size))
        except OSError:
            continue  # the loader names it
    if not sides:
        raise ConfigError(f"none of the images looked at can be opened, the first is {paths[0]}; see data.bad_images")
    return min(sides), int(median(sides)), max(sides)


def configuration(
    root: Path,
    found: Folder,
    *,
    teacher: str | None = None,
    teacher_weights: str | None = None,
    student: str | None = None,
) -> dict[str, Any]:
    """Return a configuration for a folder.

    Args:
        root: folder.
        found: what it holds.
        teacher, student: names of networks. If None, common ones for the size of the images.
        teacher_weights: file of a teacher that is trained on these classes. If None, it is trained first.

    Raises:
        ConfigError: no training image has a label, so that a teacher cannot be trained on them.
        ValueError: a network is unknown.
    """
    if not found.labelled and (teacher is None or teacher_weights is None):
        raise ConfigError(
            f"none of the training images of {root} has a label, so a teacher cannot be trained on them; give one that "
            "is trained on these classes by --teacher NAME and --teacher-weights FILE"
        )
    size = max((each for each in _SIZES if each <= found.sizes[1]), default=_SIZES[0])
    large = size >= _PRETRAINED_FROM
    batch = max(each for each in _BATCHES if each == _BATCHES[0] or 16 * each <= len(found.splits.train))
    steps = max(1, len(found.splits.train) // batch)
    epochs = max(10, min(200, round(_STEPS / steps)))
    names = ("timm/resnet50", "timm/mobilenetv3_small_100") if large else ("cifar/resnet56", "cifar/resnet20")
    first, second = teacher or names[0], student or names[1]
    published = {name: has_published_weights(name) for name in (first, second)}
    data: dict[str, Any] = {"name": "image_folder", "root": str(root), "image_size": size}
    if found.unlabelled is not None:
        data["unlabeled_root"] = str(found.unlabelled)
    if found.val_samples:
        data["val_samples"] = found.val_samples
    if not large:  # a crop out of the centre, or of an eighth of the area, leaves little of a small image
        data["augmentation"] = {"scale": [0.5, 1.0], "eval_resize": size}
    training: dict[str, Any] = {"total_epochs": max(5, epochs // 3)}
    if published[first] != published[second]:
        training["learning_rate"] = _rate(published[first])
    if batch > found.labelled:
        training["global_batch_size"] = max(2, found.labelled // 4)
    taught: dict[str, Any] = {"weights": teacher_weights}
    if teacher_weights is None:
        taught = {**_weights(published[first]), "training": training}
    return {
        "$schema": str(files("unikd_fast").joinpath("configs/schema.json")),
        "data": data,
        "teacher": {"model": first, **taught},
        "student": {"model": second, **_weights(published[second])},
        "distill": {"method": "unikd"},
        "train": {
            "total_epochs": epochs,
            "global_batch_size": batch,
            "learning_rate": _rate(published[second]),
            "weight_decay": 1e-4 if published[second] else 5e-4,
            "warmup_epochs": 1,
            "channels_last": True,
        },
    }


def _weights(published: bool) -> dict[str, str]:
    return {"weights": "pretrained"} if published else {}


def _rate(published: bool) -> float:
    return 0.01 if published else 0.05


def init(root: Path, target: Path, *, unlabelled: Path | None, force: bool, **networks: str | None) -> str:
    """Write a configuration for a folder of images, and return what was found and what to do next.

    Args:
        root, unlabelled: see `look`.
        target: file to write.
        force: whether to replace it.
        networks: see `configuration`.

    Raises:
        ConfigError: the folder cannot be used, or the target exists.
    """
    if target.exists() and not force:
        raise ConfigError(f"--to {target} exists; give another name, or --force to replace it")
    found = look(root, unlabelled)
    try:
        raw = configuration(root, found, **networks)
    except ValueError as error:  # an unknown network
        raise ConfigError(str(error)) from error
    parse_config(raw, name=target.stem, source=str(target))
    write_file(target, json.dumps(raw, indent=2) + "\n")
    return (
        f"{root}: {found}\nwrote {target}: {raw['teacher']['model']} teaches {raw['student']['model']} at "
        f"{raw['data']['image_size']} px for {raw['train']['total_epochs']} epochs\n"
        f"look first:  unikd train --config {target} --dry-run\ntrain:       unikd train --config {target}"
    )
