"""The files of a cache: which record lies where, and how they are opened, claimed and written."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unikd_fast.errors import CacheError, FileError
from unikd_fast.io import naming, open_own, remove_leftovers, sync_folder

LOCK = "create.lock"


def allocated_bytes(path: Path) -> int:
    """Return the bytes a file takes on disk, 0 if there is none."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


@contextmanager
def writing(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn errors while writing `path` into a CacheError that says how many bytes are needed."""
    try:
        with naming(path):
            yield
    except FileError as error:
        needed = f"{needed_bytes} bytes are needed; " if needed_bytes else ""
        raise CacheError(f"{error}, and build again ({needed}what is written is kept)") from error


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder; the kernel releases it if this process dies.

    Files left half-written by a holder that was killed are removed.

    Raises:
        CacheError: the disk is full, or the lock file is a link.
    """
    with writing(folder / LOCK):
        file = open_own(folder / LOCK)
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(folder)
        yield


def refuse_link(path: Path) -> None:
    """Raise CacheError if a file of a cache is a link or a device, FileNotFoundError if it is missing."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise CacheError(f"{path} is a link, or not a regular file; put the file itself there")


def rename(old: Path, new: Path) -> None:
    """Rename within a folder, and sync the folder to disk."""
    old.rename(new)
    sync_folder(new.parent)


def reserve(descriptor: int, path: Path, total_bytes: int) -> None:
    """Grow an open file to its full size and allocate its blocks; its contents are kept.

    Raises:
        CacheError: the disk is full or failing.
    """
    held = os.fstat(descriptor).st_blocks * 512
    with writing(path, max(total_bytes - held, 0)):
        os.posix_fallocate(descriptor, 0, total_bytes)


def write_at(descriptor: int, path: Path, content: memoryview, offset: int) -> None:
    """Write all of `content` (flat bytes) at `offset`.

    Raises:
        CacheError: the disk is full; the beginning may have been written.
    """
    while content:
        with writing(path, len(content)):
            written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def read_at(descriptor: int, length: int, offset: int) -> bytearray:
    """Read `length` bytes at `offset`, or fewer at the end of the file."""
    content = bytearray(length)
    view, done = memoryview(content), 0
    while done < length:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    view.release()
    return content[:done]


TARGET_SHARD_BYTES = 64 * 2**20
MAX_VIEWS = 2**31 - 1


def default_records_per_shard(payload_bytes: int) -> int:
    """Return the number of records in a shard of about 64 MiB.

    Example:
        >>> default_records_per_shard(2000)
        33288
    """
    return max(1, TARGET_SHARD_BYTES // stored_bytes(payload_bytes))


def stored_bytes(payload_bytes: int) -> int:
    """Return the bytes of a record in its file, header included.

    Example:
        >>> stored_bytes(2000)
        2016
    """
    return _record_dtype(payload_bytes).itemsize


class Layout:
    """The geometry of a cache folder; does not touch files.

    Args:
        sample_ids: ids of the samples, (n,) int64.
        views: number of views of each sample.
        payload_bytes: size of a record without its header.
        seal: identifies key and codec; CRCs start from it.
        records_per_shard: number of records in a shard; the last one may hold fewer.

    Raises:
        ValueError: there are no samples, or the number of views or records is out of range.

    Example:
        >>> layout = Layout(np.array([7, 9]), views=3, payload_bytes=8, seal=b"key", records_per_shard=4)
        >>> layout.shards, layout.span(1)
        (2, range(4, 6))
    """

    def __init__(
        self,
        sample_ids: NDArray[np.int64],
        *,
        views: int,
        payload_bytes: int,
        seal: bytes,
        records_per_shard: int,
    ) -> None:
        if len(sample_ids) == 0:
            raise ValueError("CacheFolder: there must be at least one sample, got none; check the training split")
        if not 1 <= views <= MAX_VIEWS:
            raise ValueError(f"CacheFolder: views must lie in [1, {MAX_VIEWS}], got {views}; views are int32")
        if not 1 <= records_per_shard < 2**63:
            raise ValueError(f"CacheFolder: records_per_shard must lie in [1, 2^63), got {records_per_shard}")
        self.dtype = _record_dtype(payload_bytes)
        self.payload_bytes = payload_bytes
        self.record_bytes = self.dtype.itemsize
        self.sample_ids = sample_ids
        self.samples, self.views = len(sample_ids), views
        self.records = self.samples * views
        self.records_per_shard = records_per_shard
        self.shards = -(-self.records // records_per_shard)
        self._crc_start = crc32(seal)

    def span(self, shard: int) -> range:
        """Return the records of a shard.

        Raises:
            ValueError: there is no such shard.
        """
        if not 0 <= shard < self.shards:
            raise ValueError(f"CacheFolder: shard must lie in [0, {self.shards}), got {shard}")
        first = shard * self.records_per_shard
        return range(first, min(first + self.records_per_shard, self.records))

    def shard_bytes(self, shard: int) -> int:
        """Return the size of a shard's file."""
        return len(self.span(shard)) * self.record_bytes

    def checked(self, records: ArrayLike) -> NDArray[np.int64]:
        """Return record indices as (N,) int64.

        Raises:
            ValueError: an index is out of range, or they are not a vector of integers.
        """
        array = np.asarray(records)
        if array.size == 0 and array.ndim == 1:
            return np.empty(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"CacheFolder: records must be a vector of integers, got shape {array.shape} of {array.dtype}"
            )
        if int(array.min()) < 0 or int(array.max()) >= self.records:
            raise ValueError(
                f"CacheFolder: records must lie in [0, {self.records}) ({self.views} views of {self.samples} samples), "
                f"got {array.min()} to {array.max()}; a record is view * {self.samples} + position"
            )
        return array.astype(np.int64)

    def records_of(self, positions: ArrayLike, view: int) -> NDArray[np.int64]:
        """Return the record indices of samples at these positions (N,) in one view; see `CacheFolder.records`."""
        array = np.asarray(positions, np.int64)
        if array.size and (int(array.min()) < 0 or int(array.max()) >= self.samples):
            raise ValueError(
                f"CacheFolder: positions must lie in [0, {self.samples}), got {array.min()} to {array.max()}; they are "
                "positions in the training split, not sample ids"
            )
        if not 0 <= view < self.views:
            raise ValueError(f"CacheFolder: view must lie in [0, {self.views}), got {view}; this cache has no more")
        return array + view * self.samples

    def pack(self, records: NDArray[np.int64], payloads: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Put headers before payloads (N, payload_bytes); return (N, record_bytes)."""
        packed: NDArray[Any] = np.empty(len(records), self.dtype)
        packed["sample_id"] = self.sample_ids[records % self.samples]
        packed["view"] = records // self.samples
        packed["payload"] = payloads
        rows = packed.view(np.uint8).reshape(len(records), self.record_bytes)
        packed["crc"] = self._crcs(rows)
        return rows

    def intact(self, records: NDArray[np.int64], rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return (N,), which of the rows (N, record_bytes) hold these records undamaged; rows must be contiguous."""
        packed = rows.view(self.dtype)[:, 0]
        right_place = (packed["sample_id"] == self.sample_ids[records % self.samples]) & (
            packed["view"] == records // self.samples
        )
        same: NDArray[np.bool_] = right_place & (packed["crc"] == self._crcs(rows))
        return same

    def name(self, record: int) -> str:
        """Return what messages call a record."""
        view, position = divmod(record, self.samples)
        return f"record {record} (sample id {self.sample_ids[position]}, view {view})"

    def fault(self, record: int, row: NDArray[np.uint8]) -> str:
        """Say what is wrong with a row that is not intact."""
        held = row.view(self.dtype)[0]
        computed = self._crcs(row[None])[0]
        if held["crc"] != computed:
            return f"its checksum is {held['crc']:08x} but its bytes give {computed:08x}: damaged, or of another cache"
        return f"it holds sample id {held['sample_id']}, view {held['view']}: the file is another shard's"

    def _crcs(self, rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
        start = self._crc_start
        return np.fromiter((crc32(row, start) for row in rows[:, 4:]), np.uint32, len(rows))


def _record_dtype(payload_bytes: int) -> np.dtype[Any]:
    return np.dtype([("crc", "<u4"), ("view", "<i4"), ("sample_id", "<i8"), ("payload", "u1", (payload_bytes,))])
