"""The one way to write a file: either complete under its name or not there at all, and on disk when the call returns.

Content goes to a new file with a random name next to the target, is synced, and replaces the target by a rename. So a
kill or a full disk leaves the old content, a link in the folder is replaced rather than written through, and the mode
follows umask. A kill can leave such a file behind: see `remove_leftovers`. Folders are written the same way; a rename
cannot replace one, so a kill can leave the old folder under the name given by `replaced`.
"""

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
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
    errno.ENOTDIR: "part of its path is a file; choose another",
    errno.EEXIST: "a file of that name exists; choose another",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "its folder is missing; create it",
    errno.ELOOP: "it is a link, which is not followed; remove it",
}


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file: afterwards it holds `content`, or, if this raises, its previous content.

    Args:
        content: content of the file; text is encoded as UTF-8.

    Raises:
        FileError: the disk is full or the folder cannot be written to; the message names the path and the remedy.
    """
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, indented by two; see `write_file`."""
    write_file(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` when the block ends, and is removed if the block raises.

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
    """Yield a path of the same name in a private folder: `new_file` for libraries that open files themselves.

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
            # The library may have asked for a mode other than umask's; a new file shows what that is.
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
    """Append a line to a file, creating it if missing; if this raises, the file is unchanged.

    If a kill cut off the previous line, that line is ended first.

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
    """Yield an empty folder that replaces `path` when the block ends, and is removed if the block raises.

    Its files are written by `create_file`, which syncs them to disk.

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
                if aside.exists():  # left by a kill after the second rename below; the folder itself is newer
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
    """Return where a folder is while another replaces it, and where it stays if the process is killed then."""
    return path.with_name(f".{path.name}.replaced")


def create_file(path: Path, content: bytes) -> None:
    """Write a new file and sync its content to disk; its name is synced with its folder."""
    with _created(path) as file:
        file.write(content)


def remove_folder(path: Path) -> None:
    """Remove a folder as far as possible; under its own name it is complete until it is gone."""
    removed = _temporary(path)
    with suppress(OSError):
        path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def open_own(path: Path, *, append: bool = False) -> BinaryIO:
    """Open a file that is kept open, such as a lock or a log, creating it if missing; never through a link.

    Args:
        append: whether every write goes to the end.

    Raises:
        FileError: it cannot be opened, or is a link (hard or symbolic) or not a regular file.
    """
    return cast(BinaryIO, os.fdopen(own_descriptor(path, append=append), "ab+" if append else "r+b", buffering=0))


def own_descriptor(path: Path, *, append: bool = False) -> int:
    """Open a file as `open_own` does, and return its descriptor, which the caller closes."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_APPEND if append else 0)
    with naming(path):
        descriptor = os.open(path, flags, 0o666)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(descriptor)
            what = "has another name too (a hard link)" if stat.S_ISREG(found.st_mode) else "is not a regular file"
            raise FileError(f"{path} {what}, and would be written to; remove it")
        return descriptor


def read_json(path: Path, *, without: str = "") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        without: key that all its objects are read without, to save the memory of what it holds.

    Raises:
        FileNotFoundError: it is missing.
        FileError: it cannot be read, or is empty, cut off or not a JSON object; the message names it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise  # whether a file may be missing is up to the caller
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip(b" \t\r\n\0"):
        raise FileError(f"{path} is empty: a full disk or a crash has cut it off")
    try:
        found = json.loads(content, object_hook=_dropping(without) if without else None)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise FileError(f"{path} is damaged: it holds {type(found).__name__} where an object belongs")
    return found


def _dropping(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def drop(read: dict[str, Any]) -> dict[str, Any]:
        read.pop(key, None)
        return read

    return drop


@contextmanager
def naming(path: Path, kind: type[RunError] = FileError, *, advice: str = "") -> Iterator[None]:
    """Turn an OSError while writing `path` into an error that names the path and the remedy.

    Args:
        kind: class of the error.
        advice: further advice, appended to the remedy.
    """
    try:
        yield
    except RunError:
        raise
    except OSError as error:
        raise kind(f"{path} cannot be written: {_reason(path, error)}{advice and '; '}{advice}") from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents, if missing.

    Raises:
        FileError: part of its path is a file, is not writable, or has too long a name.
    """
    with naming(path):
        path.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the bytes this user can still write to the file system of a folder."""
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


def is_leftover(name: str) -> bool:
    """Return whether a file of this name was left behind by a killed process."""
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: Path, start: str = "") -> None:
    """Remove files that killed processes left behind in a folder; the caller excludes other writers.

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
    """Refuse to replace a device or a pipe: root could replace /dev/null."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileError(f"{path} is not a regular file, and would be replaced; choose another name")


def _temporary(path: Path) -> Path:
    """Return an unpredictable name, short enough if the target's is."""
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
