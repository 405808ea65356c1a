"""One file of a packed store: written as a whole, then noted as finished. The unit that an interruption costs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from unikd_fast.data.packed.disk import complete_or_absent
from unikd_fast.data.packed.layout import PACKING, shard_name
from unikd_fast.data.packed.records import BadImageError, PackSettings, make_record


class ShardJob(NamedTuple):
    """A shard to make: images `first`, `first` + 1, ... of a split."""

    split: str
    number: int
    first: int
    paths: tuple[str, ...]


class PackedRecord(NamedTuple):
    """An image of a finished shard; records lie one after the other."""

    sample_id: int
    length: int  # in bytes
    crc: int
    height: int  # of raw rows, otherwise 0
    width: int


class FinishedShard(NamedTuple):
    """What a finished shard holds."""

    total_bytes: int
    records: tuple[PackedRecord, ...]
    skipped: tuple[tuple[int, str], ...]  # id and reason of images left out


def pack_shard(
    job: ShardJob, store: Path, settings: PackSettings, *, skip_bad: bool, tick: Callable[[], object]
) -> None:
    """Write a shard and the note that it is finished.

    Args:
        job: its images.
        store: folder of the store, with its `PACKING` folder.
        settings: how images are packed.
        skip_bad: leave out images that cannot be decoded; a file that cannot be read is an error all the same.
        tick: called after each image.

    Raises:
        ValueError: an image cannot be read, or cannot be decoded and is not to be skipped; names it.
        PackError: the disk is full.
    """
    packing = store / PACKING
    records: list[PackedRecord] = []
    skipped: list[tuple[int, str]] = []
    with complete_or_absent(store / shard_name(job.split, job.number), packing) as path, path.open("wb") as file:
        for sample_id, source in enumerate(job.paths, job.first):
            try:
                content, height, width = make_record(source, settings)
            except BadImageError as error:
                if not skip_bad:
                    raise BadImageError(f"{error}, or pack with --bad skip", error.reason) from error
                skipped.append((sample_id, error.reason))
            else:
                file.write(content)
                records.append(PackedRecord(sample_id, len(content), crc32(content), height, width))
            tick()
        total_bytes = file.tell()
    note = json.dumps(FinishedShard(total_bytes, tuple(records), tuple(skipped)))
    with complete_or_absent(_note(store, job), packing) as path:
        path.write_text(note)


def read_finished(store: Path, job: ShardJob) -> FinishedShard | None:
    """What a shard holds, or None if it is not finished: not noted, or not of the size that was noted."""
    try:
        total_bytes, records, skipped = json.loads(_note(store, job).read_text())
        size = (store / shard_name(job.split, job.number)).stat().st_size
    except FileNotFoundError:
        return None
    if size != total_bytes:
        return None
    return FinishedShard(
        total_bytes, tuple(PackedRecord(*record) for record in records), tuple((i, reason) for i, reason in skipped)
    )


def _note(store: Path, job: ShardJob) -> Path:
    return store / PACKING / f"{shard_name(job.split, job.number)}.json"
