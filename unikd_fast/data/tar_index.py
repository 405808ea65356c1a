"""Where the images of tar files lie and what their labels are: read off the headers once, and kept in a file."""

import fcntl
import hashlib
import json
import os
import tarfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from unikd_fast.data.image_folder import EXTENSIONS
from unikd_fast.data.splits import INDEX_DTYPE

_VERSION = 1
_LABEL = ".cls"
_LABEL_BYTES = 64

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarIndex(NamedTuple):
    """The samples of a split."""

    images: NDArray[np.void]  # (N,) of INDEX_DTYPE; crc is that of the member's name
    labels: NDArray[np.int64]  # (N,)


def index_tars(root: Path, name: str, paths: list[Path]) -> TarIndex:
    """Index tar files, or read the index that an earlier call kept.

    It is kept as `unikd-index-<name>.npz` in the root, or below `$XDG_CACHE_HOME/unikd_fast` (~/.cache) where the root
    cannot be written, and holds as long as the files keep their names, sizes and times of change. Of processes that
    need it at a time, one makes it.

    Args:
        root: folder of the data set.
        name: of the split.
        paths: its tar files.

    Raises:
        ValueError: a file is compressed, damaged or no tar file, or a sample lacks its label or image, or all do.
    """
    key = _key(root, paths)
    places = [root / f"unikd-index-{name}.npz", _elsewhere(root) / f"{name}.npz"]
    with _one_process(root):
        for place in places:
            if (index := _read(place, key)) is not None:
                return index
        # disable=None: no bar where stderr is no terminal.
        bar = tqdm(paths, desc=f"index of {name}", unit="file", disable=None, leave=False)
        images, labels = zip(*(scan_tar(path, number) for number, path in enumerate(bar)), strict=True)
        index = TarIndex(np.concatenate(images), np.concatenate(labels))
        if not len(index.labels):
            raise ValueError(
                f"index_tars: none of the {len(paths)} tar files of {name} in {root} holds an image; name them "
                f"<key>.jpg and their labels <key>{_LABEL}, with no other dot in the file's name"
            )
        _keep(places, key, index)
    return index


def scan_tar(path: Path, number: int) -> TarIndex:
    """List the samples of a tar file, which is shard `number`; see `index_tars`."""
    images: dict[str, tuple[int, ...]] = {}
    labels: dict[str, int] = {}
    with path.open("rb") as file:
        _refuse_compressed(path, file)
        for member in _members(path, file):
            folder, _, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            # As WebDataset does: hidden files are no samples, and a name ends at its first dot.
            if not member.isreg() or not stem or not dot:
                continue
            key, extension = f"{folder}/{stem}", f".{extension.lower()}"
            if extension != _LABEL and extension not in EXTENSIONS:
                continue
            where = f"{path}: {member.name}"
            if key in (labels if extension == _LABEL else images):
                raise ValueError(
                    f"index_tars: {where} is a second {extension} of one sample; give each a name of its own"
                )
            if member.issparse():
                raise ValueError(f"index_tars: {where} is stored with holes; make the archive without --sparse")
            if extension == _LABEL:
                labels[key] = _read_label(file, member, where)
            else:
                name_crc = crc32(member.name.encode("utf-8", "surrogateescape"))
                images[key] = (member.offset_data, member.size, name_crc, number, 0, 0)
    for of, found, lacks in ((images, labels, f"{_LABEL} with its label"), (labels, images, "image")):
        for key in of:
            if key not in found:
                raise ValueError(
                    f"index_tars: sample {key.removeprefix('/')} in {path} has no {lacks}; add it or remove the sample"
                )
    rows = np.array(list(images.values()), INDEX_DTYPE)
    return TarIndex(rows, np.array([labels[key] for key in images], np.int64))


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield what an archive holds, and make sure of its end: tarfile takes a damaged header for one."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep millions of headers
                yield member
            end = archive.offset
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"there is neither a member nor the mark of the end at byte {end}")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"index_tars: {path} is no whole tar file: {error}; it is truncated or damaged, fetch it again"
        ) from error


def _refuse_compressed(path: Path, file: BinaryIO) -> None:
    start = file.read(6)
    file.seek(0)
    for magic, name in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise ValueError(
                f"index_tars: {path} is compressed by {name}, and images are read where they lie; unpack it to a plain "
                "tar file"
            )


def _read_label(file: BinaryIO, member: tarfile.TarInfo, where: str) -> int:
    file.seek(member.offset_data)
    length = min(member.size, _LABEL_BYTES)
    content = file.read(length)
    if len(content) < length:
        raise ValueError(f"index_tars: {where} goes beyond the end of the file; it is truncated, fetch it again")
    digits = content.strip()
    if not digits.isdigit() or int(digits) >= 2**31:
        raise ValueError(f"index_tars: {where} must hold a class as a whole number from 0 on, got {content!r}")
    return int(digits)


def _key(root: Path, paths: list[Path]) -> str:
    stats = [(path, path.stat()) for path in paths]
    return json.dumps(
        [_VERSION, [[str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns] for path, stat in stats]]
    )


def _elsewhere(root: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "unikd_fast" / f"tar-index-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}"


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Some network file systems do not lock folders; there each process makes the index.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(place: Path, key: str) -> TarIndex | None:
    """The index in a file; None if there is none, or one of other tar files, or one that cannot be read."""
    # Whatever is wrong with the file, the next one takes its place.
    with (
        suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile),
        np.load(place, allow_pickle=False) as kept,
    ):
        if kept["key"].item() == key:
            return TarIndex(kept["images"], kept["labels"])
    return None


def _keep(places: list[Path], key: str, index: TarIndex) -> None:
    errors = []
    for place in places:
        temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(file, key=np.array(key), images=index.images, labels=index.labels)
            temporary.replace(place)
            return
        except OSError as error:
            errors.append(str(error))
            with suppress(OSError):
                temporary.unlink()
    warnings.warn(
        f"the index of tar files could not be kept ({'; '.join(errors)}); every start makes it anew", stacklevel=2
    )
