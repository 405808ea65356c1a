"""The life of decoding processes: they outlive stop signals, end with whom they serve, and die for a reason."""

import atexit
import signal
import time
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import DataLoader

from unikd_fast.errors import LoaderError

_WORD_OF_DEATH_S = 1.0

_GRACE_S = 10

# torch's iterators that have workers and are still there, and the queues through which the workers are told to end:
# Python closes those first where it collects them and the iterator as one cycle of garbage.
_with_workers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def started(loader: DataLoader) -> Any:
    """Return an iterator over what a loader's workers make, who begin at once and will end with this process.

    Raises:
        LoaderError: its workers died since they were last used.
    """
    try:
        batches: Any = iter(loader)
    except RuntimeError as error:  # persistent workers may have died since the last epoch
        if "DataLoader worker" not in str(error):
            raise
        raise dead_worker(error) from error
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


def dead_worker(cause: Exception) -> LoaderError:
    """Return what to raise when a worker has died of this."""
    return LoaderError(
        f"FolderLoader: a decoding process died ({type(cause).__name__}: {cause}); short of memory, lower "
        "data.workers; short of shared memory, enlarge /dev/shm (docker run --shm-size); "
        "workers 0 shows where it happens"
    )


def cause_of_death(broken_connection: Exception) -> Exception:
    """Return what torch has to say of the death of a worker, or else how it was noticed.

    torch raises from a signal handler, a moment after the connection breaks and wherever this process is by then. Wait
    for it here, where it can be told; later it could strike while the error is being printed.
    """
    try:
        time.sleep(_WORD_OF_DEATH_S)
    except RuntimeError as error:
        return error
    return broken_connection


def outlive_stop_signals(worker: int) -> None:
    """Keep a worker, which calls this first, alive through Ctrl-C and what terminals and launchers send to all.

    It must serve until the run has finished its step and saved. But SIGTERM is also how Python ends it at exit, so that
    is put off and not ignored.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_S))
