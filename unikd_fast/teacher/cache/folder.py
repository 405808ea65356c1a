"""The cache as a folder: created or opened, built shard by shard by any number of processes, readable as it grows."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from unikd_fast.errors import CacheError
from unikd_fast.io import free_bytes, sync_folder
from unikd_fast.teacher.cache.codec import Codec
from unikd_fast.teacher.cache.files import Layout, allocated_bytes, default_records_per_shard
from unikd_fast.teacher.cache.key import CacheKey
from unikd_fast.teacher.cache.manifest import (
    ATTACHMENT,
    MANIFEST,
    Attachment,
    Manifest,
    checked_sample_ids,
    read_attachment,
    read_manifest,
    write_attachment,
)
from unikd_fast.teacher.cache.shard import (
    CacheCheck,
    Progress,
    ShardReader,
    ShardWriter,
    check_shards,
    claim_shard,
    committed_path,
    lock_partial,
    partial_path,
    release,
)
from unikd_fast.values import Gaussian


class CacheInfo(NamedTuple):
    """Sizes and counts of a cache."""

    bytes_done: int  # of finished shards
    bytes_total: int  # of all shards once finished
    samples: int
    views: int
    records: int  # samples x views
    shards: int
    shards_done: int
    key_fields: dict[str, Any]


def missing_shards(folder: Path, layout: Layout) -> list[int]:
    """Return the unfinished shards, ascending."""
    names = {entry.name for entry in folder.iterdir()}
    return [shard for shard in range(layout.shards) if committed_path(folder, shard).name not in names]


def cache_info(folder: Path, layout: Layout, key: CacheKey) -> CacheInfo:
    """Return sizes, counts and the key's fields."""
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
    """Raise CacheError if the disk has no room for these shards; see `CacheFolder.require_room`."""
    needed = sum(max(layout.shard_bytes(shard) - allocated_bytes(partial_path(folder, shard)), 0) for shard in shards)
    free = free_bytes(folder)
    if needed > free:
        raise CacheError(
            f"{folder}: the shards still to build need {needed} bytes and {free} are free; free some space, build in "
            "another folder, or store fewer views or a smaller codec"
        )


class CacheFolder:
    """A teacher's outputs on disk, for every view of every sample; made by `create_or_open` or `open`.

    Args:
        path: cache folder.
        manifest: contents of its manifest.

    Example:
        >>> folder = CacheFolder.create_or_open("cache", key, Codec("fp16", 100), split.sample_ids, views=2)
        >>> while (writer := folder.claim_any(wait=True)) is not None:
        ...     with writer:
        ...         for records in np.array_split(writer.todo, batches):
        ...             writer.write(records, folder.codec.encode(teacher_logits(records)))
        ...         writer.commit()
        >>> logits, _ = folder.codec.decode(folder.read(folder.records([5, 9], view=1)))
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.key, self.codec = manifest.key, manifest.codec
        self._layout = manifest.layout
        self._reader = ShardReader(path, self._layout)

    @classmethod
    def create_or_open(
        cls,
        path: str | Path,
        key: CacheKey,
        codec: Codec,
        sample_ids: ArrayLike,
        views: int,
        records_per_shard: int | None = None,
    ) -> "CacheFolder":
        """Create a folder, or open an existing one for the same outputs with at least as many views.

        Any number of processes may do this at once.

        Args:
            path: cache folder; created if missing.
            key: what the outputs are made from.
            codec: codec of the records.
            sample_ids: ids of the training split, (n,), in its order.
            views: number of views of each sample.
            records_per_shard: number of records in a shard. If None, shards have about 64 MiB. An existing folder keeps
                its own.

        Raises:
            CacheError: the folder is a cache of something else (every difference is listed) or not a cache, it is
                damaged, or the disk is full.
            ValueError: there are no samples, or the number of views or records is out of range.
        """
        path = Path(path)
        if records_per_shard is None:
            records_per_shard = default_records_per_shard(codec.record_bytes)
        wanted = Manifest(key, codec, checked_sample_ids(sample_ids), views, records_per_shard)
        if not (path / MANIFEST).exists():
            wanted.write(path)
        found = read_manifest(path)
        wanted.require_same(found, path)
        return cls(path, found)

    @classmethod
    def open(cls, path: str | Path) -> "CacheFolder":
        """Open a folder for reading or further building, without comparing keys; see `key.require_same`.

        Raises:
            CacheError: there is no cache, or its manifest or sample ids are damaged.
        """
        return cls(Path(path), read_manifest(Path(path)))

    @property
    def samples(self) -> int:
        """Return n, the number of samples."""
        return self._layout.samples

    @property
    def views(self) -> int:
        """Return the number of views of each sample."""
        return self._layout.views

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """Return the ids of the samples, (n,), by position."""
        return self._layout.sample_ids

    def records(self, positions: ArrayLike, view: int) -> NDArray[np.int64]:
        """Return the indices of the records of some samples in one view, view * n + position.

        Args:
            positions: (N,) positions in the training split, in [0, n).
            view: view in [0, views).

        Raises:
            ValueError: a position or the view is out of range.
        """
        return self._layout.records_of(positions, view)

    def missing_shards(self, views: int | None = None) -> list[int]:
        """Return the unfinished shards, ascending, of all views or of the first ones."""
        missing = missing_shards(self.path, self._layout)
        if views is None:
            return missing
        needed = -(-views * self.samples // self._layout.records_per_shard)
        return [shard for shard in missing if shard < needed]

    def missing_bytes(self, views: int | None = None) -> int:
        """Return the size of the unfinished shards, of all views or of the first ones."""
        return sum(map(self._layout.shard_bytes, self.missing_shards(views)))

    def claim(self, shard: int, *, wait: bool = False, idle: Callable[[], None] | None = None) -> ShardWriter | None:
        """Claim a shard to build it; what an earlier build left of it counts as written.

        Args:
            shard: shard in [0, shards).
            wait: whether to wait for another process or thread that is building it, until it finishes or dies. A claim
                held by this thread itself is never waited for.
            idle: function called repeatedly while waiting; may raise.

        Returns:
            None if the shard is finished, or being built elsewhere and `wait` is off.

        Raises:
            CacheError: the disk has no room for the shard.
        """
        self._layout.span(shard)
        return claim_shard(self.path, self._layout, shard, wait=wait, idle=idle)

    def claim_any(
        self, *, wait: bool, idle: Callable[[], None] | None = None, views: int | None = None
    ) -> ShardWriter | None:
        """Claim the first unfinished shard that nobody is building.

        Args:
            wait: whether to wait while others build all that is left; if one of them dies, its shard is taken over.
            idle: function called repeatedly while waiting; may raise.
            views: number of first views whose shards are to be built. If None, all.

        Returns:
            None if all these shards are finished.

        Raises:
            CacheError: others are building all that is left and `wait` is off, or the disk has no room for the shard.
        """
        while missing := self.missing_shards(views):
            for shard in missing:
                writer = self.claim(shard)
                if writer is not None:
                    return writer
            left = self.missing_shards(views)
            if left and not wait:
                raise CacheError(
                    f"{self.path}: other processes are building the last {len(left)} of {self._layout.shards} shards "
                    f"(the first is {left[0]}); wait for them, or stop them and build again"
                )
            writer = self.claim(left[0], wait=True, idle=idle) if left else None
            if writer is not None:
                return writer
        return None

    def read(self, records: ArrayLike) -> NDArray[np.uint8]:
        """Read payloads for `Codec.decode`; each record's sample id, view and checksum are verified.

        Args:
            records: record indices, (N,), in any order, repeats allowed.

        Returns:
            Payloads (N, record_bytes), a copy.

        Raises:
            CacheError: a record was never built, or its shard was deleted, truncated or damaged; the message names
                file, record and remedy.
            ValueError: an index is out of range.
        """
        return self._reader.rows(self._layout.checked(records))[:, -self._layout.payload_bytes :]

    def covers(self, records: ArrayLike) -> bool:
        """Return whether these records (N,) lie in finished shards; damage is only detected when they are read."""
        shards = np.unique(self._layout.checked(records) // self._layout.records_per_shard)
        return all(committed_path(self.path, shard).exists() for shard in shards.tolist())

    def verify(self, progress: Progress | None = None) -> CacheCheck:
        """Check every record and report on every shard.

        Args:
            progress: function called after each shard with the number checked and the total.
        """
        return check_shards(self.path, self._layout, progress)

    def discard(self, shard: int) -> None:
        """Delete a shard, finished or not, so that the next build redoes it; other shards are not touched.

        Raises:
            CacheError: another process is building it.
        """
        self._layout.span(shard)
        descriptor = lock_partial(self.path, shard)
        if descriptor is None:
            raise CacheError(
                f"{partial_path(self.path, shard)} is being built by another process; wait for it or stop it, then "
                "discard the shard"
            )
        try:
            committed_path(self.path, shard).unlink(missing_ok=True)
            partial_path(self.path, shard).unlink()
            sync_folder(self.path)
        finally:
            release(descriptor)

    def attach(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Attachment:
        """Store what belongs to all records, such as the head their Gaussians come from; before the first shard.

        Args:
            tensors: dense tensors by name.
            record: JSON-serialisable values.

        Returns:
            The attachment the folder now holds; another process's if it was faster.

        Raises:
            CacheError: the disk is full, or the existing attachment is damaged.
        """
        write_attachment(self.path, self.key.digest, tensors, record)
        attachment = read_attachment(self.path, self.key.digest)
        assert attachment is not None
        return attachment

    def attachment(self) -> Attachment | None:
        """Return what `attach` stored, or None if it was not called yet.

        Raises:
            CacheError: it is damaged, or missing although shards made with it exist.
        """
        attachment = read_attachment(self.path, self.key.digest)
        if attachment is None and any(self.path.glob("shard-*")):
            attachment = read_attachment(self.path, self.key.digest)  # another process may have begun meanwhile
            if attachment is not None:
                return attachment
            raise CacheError(
                f"{self.path / ATTACHMENT} is missing, but the shards were made with it; restore it, or "
                f"delete {self.path} and build the cache again"
            )
        return attachment

    def info(self) -> CacheInfo:
        """Return sizes, counts and the key's fields."""
        return cache_info(self.path, self._layout, self.key)

    def require_room(self, views: int | None = None) -> None:
        """Raise CacheError if the unfinished shards, less what is allocated already, exceed the free space.

        Args:
            views: number of first views whose shards are to be built. If None, all.

        Raises:
            CacheError: they do not fit; the message gives both sizes.
        """
        require_room(self.path, self._layout, self.missing_shards(views))

    def __reduce__(self) -> tuple[Callable[[Path], "CacheFolder"], tuple[Path]]:
        # Loader processes get the path: memory maps cannot be pickled.
        return CacheFolder.open, (self.path,)


Request = tuple[NDArray[np.int64], int]
"""Positions (N,) in the training split, and the view (the epoch) to show them in."""
ComputeOutputs = Callable[[Iterable[Request]], Iterator[tuple[Tensor, Gaussian | None]]]
"""Computes the teacher's logits (N, K), and the Gaussian if the codec has one, request by request."""
BuildProgress = Callable[[int], None]


def build_cache(
    folder: CacheFolder,
    outputs: ComputeOutputs,
    *,
    batch_size: int,
    views: int | None = None,
    progress: BuildProgress | None = None,
) -> int:
    """Build every missing shard that no other process is building, then wait for the others'.

    A process that is killed leaves what it wrote; the next build continues from there.

    Args:
        folder: cache folder.
        outputs: function that runs the teacher on an iterable of requests; it may read ahead.
        batch_size: maximum number of samples per request.
        views: number of first views to build. If None, all.
        progress: function called with the number of records written after each request, and with 0 while waiting for
            others; may raise.

    Returns:
        The number of records written by this process.

    Raises:
        CacheError: the disk is full, or the codec cannot store an output.

    Example:
        >>> build_cache(folder, lambda requests: (run_teacher(b) for b in loader.views(requests)), batch_size=256)
        100000
    """
    written = 0

    def idle() -> None:
        if progress is not None:
            progress(0)

    while (writer := folder.claim_any(wait=True, idle=idle, views=views)) is not None:
        with writer:
            parts = list(_parts(writer.todo, folder.samples, batch_size))
            requests = ((records % folder.samples, int(records[0]) // folder.samples) for records in parts)
            for records, (logits, gaussian) in zip(parts, outputs(requests), strict=True):
                writer.write(records, folder.codec.encode(logits, gaussian))
                written += len(records)
                if progress is not None:
                    progress(len(records))
            writer.commit()
    return written


def _parts(records: NDArray[np.int64], samples: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Split ascending records into parts of one view each."""
    views = np.flatnonzero(np.diff(records // samples)) + 1
    for of_view in np.split(records, views):
        yield from (of_view[start : start + size] for start in range(0, len(of_view), size))
