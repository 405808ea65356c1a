"""What a method learns of the teacher before the student's training, the same on all processes."""

import logging
from collections.abc import Iterator

from unikd_fast.data.loader import Loader
from unikd_fast.engine.batch_norm import average_buffers
from unikd_fast.engine.out_of_memory import naming_part
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.stop import StopSignal
from unikd_fast.errors import Interrupted
from unikd_fast.methods import Method
from unikd_fast.teacher import OnlineTeacher
from unikd_fast.values import Features

_logger = logging.getLogger("unikd_fast")

_STREAM = 1  # of augmentation views; training uses stream 0


@naming_part("method")
def prepare_method(
    method: Method, loader: Loader, teacher: OnlineTeacher, processes: Processes, stop: StopSignal, name: str
) -> None:
    """Fits the method's head, if it has one, to the teacher's features of augmented training batches.

    Each process fits it to batches of its own, and its BatchNorms to their statistics, of which the mean is taken: what
    is frozen then is one head.

    Args:
        name: of the run, before its lines.

    Raises:
        Interrupted: SIGTERM or Ctrl-C.
        OutOfMemory: the head and its optimiser do not fit into memory.
    """
    if method.fitted_head is not None and processes.is_first:
        _logger.info("[%s] the teacher's head is fitted first", name)
    method.prepare(_features_without_end(loader, teacher, stop, name))
    if method.fitted_head is not None:
        average_buffers(method.fitted_head, processes)


def _features_without_end(loader: Loader, teacher: OnlineTeacher, stop: StopSignal, name: str) -> Iterator[Features]:
    epoch = 0
    while True:
        for batch in loader.train(epoch, stream=_STREAM):
            if number := stop.agreed():
                said = f"[{name}] stopped while the teacher's head was fitted; nothing to save"
                raise Interrupted(number, f"{said}; start again with --resume auto")
            with naming_part("teacher"):
                features = teacher(batch.images)
            yield features
        epoch += 1
