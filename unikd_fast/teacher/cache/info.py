"""How much of a cache is done, and whether the rest fits."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from unikd_fast.errors import CacheError
from unikd_fast.io import free_bytes
from unikd_fast.teacher.cache.disk import allocated_bytes
from unikd_fast.teacher.cache.key import CacheKey
from unikd_fast.teacher.cache.layout import Layout
from unikd_fast.teacher.cache.writer import committed_path, partial_path


class CacheInfo(NamedTuple):
    """A cache in numbers."""

    bytes_done: int  # of finished shards
    bytes_total: int  # of all shards, once finished
    samples: int
    views: int
    records: int  # samples x views
    shards: int
    shards_done: int
    key_fields: dict[str, Any]


def missing_shards(folder: Path, layout: Layout) -> list[int]:
    """The shards that are not finished, ascending."""
    names = {entry.name for entry in folder.iterdir()}
    return [shard for shard in range(layout.shards) if committed_path(folder, shard).name not in names]


def cache_info(folder: Path, layout: Layout, key: CacheKey) -> CacheInfo:
    """Sizes, counts and the key's fields."""
    missing = missing_shards(folder, layout)
    total = layout.records * layout.record_bytes
    return CacheInfo(
        bytes_done=total - sum(layout.shard_bytes(shard) for shard in missing),
        bytes_total=total,
        samples=layout.samples,
        views=layout.views,
        records=layout.records,
        shards=layout.shards,
        shards_done=layout.shards - len(missing),
        key_fields=key.fields,
    )


def require_room(folder: Path, layout: Layout, shards: Iterable[int]) -> None:
    """Refuse a build of these shards that cannot end; see `CacheFolder.require_room`."""
    needed = sum(max(layout.shard_bytes(shard) - allocated_bytes(partial_path(folder, shard)), 0) for shard in shards)
    free = free_bytes(folder)
    if needed > free:
        raise CacheError(
            f"{folder}: the shards still to build need {needed} bytes and {free} are free; make room, build into a "
            "folder elsewhere, or store fewer views or a smaller codec"
        )
