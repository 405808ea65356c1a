"""Reading records from finished shards, each one checked before it is handed out."""

import mmap
import os
import stat
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache.layout import Layout
from unikd_fast.teacher.cache.writer import committed_path

# Python's mmap holds a file descriptor, and a process often may have no more than 1024.
_MAPPED_SHARDS = 256


class _Mapping(NamedTuple):
    """A shard in memory."""

    device: int
    inode: int
    rows: NDArray[np.uint8]  # (records of the shard, record_bytes), read-only


class ShardReader:
    """Gathers records through memory maps that are kept; may be used from several threads.

    Example:
        >>> rows = ShardReader(folder, layout).rows(np.array([3, 900_000]))
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout
        self._mappings: dict[int, _Mapping] = {}  # the least recently used first
        self._lock = threading.Lock()

    def rows(self, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Give records (N,) with their headers, (N, record_bytes).

        Raises:
            CacheError: a record was never built, or is not what was written; names file, record and remedy.
        """
        layout = self._layout
        rows = np.empty((len(records), layout.record_bytes), np.uint8)
        shards, local = np.divmod(records, layout.records_per_shard)
        order = np.argsort(shards, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if here.size:
                rows[here] = self._shard(int(shards[here[0]]), int(records[here[0]]))[local[here]]
        intact = layout.intact(records, rows)
        if not intact.all():
            bad = int(np.flatnonzero(~intact)[0])
            self._refuse(int(records[bad]), rows[bad])
        return rows

    def _shard(self, shard: int, record: int) -> NDArray[np.uint8]:
        path = committed_path(self._folder, shard)
        try:
            return self._mapped(path, shard, record)
        except FileNotFoundError as error:
            raise CacheError(
                f"{path} is missing: {self._layout.name(record)} was never built, or the file was deleted; build the "
                "cache again, finished shards are kept"
            ) from error

    def _mapped(self, path: Path, shard: int, record: int) -> NDArray[np.uint8]:
        found, expected = path.lstat(), self._layout.shard_bytes(shard)
        if not stat.S_ISREG(found.st_mode):
            raise CacheError(
                f"{path} is a link, or not a regular file: {self._layout.name(record)} cannot be trusted; delete it "
                "and build the cache again, only this shard is redone"
            )
        # Looked at every time: memory mapped beyond the end of a file is a bus error, not an exception.
        if found.st_size != expected:
            raise CacheError(
                f"{path} has {found.st_size} bytes and must have {expected}: {self._layout.name(record)} cannot be "
                "trusted; delete this file and build the cache again, only this shard is redone"
            )
        with self._lock:
            mapping = self._mappings.pop(shard, None)
            if mapping is None or (mapping.device, mapping.inode) != (found.st_dev, found.st_ino):
                mapping = self._map(path, expected)
            self._mappings[shard] = mapping
            if len(self._mappings) > _MAPPED_SHARDS:
                del self._mappings[next(iter(self._mappings))]
        return mapping.rows

    def _map(self, path: Path, size: int) -> _Mapping:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            opened = os.fstat(file.fileno())
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        rows = np.frombuffer(memory, np.uint8).reshape(-1, self._layout.record_bytes)
        return _Mapping(opened.st_dev, opened.st_ino, rows)

    def _refuse(self, record: int, row: NDArray[np.uint8]) -> None:
        path = committed_path(self._folder, record // self._layout.records_per_shard)
        raise CacheError(
            f"{path}: {self._layout.name(record)} is not what was written, {self._layout.fault(record, row)}; delete "
            "this file and build the cache again, only this shard is redone"
        )
