"""The teacher's outputs of a run, read from the cache ahead of the steps that need them."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.teacher.cache import CacheFolder
from unikd_fast.values import Gaussian, QuantizedLogits, TopKLogits

Outputs = tuple[Tensor | QuantizedLogits | TopKLogits, Gaussian | None]


def read_ahead(
    folder: CacheFolder,
    positions: Iterable[NDArray[np.int64]],
    view: int,
    *,
    device: torch.device | str = "cpu",
    ahead: int = 4,
) -> Iterator[Outputs]:
    """Yield the outputs of micro-batch after micro-batch; a thread reads and checks the next ones meanwhile.

    Args:
        folder: the cache.
        positions: (N,) of each micro-batch in the training split.
        view: that is trained on.
        device: where the outputs go; to a GPU from pinned memory, without waiting.
        ahead: micro-batches in memory at most.

    Yields:
        What `Codec.decode` gives.

    Raises:
        CacheError: a record is missing or damaged; raised where its micro-batch would be yielded.

    Example:
        >>> for batch, (logits, gaussian) in zip(batches, read_ahead(folder, positions, view=7), strict=True):
        ...     ...
    """
    source = iter(positions)
    waiting: deque[Future[NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="teacher-cache") as thread:

        def ask() -> None:
            batch = next(source, None)
            if batch is not None:
                waiting.append(thread.submit(folder.read, folder.records(batch, view)))

        try:
            for _ in range(ahead):
                ask()
            while waiting:
                records = waiting.popleft().result()
                ask()
                yield folder.codec.decode(records, device)
        finally:
            for future in waiting:
                future.cancel()
