"""The throughput of a run, whether it is bound by its loader, and the times of the parts of a step."""

import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from unikd_fast.engine.distributed import Processes
from unikd_fast.report.run_files import StepTime, write_step_time, write_whole_step_time

Item = TypeVar("Item")

_logger = logging.getLogger("unikd_fast")

LOADER_MARGIN = 1.2
"""A run whose loader delivers less than this many times what the steps take is reported as loader-bound."""

_SKIPPED, _MEASURED, _SECONDS = 4, 8, 3.0


def loader_rate(batches: Iterator[Any], processes: Processes, *, micro_batch_size: int) -> float | None:
    """Measure the images per second that the loaders deliver without training; all processes must call it.

    The first batches are not counted: they wait for the loader to start, and others are made meanwhile.

    Args:
        batches: this process's micro-batches, of which a dozen are taken.
        processes: processes of the run.
        micro_batch_size: images of each.

    Returns:
        The rate of the slowest process times the number of processes, or None if a process has too few batches.
    """
    processes.barrier()
    first = began = last = 0.0
    counted = -1
    for place, _ in enumerate(islice(batches, _SKIPPED + _MEASURED)):
        if processes.device.type == "cuda":
            torch.cuda.synchronize(processes.device)
        last = time.perf_counter()
        first = first or last
        if place + 1 < _SKIPPED and last - first < _SECONDS:
            continue
        counted += 1
        if counted == 0:
            began = last
        elif last - began > _SECONDS:
            break
    own = counted * micro_batch_size / (last - began) if counted > 0 else None
    rates = [rate for rate in processes.gather(own) if rate is not None]
    return processes.world_size * min(rates) if len(rates) == processes.world_size else None


class Throughput:
    """The throughput of a run, read at every log line.

    The first wait of an epoch includes the loader's start, and is not counted as its speed.

    Args:
        processes: processes that train; the first one logs.
        global_batch_size: images of a step, over all processes.
        loader_rate: images per second that the loaders deliver without training. If None, it was not measured.
    """

    def __init__(self, processes: Processes, *, global_batch_size: int, loader_rate: float | None) -> None:
        self._processes = processes
        self._images = global_batch_size
        self._loader_rate = loader_rate
        self._said = False

    def begin(self, step: int) -> None:
        """Start an epoch, or the rest of one, at this step."""
        self._step, self._began, self._waited = step, time.perf_counter(), 0.0
        self._start: float | None = None

    def next(self, batches: Iterator[Item]) -> Item:
        """Return the next batch; the time it takes counts as waiting for data."""
        asked = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - asked
        self._waited += waited
        if self._start is None:
            self._start = waited
        return batch

    def read(self, step: int) -> dict[str, float]:
        """Return images_per_s and data_wait_share since the last call, and warn once if the run is loader-bound."""
        seconds, waited, images = time.perf_counter() - self._began, self._waited, (step - self._step) * self._images
        start = self._start or 0.0
        if self._processes.is_first and not self._said:
            message = self._loader_bound(images, seconds - start, waited - start)
            if message is not None:
                _logger.warning(message)
                self._said = True
        self._step, self._began, self._waited, self._start = step, time.perf_counter(), 0.0, 0.0
        return {"images_per_s": images / seconds, "data_wait_share": waited / seconds}

    def _loader_bound(self, images: int, seconds: float, waited: float) -> str | None:
        if self._loader_rate is None:
            return None
        # On a CPU the time without waiting is that of the steps. A GPU may compute while the host waits for a batch;
        # there the slower of loader and step determines the throughput, which the loader is compared with.
        taken = images / (seconds - waited if self._processes.device.type == "cpu" else seconds)
        if self._loader_rate >= LOADER_MARGIN * taken:
            return None
        return (
            f"loader-bound: the loader delivers {self._loader_rate:,.0f} images/s, {self._loader_rate / taken:.2f} "
            f"times the {taken:,.0f} images/s that the steps take, and {LOADER_MARGIN} times would be enough; for "
            "image files raise data.dali_threads or data.workers, or pack them (unikd data pack)"
        )


FIRST, COUNT = 10, 10
"""Steps that are measured, counted from the process's first; earlier ones warm up caches and kernels."""


def describe_hardware(device: torch.device) -> str:
    """Return what a figure was measured on.

    Example:
        >>> describe_hardware(torch.device("cuda"))
        'NVIDIA H200'
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


class StepClock:
    """Records when the parts of a step end; on a GPU by events, which are waited for in `write` only.

    On a GPU a part's time is that between two points of the stream. For a small network it is the time of the launches.
    The parts of a step captured as a whole cannot be separated.

    Args:
        device: device of the step. If None, nothing is recorded.
        whole: whether a step has no parts besides "data".
    """

    def __init__(self, device: torch.device | None, *, whole: bool = False) -> None:
        self._device, self._whole = device, whole
        self._steps = 0
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._runs = False

    def start(self) -> None:
        """Start a step, before its first batch."""
        self._steps += 1
        self._runs = self._device is not None and FIRST < self._steps <= FIRST + COUNT
        self.mark("")

    def mark(self, part: str) -> None:
        """Count the time since the last mark towards this part."""
        if not self._runs:
            return
        assert self._device is not None
        if self._device.type != "cuda":
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def write(self, folder: Path) -> None:
        """Write step_time.json once, when all steps are measured; waits for the device."""
        if self._device is None or self._steps < FIRST + COUNT or not self._marks:
            return
        spent = self._milliseconds()
        hardware = describe_hardware(self._device)
        if self._whole:
            write_whole_step_time(folder, data_ms=spent["data"], step_ms=spent["step"], hardware=hardware)
        else:
            parts = ("data", "teacher", "student_forward", "loss", "backward", "optimiser")
            times = {f"{part}_ms": spent.get(part, 0.0) for part in parts}
            write_step_time(folder, StepTime(**times, hardware=hardware))
        self._marks, self._device = [], None

    def _milliseconds(self) -> dict[str, float]:
        """Return the mean milliseconds per step, by part."""
        spent: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if not part:  # between two steps
                continue
            if isinstance(before, float) or isinstance(after, float):
                assert isinstance(before, float) and isinstance(after, float)
                milliseconds = 1000 * (after - before)
            else:
                after.synchronize()
                milliseconds = before.elapsed_time(after)
            spent[part] = spent.get(part, 0.0) + milliseconds / COUNT
        return spent


UNTIMED = StepClock(None)
"""A clock that records nothing."""
