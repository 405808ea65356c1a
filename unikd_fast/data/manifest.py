"""What a training split holds, as one hash: the identity of a data set for what is kept of it on disk."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from unikd_fast.data.splits import ImageFiles, PackedImages, Split, TensorImages
from unikd_fast.errors import DataError

# A file system over a network answers many questions at a time, each late.
_THREADS = 32
_FILES_AT_A_TIME = 1024
_CHUNK_BYTES = 2**24


def hash_split(split: Split) -> str:
    """Hash the samples of a split, their order and their ids; labels are no part of it, since no teacher sees them.

    Images in memory are hashed with their shape, packed ones by the checksums in their index. Of image files and of
    images in archives without checksums, only names and sizes are: one overwritten by another of the same size goes
    unnoticed, because to read all of ImageNet would cost as much as an epoch. Names are relative to the deepest folder
    that holds all files, or to the archive, so a data set may move.

    A folder and the pack made of it differ, even where the pack holds the same bytes: of the folder the names are known
    and not the bytes, of the pack the bytes and not the names, and any part of either must have a hash. So pack first,
    and then keep what is kept by this hash.

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
    elif isinstance(split, PackedImages):
        header, chunks = ["packed" if split.checked else "archived", len(split)], _checksums(split)
    else:
        header, chunks = ["files", len(split)], _lines(split)
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


def _checksums(split: PackedImages) -> Iterator[bytes]:
    """Yield what the index knows of the images, and not where they lie: sizes, shapes, CRCs of their bytes or names."""
    for start in range(0, len(split), _FILES_AT_A_TIME):
        rows = split.index[start : start + _FILES_AT_A_TIME]
        yield b"".join(rows[name].tobytes() for name in ("length", "crc", "height", "width"))


def _lines(split: ImageFiles) -> Iterator[bytes]:
    """Yield a line of JSON [folder, name, size in bytes] for each file; folders are relative to the one of them all."""
    absolute = {folder: str(Path(folder).absolute()) for folder in set(map(os.path.dirname, split.paths))}
    root = os.path.commonpath(absolute.values()) if absolute else ""
    relative = {folder: os.path.relpath(path, root) for folder, path in absolute.items()}

    def describe(paths: Sequence[str]) -> bytes:
        return "".join(_line(path, relative) for path in paths).encode()

    chunks = (split.paths[start : start + _FILES_AT_A_TIME] for start in range(0, len(split), _FILES_AT_A_TIME))
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash-split") as threads:
        yield from threads.map(describe, chunks)


def _line(path: str, relative: dict[str, str]) -> str:
    try:
        size = os.stat(path).st_size  # noqa: PTH116  a Path of each of a million files takes longer than its size
    except OSError as error:
        raise DataError(
            f"hash_split: cannot find out the size of {path}: {error.strerror}; restore the file or remove it"
        ) from error
    folder, name = os.path.split(path)
    return json.dumps([relative[folder], name, size]) + "\n"
