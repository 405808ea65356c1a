"""Jobs as processes, several at a time: in order, after what they need, and apart from each other's failures."""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

from unikd_fast.command import stop_signals
from unikd_fast.errors import OutOfMemory
from unikd_fast.io import append_line, make_folder, open_own

_POLL_S = 0.1
_SHOWN_LINES = 8
_READ_BYTES = 16384
_SIGNAL_OF_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG


class Job(NamedTuple):
    """A command that runs once.

    Args:
        name: unique.
        command: with its arguments.
        log: its output is appended to this file.
        needs: names of jobs that must have ended well before it starts; those not in the schedule count as such.
        environment: variables beside those of this process.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}


class Started(NamedTuple):
    """A job has been started; beside it run ``beside`` others."""

    job: Job
    beside: int


class Ended(NamedTuple):
    """A job has ended, or cannot be started.

    Args:
        job: which.
        code: its exit code, -n for signal n; None if it was never started.
        wall_s: seconds from start to end.
        beside: the most jobs that ran beside it.
        last_lines: of its output; or why it was not started.
        again: whether it is back in the queue, having run out of memory beside others.
    """

    job: Job
    code: int | None
    wall_s: float
    beside: int
    last_lines: tuple[str, ...]
    again: bool = False


class Room(Protocol):
    """How many jobs run at a time, and where."""

    def offer(self, running: Sequence[Mapping[str, str]]) -> Mapping[str, str] | None:
        """Environment variables of one more job, or None if there is no room.

        Args:
            running: what was offered to each of those that run.
        """

    def narrow(self, running: int) -> bool:
        """A job ran out of memory beside ``running`` others: offer less. Returns whether it is worth another try."""


class Schedule:
    """Runs jobs, the first ready one first, as long as there is room.

    SIGTERM and Ctrl-C end all processes by SIGTERM, upon which a run saves where it is; a second Ctrl-C kills them. A
    process that outlives this one, because that was killed, gets SIGTERM too.

    Args:
        jobs: in the order in which they are to be started.
        room: how many at a time.

    Example:
        >>> schedule = Schedule([Job("a", ("true",), Path("a.log"))], room)
        >>> [type(event).__name__ for event in schedule.run()]
        ['Started', 'Ended']
    """

    def __init__(self, jobs: Sequence[Job], room: Room) -> None:
        self._waiting = list(jobs)
        self._room = room
        self._running: list[_Process] = []
        self._good = set[str]()
        self._bad = set[str]()
        self.signal = 0
        """The signal that ended it early, or 0."""

    @property
    def waiting(self) -> int:
        """Jobs that have not been started."""
        return len(self._waiting)

    def run(self) -> Iterator[Started | Ended]:
        """Runs them, and yields what happens as it happens."""
        told = False
        with self._listening():
            try:
                while self._running or (self._waiting and not self.signal):
                    if not self.signal:
                        yield from self._refuse()
                        yield from self._start()
                    elif not told:
                        told = True
                        for process in self._running:
                            process.popen.terminate()
                    yield from self._collect()
                    time.sleep(_POLL_S)
            finally:
                for process in self._running:
                    process.kill()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            if self.signal and number == signal.SIGINT:
                for process in self._running:
                    process.kill()
            self.signal = self.signal or number

        previous = {number: signal.signal(number, note) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _refuse(self) -> Iterator[Ended]:
        """Those that wait for what has failed will never start."""
        while (job := next((job for job in self._waiting if self._bad.intersection(job.needs)), None)) is not None:
            self._waiting.remove(job)
            self._bad.add(job.name)
            failed = next(need for need in job.needs if need in self._bad)
            yield Ended(job, None, 0.0, 0, (f"not started: it needs {failed}, which failed",))

    def _start(self) -> Iterator[Started]:
        while (job := self._ready()) is not None:
            offered = self._room.offer([process.offered for process in self._running])
            if offered is None:
                return
            self._waiting.remove(job)
            for process in self._running:
                process.beside = max(process.beside, len(self._running))
            self._running.append(_Process(job, offered, beside=len(self._running)))
            yield Started(job, len(self._running) - 1)

    def _ready(self) -> Job | None:
        not_yet = {job.name for job in self._waiting} | {process.job.name for process in self._running}
        return next((job for job in self._waiting if not not_yet.intersection(job.needs)), None)

    def _collect(self) -> Iterator[Ended]:
        for process in list(self._running):
            code = process.popen.poll()
            if code is None:
                continue
            self._running.remove(process)
            again = code == OutOfMemory.exit_code and not self.signal and self._room.narrow(process.beside)
            if again:
                self._waiting.insert(0, process.job)
            elif code:
                self._bad.add(process.job.name)
            yield Ended(process.job, code, process.wall_s(), process.beside, process.last_lines(), again)


class _Process:
    """A job that runs."""

    def __init__(self, job: Job, offered: Mapping[str, str], *, beside: int) -> None:
        self.job, self.offered, self.beside = job, offered, beside
        make_folder(job.log.parent)
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in {**job.environment, **offered}.items())
        append_line(job.log, f"$ {variables} {shlex.join(job.command)}")
        with open_own(job.log, append=True) as log:
            self._log_start = log.seek(0, os.SEEK_END)
            self._began = time.monotonic()
            self.popen = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **job.environment, **offered},
                start_new_session=True,  # a Ctrl-C on the terminal comes to them once, through us
                preexec_fn=_ends_with_parent(),
            )

    def wall_s(self) -> float:
        return time.monotonic() - self._began

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def last_lines(self) -> tuple[str, ...]:
        """Of what this process has written."""
        with self.job.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _READ_BYTES))
            text = log.read().decode(errors="replace")
        return tuple(line.rstrip() for line in text.splitlines() if line.strip())[-_SHOWN_LINES:]


def _ends_with_parent() -> Callable[[], None] | None:
    """What a child does first: it asks for SIGTERM when this process is gone, where the system knows that."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork

    def ask() -> None:
        prctl(_SIGNAL_OF_PARENTS_DEATH, signal.SIGTERM)

    return ask
