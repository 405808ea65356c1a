"""SIGTERM, SIGHUP and Ctrl-C as a request that all processes honour after the same step."""

import signal
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from unikd_fast.command import stop_signals
from unikd_fast.engine.processes import Processes


class StopSignal:
    """Context manager that catches SIGTERM, SIGHUP and SIGINT; :meth:`agreed` tells every process at the same step.

    Launchers signal one process after another, so acting on the own signal would leave the others waiting in a
    collective. The requests are compared by a small all-reduce on a gloo group of its own, started at one step and read
    at the next: no device synchronisation and nothing to wait for. A second Ctrl-C interrupts at once.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._signal = 0
        self._pending: tuple[Any, torch.Tensor] | None = None
        several = processes.world_size > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=processes.patience) if several else None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    @property
    def asked(self) -> int:
        """The signal that this process received, or 0; for work that the processes do not do in step."""
        return self._signal

    def agreed(self) -> int:
        """The signal that some process received before the previous call, or 0; the same on every process."""
        if self._group is None:
            return self._signal
        agreed = 0
        if self._pending is not None:
            work, value = self._pending
            work.wait()
            agreed = int(value)
        value = torch.tensor(self._signal)
        self._pending = (dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True), value)
        return agreed
