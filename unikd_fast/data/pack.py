"""Packing an image folder into Arrow files, which `arrow.load_arrow` and Hugging Face's `load_from_disk` read."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, features
from tqdm import tqdm

from unikd_fast.data.arrow import UNFINISHED
from unikd_fast.data.images import StoredImage, open_image, to_rgb
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits, ImageFiles, hash_split
from unikd_fast.errors import DataError, RunError
from unikd_fast.io import is_leftover, make_folder, new_file, read_json, remove_leftovers, write_file, write_json

IMAGES_PER_FILE = 4096
"""What an interruption costs at most."""

_SPLITS = {"train": "train", "validation": "val"}
"""Names of the splits in a store, and of their folders in the source."""

_DICTIONARY = "dataset_dict.json"
_STATE = "state.json"
_NOT_CONTENT = {"lost+found"}  # a freshly made file system has it at its top

# What a record batch holds at most; Arrow counts the bytes in it by 32 bits.
_BATCH, _BATCH_BYTES = 64, 2**26

_logger = logging.getLogger("unikd_fast")

_Content = bytes | NDArray[np.uint8] | None
"""Of an image: the file, or (H, W, 3) pixels, or None where these cannot be decoded."""


class PackError(RunError, RuntimeError):
    """Packing cannot continue, through no fault of the images; the message says what to do."""


def pack_folder(
    source: Path, target: Path, *, raw: int | None = None, workers: int = 2, images_per_file: int = IMAGES_PER_FILE
) -> None:
    """Pack an image folder, or continue an interrupted pack of the same images.

    The store is complete when its dataset_dict.json is there, which is written last; it depends neither on
    interruptions nor on the number of workers. What was begun with other images or settings is removed, and a finished
    store is left as it is. An image that cannot be decoded is packed as it is, or, in place of pixels, as a row without
    an image: so ids stay those of the folder, and `data.bad_images` decides.

    Args:
        source: folder that `load_image_folder` reads; it must not change meanwhile.
        target: new or empty folder, or one that was begun.
        raw: short side in pixels of the (height, width, 3) arrays of uint8 that are stored; larger images are reduced
            to it by antialiased bilinear interpolation. If None, the files are stored as they are.
        workers: number of threads that read and decode.
        images_per_file: number of images in an Arrow file.

    Raises:
        ValueError: the source is not an image folder, the target holds something else or lost a file since it was
            finished, or a number is below 1.
        DataError: a file cannot be read.
        FileError: the disk is full, or the target cannot be written to.
        PackError: another process packs into the folder.

    Example:
        >>> pack_folder(Path("/data/imagenet"), Path("/data/imagenet-arrow"), workers=16)
    """
    for name, value in (("raw", raw), ("workers", workers), ("images_per_file", images_per_file)):
        if value is not None and value < 1:
            raise ValueError(f"pack_folder: {name} must be at least 1, got {value}")
    _check_target(source, target)
    data = load_image_folder(source, 1)
    if data.unlabelled:
        raise ValueError(
            f"pack_folder: {source / 'train'} has no class folders, and a store needs a label for every image; train "
            "on the folder itself"
        )
    identity = _identity(data, raw, images_per_file)
    make_folder(target)
    with _only_packer(target):
        if (target / _DICTIONARY).exists():
            _require_same(target, identity)
        else:
            _continue_or_clean(target, identity)
            _pack(source, data, target, raw, workers, images_per_file, identity)
            write_json(target / _DICTIONARY, {"splits": [*_SPLITS]})
        (target / UNFINISHED).unlink(missing_ok=True)


def _check_target(source: Path, target: Path) -> None:
    for folder in _SPLITS.values():
        if target.resolve().is_relative_to((source / folder).resolve()):
            raise ValueError(
                f"pack_folder: {target} lies within {source / folder}, where it would be read as a class; pack "
                "elsewhere"
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"pack_folder: {target} is not a folder; give a new one or one that is empty")
    names = {path.name for path in target.iterdir() if not is_leftover(path.name)} - _NOT_CONTENT
    if names and not names & {_DICTIONARY, UNFINISHED}:
        raise ValueError(
            f"pack_folder: {target} holds something else, {min(names)!r} for one; give a new or an empty folder"
        )


def _identity(data: DataSplits, raw: int | None, images_per_file: int) -> str:
    """Return a hash of all that decides the bytes of a store."""
    decoder = None if raw is None else [PIL.__version__, features.version("libjpeg_turbo")]
    content = [hash_split(data.train), hash_split(data.val), data.class_names, raw, images_per_file, decoder]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


@contextmanager
def _only_packer(target: Path) -> Iterator[None]:
    """Exclude other processes that pack into a folder; the kernel releases the lock if this one dies."""
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PackError(f"another process is packing into {target}; wait for it, or pack elsewhere") from error
        yield
    finally:
        os.close(descriptor)


def _require_same(target: Path, identity: str) -> None:
    for name in _SPLITS:
        try:
            state = read_json(target / name / _STATE)
            for file in state["_data_files"]:
                (target / name / file["filename"]).stat()
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"pack_folder: {target / name / _STATE} is damaged; delete {target} and pack again"
            ) from error
        except FileNotFoundError as error:
            raise ValueError(
                f"pack_folder: {target} was finished and now lacks {error.filename}; delete it and pack again"
            ) from error
    found = str(state.get("_fingerprint")).partition("-")[0]
    if found != identity:
        raise ValueError(
            f"pack_folder: {target} is a finished store of other images or settings, {found} there and {identity} now; "
            "pack into another folder, or delete this one"
        )


def _continue_or_clean(target: Path, identity: str) -> None:
    """Keep the files of a pack that was begun with the same images and settings, and remove those of another."""
    begun = target / UNFINISHED
    if not begun.exists() or begun.read_text() != identity:
        if begun.exists():
            _logger.warning("%s: the unfinished pack was of other images or settings; it starts over", target)
        for name in _SPLITS:
            shutil.rmtree(target / name, ignore_errors=True)
        write_file(begun, identity)
    for folder in (target, *(target / name for name in _SPLITS)):
        if folder.exists():
            remove_leftovers(folder)


def _pack(
    source: Path, data: DataSplits, target: Path, raw: int | None, workers: int, images_per_file: int, identity: str
) -> None:
    total = len(data.train) + len(data.val)
    columns = _columns(data.class_names or (), raw)
    with (
        # disable=None: no bar where stderr is not a terminal.
        tqdm(total=total, desc="pack", unit="image", smoothing=0.05, disable=None) as bar,
        ThreadPoolExecutor(workers, thread_name_prefix="pack") as threads,
    ):
        for (name, part), split in zip(_SPLITS.items(), (data.train, data.val), strict=True):
            assert isinstance(split, ImageFiles)
            images, folder = _Images(split, source / part, columns.arrow_schema, raw, threads), target / name
            starts = range(0, len(split), images_per_file)
            files = [f"data-{number:05}-of-{len(starts):05}.arrow" for number in range(len(starts))]
            make_folder(folder)
            for file, start in zip(files, starts, strict=True):
                rows = range(start, min(start + images_per_file, len(split)))
                if (folder / file).exists():
                    bar.update(len(rows))
                else:
                    _write_rows(folder / file, images, rows, bar.update)
            state: dict[str, Any] = {
                "_data_files": [{"filename": file} for file in files],
                "_fingerprint": f"{identity}-{name}",
                "_format_columns": None,
                "_format_kwargs": {},
                "_format_type": None,
                "_output_all_columns": False,
                "_split": name,
            }
            write_json(folder / "dataset_info.json", {"features": columns.to_dict()})
            write_json(folder / _STATE, state)


def _columns(class_names: Sequence[str], raw: int | None) -> Any:
    """Return the columns of a store, as `datasets.Features`."""
    import datasets

    label = datasets.ClassLabel(names=list(class_names))
    if raw is None:
        return datasets.Features({"image": datasets.Image(), "label": label})
    pixels = datasets.List(datasets.List(datasets.List(datasets.Value("uint8"), length=3)))
    return datasets.Features({"image": pixels, "path": datasets.Value("string"), "label": label})


class _Images(NamedTuple):
    """A split to pack."""

    split: ImageFiles
    folder: Path
    schema: pa.Schema
    raw: int | None
    threads: Executor

    def read(self, rows: Iterable[int]) -> Iterator[_Content]:
        """Yield the images of these rows, read ahead by threads."""
        paths = [self.split.paths[row] for row in rows]
        for start in range(0, len(paths), _BATCH):
            yield from self.threads.map(self._read_one, paths[start : start + _BATCH])

    def _read_one(self, path: str) -> _Content:
        stored = StoredImage(path)
        content = stored.read()
        if self.raw is None or isinstance(content, np.ndarray):
            return content
        try:
            return np.asarray(shrink(to_rgb(open_image(content, stored), stored), self.raw))
        except DataError as error:
            _logger.warning("packed without its image: %s", error)
            return None

    def batch(self, first: int, images: Sequence[_Content]) -> pa.RecordBatch:
        """Return the rows from `first` on with these images."""
        rows = slice(first, first + len(images))
        names = [os.path.relpath(path, self.folder) for path in self.split.paths[rows]]
        names = [name.encode("utf-8", "backslashreplace").decode() for name in names]
        labels = pa.array(self.split.labels[rows], pa.int64())
        if self.raw is None:
            columns = [pa.array([{"bytes": image, "path": name} for image, name in zip(images, names, strict=True)])]
        else:
            columns = [_nested([image for image in images if not isinstance(image, bytes)]), pa.array(names)]
        return pa.record_batch([*columns, labels], schema=self.schema)


def _write_rows(path: Path, images: _Images, rows: range, advance: Callable[[int], object]) -> None:
    first = rows.start
    with new_file(path) as file, pa.ipc.new_stream(file, images.schema) as writer:
        for some in _grouped(images.read(rows)):
            writer.write_batch(images.batch(first, some))
            first += len(some)
            advance(len(some))


def _grouped(images: Iterable[_Content]) -> Iterator[list[_Content]]:
    """Yield images in groups that a record batch can hold."""
    group: list[_Content] = []
    size = 0
    for image in images:
        own = 0 if image is None else len(image) if isinstance(image, bytes) else image.nbytes
        if group and (len(group) == _BATCH or size + own > _BATCH_BYTES):
            yield group
            group, size = [], 0
        group.append(image)
        size += own
    if group:
        yield group


def _nested(images: Sequence[NDArray[np.uint8] | None]) -> pa.ListArray:
    """Return images as Arrow holds them, lists of rows of pixels."""
    good = [image for image in images if image is not None]
    levels = np.concatenate([np.empty(0, np.uint8), *(image.reshape(-1) for image in good)])
    rows = [image.shape[1] for image in good for _ in range(image.shape[0])]
    heights = [0 if image is None else image.shape[0] for image in images]
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(levels), 3)
    missing = pa.array([image is None for image in images])
    return pa.ListArray.from_arrays(_offsets(heights), pa.ListArray.from_arrays(_offsets(rows), pixels), mask=missing)


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Reduce the short side to `size` pixels; a smaller image stays as it is.

    Example:
        >>> shrink(Image.new("RGB", (500, 375)), 256).size
        (341, 256)
    """
    short, long = sorted(image.size)
    if short <= size:
        return image
    long_side = int(size * long / short)  # as the loader's central view
    return image.resize(
        (size, long_side) if image.width <= image.height else (long_side, size), Image.Resampling.BILINEAR
    )
