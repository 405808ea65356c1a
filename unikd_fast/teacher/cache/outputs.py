"""Stored outputs in a run: read ahead of the steps that need them, and compared with recomputed ones."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, Codec
from unikd_fast.teacher.fidelity import LOGIT_BOUND
from unikd_fast.teacher.online import unit_rounding
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
    """Yield the outputs of one micro-batch after another, while a thread reads and checks the next ones.

    Args:
        folder: cache folder.
        positions: positions (N,) in the training split, one array per micro-batch.
        view: view that is trained on.
        device: device of the outputs; copied to a GPU from pinned memory, without blocking.
        ahead: maximum number of micro-batches held in memory.

    Yields:
        What `Codec.decode` returns.

    Raises:
        CacheError: a record is missing or damaged; raised when its micro-batch is due.

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


# Two computations of a number may round in different directions and be stored one unit of fp16 apart.
_HALF_UNIT = 2.0**-10


class Recheck(NamedTuple):
    """Stored outputs compared with the teacher's, in units of their own size."""

    views: int
    worst: float  # largest difference over the views
    bound: float  # what rounding explains


def output_differences(
    codec: Codec, records: NDArray[np.uint8], logits: Tensor, gaussian: Gaussian | None = None
) -> Tensor:
    """Return how far each stored output is from a recomputed one.

    Both are compared as stored, so neither the codec's own loss nor one unit in the last place of a number counts.
    Logits are centred and measured relative to the size of the centred row; for top_k, the log-probabilities of the
    kept classes relative to the share of that size that as many classes have; the Gaussian's mean relative to its size;
    its log-variance as it is, the relative change of the variance. The largest of these counts.

    Args:
        codec: codec that packed the records.
        records: stored records (N, record_bytes), as read.
        logits: recomputed logits (N, K).
        gaussian: recomputed Gaussian, (N, K) each, if the codec holds one.

    Returns:
        (N,) in fp64 on the CPU; NaN or inf where a value is not finite.

    Example:
        >>> float(output_differences(codec, codec.encode(logits), logits).max())
        0.0
    """
    stored, stored_gaussian = codec.decode(records)
    again, again_gaussian = codec.decode(codec.encode(logits, gaussian))
    exact = logits.detach().cpu().double()
    size = _root_mean_square(exact - exact.mean(1, keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)
    if isinstance(stored, TopKLogits):
        assert isinstance(again, TopKLogits)
        # The classes may differ if two logits are nearly equal: the new logits are taken at the stored classes.
        values, kept = stored.values.double(), exact.half().double().gather(1, stored.indices.long())
        sums = (stored.log_sum_exp.double() - again.log_sum_exp.double())[:, None]
        # The largest logit affects the log-sum-exp, and with it every kept log-probability.
        allowed = _HALF_UNIT * (values.abs() + values.abs().amax(1, keepdim=True))
        worst = _root_mean_square(_beyond(values - kept - sums, allowed)) / size
    elif isinstance(stored, QuantizedLogits):
        assert isinstance(again, QuantizedLogits)
        level = torch.maximum(stored.scale, again.scale).double()[:, None]
        worst = _root_mean_square(_beyond(_centred(_dense(stored) - _dense(again)), level)) / size
    else:
        assert isinstance(again, Tensor)
        change = _centred(stored.double() - again.double())
        worst = _root_mean_square(_beyond(change, _HALF_UNIT * stored.double().abs())) / size
    if stored_gaussian is not None and again_gaussian is not None:
        for name, left, right in zip(Gaussian._fields, stored_gaussian, again_gaussian, strict=True):
            change = _beyond(left.double() - right.double(), _HALF_UNIT * left.double().abs())
            found = _root_mean_square(change)
            if name == "mean":
                found = found / _root_mean_square(right.double()).clamp_min(torch.finfo(torch.float64).tiny)
            worst = torch.maximum(worst, found)  # NaN propagates
    return worst


def check_outputs(
    differences: Tensor, *, precision: str, device: torch.device | str, names: list[str], cache: str
) -> Recheck:
    """Raise CacheError if the outputs in a cache are not the teacher's.

    Args:
        differences: differences (N,) from `output_differences`.
        precision: precision of the teacher.
        device: device it computed on.
        names: names of the N views for messages.
        cache: name of the cache for messages.

    Raises:
        CacheError: a view differs by more than rounding explains; the message gives it, both values and the remedy.

    Example:
        >>> check_outputs(torch.zeros(1), precision="bf16", device="cpu", names=["sample 7"], cache="caches/a")
        Recheck(views=1, worst=0.0, bound=0.125)
    """
    bound = LOGIT_BOUND * unit_rounding(precision, device)
    wrong = ~(differences <= bound)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise CacheError(
            f"{cache} does not match the teacher: {int(wrong.sum())} of {len(differences)} recomputed outputs "
            f"differ, {names[first]} by {float(differences[first]):.2g} of its size, and rounding explains at "
            f"most {bound:.2g}; something the key does not cover has changed (image files, libraries, the "
            "processor): delete the folder and build the cache again, or choose another with --set "
            "teacher.cache.dir=..."
        )
    return Recheck(len(differences), float(differences.max()), bound)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True)


def _root_mean_square(rows: Tensor) -> Tensor:
    return rows.square().mean(1).sqrt()


def _beyond(change: Tensor, allowed: Tensor) -> Tensor:
    """Return how far a change exceeds what is allowed; NaN stays NaN."""
    return (change.abs() - allowed).clamp_min(0.0)


def _dense(logits: QuantizedLogits) -> Tensor:
    return logits.values.double() * logits.scale.double()[:, None] + logits.offset.double()[:, None]
