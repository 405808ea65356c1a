"""Loaders that decode with DALI, and files they fail on."""

import shutil
from pathlib import Path
from typing import Any

from support.loaders import build_loader
from support.odd_images import encoded
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.loader import Loader
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits, ImageFiles

RESIZED = Augmentation(crop="resized", flip_probability=0.5)


def make(splits: DataSplits, **changes: Any) -> Loader:
    shared = {"kind": "dali", "augmentation": RESIZED, "seed": 3, "global_batch_size": 8, "device": "cpu", "workers": 0}
    return build_loader(splits, **{**shared, **changes})


def undecodable_jpeg() -> bytes:
    """Its header and its end are in order, but a Huffman table has more codes of one bit than there are."""
    content = bytearray(encoded("JPEG"))
    content[content.index(b"\xff\xc4") + 5] = 255
    return bytes(content)


def spoilt(splits: DataSplits, folder: Path, contents: dict[str, dict[int, bytes]]) -> DataSplits:
    """Copy a folder and write these contents over the images at these positions of train and val."""
    assert isinstance(splits.train, ImageFiles)
    root = shutil.copytree(Path(splits.train.paths[0]).parents[2], folder / "spoilt")
    copied = load_image_folder(root, splits.image_size)
    for part, files in contents.items():
        split = copied.train if part == "train" else copied.val
        assert isinstance(split, ImageFiles)
        for position, content in files.items():
            Path(split.paths[position]).write_bytes(content)
    return copied
