"""Errors that end a run with a message instead of a traceback, their exit codes, and the signals that stop a run."""

import os
import signal


class RunError(Exception):
    """The run ended for a reason the user can act on."""

    exit_code = 1


class ConfigError(RunError, ValueError):
    """The configuration is invalid; the message says what to change."""

    exit_code = 2


class NonFiniteLoss(RunError):
    """A loss term became inf or NaN."""

    exit_code = 3


class FileError(RunError, OSError):
    """A file cannot be written, or its contents are damaged; the message names it and the remedy."""


class CacheError(RunError):
    """The cache of the teacher's outputs is damaged, incomplete or of another run; the message says what to do."""

    exit_code = 4


class DataError(RunError, ValueError):
    """Files of the data set cannot be read or decoded, more than may be skipped; the message names them."""

    exit_code = 5


class LoaderError(RunError, RuntimeError):
    """The data loader failed for a reason other than the files; the message says what to check."""

    exit_code = 5


class CheckpointError(RunError):
    """A checkpoint could not be written, or none is intact; the message says what to do."""

    exit_code = 6


class OutOfMemory(RunError):
    """The device or the host is out of memory; the message says which part needed it, and what to lower."""

    exit_code = 7


class LostProcess(RunError):
    """Another process of the run ended, or did not answer in time; its own last lines say why."""

    exit_code = 8


class Interrupted(RunError):
    """SIGTERM, SIGHUP or Ctrl-C was received; everything that could be saved is saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


# Messages of torch's allocator for the CPU, and of the system.
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory")


def lacks_memory(error: Exception) -> bool:
    """Return whether an error means that the memory of the device or of the host was not sufficient."""
    import torch  # seconds, and most errors need none of it

    if isinstance(error, RunError):  # names its remedy already
        return False
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a command to save and exit.

    SIGHUP, which a closing terminal sends, is not among them under ``nohup``.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *(() if ignored else (signal.SIGHUP,)))


def describe_os_error(error: OSError) -> str:
    """Return the path and the system's message.

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
