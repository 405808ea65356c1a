"""Writing so that it survives: whole files or none, room claimed beforehand, a full disk named."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unikd_fast.errors import CacheError

# EDQUOT: a user's quota; EFBIG: a file size limit of the process (ulimit -f).
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

LOCK = "create.lock"


def free_bytes(folder: Path) -> int:
    """Bytes this user can still write on the file system of a folder."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def allocated_bytes(path: Path) -> int:
    """Bytes a file takes on disk; 0 if there is none."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


@contextmanager
def full_disk_named(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turns the OSError of a full disk into a CacheError with the bytes needed for `path` and those that are free."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise CacheError(
            f"{path} cannot be written ({os.strerror(error.errno)}): {needed_bytes} bytes needed, "
            f"{free_bytes(path.parent)} free on its file system; make room and build again, what is written is kept, "
            "or build into a folder elsewhere"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is complete under its name or not there; two writers of one name must exclude each other.

    Raises:
        CacheError: the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    with full_disk_named(path, len(content)):
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Exclude all other processes that ask for the same; the kernel gives the lock back if this one dies.

    Raises:
        CacheError: the disk is full.
    """
    with full_disk_named(folder / LOCK, 0):
        file = (folder / LOCK).open("a")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def rename(old: Path, new: Path) -> None:
    """Rename within a folder, and have that on disk."""
    old.rename(new)
    sync_folder(new.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, path: Path, total_bytes: int) -> None:
    """Give an open file its full size and the blocks for it; what it holds stays.

    Raises:
        CacheError: the disk has no room for it.
    """
    held = os.fstat(descriptor).st_blocks * 512
    with full_disk_named(path, max(total_bytes - held, 0)):
        os.posix_fallocate(descriptor, 0, total_bytes)


def write_at(descriptor: int, path: Path, content: memoryview, offset: int) -> None:
    """Write all of `content` (flat bytes) at `offset`.

    Raises:
        CacheError: the disk is full; a first part may be written.
    """
    while content:
        with full_disk_named(path, len(content)):
            written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def read_at(descriptor: int, length: int, offset: int) -> bytearray:
    """Read `length` bytes at `offset`; fewer only where the file ends."""
    content = bytearray(length)
    view, done = memoryview(content), 0
    while done < length:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    view.release()
    return content[:done]
