"""Where errors become messages: every sub-command runs its body here.

What the user can act on ends as one line on standard error and an exit code; anything else is a fault of ours and keeps
its traceback.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from unikd_fast.errors import ConfigError, LostProcess, RunError, describe_os_error

_FIRST_SPEAKS_S = 10.0
"""How much later than the others the first process may speak on a busy machine."""


def run_command(name: str, body: Callable[[], int], *, extra: str | None = None) -> int:
    """Run a command and return its exit code; a failure is one line on standard error.

    Of the processes of a launcher the first speaks for all; another one speaks if the first has not ended the run
    meanwhile. If nobody reads the output any more (``| head``), nothing is said.

    Args:
        name: command as the user types it.
        body: function that does the work and returns the exit code.
        extra: extra of the package that brings what the body imports. If None, a missing package is a fault of ours.

    Returns:
        The body's code; that of a `RunError`; 1 for an `OSError`; 2 if a package of the extra is missing; 130 after
        Ctrl-C, also if a second one interrupts the shutdown; 141 if nobody reads the output.

    Example:
        >>> run_command("unikd export", lambda: 0)
        0
    """
    code, message = 0, None
    try:
        try:
            code = body()
            _flush_output()
        except Exception as error:
            if _was_interrupted(error):
                raise KeyboardInterrupt from None
            if isinstance(error, BrokenPipeError) and _without_reader(sys.stdout, sys.stderr):
                code = 128 + signal.SIGPIPE
            elif isinstance(error, RunError):
                code, message = error.exit_code, str(error)
            elif isinstance(error, OSError):
                code, message = RunError.exit_code, describe_os_error(error)
            elif extra is not None and isinstance(error, ModuleNotFoundError) and _is_absent(error.name):
                code = ConfigError.exit_code
                message = (
                    f"the package {error.name} is not installed for {sys.executable}; activate the environment that "
                    f"has it, or pip install 'unikd-fast[{extra}]'"
                )
            else:
                raise
            if message is not None and not _is_first() and not isinstance(error, LostProcess):
                time.sleep(_FIRST_SPEAKS_S)
    except KeyboardInterrupt:
        # Ctrl-C reaches all processes of a terminal, so the first has it too.
        code, message = 128 + signal.SIGINT, "stopped by Ctrl-C" if _is_first() else None
        # One more while Python shuts down ends it at once, in place of a traceback.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    if message is not None:
        with contextlib.suppress(OSError):
            print(f"{name}: error: {message}", file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        _discard_unwritable(stream)
    return code


def _is_absent(module: str | None) -> bool:
    """Return whether a module is missing because its whole package is, and the package is not this one."""
    package = (module or "unikd_fast").partition(".")[0]
    return package != "unikd_fast" and sys.modules.get(package) is None


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _was_interrupted(error: BaseException) -> bool:
    """Return whether Ctrl-C preceded an error: a lock that it interrupts cannot be released, and the error says only
    that."""
    following: list[BaseException] = [error]
    seen: set[int] = set()
    while following:
        one = following.pop()
        if isinstance(one, KeyboardInterrupt):
            return True
        seen.add(id(one))
        following += [
            other for other in (one.__cause__, one.__context__) if other is not None and id(other) not in seen
        ]
    return False


def _flush_output() -> None:
    """Flush standard output, so that an output that cannot be written fails here and not while Python shuts down."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _without_reader(*streams: TextIO) -> bool:
    """Return whether one of the streams is a pipe whose other end is closed."""
    poll = select.poll()
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # not a file, as in a notebook
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard_unwritable(stream: TextIO) -> None:
    """Discard what cannot be written, which would otherwise fail again while Python shuts down, with exit code 120."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
