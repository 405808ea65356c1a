"""What a training split holds, as one hash: the identity of a data set for what is kept of it on disk."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unikd_fast.data.splits import ArrowImages, ImageFiles, Split, TensorImages
from unikd_fast.errors import DataError

# A file system over a network answers many questions at a time, each late.
_THREADS = 32
_FILES_AT_A_TIME = 1024
_CHUNK_BYTES = 2**24


def hash_split(split: Split) -> str:
    """Hash the samples of a split, their order and their ids; labels are no part of it, since no teacher sees them.

    Images in memory are hashed with their shape. Of images on disk only names and sizes are: one overwritten by another
    of the same size goes unnoticed, because to read all of ImageNet would cost as much as an epoch. Names are relative
    to the deepest folder that holds all, so a data set may move, and a folder and the files packed from it are the same
    data set. Pixels in Arrow files that have no names are hashed as a whole.

    Args:
        split: N samples.

    Returns:
        SHA-256, 64 hexadecimal digits.

    Raises:
        DataError: the size of a file cannot be found out; the message names it.

    Example:
        >>> len(hash_split(open_data("digits", root=None, image_size=32).train))
        64
    """
    chunks: Iterator[bytes | memoryview]
    if isinstance(split, TensorImages):
        header, chunks = ["images", *split.images.shape], _pixels(split)
    else:
        header, chunks = ["files", len(split)], _files(split) if isinstance(split, ImageFiles) else _rows(split)
    # The header says how many ids of 8 bytes, and how many images or lines, come after it.
    digest = hashlib.sha256(json.dumps(header).encode() + b"\n")
    digest.update(split.sample_ids.astype("<i8").tobytes())
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _pixels(split: TensorImages) -> Iterator[memoryview]:
    count = max(1, _CHUNK_BYTES // max(1, split.images[:1].numel()))
    for start in range(0, len(split), count):
        yield split.images[start : start + count].cpu().numpy().ravel().data


def _files(split: ImageFiles) -> Iterator[bytes]:
    """Yield a line of JSON [folder, name, size in bytes] for each file; folders are relative to the one of them all."""
    relative = _relative(split.paths)

    def describe(paths: Sequence[str]) -> bytes:
        return "".join(_line(relative, path, _size(path)) for path in paths).encode()

    chunks = (split.paths[start : start + _FILES_AT_A_TIME] for start in range(0, len(split), _FILES_AT_A_TIME))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash-split") as threads:
        yield from threads.map(describe, chunks)


def _rows(split: ArrowImages) -> Iterator[bytes]:
    """Yield lines as `_files` does, for images in Arrow files."""
    from unikd_fast.data.arrow import describe_rows

    described = [describe_rows(path, split.column) for path in split.files]
    taken = [described[file][row] for file, row in split.rows.tolist()]
    relative = _relative([name for name, _ in taken])
    for name, size in taken:
        yield _line(relative, name, size).encode()


def _relative(paths: Sequence[str]) -> dict[str, str]:
    absolute = {folder: str(Path(folder).absolute()) for folder in set(map(os.path.dirname, paths))}
    root = os.path.commonpath(absolute.values()) if absolute else ""
    return {folder: os.path.relpath(path, root) for folder, path in absolute.items()}


def _line(relative: dict[str, str], path: str, size: Any) -> str:
    folder, name = os.path.split(path)
    return json.dumps([relative[folder], name, size]) + "\n"


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116  a Path of each of a million files takes longer than its size
    except OSError as error:
        raise DataError(
            f"hash_split: cannot find out the size of {path}: {error.strerror}; restore the file or remove it"
        ) from error
