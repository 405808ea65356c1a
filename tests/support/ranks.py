"""Processes that cost their work alone: forked from a server that has imported everything.

The ranks of a run are what torchrun or DeepSpeed's launcher would start: the same environment, a session each, signals
and exit codes of their own. What the launchers themselves do, `real_runs.launch` shows.
"""

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import reduction
from pathlib import Path
from typing import Any, NamedTuple

import torch

from support.free_ports import free_port

LIMIT_S = 300
# Once for all processes: nothing of it computes, so that the server can be forked. DeepSpeed would import the last for
# ZeRO, and with it all of torch.compile.
_IMPORTED = [
    "unikd_fast.cli",
    "unikd_fast.engine.run",
    "deepspeed",
    "torchvision",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]


def _process(target: Callable[..., None], *arguments: Any) -> Any:
    # A server that has looked for GPUs cannot be forked.
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context.Process(target=target, args=arguments)


class Done(NamedTuple):
    """How a run ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


class Ranks:
    """Processes of one run, by rank; of several the first ends all, as a launcher would have it.

    Attributes:
        pids: process of each rank.
    """

    def __init__(
        self,
        body: Callable[[], int],
        folder: Path,
        *,
        processes: int = 1,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the processes.

        Args:
            body: what each does, which returns its exit code; from a module, so that it can be sent to it.
            folder: where what they say is kept.
            processes: number of ranks.
            environment: variables to set in addition.
        """
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if processes > 1 else {}
        self._said = [folder / f".{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        self._processes: list[Any] = []
        for rank in range(processes):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            variables = {**os.environ, **(environment or {}), **shared}
            if processes > 1:
                variables |= {name: str(value) for name, value in own.items()}
            self._processes.append(_process(_rank, body, variables, self._said))
        for process in self._processes:
            process.start()
        self.pids = [process.pid for process in self._processes]

    def poll(self) -> int | None:
        """Return the exit code, which is that of the first rank that failed; None while one of them runs."""
        codes = [process.exitcode for process in self._processes]
        if codes[0] and None in codes:  # the launchers end the others then
            self.send_signal(signal.SIGTERM)
        return None if None in codes else next((code for code in codes if code), 0)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float = LIMIT_S) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"a run did not end within {timeout} s:\n{self.said()}")
            time.sleep(0.02)
        return code

    def done(self, timeout: float = LIMIT_S) -> Done:
        """Wait for the end."""
        return Done(self.wait(timeout), *(path.read_text() for path in self._said))

    def said(self) -> str:
        """Return what they said so far, standard error last."""
        return "".join(path.read_text() for path in self._said if path.exists())

    def send_signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks alone, or to all."""
        for rank, process in enumerate(self._processes):
            if process.exitcode is None and (not ranks or rank in ranks):
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)

    def signal_groups(self, number: int) -> None:
        """Send a signal to all ranks and to whatever they have started."""
        for process in self._processes:
            if process.exitcode is None:
                os.killpg(process.pid, number)

    def kill(self) -> None:
        """Kill all of it and wait for the end."""
        self.signal_groups(signal.SIGKILL)
        for process in self._processes:
            process.join()


def _rank(body: Callable[[], int], variables: dict[str, str], said: list[Path]) -> None:
    gc.freeze()  # what was imported stays the server's: to look through it would copy it
    os.setsid()
    signal.alarm(LIMIT_S)  # ends it where the test was killed before it could
    for number, path in enumerate(said, 1):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(variables)
    sys.exit(body())


class Program:
    """A Python program that has `sys`, with a pipe to its standard input and one from its standard output."""

    def __init__(self, source: str, *arguments: object) -> None:
        (its_stdin, stdin), (stdout, its_stdout) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)
        given = list(map(str, arguments))
        # Only while a process starts can a descriptor be sent to it.
        self._process = _process(_program, source, given, _Descriptor(its_stdin), _Descriptor(its_stdout))
        self._process.start()
        os.close(its_stdin)
        os.close(its_stdout)

    def poll(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def tell(self, line: str) -> None:
        print(line, file=self.stdin, flush=True)

    def ended(self) -> str:
        """Wait for the end and return what was not read yet of what it said."""
        rest = self.stdout.read()
        self._process.join()
        self.stdin.close()
        self.stdout.close()
        return rest

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Descriptor:
    """A file descriptor on its way to another process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(sent: Any) -> int:
    number: int = sent.detach()
    return number


def _program(source: str, arguments: list[str], stdin: int, stdout: int) -> None:
    signal.alarm(LIMIT_S)
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.close(stdin)
    os.close(stdout)
    sys.stdin, sys.argv = open(0, closefd=False), ["-c", *arguments]  # noqa: SIM115
    exec(source, {"__name__": "__main__", "sys": sys})
