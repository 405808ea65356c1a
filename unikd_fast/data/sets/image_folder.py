"""Folders of images in the layout of ImageNet: root/train/<class>/<image> and root/val/<class>/<image>."""

import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from unikd_fast.data.splits import IMAGENET_MEAN, IMAGENET_STD, DataSplits, ImageFiles, stratified_split
from unikd_fast.values import NO_LABEL

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those of torchvision's ImageFolder, in capitals or not."""

_NAMED = 5

_logger = logging.getLogger("unikd_fast")


def load_image_folder(
    root: Path, image_size: int, *, val_samples: int = 0, unlabelled: Path | None = None
) -> DataSplits:
    """List the images of a folder; nothing is decoded yet.

    Classes are the folders below train and val, sorted by name; images are the files in them and in their sub-folders,
    however deep, whose names end in one of `EXTENSIONS`. The samples of a split are sorted by class, then by folder and
    file name, as torchvision's ImageFolder does, and their place in that list is their id. Links are followed; one that
    leads nowhere is listed as well, for the loader to find, since ids would change if it were not. Everything else is
    left out, counted and named in the log: other endings, names that begin with a dot, links to a folder around them,
    images beside the class folders. Mean and deviation are those of ImageNet; `test` is `val`.

    Training images may lack a label: those of `unlabelled`, which come after the others, and all of a train that has
    images but no folders.

    Args:
        root: folder.
        image_size: side of the images that the networks see.
        val_samples: number of images held out for validation, stratified, the same in every run: the class folders then
            lie in the root itself, without train and val. With 0, there are both.
        unlabelled: folder of images without labels, at any depth; then train may be missing, or be this folder. If
            None, there are none.

    Raises:
        FileNotFoundError: the root, train or val is missing.
        ValueError: a split has no classes or a broken link to one, train and val have different ones, a class has no
            images, or one of the other folders lies in `unlabelled` or around it.

    Example:
        >>> splits = load_image_folder(Path("/data/imagenet"), 224)
        >>> splits.num_classes
        1000
    """
    read = _held_out(root, val_samples, unlabelled) if val_samples else _published(root, unlabelled)
    names, train, val = read
    return DataSplits(
        train=train,
        val=val,
        test=val,
        num_classes=len(names),
        class_names=tuple(names),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=image_size,
    )


def _published(root: Path, unlabelled: Path | None) -> tuple[list[str], ImageFiles, ImageFiles]:
    """Return the classes of a root with train and val, and its splits."""
    folders = {part: root / part for part in ("train", "val")}
    for part, folder in (("root", root), *folders.items()):
        if not folder.is_dir() and (part != "train" or unlabelled is None):
            raise FileNotFoundError(
                f"load_image_folder: {folder} is missing; the root must hold train/<class>/<image> and "
                "val/<class>/<image>, or <class>/<image> with val_samples held out"
            )
    val_names = _class_names(folders["val"])
    if unlabelled is not None:
        _require_apart(unlabelled, folders["val"])
        if not folders["train"].is_dir() or unlabelled.samefile(folders["train"]):
            return val_names, _list_unlabelled(unlabelled), _list_images(folders["val"], val_names)
        _require_apart(unlabelled, folders["train"])
    elif _is_flat(folders["train"]):
        return val_names, _list_unlabelled(folders["train"]), _list_images(folders["val"], val_names)
    train_names = _class_names(folders["train"])
    if train_names != val_names:
        name = min(set(train_names) ^ set(val_names))
        has, lacks = ("train", "val") if name in train_names else ("val", "train")
        raise ValueError(
            f"load_image_folder: train has {len(train_names)} classes and val {len(val_names)} under {root}; the first "
            f"that differs is {name!r}, in {has} but not in {lacks}; both need the same class folders (folders of "
            f"images without labels: set data.unlabeled_root to {folders['train']})"
        )
    train = _list_images(folders["train"], train_names)
    if unlabelled is not None:
        train = _joined(train, _list_unlabelled(unlabelled), first_id=len(train))
    return train_names, train, _list_images(folders["val"], val_names)


def _is_flat(folder: Path) -> bool:
    """Return whether a folder has images, and no folders that could be classes."""
    with os.scandir(folder) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    return not any(map(_is_class, seen)) and any(entry.name.lower().endswith(EXTENSIONS) for entry in seen)


def _require_apart(unlabelled: Path, other: Path) -> None:
    one, two = unlabelled.resolve(), other.resolve()
    if one.is_relative_to(two) or two.is_relative_to(one):
        raise ValueError(
            f"load_image_folder: the images without labels in {unlabelled} and those in {other} are partly the same; "
            "put them into a folder beside it (data.unlabeled_root)"
        )


def _list_unlabelled(folder: Path) -> ImageFiles:
    """Return the images of a folder and its sub-folders, sorted by folder and name, without labels."""
    left_out: list[str] = []
    paths = [path for _, found in sorted(_walk(str(folder), left_out)) for path in found]
    _log_left_out(folder, left_out)
    if not paths:
        raise ValueError(
            f"load_image_folder: {folder} holds no images; put images ({' '.join(EXTENSIONS)}) into it, or set "
            "data.unlabeled_root to null"
        )
    return ImageFiles(paths, np.full(len(paths), NO_LABEL))


def _joined(labelled: ImageFiles, unlabelled: ImageFiles, *, first_id: int) -> ImageFiles:
    """Return both as one split; the ids of the second begin with ``first_id``."""
    return ImageFiles(
        [*labelled.paths, *unlabelled.paths],
        np.concatenate((labelled.labels, unlabelled.labels)),
        np.concatenate((labelled.sample_ids, first_id + unlabelled.sample_ids)),
    )


_HOLD_OUT_SEED = 0


def _held_out(root: Path, val_samples: int, unlabelled: Path | None) -> tuple[list[str], ImageFiles, ImageFiles]:
    """Return the classes of a root of class folders alone, and its images in two parts."""
    names = _class_names(root)
    if unlabelled is not None:
        names = [name for name in names if not unlabelled.samefile(root / name)]
        for name in names:
            _require_apart(unlabelled, root / name)
    if {"train", "val"} <= set(names):
        raise ValueError(
            f"load_image_folder: {root} has train and val, and val_samples = {val_samples} would hold out further "
            "ones; set it to 0"
        )
    whole = _list_images(root, names)
    if not len(names) <= val_samples <= len(whole) - len(names):
        raise ValueError(
            f"load_image_folder: val_samples must be between {len(names)}, one a class, and {len(whole) - len(names)} "
            f"of the {len(whole)} images in {root}, got {val_samples}"
        )
    kept, held_out = stratified_split(whole.labels, (len(whole) - val_samples, val_samples), seed=_HOLD_OUT_SEED)
    train = whole.select(kept)
    if unlabelled is not None:
        train = _joined(train, _list_unlabelled(unlabelled), first_id=len(whole))
    return names, train, whole.select(held_out)


def _class_names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_class(entry))
    if not names:
        raise ValueError(f"load_image_folder: {folder} has no class folders; images belong in {folder}/<class>/")
    return names


def _is_class(entry: os.DirEntry[str]) -> bool:
    if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
        raise ValueError(
            f"load_image_folder: the link {entry.path} leads nowhere, and labels would change without its class; "
            "repair or remove it"
        )
    return entry.is_dir()


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a file, or a link that does not lead to a folder; it may lead nowhere."""
    if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
        return True
    return entry.is_file()


def _list_images(folder: Path, class_names: list[str]) -> ImageFiles:
    paths: list[str] = []
    counts: list[int] = []
    left_out = _beside_classes(folder)
    for name in class_names:
        images = [path for _, found in sorted(_walk(str(folder / name), left_out)) for path in found]
        paths += images
        counts.append(len(images))
    _log_left_out(folder, left_out)
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"load_image_folder: {len(empty)} of {len(class_names)} class folders in {folder} hold no images: "
            f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}; put images ({' '.join(EXTENSIONS)}) into them "
            "or remove them from train and val"
        )
    return ImageFiles(paths, np.repeat(np.arange(len(class_names)), counts))


def _log_left_out(folder: Path, left_out: list[str]) -> None:
    if left_out:
        names = ", ".join(os.path.relpath(path, folder) for path in left_out[:_NAMED])
        _log_once(
            f"load_image_folder: {len(left_out)} files and folders in {folder} are left out: {names}"
            f"{', ...' if len(left_out) > _NAMED else ''}; names of images end in {' '.join(EXTENSIONS)}"
        )


def _walk(top: str, left_out: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder from the top downwards with the paths of its images, sorted; add what is left out."""
    # Folders to come, each with the real paths of itself and those around it, to which a link may lead back.
    pending: list[tuple[str, tuple[str, ...]]] = [(top, (os.path.realpath(top),))]
    while pending:
        folder, around = pending.pop()
        images = []
        # A million files: entries of a folder know whether they are files without a further system call.
        with os.scandir(folder) as entries:
            for entry in entries:
                hidden, named = entry.name.startswith("."), entry.name.lower().endswith(EXTENSIONS)
                if named and not hidden and _is_file(entry):
                    images.append(entry.path)
                elif not hidden and entry.is_dir() and (real := os.path.realpath(entry.path)) not in around:
                    pending.append((entry.path, (*around, real)))
                elif named or not hidden or entry.is_dir():  # what is hidden and not an image is the system's
                    left_out.append(entry.path)
        yield folder, sorted(images)


def _beside_classes(folder: Path) -> list[str]:
    """Return the images and hidden folders that lie beside the class folders."""
    with os.scandir(folder) as entries:
        return [
            entry.path
            for entry in entries
            if (entry.name.startswith(".") if entry.is_dir() else entry.name.lower().endswith(EXTENSIONS))
        ]


@cache
def _log_once(message: str) -> None:
    _logger.warning(message)
