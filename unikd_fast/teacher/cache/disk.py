"""The files of a cache: opened where they are no links, room claimed beforehand, what goes wrong a CacheError."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unikd_fast.errors import CacheError, FileError
from unikd_fast.io import naming, open_own, remove_leftovers, sync_folder

LOCK = "create.lock"


def allocated_bytes(path: Path) -> int:
    """Bytes a file takes on disk; 0 if there is none."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


@contextmanager
def writing(path: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into a CacheError, with the bytes needed for it."""
    try:
        with naming(path):
            yield
    except FileError as error:
        needed = f"{needed_bytes} bytes are needed; " if needed_bytes else ""
        raise CacheError(f"{error}, and build again ({needed}what is written is kept)") from error


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Exclude all other processes that ask for the same; the kernel gives the lock back if this one dies.

    What a killed holder left of a file it wrote is removed.

    Raises:
        CacheError: the disk is full, or the lock's file is a link.
    """
    with writing(folder / LOCK):
        file = open_own(folder / LOCK)
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(folder)
        yield


def refuse_link(path: Path) -> None:
    """Raise CacheError where a file of a cache is a link or a device; FileNotFoundError where it is missing."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise CacheError(f"{path} is a link, or not a regular file; put the file itself there")


def rename(old: Path, new: Path) -> None:
    """Rename within a folder, and have that on disk."""
    old.rename(new)
    sync_folder(new.parent)


def reserve(descriptor: int, path: Path, total_bytes: int) -> None:
    """Give an open file its full size and the blocks for it; what it holds stays.

    Raises:
        CacheError: the disk has no room for it, or is broken.
    """
    held = os.fstat(descriptor).st_blocks * 512
    with writing(path, max(total_bytes - held, 0)):
        os.posix_fallocate(descriptor, 0, total_bytes)


def write_at(descriptor: int, path: Path, content: memoryview, offset: int) -> None:
    """Write all of `content` (flat bytes) at `offset`.

    Raises:
        CacheError: the disk is full; a first part may be written.
    """
    while content:
        with writing(path, len(content)):
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
