"""One shard: claimed by a lock, resumed by checksums, committed by a rename, read and verified record by record."""

import fcntl
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unikd_fast.errors import CacheError
from unikd_fast.io import own_descriptor
from unikd_fast.teacher.cache.files import Layout, read_at, refuse_link, rename, reserve, write_at, writing

_SCAN_BYTES = 2**22
_WAIT_S = 0.05  # between two attempts at a lock: waiting in the kernel would block Ctrl-C


def committed_path(folder: Path, shard: int) -> Path:
    """Return the path of a finished shard."""
    return folder / f"shard-{shard:05d}.bin"


def partial_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard that is being built."""
    return folder / f"shard-{shard:05d}.partial"


class ShardWriter:
    """A claim to build one shard, and the records it still lacks; made by `CacheFolder.claim`.

    A context manager: on exit the claim is released, and what is written but not committed is kept for the next claim.

    Example:
        >>> with folder.claim(shard) as writer:
        ...     for records in np.array_split(writer.todo, batches):
        ...         writer.write(records, codec.encode(teacher_logits(records)))
        ...     writer.commit()
    """

    def __init__(self, folder: Path, layout: Layout, shard: int, descriptor: int) -> None:
        self.shard = shard
        self._span = layout.span(shard)
        self._layout = layout
        self._path = partial_path(folder, shard)
        self._committed = committed_path(folder, shard)
        self._descriptor: int | None = descriptor
        self._done = np.zeros(len(self._span), np.bool_)
        self._prepare(descriptor)

    @property
    def todo(self) -> NDArray[np.int64]:
        """Return the indices of the records still to be written, ascending; view * n + position."""
        return np.flatnonzero(~self._done) + self._span.start

    def write(self, records: ArrayLike, payloads: NDArray[np.uint8]) -> None:
        """Store records of this shard, in any order.

        Args:
            records: record indices (N,) from `todo`, each once.
            payloads: payloads (N, record_bytes) from `Codec.encode`.

        Raises:
            CacheError: the disk is full; what was written before is kept.
            ValueError: a record belongs to another shard or is already written, or the payloads have another shape.
        """
        descriptor = self._open_descriptor()
        indices = self._layout.checked(records)
        expected = (len(indices), self._layout.payload_bytes)
        if payloads.dtype != np.uint8 or payloads.shape != expected:
            raise ValueError(
                f"ShardWriter.write: payloads must be {expected} uint8, got {payloads.shape} {payloads.dtype}"
            )
        outside = [record for record in indices.tolist() if record not in self._span]
        if outside:
            raise ValueError(
                f"ShardWriter.write: shard {self.shard} holds records [{self._span.start}, {self._span.stop}), got "
                f"{outside[0]}; write only what .todo names"
            )
        order = np.argsort(indices, kind="stable")
        indices = indices[order]
        local = indices - self._span.start
        again = indices[self._done[local] | (np.diff(indices, prepend=-1) == 0)]
        if again.size:
            raise ValueError(f"ShardWriter.write: record {again[0]} is already written; write only what .todo names")
        rows = self._layout.pack(indices, payloads[order])
        for run in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(indices) != 1) + 1):
            if run.size:
                offset = int(local[run[0]]) * self._layout.record_bytes
                write_at(descriptor, self._path, rows[run[0] : run[-1] + 1].reshape(-1).data, offset)
                self._done[local[run]] = True

    def commit(self) -> None:
        """Make the shard readable: sync it to disk, then rename it; releases the claim.

        Raises:
            CacheError: the disk is full.
            ValueError: records are missing.
        """
        descriptor = self._open_descriptor()
        todo = self.todo
        if todo.size:
            raise ValueError(
                f"ShardWriter.commit: shard {self.shard} lacks {todo.size} of {len(self._span)} records, the first is "
                f"{self._layout.name(int(todo[0]))}; write all of .todo first"
            )
        with writing(self._path):
            os.fsync(descriptor)
            rename(self._path, self._committed)
        self.close()

    def close(self) -> None:
        """Release the claim; closing twice does nothing."""
        if self._descriptor is not None:
            release(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"ShardWriter: the claim on shard {self.shard} was released; claim the shard again")
        return self._descriptor

    def _prepare(self, descriptor: int) -> None:
        size = self._layout.shard_bytes(self.shard)
        held = os.fstat(descriptor).st_size
        if held > size:
            os.ftruncate(descriptor, size)
        try:
            reserve(descriptor, self._path, size)
        except BaseException:
            if held == 0:
                self._path.unlink()  # an empty shard would only take up space
            raise
        if held:
            self._done = intact_records(descriptor, self._layout, self.shard)


def claim_shard(
    folder: Path, layout: Layout, shard: int, *, wait: bool, idle: Callable[[], None] | None = None
) -> ShardWriter | None:
    """Claim a shard to build it; see `CacheFolder.claim`."""
    if committed_path(folder, shard).exists():
        return None
    while (descriptor := lock_partial(folder, shard)) is None:
        if not wait:
            return None
        if idle is not None:
            idle()
        time.sleep(_WAIT_S)
    try:
        if committed_path(folder, shard).exists():  # committed meanwhile by its last holder
            partial_path(folder, shard).unlink()
            release(descriptor)
            return None
        return ShardWriter(folder, layout, shard, descriptor)
    except BaseException:
        release(descriptor)
        raise


def lock_partial(folder: Path, shard: int) -> int | None:
    """Open and lock a shard's partial file, created if necessary; return None if it is locked elsewhere.

    The kernel releases the lock when its holder dies.

    Raises:
        CacheError: it is a link, or the disk is full.
    """
    path = partial_path(folder, shard)
    while True:
        with writing(path):
            descriptor = own_descriptor(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        # Its holder renamed or deleted the file between our open and our lock: it is no longer the partial file.
        release(descriptor)


def release(descriptor: int) -> None:
    """Unlock and close; unlocking also covers copies of the descriptor in forked processes."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def intact_records(descriptor: int, layout: Layout, shard: int) -> NDArray[np.bool_]:
    """Return (records of the shard,), which of them an open file holds undamaged."""
    span = layout.span(shard)
    intact = np.zeros(len(span), np.bool_)
    step = max(1, _SCAN_BYTES // layout.record_bytes)
    for first in range(0, len(span), step):
        count = min(step, len(span) - first)
        content = read_at(descriptor, count * layout.record_bytes, first * layout.record_bytes)
        rows = np.frombuffer(content, np.uint8, len(content) // layout.record_bytes * layout.record_bytes)
        rows = rows.reshape(-1, layout.record_bytes)
        records = np.arange(len(rows), dtype=np.int64) + span.start + first
        intact[first : first + len(rows)] = layout.intact(records, rows)
    return intact


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


# Python's mmap keeps a file descriptor open, and a process is often limited to 1024.
_MAPPED_SHARDS = 256


class _Mapping(NamedTuple):
    """A memory-mapped shard."""

    device: int
    inode: int
    rows: NDArray[np.uint8]  # (records of the shard, record_bytes), read-only


class ShardReader:
    """Gathers records through memory maps that are kept open; thread-safe.

    Example:
        >>> rows = ShardReader(folder, layout).rows(np.array([3, 900_000]))
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout
        self._mappings: dict[int, _Mapping] = {}  # least recently used first
        self._lock = threading.Lock()

    def rows(self, records: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return records (N,) with their headers, (N, record_bytes).

        Raises:
            CacheError: a record was never built, or is not what was written; the message names file, record and remedy.
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
        # Checked every time: reading a memory map beyond the end of its file is a bus error, not an exception.
        if found.st_size != expected:
            raise CacheError(
                f"{path} has {found.st_size} bytes but must have {expected}: {self._layout.name(record)} cannot be "
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


Progress = Callable[[int, int], None]


class ShardCheck(NamedTuple):
    """Result of checking one shard."""

    shard: int
    status: str  # "ok", "missing", "a link", "truncated", "too long" or "bad records"
    bad_records: tuple[int, ...] = ()  # record indices, if the shard has the right size


class CacheCheck(NamedTuple):
    """Result of checking every shard.

    Example:
        >>> print(folder.verify())
        3 of 4 shards are ok
        shard 2: bad records, 1 of them, the first is 41; discard this shard and build again
    """

    shards: tuple[ShardCheck, ...]

    @property
    def ok(self) -> bool:
        """Return whether every record is present and undamaged."""
        return not self.faulty

    @property
    def faulty(self) -> tuple[ShardCheck, ...]:
        """Return the shards that are not ok."""
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
