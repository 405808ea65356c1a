"""What ends a run with a message instead of a traceback, and with which exit code; and the signals that stop it."""

import os
import signal


class RunError(Exception):
    """The run ended for a reason the user can act on."""

    exit_code = 1


class ConfigError(RunError, ValueError):
    """The configuration is not usable; the message says what to change."""

    exit_code = 2


class NonFiniteLoss(RunError):
    """A loss term became inf or NaN."""

    exit_code = 3


class FileError(RunError, OSError):
    """A file cannot be written, or what it holds is damaged; names it and the remedy."""


class CacheError(RunError):
    """The teacher's output cache is damaged, incomplete or of another run; the message says what to do."""

    exit_code = 4


class DataError(RunError, ValueError):
    """A file of the data set cannot be read or decoded, or more of them than may be skipped; names them."""

    exit_code = 5


class LoaderError(RunError, RuntimeError):
    """The data set's loader broke down, for a reason outside of the files; the message says what to look at."""

    exit_code = 5


class CheckpointError(RunError):
    """A checkpoint could not be written, or none that is whole can be read; the message says what to do."""

    exit_code = 6


class OutOfMemory(RunError):
    """The memory of the device or of the host is not enough; the message says for which part, and what to lower."""

    exit_code = 7


class LostProcess(RunError):
    """Another process of the run ended, or did not answer in time; its own last lines say why."""

    exit_code = 8


class Interrupted(RunError):
    """SIGTERM, SIGHUP or Ctrl-C; what could be saved is saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a command to save and end.

    SIGHUP, which a terminal sends when it is closed, is not among them under ``nohup``.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,)))


def describe_os_error(error: OSError) -> str:
    """Return the path and what the system says of it.

    Example:
        >>> describe_os_error(OSError(28, "No space left on device", "/runs/a/config.json"))
        '/runs/a/config.json: No space left on device'
    """
    if error.errno is None:
        return str(error)
    paths = [
        os.fsdecode(path) if isinstance(path, bytes) else str(path)
        for path in (error.filename, error.filename2)
        if path is not None
    ]
    said = error.strerror or os.strerror(error.errno)
    return f"{' -> '.join(paths)}: {said}" if paths else said
