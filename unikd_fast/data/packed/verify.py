"""Reading a whole packed store to see what is wrong with it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from unikd_fast.data.packed.layout import SPLITS, SplitManifest, read_manifest
from unikd_fast.data.packed.store import array_faults, map_split, shard_faults


class StoreCheck(NamedTuple):
    """What was found of a store."""

    images: int  # that are as they were packed
    faults: tuple[str, ...]  # a line each, with the file

    @property
    def ok(self) -> bool:
        """Whether every byte is there, unharmed."""
        return not self.faults


def verify_store(root: Path) -> StoreCheck:
    """Check the manifest, the arrays, and every image of a packed store.

    Args:
        root: of the store.

    Raises:
        ValueError: it has no manifest, or one that cannot be trusted.

    Example:
        >>> verify_store(Path("/data/imagenet-256")).ok
        True
    """
    manifest = read_manifest(root)
    total = sum(part.count for part in manifest.splits.values())
    intact = 0
    faults: list[str] = []
    # disable=None: no bar where stderr is no terminal.
    with tqdm(total=total, desc="verify", unit="image", disable=None) as bar:
        for name in SPLITS:
            found = _check_split(root, name, manifest.splits[name], bar)
            intact += found.images
            faults += found.faults
    return StoreCheck(intact, tuple(faults))


def _check_split(root: Path, name: str, part: SplitManifest, bar: tqdm) -> StoreCheck:
    of_arrays, of_shards = array_faults(root, name, part), shard_faults(root, name, part)
    faults = [*of_arrays, *of_shards.values()]
    if of_arrays:
        return StoreCheck(0, tuple(faults))  # where its images lie is not known
    split, intact = map_split(root, name, part), 0
    starts = np.searchsorted(split.index["shard"], np.arange(len(part.shard_bytes) + 1)).tolist()
    for number, rows in enumerate(map(range, starts, starts[1:])):
        if number in of_shards:
            continue
        damaged = []
        for image in split.images(rows):
            try:
                image.read()
            except ValueError as error:
                damaged.append(str(error))
            bar.update()
        intact += len(rows) - len(damaged)
        if damaged:
            faults.append(f"{len(damaged)} of the {len(rows)} images in {split.shards[number]}: {damaged[0]}")
    return StoreCheck(intact, tuple(faults))
