"""Filling a cache folder: shard by shard, by any number of processes, from whatever computes a teacher's outputs."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.teacher.cache.shards import CacheFolder
from unikd_fast.values import Gaussian

Request = tuple[NDArray[np.int64], int]
"""Positions (N,) in the training split, and the view (the epoch) to show them in."""
Outputs = Callable[[Iterable[Request]], Iterator[tuple[Tensor, Gaussian | None]]]
"""Computes the teacher's logits (N, K), and the Gaussian where the codec has one, request by request."""
Progress = Callable[[int], None]


def build_cache(
    folder: CacheFolder,
    outputs: Outputs,
    *,
    batch_size: int,
    views: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Build every shard that is missing and that no other process builds; wait for those of others at the end.

    A process that is killed leaves what it wrote; who builds next goes on from there.

    Args:
        folder: the cache.
        outputs: runs the teacher; it is given an iterable and may read ahead in it.
        batch_size: samples per request at most.
        views: None for all, else the first ones.
        progress: called with the number of records written, after each request, and with 0 while it waits for others;
            may raise.

    Returns:
        How many records this process wrote.

    Raises:
        CacheError: the disk is full, or an output does not fit the codec.

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
    """Cut ascending records into parts of one view each."""
    views = np.flatnonzero(np.diff(records // samples)) + 1
    for of_view in np.split(records, views):
        yield from (of_view[start : start + size] for start in range(0, len(of_view), size))
