"""Image sets in tar files, as WebDataset lays them out: <key>.jpg and <key>.cls, read where they lie in the archive."""

from pathlib import Path

import numpy as np

from unikd_fast.data.splits import IMAGENET_MEAN, IMAGENET_STD, DataSplits, PackedImages
from unikd_fast.data.tar_index import TarIndex, index_tars

# The second name is that of several published sets.
_PARTS = {"train": ("train",), "val": ("val", "validation")}
_PATTERNS = ("{}-*.tar", "*[-_]{}-*.tar", "{}/*.tar")


def load_tar_shards(root: Path, image_size: int, num_classes: int | None = None) -> DataSplits:
    """Open the tar files of a folder; they are indexed once, see `index_tars`, and nothing is unpacked.

    The files are train-*.tar and val-*.tar, with anything before, or train/*.tar and val/*.tar; "validation" is another
    name of val. Samples are in the order of the files' names and then of the archive; their place in that order is
    their id. Mean and deviation are those of ImageNet; `test` is `val`.

    Args:
        root: folder of the tar files.
        image_size: height and width in pixels of the images a loader delivers.
        num_classes: K; None is one more than the largest label of train.

    Raises:
        FileNotFoundError: a split has no tar files.
        ValueError: a file is compressed, damaged or no tar file; a sample lacks its label or image; a label is no
            class.

    Example:
        >>> load_tar_shards(Path("/data/imagenet-wds"), 224).num_classes
        1000
    """
    paths = {name: _find_tars(root, name) for name in _PARTS}
    indices = {name: index_tars(root, name, paths[name]) for name in _PARTS}
    if num_classes is None:
        num_classes = int(indices["train"].labels.max()) + 1
    train, val = (_split(paths[name], indices[name], num_classes) for name in _PARTS)
    return DataSplits(
        train=train,
        val=val,
        test=val,
        num_classes=num_classes,
        class_names=None,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=image_size,
    )


def _find_tars(root: Path, name: str) -> list[Path]:
    patterns = [pattern.format(part) for part in _PARTS[name] for pattern in _PATTERNS]
    found = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    if not found:
        packed = sorted({path for pattern in patterns for path in root.glob(f"{pattern}.*")})
        remedy = f"; {packed[0].name} is compressed, unpack it to .tar" if packed else ""
        raise FileNotFoundError(
            f"load_tar_shards: {root} has no tar files of {name}: neither {name}-*.tar nor {name}/*.tar{remedy}"
        )
    return found


def _split(paths: list[Path], index: TarIndex, num_classes: int) -> PackedImages:
    outside = np.flatnonzero(index.labels >= num_classes)
    if len(outside):
        row = index.images[outside[0]]
        raise ValueError(
            f"load_tar_shards: the image at byte {row['offset']} of {paths[row['shard']]} has label "
            f"{index.labels[outside[0]]}, and there are {num_classes} classes, counted from 0; correct its .cls or "
            "num_classes"
        )
    return PackedImages(tuple(map(str, paths)), index.images, index.labels, checked=False)
