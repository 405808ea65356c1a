"""Processes that decode requests ahead, through torch's DataLoader: their life, and what is said when one dies."""

import atexit
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import DataLoader

from unikd_fast.data.images import BadImageTally
from unikd_fast.errors import DataError, LoaderError

_SIGNAL_WAIT_S = 1.0

_GRACE_S = 10

# torch's iterators that have workers and are still there, and the queues through which the workers are told to end:
# Python closes those first where it collects them and the iterator as one cycle of garbage.
_with_workers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

T = TypeVar("T")


class DecodingWorkers:
    """Worker processes that decode requests.

    Those of training live as long as this object and serve one iterator at a time: a new `train` takes them over. Each
    call of `once` has workers of its own and may run in the middle of an epoch.

    Args:
        decoder: object that is indexed by a request and returns what is decoded, with its bad images as `bad`.
        count: number of processes. With 0, this process decodes.
        pin_memory: whether tensors come in pinned memory.

    Raises:
        ValueError: count is negative.

    Example:
        >>> batches = DecodingWorkers(Decoder(windows), 2, pin_memory=False).once(requests, tally, batch_of)
    """

    def __init__(self, decoder: Any, count: int, *, pin_memory: bool) -> None:
        if count < 0:
            raise ValueError(f"DecodingWorkers: workers must be at least 0, got {count}; raise data.workers")
        self._decoder = decoder
        self._count = count
        self._pin_memory = pin_memory
        self._requests = _Requests()
        self._trainers = self._data_loader(self._requests, persistent=count > 0)
        self._latest_train = 0

    def train(self, requests: Iterator[Any], tally: BadImageTally, batch_of: Callable[[Any], T | None]) -> Iterator[T]:
        """Decode the requests of an epoch; arguments and errors as for `once`.

        Raises:
            RuntimeError: the iterator is used after a newer `train` took over the workers.
        """
        self._requests.pending = requests
        self._latest_train += 1
        return self._latest(_batches(start_workers(self._trainers), tally, batch_of), self._latest_train)

    def once(self, requests: Iterable[Any], tally: BadImageTally, batch_of: Callable[[Any], T | None]) -> Iterator[T]:
        """Decode requests.

        Args:
            requests: requests, taken one by one.
            tally: where their bad images are counted.
            batch_of: function that makes a batch of what is decoded, or None, which is left out.

        Raises:
            DataError: an image cannot be decoded and its request makes that an error, or there are too many.
            LoaderError: a worker died.
        """
        queue = _Requests()
        queue.pending = iter(requests)
        return _batches(start_workers(self._data_loader(queue, persistent=False)), tally, batch_of)

    def _latest(self, batches: Iterator[T], ticket: int) -> Iterator[T]:
        while True:
            if ticket != self._latest_train:
                raise RuntimeError(
                    "Loader.train: this iterator ended when a newer call of train took over the workers; "
                    "build a second loader to train from two iterators at once"
                )
            batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _data_loader(self, requests: Iterable[Any], *, persistent: bool) -> DataLoader:
        return DataLoader(
            self._decoder,
            sampler=requests,
            batch_size=None,
            num_workers=self._count,
            collate_fn=_as_decoded,
            pin_memory=self._pin_memory,
            persistent_workers=persistent,
            worker_init_fn=outlive_stop_signals,
            # Without a generator a DataLoader draws from the global one, and a resumed run would see other numbers.
            generator=torch.Generator(),
        )


def _batches(decoded: Iterator[Any], tally: BadImageTally, batch_of: Callable[[Any], T | None]) -> Iterator[T]:
    try:
        for each in decoded:
            tally.add(each.bad)
            if (batch := batch_of(each)) is not None:
                yield batch
    except DataError as error:
        # torch has put the worker's traceback into the message, whose end is what is wrong with the file. Its frame
        # here holds the error and is held by the traceback; without one the workers end now and not at some garbage
        # collection.
        error.args = (str(error).rpartition("DataError: ")[2].rstrip(),)
        raise error.with_traceback(None)  # noqa: B904
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise worker_died(error) from error
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        # Files that cannot be read are DataErrors, so this is a batch whose maker is no longer there to hand over its
        # memory.
        cause = worker_failure(error)
        raise worker_died(cause) from cause


class _Requests:
    """The queue of the training workers: a long-lived DataLoader asks anew for its sampler's items at each epoch."""

    def __init__(self) -> None:
        self.pending: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.pending


def _as_decoded(decoded: Any) -> Any:
    return decoded


def start_workers(loader: DataLoader) -> Any:
    """Return an iterator over what a loader's workers make; they begin at once and end with this process.

    Raises:
        LoaderError: its workers died since they were last used.
    """
    try:
        batches: Any = iter(loader)
    except RuntimeError as error:  # persistent workers may have died since the last epoch
        if "DataLoader worker" not in str(error):
            raise
        raise worker_died(error) from error
    if loader.num_workers:
        _with_workers[batches] = batches._index_queues
        # The last to be registered is the first to be called. Of the others, torch's keep it from ending its workers or
        # wait for them, and multiprocessing's sends them SIGTERM, which they put off, and waits too.
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
    return batches


def _end_workers() -> None:
    for batches in tuple(_with_workers):
        batches.__del__()


def worker_died(cause: Exception) -> LoaderError:
    """Return the error to raise when a worker has died of this."""
    return LoaderError(
        f"data.loader: a decoding process died ({type(cause).__name__}: {cause}); short of memory, lower "
        "data.workers; short of shared memory, enlarge /dev/shm (docker run --shm-size); "
        "workers 0 shows where it happens"
    )


def worker_failure(broken_connection: Exception) -> Exception:
    """Return what torch says about the death of a worker, otherwise how it was noticed.

    torch raises from a signal handler, a moment after the connection breaks and wherever this process is by then. Wait
    for it here, where it can be reported; later it could strike while the error is being printed.
    """
    try:
        time.sleep(_SIGNAL_WAIT_S)
    except RuntimeError as error:
        return error
    return broken_connection


def outlive_stop_signals(worker: int) -> None:
    """Keep a worker, which calls this first, alive through Ctrl-C and signals that are sent to all processes.

    It must serve until the run has finished its step and saved. But Python also ends it by SIGTERM at exit, so that
    signal is delayed, not ignored.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
