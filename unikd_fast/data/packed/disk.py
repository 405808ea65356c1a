"""Writing a pack so that it survives: whole files or none, a full disk named, one packer at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unikd_fast.errors import RunError
from unikd_fast.io import NO_ROOM, free_bytes, open_own, sync_folder


class PackError(RunError, RuntimeError):
    """Packing cannot go on, for no fault of the images; the message says what to do."""


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turns the OSError of a full disk into a PackError with the bytes that are free where `path` is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise PackError(
            f"{path} cannot be written ({os.strerror(error.errno)}): {free_bytes(path.parent)} bytes are free on its "
            "file system; make room and pack again, finished shards are kept"
        ) from error


@contextmanager
def complete_or_absent(path: Path, workshop: Path) -> Iterator[Path]:
    """Yields a temporary path in `workshop`; what is written there is on disk under its name at the end, or not at all.

    The name holds the process, for one whose parent was killed may outlive it by a moment.

    Raises:
        PackError: the disk is full.
    """
    temporary = workshop / f"{path.name}.{os.getpid()}.tmp"
    try:
        with full_disk_named(temporary):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def only_packer(lock: Path) -> Iterator[None]:
    """Excludes all other processes that ask for the same; the kernel gives the lock back if this one dies.

    Raises:
        PackError: another process holds it.
    """
    with open_own(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PackError(
                f"another process is packing into {lock.parent.parent}; wait for it, or pack elsewhere"
            ) from error
        yield
