"""Folders of images in the layout of ImageNet: root/train/<class>/<image> and root/val/<class>/<image>."""

import os
from pathlib import Path

import numpy as np

from unikd_fast.data.splits import IMAGENET_MEAN, IMAGENET_STD, DataSplits, ImageFiles

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def load_image_folder(root: Path, image_size: int) -> DataSplits:
    """List the images of a folder; nothing is decoded yet.

    Classes are the folders below train and val, sorted by name; the samples of a split are sorted by class, then by
    file name, and their place in that list is their id. Links are followed; one that leads nowhere is listed as well,
    for the loader to find, since ids would change if it were not. Names that begin with a dot are passed over. Mean and
    deviation are those of ImageNet; `test` is `val`.

    Raises:
        FileNotFoundError: the root, train or val is missing.
        ValueError: a split has no classes or a broken link to one, train and val have different ones, or a class has no
            images.

    Example:
        >>> splits = load_image_folder(Path("/data/imagenet"), 224)
        >>> splits.num_classes
        1000
    """
    folders = {part: root / part for part in ("train", "val")}
    for folder in (root, *folders.values()):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"load_image_folder: {folder} is missing; the root must hold train/<class>/<image> and "
                "val/<class>/<image>"
            )
    train_names, val_names = (_class_names(folder) for folder in folders.values())
    if train_names != val_names:
        name = min(set(train_names) ^ set(val_names))
        has, lacks = ("train", "val") if name in train_names else ("val", "train")
        raise ValueError(
            f"load_image_folder: train has {len(train_names)} classes and val {len(val_names)} under {root}; the first "
            f"that differs is {name!r}, in {has} but not in {lacks}; both need the same class folders"
        )
    val = _list_images(folders["val"], val_names)
    return DataSplits(
        train=_list_images(folders["train"], train_names),
        val=val,
        test=val,
        num_classes=len(train_names),
        class_names=tuple(train_names),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=image_size,
    )


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
    """Tell whether an entry is a file or a link, be it one that leads nowhere, but not to a folder."""
    if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
        return True
    return entry.is_file()


def _list_images(folder: Path, class_names: list[str]) -> ImageFiles:
    paths: list[str] = []
    counts: list[int] = []
    for name in class_names:
        # A million files: entries of a directory know whether they are files without a further system call.
        with os.scandir(folder / name) as entries:
            images = sorted(
                entry.path
                for entry in entries
                if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and _is_file(entry)
            )
        paths += images
        counts.append(len(images))
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"load_image_folder: {len(empty)} of {len(class_names)} class folders in {folder} hold no images: "
            f"{', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}; put images ({' '.join(EXTENSIONS)}) directly "
            "into them or remove them from train and val"
        )
    return ImageFiles(paths, np.repeat(np.arange(len(class_names)), counts))
