"""What a pack is going to be, settled before the first image and kept for whoever goes on with it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unikd_fast.data.manifest import hash_split
from unikd_fast.data.packed.disk import PackError, complete_or_absent
from unikd_fast.data.packed.layout import MANIFEST, PACKING, SPLITS, StoreManifest
from unikd_fast.data.packed.records import BadImageError, PackSettings, make_record
from unikd_fast.data.packed.shard import ShardJob
from unikd_fast.data.splits import DataSplits, ImageFiles
from unikd_fast.io import free_bytes

_PLAN = "plan.json"
_SAMPLED_IMAGES = 64

# A freshly made file system has it at its top.
_NOT_CONTENT = {"lost+found"}


def check_target(source: Path, target: Path) -> None:
    """Refuse a folder to pack into that holds something else, or is read as part of the source.

    Raises:
        ValueError: it does.
        NotADirectoryError: it is a file.
    """
    for part in SPLITS:
        if target.resolve().is_relative_to((source / part).resolve()):
            raise ValueError(
                f"pack: {target} lies within {source / part}, where it would be read as a class; pack elsewhere"
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise NotADirectoryError(f"pack: {target} is no folder; give a new one or one that is empty")
    names = {entry.name for entry in target.iterdir()} - _NOT_CONTENT
    if names and not names & {MANIFEST, PACKING}:
        raise ValueError(f"pack: {target} holds something else, {min(names)!r} for one; give a new or an empty folder")


@dataclass(frozen=True)
class PackPlan:
    """The images of a pack and what they are packed by.

    Args:
        splits: each of `SPLITS`.
        class_names: K names.
        settings: how images are packed.
        hashes: `hash_split` of each split.
    """

    splits: Mapping[str, ImageFiles]
    class_names: tuple[str, ...]
    settings: PackSettings
    hashes: Mapping[str, str]

    @classmethod
    def of(cls, data: DataSplits, settings: PackSettings) -> "PackPlan":
        """Plan to pack an image folder."""
        assert isinstance(data.train, ImageFiles)
        assert isinstance(data.val, ImageFiles)
        assert data.class_names is not None
        splits = {"train": data.train, "val": data.val}
        return cls(splits, data.class_names, settings, {name: hash_split(split) for name, split in splits.items()})

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the store's bytes, in JSON's types."""
        return {"settings": self.settings.record, "class_names": list(self.class_names), "sources": dict(self.hashes)}

    def mean_bytes(self) -> int:
        """Mean size of a record, rounded up: known where files are copied, otherwise from packing a few of them.

        Raises:
            BadImageError: none of these can be decoded.
        """
        if self.settings.copies:
            sizes = [os.stat(path).st_size for split in self.splits.values() for path in split.paths]  # noqa: PTH116
            return max(1, -(-sum(sizes) // len(sizes)))
        paths = [path for split in self.splits.values() for path in split.paths]
        sizes = []
        bad: BadImageError | None = None
        for i in np.linspace(0, len(paths) - 1, min(len(paths), _SAMPLED_IMAGES)).astype(int):
            try:
                sizes.append(len(make_record(paths[i], self.settings).content))
            except BadImageError as error:
                bad = error
        if not sizes:
            assert bad is not None
            raise bad
        return max(1, -(-sum(sizes) // len(sizes)))

    def jobs(self, mean_bytes: int) -> list[ShardJob]:
        """Cut the splits into shards of equally many images."""
        per_shard = max(1, self.settings.shard_bytes // mean_bytes)
        return [
            ShardJob(name, number, first, tuple(split.paths[first : first + per_shard]))
            for name, split in self.splits.items()
            for number, first in enumerate(range(0, len(split), per_shard))
        ]


def begun_mean_bytes(target: Path, plan: PackPlan) -> int:
    """Mean size of a record as the first packer of this folder found it, for the shards follow from it.

    Raises:
        ValueError: what was begun is another pack.
    """
    path = target / PACKING / _PLAN
    if path.exists():
        begun = json.loads(path.read_text())
        _require_same(begun["identity"], plan.identity, target, "begun")
        return int(begun["mean_bytes"])
    mean_bytes = plan.mean_bytes()
    with complete_or_absent(path, path.parent) as temporary:
        temporary.write_text(json.dumps({"identity": plan.identity, "mean_bytes": mean_bytes}))
    return mean_bytes


def require_same_store(manifest: StoreManifest, plan: PackPlan, target: Path) -> None:
    """Compare a finished store with what is to be packed.

    Raises:
        ValueError: it is another.
    """
    sources = {name: part.source_hash for name, part in manifest.splits.items()}
    stored = {"settings": manifest.settings, "class_names": list(manifest.class_names), "sources": sources}
    _require_same(stored, plan.identity, target, "finished")


def require_room(target: Path, jobs: list[ShardJob], mean_bytes: int) -> None:
    """Refuse a pack that cannot end.

    Raises:
        PackError: the disk has less room than these shards are expected to take.
    """
    needed, free = mean_bytes * sum(len(job.paths) for job in jobs), free_bytes(target)
    if needed > free:
        raise PackError(
            f"{target}: the images still to pack need about {needed} bytes and {free} are free; make room, pack "
            "elsewhere, or choose a smaller size"
        )


def _require_same(stored: dict[str, Any], wanted: dict[str, Any], target: Path, state: str) -> None:
    differing = [
        f"{name}.{key}: {stored[name].get(key)!r} there, {wanted[name].get(key)!r} now"
        for name in ("settings", "sources")
        for key in sorted({*stored[name], *wanted[name]})
        if stored[name].get(key) != wanted[name].get(key)
    ]
    if stored["class_names"] != wanted["class_names"]:
        differing.append(f"classes: {len(stored['class_names'])} there, {len(wanted['class_names'])} of others now")
    if differing:
        raise ValueError(
            f"pack: {target} holds another pack, {state}: {'; '.join(differing)}; pack into another folder, or delete "
            "this one"
        )
