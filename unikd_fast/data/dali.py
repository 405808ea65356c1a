"""The loader of image files that decodes with NVIDIA DALI: whether it works, its graphs, and its batches."""

import atexit
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from unikd_fast.data.dali_views import ImageFeed, PipelineOf, ReadViews, ViewBatch, cpu_views, gpu_views, windows_by
from unikd_fast.data.device import Normalise, to_device
from unikd_fast.data.files import DecodeRequest, FileRequests, Requested
from unikd_fast.data.images import BadImage, StoredImage
from unikd_fast.data.sampler import Schedule
from unikd_fast.data.splits import DataSplits
from unikd_fast.data.views import Box, ViewWindow, Windows, limit_to_one_thread, strong_pixels
from unikd_fast.values import Batch, Interpolation

if TYPE_CHECKING:
    from nvidia.dali import Pipeline


Decoding = Literal["cpu", "gpu", "gpu_parts"]
"""Who decodes: "cpu" and "gpu_parts" only the part of an image that is shown, "gpu" all of it.

nvImageCodec 0.9 was reported to crash where a GPU decodes parts (its issue 55), so that is tried in a process of its
own. Neither way on a GPU has run on one yet.
"""

PREFETCH = 2
"""Micro-batches that are under way in DALI at a time."""

_TIMEOUT_S = 120
_SIZE = 64
_MAX_MEAN_DIFFERENCE = 8.0  # in levels: chroma is smoothed differently, a broken decoder is farther off

# Iterators that are open. While Python shuts down, what their ends call may be gone before they are collected.
_open: WeakSet[Generator[Any, None, None]] = WeakSet()

_logger = logging.getLogger("unikd_fast")

T = TypeVar("T")


@cache
def dali_problem() -> str | None:
    """Return why DALI cannot be used on this machine, or None if it can.

    Example:
        >>> dali_problem()  # without it
        "No module named 'nvidia.dali'"
    """
    try:
        images = _samples()
        (parts,) = decoding_pipeline(iter([images]).__next__, batch_size=len(images), threads=1, prefetch=1).run()
        shapes, expected = parts.shape(), [(*image.part[2:], 3) for image in images]
    except Exception as error:  # an import or a library may fail in any way, and then others decode
        return f"{type(error).__name__}: {error}"
    return None if shapes == expected else f"it decodes {shapes} where {expected} is right"


@cache
def choose_decoding(device: torch.device) -> Decoding:
    """Return who decodes for a device on which `dali_problem` is None: on a GPU the first of its ways that works there.

    Example:
        >>> choose_decoding(torch.device("cpu"))
        'cpu'
    """
    if device.type != "cuda":
        return "cpu"
    ways: tuple[Decoding, ...] = ("gpu_parts", "gpu")
    for way in ways:
        problem = _try_in_a_process(way, gpu_number(device))
        if problem is None:
            return way
        _logger.warning("DALI: decoding by %r does not work on %s: %s", way, device, problem)
    return "cpu"


def gpu_number(device: torch.device) -> int:
    """Return which GPU a CUDA device is."""
    return torch.cuda.current_device() if device.index is None else device.index


def pixels_of(decoding: Decoding, interpolation: Interpolation = "bilinear") -> dict[str, str]:
    """Return what decides the pixels of views, as in `Loader.pixels`."""
    from nvidia.dali import __version__ as dali

    where = {"cpu": "cpu", "gpu": "gpu", "gpu_parts": "gpu, by parts"}[decoding]
    torch_version = ".".join(torch.__version__.split(".")[:2])
    resize = f"torch {torch_version}" if decoding == "cpu" else f"dali {dali} gpu"
    return {
        "decoder": f"dali {dali} {where}, nvimgcodec {_nvimgcodec_version()}",
        "resize": f"{resize}, {interpolation}, antialiased",
    }


def _nvimgcodec_version() -> str:
    for cuda in (13, 12):
        try:
            return version(f"nvidia-nvimgcodec-cu{cuda}")
        except PackageNotFoundError:
            continue
    return "unknown"


def _samples() -> list[ReadViews]:
    """Return JPEGs of several sizes and chroma subsamplings, and a window within each."""
    samples = []
    for i, (height, width) in enumerate(((120, 160), (333, 97), (48, 500), (64, 64))):
        rows, columns = np.mgrid[:height, :width]
        pixels = np.stack((rows * 255 // height, columns * 255 // width, (rows + columns) % 256), axis=-1)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90, subsampling=i % 3, progressive=i == 1)
        part = Box(height // 5, width // 7, height // 2, width // 3)
        window = ViewWindow(part.within(part), (_SIZE, _SIZE), (0, 0), (0, 0), i % 2 == 1)
        samples.append(ReadViews(np.frombuffer(file.getvalue(), np.uint8), part, (window,)))
    return samples


def _try_in_a_process(way: Decoding, device_id: int) -> str | None:
    """Return what goes wrong where a GPU decodes in this way; None if nothing does."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "unikd_fast.data.dali", way, str(device_id)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return f"a trial had not ended after {_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    return f"a trial ended with status {done.returncode}: {last[0]}"


def _try(way: Decoding, device_id: int | None) -> None:
    """Compare the views that a way of decoding gives with those of the CPU.

    Raises:
        RuntimeError: it fails, or the views differ too much.
    """
    images = _samples()

    def views(by_parts: bool, where: int | None) -> np.ndarray:
        (shown,) = view_pipeline(
            iter([images]).__next__,
            batch_size=len(images),
            views=1,
            image_size=_SIZE,
            padded=False,
            by_parts=by_parts,
            device_id=where,
            threads=1,
            prefetch=1,
        ).run()
        return np.array(shown.as_cpu().as_array(), np.float64)

    difference = np.abs(views(way == "gpu_parts", device_id) - views(False, None)).mean(axis=(1, 2, 3))
    if difference.max() > _MAX_MEAN_DIFFERENCE:
        raise RuntimeError(f"views differ from those of the CPU by {difference.round(1).tolist()} levels on average")


Source = Callable[[], list[ReadViews]]
"""Returns the images of the next batch, at least one, or raises StopIteration."""


def decoding_pipeline(source: Source, *, batch_size: int, threads: int, prefetch: int) -> "Pipeline":
    """Return a pipeline on the CPU whose one output is the part of each image that is asked for, (H_i, W_i, 3) uint8.

    Args:
        source: function that returns the next batch.
        batch_size: number of images in the largest batch.
        threads: number of DALI's threads.
        prefetch: number of batches under way at a time.

    Example:
        >>> (parts,) = decoding_pipeline(source, batch_size=64, threads=2, prefetch=2).run()
    """
    from nvidia.dali import Pipeline, fn

    # The dynamic executor gives each output memory of its own, which lives as long as somebody holds it.
    pipeline = Pipeline(batch_size, threads, None, prefetch_queue_depth=prefetch, exec_dynamic=True, seed=0)
    with pipeline:
        inputs = fn.external_source(lambda: _inputs(source(), by_parts=True, views=0, padded=False), num_outputs=3)
        pipeline.set_outputs(_decoded(inputs, "cpu", by_parts=True))
    pipeline.build()
    return pipeline


def view_pipeline(
    source: Source,
    *,
    batch_size: int,
    views: int,
    image_size: int,
    interpolation: Interpolation = "bilinear",
    padded: bool,
    by_parts: bool,
    device_id: int | None,
    threads: int,
    prefetch: int,
) -> "Pipeline":
    """Return a pipeline whose outputs are views, (N, image_size, image_size, 3) uint8, one output for each of `views`.

    Args:
        source: function that returns the next batch.
        batch_size: number of images in the largest batch.
        views: number of views of each image.
        image_size: height and width of the views in pixels.
        interpolation: interpolation of every resize.
        padded: whether views are shifted.
        by_parts: whether to decode only the parts that are asked for.
        device_id: number of the GPU that decodes and resizes. If None, the CPU does both, to check the graph.
        threads: number of DALI's threads on the CPU.
        prefetch: number of batches under way at a time.

    Example:
        >>> (shown,) = view_pipeline(source, batch_size=64, views=1, image_size=224, padded=False, by_parts=False,
        ...                          device_id=0, threads=4, prefetch=2).run()
    """
    from nvidia.dali import Pipeline, fn, types

    kernel = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[interpolation]
    pipeline = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=prefetch, exec_dynamic=True, seed=0)
    square: dict[str, Any] = {"shape": [image_size, image_size], "axes": [0, 1]}
    with pipeline:
        of_image, of_view = 1 + 2 * by_parts, 5 + padded
        columns = of_image + of_view * views
        inputs = fn.external_source(lambda: _inputs(source(), by_parts, views, padded), num_outputs=columns)
        decoded = _decoded(inputs, "cpu" if device_id is None else "mixed", by_parts=by_parts)
        outputs = []
        for first in range(of_image, columns, of_view):
            start, shape, size, cut, flip, *shift = inputs[first : first + of_view]
            view = fn.slice(decoded, start=start, shape=shape, axes=[0, 1])
            view = fn.resize(view, size=size, interp_type=kernel, antialias=True)
            view = fn.slice(view, start=cut, **square)
            if padded:
                view = fn.slice(view, start=shift[0], out_of_bounds_policy="pad", **square)
            outputs.append(fn.flip(view, horizontal=flip))
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline


def _decoded(inputs: Any, device: str, *, by_parts: bool) -> Any:
    from nvidia.dali import fn

    if not by_parts:
        return fn.decoders.image(inputs[0], device=device, adjust_orientation=False)
    return fn.decoders.image_slice(
        inputs[0], device=device, start=inputs[1], shape=inputs[2], axes=[0, 1], adjust_orientation=False
    )


def _encoded(image: ReadViews) -> NDArray[np.uint8]:
    """Return bytes for DALI's decoder; for pixels those of a PNM file, which are a header and the pixels."""
    if not image.is_decoded:
        return image.content
    height, width, _ = image.content.shape
    header = np.frombuffer(f"P6\n{width} {height}\n255\n".encode(), np.uint8)
    return np.concatenate([header, image.content.reshape(-1)])


def _inputs(images: list[ReadViews], by_parts: bool, views: int, padded: bool) -> tuple[Any, ...]:
    """Return the columns that the graphs take, each N long."""
    columns: list[Any] = [[_encoded(image) for image in images]]
    if by_parts:
        columns += [
            np.array([image.part[:2] for image in images], np.int32),
            np.array([image.part[2:] for image in images], np.int32),
        ]
    for view in range(views):
        windows = [image.windows[view] for image in images]
        starts = np.array([window.box[:2] for window in windows], np.int32)
        if not by_parts:
            starts += np.array([image.part[:2] for image in images], np.int32)
        columns += [
            starts,
            np.array([window.box[2:] for window in windows], np.int32),
            np.array([window.size for window in windows], np.float32),
            np.array([window.cut for window in windows], np.int32),
            np.array([window.flip for window in windows], np.int32),
        ]
        if padded:
            columns.append(np.array([window.shift for window in windows], np.int32))
    return tuple(columns)


class DaliLoader:
    """Serve image files through DALI; made by `build_loader`, which documents the methods.

    Order, ids, labels and windows are those of `FolderLoader`. On a CPU the decoded pixels are too, and resized about
    one in a hundred differs by one level, one in ten millions by two. On a GPU they differ more: its decoder smooths
    chroma less, and where a window is made smaller, the filter repeats the border instead of ending there. That path
    has never run on a GPU yet.

    Each iterator has threads and a pipeline of its own, from its first batch until it ends or is dropped. So several
    may run at a time, and a new `train` leaves older ones alone.

    Args:
        splits: data set.
        files: requests for what to decode of it.
        device: device of the batches.
        decoding: way of decoding; see `Decoding`.
        threads: number of DALI's threads on the CPU; as many again read files and, on a CPU, resize.
        channels_last: whether images have that memory layout.

    Raises:
        ValueError: threads is below 1.

    Example:
        >>> loader = build_loader(splits, augmentation=Augmentation(), kind="dali", seed=0, global_batch_size=64,
        ...                       device="cuda")
    """

    def __init__(
        self,
        splits: DataSplits,
        files: FileRequests,
        *,
        device: torch.device,
        decoding: Decoding,
        threads: int = 2,
        channels_last: bool = False,
    ) -> None:
        if threads < 1:
            raise ValueError(f"DaliLoader: threads must be at least 1, got {threads}")
        self._files = files
        self._device = device
        self._decoding = decoding
        self._number_of_threads = threads
        self._normalise = Normalise(splits.mean, splits.std, device=device, channels_last=channels_last)
        self._windows = Windows.of(splits, files.augmentation)
        self._interpolation = splits.interpolation
        self._for_pil: set[StoredImage] = set()

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps per epoch, the same on every rank."""
        return self._files.schedule.steps_per_epoch

    @property
    def schedule(self) -> Schedule:
        """Return the part of this rank; see `Loader.schedule`."""
        return self._files.schedule

    @property
    def pixels(self) -> dict[str, str]:
        """Return what decides a view's pixels besides its numbers; see `Loader.pixels`."""
        return {**pixels_of(self._decoding, self._interpolation), **strong_pixels(self._files.augmentation)}

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Return the samples of the latest `train` that others stand in for; see `Loader.bad_samples`."""
        return self._files.bad_samples

    def train(
        self, epoch: int, start_step: int = 0, *, stream: int = 0, view_epoch: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's micro-batches of an epoch, decoded ahead; see `Loader.train`."""
        return self._batches(self._files.training(epoch, start_step, stream, view_epoch=view_epoch))

    def views(self, requests: Iterable[tuple[NDArray[np.int64], int]]) -> Iterator[Batch]:
        """Yield a batch of views for each request, decoded ahead; see `Loader.views`.

        Nothing can stand in for a sample that was asked for, so a bad file is an error in any case.
        """
        return self._batches(self._files.views(requests))

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[Batch]:
        """Yield this rank's share of a split, without bad files if those are skipped; see `Loader.evaluate`."""
        asked = self._files.evaluation(split)
        yield from self._batches(asked)
        asked.tally.log_missing()

    def _batches(self, asked: Requested) -> Iterator[Batch]:
        requests, tally = asked
        first = next(requests, None)
        while first is not None:
            # A pipeline is built for a largest batch. Only `views` may ask for a larger one later, which gets another.
            fitting = _UpTo(len(first.images), chain((first,), requests))
            with closed_in_time(self._views(first, fitting)) as made:
                for views in made:
                    tally.add(views.batch.bad)
                    if (batch := self._batch(views)) is not None:
                        yield batch
            first = fitting.left_over

    def _batch(self, views: ViewBatch) -> Batch | None:
        """Return the batch of a request, or None if all its images are left out."""
        taken, places = views.batch.taken()
        if not len(taken):
            return None
        on_device = (to_device(view, self._device) if view.device.type == "cpu" else view for view in views.views)
        chosen = to_device(torch.from_numpy(taken), self._device)
        images, *second = (self._normalise(view if len(taken) == len(view) else view[chosen]) for view in on_device)
        labels, sample_ids = (
            to_device(torch.from_numpy(part[places]), self._device)
            for part in (views.batch.request.labels, views.batch.request.sample_ids)
        )
        return Batch(images, labels, sample_ids, second[0] if second else None)

    def _views(self, first: DecodeRequest, requests: Iterator[DecodeRequest]) -> Generator[ViewBatch, None, None]:
        pipeline_of = self._pipeline_of(first)
        threads = ThreadPoolExecutor(
            self._number_of_threads, thread_name_prefix="unikd-dali-loader", initializer=limit_to_one_thread
        )
        try:
            feed = ImageFeed(requests, windows_by(self._windows), threads, ahead=PREFETCH + 1, for_pil=self._for_pil)
            if self._decoding == "cpu":
                yield from cpu_views(feed, pipeline_of, threads, self._windows.image_size, self._interpolation)
            else:
                yield from gpu_views(feed, pipeline_of, threads, torch.cuda.current_stream(self._device))
        finally:
            threads.shutdown(cancel_futures=True)

    def _pipeline_of(self, first: DecodeRequest) -> PipelineOf:
        shared: dict[str, Any] = {
            "batch_size": len(first.images),
            "threads": self._number_of_threads,
            "prefetch": PREFETCH,
        }
        if self._decoding == "cpu":
            return lambda source: decoding_pipeline(source, **shared)
        numbers = [views for views in (first.views, first.second) if views is not None]
        return lambda source: view_pipeline(
            source,
            views=1 if first.second is None else 2,
            image_size=self._windows.image_size,
            interpolation=self._interpolation,
            padded=any(views.augmentation.crop == "pad" for views in numbers),
            by_parts=self._decoding == "gpu_parts",
            device_id=gpu_number(self._device),
            **shared,
        )


@contextmanager
def closed_in_time(made: Generator[T, None, None]) -> Iterator[Generator[T, None, None]]:
    """Close an iterator that has threads or a pipeline at the end, or when Python shuts down."""
    with closing(made):
        _open.add(made)
        yield made


@atexit.register
def _close() -> None:
    for made in tuple(_open):
        made.close()


class _UpTo(Iterator[DecodeRequest]):
    """The requests up to one of more than `size` images, which is left over."""

    def __init__(self, size: int, requests: Iterator[DecodeRequest]) -> None:
        self._size = size
        self._requests = requests
        self.left_over: DecodeRequest | None = None

    def __next__(self) -> DecodeRequest:
        if self.left_over is not None:
            raise StopIteration
        request = next(self._requests)
        if len(request.images) > self._size:
            self.left_over = request
            raise StopIteration
        return request


if __name__ == "__main__":
    asked, number = sys.argv[1:]
    _try({way: way for way in get_args(Decoding)}[asked], int(number))
