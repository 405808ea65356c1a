"""The one way to write a file: whole under its name or not there at all, on disk when the call returns.

What is written goes to a new file with a random name beside the target, is synced, and takes the target's place by a
rename. So a kill or a full disk leaves the old content, a link that lies in the folder is replaced and never written
through, and the mode is what umask gives. A kill can leave such a file behind: see `remove_leftovers`. Folders are
written likewise; no rename replaces one, so a kill can leave the old folder under the name that `replaced` gives.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from unikd_fast.errors import FileError, RunError

# EDQUOT: a user's quota; EFBIG: a file size limit of the process (ulimit -f).
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_REMEDIES = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder that is not mounted read-only",
    errno.ENOTDIR: "a part of its path is a file; choose another",
    errno.EEXIST: "a file of that name is there; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "its folder is missing; make it",
    errno.ELOOP: "it is a link, which is not followed; remove it",
}


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file: afterwards it holds `content`, or, if this raises, what it held before.

    Args:
        content: text is encoded as UTF-8.

    Raises:
        FileError: the disk is full or the folder cannot be written to; names the path and the remedy.
    """
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, indented by two; see `write_file`."""
    write_file(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` when the block ends, and is gone if it raises.

    Raises:
        FileError: see `write_file`.
    """
    temporary = _temporary(path)
    with naming(path):
        _refuse_device(path)
        try:
            with _created(temporary) as file:
                yield file
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


@contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """As `new_file`, for libraries that open a file by themselves: yield a path of the same name in a private folder.

    Raises:
        FileError: see `write_file`.
    """
    folder = _temporary(path)
    with naming(path):
        _refuse_device(path)
        try:
            folder.mkdir(mode=0o700)
            unfinished = folder / path.name
            yield unfinished
            # The library may have asked for another mode than umask gives; a new file shows what that is.
            probe = folder / "mode"
            os.close(os.open(probe, _NEW, 0o666))
            unfinished.chmod(stat.S_IMODE(probe.stat().st_mode))
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        sync_folder(path.parent)


def append_line(path: Path, text: str) -> None:
    """Append a line to a file, and make it where it is missing; if this raises, the file is as it was.

    A line that a kill cut off before is ended first.

    Raises:
        FileError: see `open_own`, or the disk is full.
    """
    with open_own(path, append=True) as file, naming(path):
        size = os.fstat(file.fileno()).st_size
        ends = size == 0 or os.pread(file.fileno(), 1, size - 1) == b"\n"
        left = memoryview((("" if ends else "\n") + text + "\n").encode())
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends, and is gone if it raises.

    Its files are made by `create_file`, which has them on disk.

    Raises:
        FileError: see `write_file`.
    """
    folder, aside = _temporary(path), replaced(path)
    with naming(path):
        try:
            folder.mkdir()
            yield folder
            sync_folder(folder)
            if path.exists():
                if aside.exists():  # of a kill after the second rename below: what has its name is the newer one
                    remove_folder(aside)
                path.rename(aside)
            try:
                folder.rename(path)
            except BaseException:
                with suppress(OSError):
                    aside.rename(path)
                raise
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    if aside.exists():
        remove_folder(aside)


def replaced(path: Path) -> Path:
    """Return where a folder lies while another takes its place, and stays if the process is killed at that moment."""
    return path.with_name(f".{path.name}.replaced")


def create_file(path: Path, content: bytes) -> None:
    """Write a file of a name that is not taken, and have its content on disk; its name is when its folder is synced."""
    with _created(path) as file:
        file.write(content)


def remove_folder(path: Path) -> None:
    """Remove a folder as far as that is possible; under its name it is whole until it is gone."""
    removed = _temporary(path)
    with suppress(OSError):
        path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def open_own(path: Path, *, append: bool = False) -> BinaryIO:
    """Open a file that is kept open, a lock or a log, and make it where it is missing; never through a link.

    Args:
        append: every write goes to the end.

    Raises:
        FileError: it cannot be opened, or is a link (hard or symbolic) or not a regular file.
    """
    return cast(BinaryIO, os.fdopen(own_descriptor(path, append=append), "ab+" if append else "r+b", buffering=0))


def own_descriptor(path: Path, *, append: bool = False) -> int:
    """Open a file as `open_own` does; the caller closes the descriptor."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_APPEND if append else 0)
    with naming(path):
        descriptor = os.open(path, flags, 0o666)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(descriptor)
            what = "has another name too (a hard link)" if stat.S_ISREG(found.st_mode) else "is not a regular file"
            raise FileError(f"{path} {what}, and would be written to; remove it")
        return descriptor


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: it is missing.
        FileError: it cannot be read, or is empty, cut off or something else than a JSON object; names it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise  # whether a file may be missing is for the caller to say
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip(b" \t\r\n\0"):
        raise FileError(f"{path} is empty: a full disk or a crash has cut it off")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise FileError(f"{path} is damaged: it holds {type(found).__name__} where an object belongs")
    return found


@contextmanager
def naming(path: Path, kind: type[RunError] = FileError, *, advice: str = "") -> Iterator[None]:
    """Turn an OSError of writing `path` into an error that names it and the remedy.

    Args:
        kind: class of the error.
        advice: what else to do, after the remedy.
    """
    try:
        yield
    except RunError:
        raise
    except OSError as error:
        raise kind(f"{path} cannot be written: {_reason(path, error)}{advice and '; '}{advice}") from error


def make_folder(path: Path) -> None:
    """Make a folder with those above it, where they are missing.

    Raises:
        FileError: a part of its path is a file, may not be written to, or has too long a name.
    """
    with naming(path):
        path.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user can still write on the file system of a folder."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def is_leftover(name: str) -> bool:
    """Whether a file of this name is what a killed process left of one it wrote."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: Path, start: str = "") -> None:
    """Remove what killed processes left of files they wrote in a folder; the caller excludes other writers.

    Args:
        start: beginning of the names of these files.
    """
    for path in folder.iterdir():
        if is_leftover(path.name) and path.name.startswith(f".{start}"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    with os.fdopen(os.open(path, _NEW, 0o666), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _refuse_device(path: Path) -> None:
    """Leave a device or a pipe where it is: root could replace /dev/null."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileError(f"{path} is not a regular file, and would be replaced; choose another name")


def _temporary(path: Path) -> Path:
    """Return a name that nobody can foresee, short enough where that of the target is."""
    start = path.name.lstrip(".").encode()[:200].decode(errors="ignore")
    return path.with_name(f".{start}.{secrets.token_hex(8)}.tmp")


def _reason(path: Path, error: OSError) -> str:
    said = error.strerror or str(error)
    if error.errno in NO_ROOM:
        with suppress(OSError):
            said += f", {free_bytes(path.parent) / 2**20:,.1f} MiB are free on its file system"
        return f"{said}; make room"
    remedy = _REMEDIES.get(error.errno or 0)
    return said if remedy is None else f"{said}; {remedy}"
