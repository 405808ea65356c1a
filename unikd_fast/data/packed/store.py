"""Opening a packed store."""

from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unikd_fast.data.packed.layout import ARRAYS, MANIFEST, SPLITS, SplitManifest, array_name, read_manifest, shard_name
from unikd_fast.data.splits import IMAGENET_MEAN, IMAGENET_STD, DataSplits, PackedImages


def load_packed(root: Path, image_size: int) -> DataSplits:
    """Open a store that `unikd-data pack` made; no image is read yet.

    The samples keep the order and the ids they have in the image folder. Mean and deviation are those of ImageNet;
    `test` is `val`. The index is held against its hash and the shards against their sizes; the bytes of an image are
    held against their checksum when it is read.

    Raises:
        ValueError: the folder is no packed store, an unfinished one or one of another version; the manifest or an index
            is damaged; or a shard is missing or not of its size.

    Example:
        >>> load_packed(Path("/data/imagenet-256"), 224).num_classes
        1000
    """
    manifest = read_manifest(root)
    faults = [
        fault
        for name, part in manifest.splits.items()
        for fault in (*array_faults(root, name, part), *shard_faults(root, name, part).values())
    ]
    if faults:
        more = f" (and {len(faults) - 1} more, see `unikd-data verify`)" if len(faults) > 1 else ""
        raise ValueError(f"load_packed: {faults[0]}{more}; restore the file or pack again")
    train, val = (map_split(root, name, manifest.splits[name]) for name in SPLITS)
    return DataSplits(
        train=train,
        val=val,
        test=val,
        num_classes=len(manifest.class_names),
        class_names=manifest.class_names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=image_size,
    )


def map_split(root: Path, name: str, part: SplitManifest) -> PackedImages:
    """Map a split of a packed store into memory, unchecked."""
    index, labels, ids = (_load(root / array_name(name, array)) for array in ARRAYS)
    shards = tuple(str(root / shard_name(name, number)) for number in range(len(part.shard_bytes)))
    return PackedImages(shards, index, np.array(labels), np.array(ids))


def array_faults(root: Path, name: str, part: SplitManifest) -> list[str]:
    """What is wrong with the arrays of a split, a line each."""
    faults = []
    for array in ARRAYS:
        path, expected = root / array_name(name, array), part.array_hashes[array]
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif (found := sha256(path.read_bytes()).hexdigest()) != expected:
            faults.append(f"{path} is damaged: its hash is {expected} in {MANIFEST} and its content gives {found}")
    return faults


def shard_faults(root: Path, name: str, part: SplitManifest) -> dict[int, str]:
    """What is wrong with the sizes of a split's shards, a line for each that is."""
    faults = {}
    for number, expected in enumerate(part.shard_bytes):
        path = root / shard_name(name, number)
        if not path.is_file():
            faults[number] = f"{path} is missing"
        elif (found := path.stat().st_size) != expected:
            fault = "truncated" if found < expected else "too long"
            faults[number] = f"{path} is {fault}: {expected} bytes in {MANIFEST}, {found} on disk"
    return faults


def _load(path: Path) -> NDArray:
    # As a plain array, whose rows are found twice as fast; it keeps the map.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
