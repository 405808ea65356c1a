"""Reading a whole cache to see what is wrong with it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache.disk import refuse_link
from unikd_fast.teacher.cache.layout import Layout
from unikd_fast.teacher.cache.writer import committed_path, intact_records

Progress = Callable[[int, int], None]


class ShardCheck(NamedTuple):
    """What was found of one shard."""

    shard: int
    status: str  # "ok", "missing", "a link", "truncated", "too long" or "bad records"
    bad_records: tuple[int, ...] = ()  # record indices, of a shard of the right size


class CacheCheck(NamedTuple):
    """What was found of every shard.

    Example:
        >>> print(folder.verify())
        3 of 4 shards are ok
        shard 2: bad records, 1 of them, the first is 41; discard this shard and build again
    """

    shards: tuple[ShardCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether every record is there, unharmed."""
        return not self.faulty

    @property
    def faulty(self) -> tuple[ShardCheck, ...]:
        """The shards that are not ok."""
        return tuple(shard for shard in self.shards if shard.status != "ok")

    def __str__(self) -> str:
        lines = [f"{len(self.shards) - len(self.faulty)} of {len(self.shards)} shards are ok"]
        for shard in self.faulty:
            bad = (
                f", {len(shard.bad_records)} of them, the first is {shard.bad_records[0]}" if shard.bad_records else ""
            )
            remedy = "build again" if shard.status == "missing" else "discard this shard and build again"
            lines.append(f"shard {shard.shard}: {shard.status}{bad}; {remedy}")
        return "\n".join(lines)


def check_shards(folder: Path, layout: Layout, progress: Progress | None) -> CacheCheck:
    """Check every record of every shard; see `CacheFolder.verify`."""
    checks = []
    for shard in range(layout.shards):
        checks.append(_check(folder, layout, shard))
        if progress is not None:
            progress(shard + 1, layout.shards)
    return CacheCheck(tuple(checks))


def _check(folder: Path, layout: Layout, shard: int) -> ShardCheck:
    path = committed_path(folder, shard)
    try:
        refuse_link(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return ShardCheck(shard, "missing")
    except CacheError:
        return ShardCheck(shard, "a link")
    try:
        size, expected = os.fstat(descriptor).st_size, layout.shard_bytes(shard)
        if size != expected:
            return ShardCheck(shard, "truncated" if size < expected else "too long")
        bad = np.flatnonzero(~intact_records(descriptor, layout, shard)) + layout.span(shard).start
        return ShardCheck(shard, "bad records" if bad.size else "ok", tuple(bad.tolist()))
    finally:
        os.close(descriptor)
