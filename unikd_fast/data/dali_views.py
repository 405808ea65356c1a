"""From requests to uint8 views through DALI: images are read ahead, decoded and cut, with batches at every stage."""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unikd_fast.data.augmentation import ViewParameters
from unikd_fast.data.files import DecodeRequest
from unikd_fast.data.images import BadImage, StoredImage, is_plain_jpeg, open_image, read_rgb, stand_ins, to_rgb
from unikd_fast.data.views import Box, ViewWindow, Windows, chunks, enclosing, strong_view
from unikd_fast.errors import DataError
from unikd_fast.values import Interpolation

if TYPE_CHECKING:
    from nvidia.dali import Pipeline


class ReadImage(NamedTuple):
    """An image that was read; it is decoded only if DALI is not to decode it."""

    content: NDArray[np.uint8]  # (bytes,) of a JPEG, or (H, W, 3) pixels
    height: int  # in pixels
    width: int


class ReadViews(NamedTuple):
    """An image that was read, and the views to be made from it."""

    content: NDArray[np.uint8]  # (bytes,) of a JPEG, or (H, W, 3) pixels
    part: Box  # the part of the image that all views lie in
    windows: tuple[ViewWindow, ...]  # their boxes in coordinates of that part

    @property
    def is_decoded(self) -> bool:
        return self.content.ndim == 3

    def decoded_part(self) -> NDArray[np.uint8]:
        """Return the part of a decoded image, (H, W, 3)."""
        top, left, height, width = self.part
        return self.content[top : top + height, left : left + width]


class ReadBatch(NamedTuple):
    """A request for N images and the M of them that are good, read."""

    request: Any  # DecodeRequest, or SceneRequest
    images: dict[int, ReadViews]  # place in the request: image; M of them, by place
    bad: tuple[BadImage, ...]

    def taken(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which of the M images make up the batch, and their places in the request.

        Raises:
            DataError: bad images are to be replaced, and there is no good one.
        """
        places = np.array(list(self.images), np.int64)
        if len(places) == len(self.request.images) or self.request.on_bad == "leave_out":
            return np.arange(len(places)), places
        if not len(places):
            raise DataError(
                f"none of the {len(self.bad)} images of a batch can be decoded, so none can stand in for the others; "
                f"the first: {self.bad[0].reason}"
            )
        shown = stand_ins(np.isin(np.arange(len(self.request.images)), places))
        return np.searchsorted(places, shown), shown


class ImageFeed:
    """Read requests ahead.

    Args:
        requests: requests, taken one by one as batches are asked for.
        windows_of: function of a request, a place in it and the image there, that returns the windows of its views; it
            raises DataError if the image cannot be used.
        threads: threads that read.
        ahead: number of requests that are read at a time, including the one asked for; at least 1.
        for_pil: images that Pillow is to decode, whatever they are; `read_by_pil` adds to them.

    Example:
        >>> with ThreadPoolExecutor(2) as threads:
        ...     feed = ImageFeed(iter(requests), windows_by(Windows(224, 256)), threads, ahead=3, for_pil=set())
        ...     batch = feed.next_batch()
    """

    def __init__(
        self,
        requests: Iterator[Any],
        windows_of: "WindowsOf",
        threads: Executor,
        *,
        ahead: int,
        for_pil: set[StoredImage],
    ) -> None:
        self._requests = requests
        self._for_pil = for_pil
        self._windows_of = windows_of
        self._threads = threads
        self._ahead = ahead
        self._reading: deque[tuple[Any, list[Future[list[ReadViews | BadImage]]]]] = deque()

    def next_batch(self) -> ReadBatch | None:
        """Return the next request, read; None after the last.

        Raises:
            DataError: an image cannot be read, is not an image or is truncated, and the request makes that an error;
                the message names it.
        """
        while len(self._reading) < self._ahead and (request := next(self._requests, None)) is not None:
            parts = chunks(len(request.images))
            self._reading.append((request, [self._threads.submit(self._read, request, places) for places in parts]))
        if not self._reading:
            return None
        request, chunks_read = self._reading.popleft()
        found = dict(enumerate(image for chunk in chunks_read for image in chunk.result()))
        good = {place: image for place, image in found.items() if isinstance(image, ReadViews)}
        return ReadBatch(request, good, tuple(image for image in found.values() if isinstance(image, BadImage)))

    def read_by_pil(self, request: Any, place: int) -> ReadViews | BadImage:
        """Return an image of a request that DALI failed to decode, decoded by Pillow, now and in future.

        Raises:
            DataError: Pillow cannot decode it, and the request makes that an error; the message names the image.
        """
        self._for_pil.add(request.images[place])
        return self._read_one(request, place)

    def is_by_pil(self, request: Any, place: int) -> bool:
        """Return whether `read_by_pil` was called for this image."""
        return request.images[place] in self._for_pil

    def _read(self, request: Any, places: range) -> list[ReadViews | BadImage]:
        return [self._read_one(request, place) for place in places]

    def _read_one(self, request: Any, place: int) -> ReadViews | BadImage:
        """Read and check an image; all that is read comes through here."""
        stored = request.images[place]
        try:
            image = _decoded_by_pil(stored) if stored in self._for_pil else read_image(stored)
            windows = self._windows_of(request, place, image)
        except DataError as error:
            if request.on_bad == "raise":
                raise
            return BadImage(stored.name, int(request.sample_ids[place]), str(error))
        part = enclosing([window.box for window in windows])
        inside = tuple(window._replace(box=window.box.within(part)) for window in windows)
        return ReadViews(image.content, part, inside)


WindowsOf = Callable[[Any, int, ReadImage], list[ViewWindow]]
"""Returns the windows of the image at a place of a request."""


def windows_by(windows: Windows) -> WindowsOf:
    """Return the function that says which windows a `DecodeRequest` asks for."""

    def windows_of(request: DecodeRequest, place: int, image: ReadImage) -> list[ViewWindow]:
        windows.check(request.images[place], image.height, image.width)
        if request.views is None:
            return [windows.central(image.height, image.width)]
        shown = (request.views,) if request.second is None else (request.views, request.second)
        return [windows.training(views, place, image.height, image.width) for views in shown]

    return windows_of


def read_image(stored: StoredImage) -> ReadImage:
    """Read an image and check that it is complete: decoding a part of it would not reveal that the rest is missing.

    Usual JPEGs are left as they are. Everything else, except stored pixels, is decoded by Pillow, so that every format
    and mode has Pillow's pixels.

    Raises:
        DataError: it cannot be read or decoded; the message names it.

    Example:
        >>> read_image(StoredImage("n01440764_10026.JPEG")).height
        375
    """
    content = stored.read()
    if isinstance(content, np.ndarray):
        return ReadImage(content, *content.shape[:2])
    image = open_image(content, stored)
    if is_plain_jpeg(image, content):
        return ReadImage(np.frombuffer(content, np.uint8), image.height, image.width)
    decoded = to_rgb(image, stored)
    del image  # with a decoder that may hold the picture twice more
    return _pixels(decoded)


def _decoded_by_pil(stored: StoredImage) -> ReadImage:
    return _pixels(read_rgb(stored))


def _pixels(image: Image.Image) -> ReadImage:
    return ReadImage(np.asarray(image), image.height, image.width)


_logger = logging.getLogger("unikd_fast")

PipelineOf = Callable[[Callable[[], list[ReadViews]]], "Pipeline"]
"""Builds a pipeline for a source of batches."""


class ViewBatch(NamedTuple):
    """A request and its views."""

    batch: ReadBatch
    views: list[Tensor]  # (M, 3, image_size, image_size) uint8, one or two; none where no image is good


def decoded(
    feed: ImageFeed, pipeline_of: PipelineOf, stream: Any = None, *, encoded_only: bool
) -> Generator[tuple[ReadBatch, Any], None, None]:
    """Yield each batch of a feed with the outputs of a pipeline for it; None for a batch that has nothing for DALI.

    If DALI fails on an image, Pillow decodes it, so that an image is bad only if Pillow cannot decode it.

    Args:
        feed: feed of the batches.
        pipeline_of: function that builds the pipeline, and builds it again after a failure, which no pipeline survives.
        encoded_only: whether images that are decoded already are left out.
        stream: CUDA stream on which the outputs are used. If None, they are ready when they are yielded.

    Raises:
        DataError: an image cannot be read or decoded, and its request makes that an error.
        RuntimeError: DALI failed for a reason other than an image.
    """
    run = _Run(feed, encoded_only=encoded_only)
    pipeline = pipeline_of(run.next_images)
    try:
        while True:
            outputs, failure = _outputs(pipeline, stream)
            if failure is not None:
                _end(pipeline)
                run.repair(failure, pipeline_of)
                pipeline = pipeline_of(run.next_images)
                continue
            yield from run.without_outputs()
            if outputs is None:
                break
            yield run.under_way.popleft(), outputs
    finally:
        # An error's traceback may live long, and DALI's threads would with it.
        _end(pipeline)
    if run.error is not None:
        raise run.error


def _outputs(pipeline: "Pipeline", stream: Any = None) -> tuple[Any, RuntimeError | None]:
    """Return the next outputs of a pipeline, None after the last; or else its failure, which does not hold it."""
    try:
        return pipeline.run(stream), None
    except StopIteration:
        return None, None
    except RuntimeError as error:
        return None, error.with_traceback(None)


def _end(pipeline: "Pipeline") -> None:
    """End the threads of a pipeline now, by an explicit call.

    When Python itself calls `__del__`, it swallows what is raised there: a Ctrl-C would stop nothing.
    """
    pipeline.__del__()


class _Run:
    """The batches that a pipeline has been given and has not given back."""

    def __init__(self, feed: ImageFeed, *, encoded_only: bool) -> None:
        self._feed = feed
        self._encoded_only = encoded_only
        self._again: deque[ReadBatch] = deque()  # to be fed once more, after a failure
        self.under_way: deque[ReadBatch] = deque()
        self.error: DataError | None = None  # of the feed; the batches before it come first

    def next_images(self) -> list[ReadViews]:
        """Return the images for DALI of the next batch that has any."""
        while True:
            batch = self._again.popleft() if self._again else self._next_batch()
            if batch is None:
                raise StopIteration
            self.under_way.append(batch)
            if images := self._for_dali(batch):
                return [image for _, image in images]

    def _next_batch(self) -> ReadBatch | None:
        try:
            return None if self.error else self._feed.next_batch()
        except DataError as error:
            # Without its traceback, which holds the frames of whoever called, the pipeline among them.
            self.error = error.with_traceback(None)
            return None

    def _for_dali(self, batch: ReadBatch) -> list[tuple[int, ReadViews]]:
        return [item for item in batch.images.items() if not (self._encoded_only and item[1].is_decoded)]

    def without_outputs(self) -> Iterator[tuple[ReadBatch, None]]:
        """Yield the next batches, as long as DALI was given nothing of them."""
        while self.under_way and not self._for_dali(self.under_way[0]):
            yield self.under_way.popleft(), None

    def repair(self, error: RuntimeError, pipeline_of: PipelineOf) -> None:
        """Have Pillow decode what DALI failed on, and start again with the first batch that was not given back.

        If Pillow cannot either and the request makes that an error, it is raised after the batches before this one.

        Raises:
            RuntimeError: none of the images causes the failure.
        """
        repaired: list[ReadBatch] = []
        found = False
        for batch in self.under_way:
            places = _failing(self._for_dali(batch), pipeline_of)
            if any(self._feed.is_by_pil(batch.request, place) for place in places):
                raise error  # pixels have nothing to fail on
            found = found or bool(places)
            try:
                repaired.append(self._by_pil(batch, places))
            except DataError as its_own:
                self.error = its_own.with_traceback(None)
                self._again.clear()
                break
        if not found:
            raise error
        self._again.extendleft(reversed(repaired))
        self.under_way.clear()

    def _by_pil(self, batch: ReadBatch, places: list[int]) -> ReadBatch:
        images, bad = dict(batch.images), list(batch.bad)
        for place in places:
            image = self._feed.read_by_pil(batch.request, place)
            if isinstance(image, BadImage):
                bad.append(image)
                del images[place]
            else:
                images[place] = image
                _logger.warning("DALI cannot decode %s, PIL can and does", batch.request.images[place].name)
        return ReadBatch(batch.request, images, tuple(bad))


def _failing(images: list[tuple[int, ReadViews]], pipeline_of: PipelineOf) -> list[int]:
    """Return the places of the images that DALI fails on, found by halving."""
    if not images:
        return []
    pipeline = pipeline_of(iter([[image for _, image in images]]).__next__)
    failure = _outputs(pipeline)[1]
    _end(pipeline)
    if failure is None:
        return []
    half = len(images) // 2
    return _failing(images[:half], pipeline_of) + _failing(images[half:], pipeline_of) if half else [images[0][0]]


def cpu_views(
    feed: ImageFeed,
    pipeline_of: PipelineOf,
    threads: Executor,
    image_size: int,
    interpolation: Interpolation = "bilinear",
) -> Generator[ViewBatch, None, None]:
    """Yield the views of each batch of a feed; DALI decodes, and torch resizes in these threads.

    On a CPU torch resizes four times as fast as DALI, and rounds as Pillow does.

    Args:
        feed: feed of the batches.
        pipeline_of: function that builds the decoding pipeline.
        threads: threads that make the views.
        image_size: height and width of the views in pixels.
        interpolation: interpolation of every resize.

    Raises:
        DataError: an image cannot be read or decoded, and its request makes that an error.
    """
    yield from made_ahead(
        decoded(feed, pipeline_of, encoded_only=True),
        lambda batch, outputs: _start(batch, outputs, threads, image_size, interpolation),
    )


V = TypeVar("V")


def made_ahead(
    batches: Generator[tuple[ReadBatch, Any], None, None],
    start: Callable[[ReadBatch, Any], tuple[V, list[Future[None]]]],
) -> Generator[V, None, None]:
    """Yield what is made of decoded batches, while that of the next one is under way.

    Args:
        batches: batches of `decoded`.
        start: function of a batch and DALI's outputs, that returns what will be there when the tasks have ended.
    """
    started: deque[tuple[V, list[Future[None]]]] = deque()
    bad: DataError | None = None
    with closing(batches):
        try:
            for batch, outputs in batches:
                started.append(start(batch, outputs))
                if len(started) > 1:
                    yield _finished(*started.popleft())
        except DataError as error:
            bad = error  # after what was started before
    while started:
        yield _finished(*started.popleft())
    if bad is not None:
        raise bad


def raw_parts(batch: ReadBatch, outputs: Any) -> list[Any]:
    """Return the decoded parts of the good images of a batch, by place, for `part_pixels`."""
    by_dali = iter(() if outputs is None else outputs[0])
    return [image.decoded_part() if image.is_decoded else next(by_dali) for image in batch.images.values()]


def part_pixels(part: Any) -> Tensor:
    """Return the (H, W, 3) uint8 pixels of a decoded part."""
    return torch.from_numpy(part.copy()) if isinstance(part, np.ndarray) else torch.from_dlpack(part)


def _start(
    batch: ReadBatch, outputs: Any, threads: Executor, image_size: int, interpolation: Interpolation
) -> tuple[ViewBatch, list[Future[None]]]:
    images = list(batch.images.items())
    if not images:
        return ViewBatch(batch, []), []
    parts = raw_parts(batch, outputs)
    shown = [torch.empty(len(images), 3, image_size, image_size, dtype=torch.uint8) for _ in images[0][1].windows]

    numbers_of = (batch.request.views, batch.request.second)

    def make(rows: range) -> None:
        for row in rows:
            place, image = images[row]
            part = part_pixels(parts[row])
            for views, window, numbers in zip(shown, image.windows, numbers_of, strict=False):
                view = cut_view(part, window, image_size, interpolation)
                views[row] = view if numbers is None else _strong(view, numbers, place)

    return ViewBatch(batch, shown), [threads.submit(make, rows) for rows in chunks(len(images))]


def _strong(view: Tensor, numbers: ViewParameters, place: int) -> Tensor:
    return strong_view(view, numbers, place) if numbers.augmentation.is_strong else view


def _finished(made: V, tasks: list[Future[None]]) -> V:
    for task in tasks:
        task.result()
    return made


def cut_view(image: Tensor, window: ViewWindow, image_size: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """Make a view from a decoded image.

    Args:
        image: (H, W, 3) uint8.
        window: how the view comes out of the image, in which its box lies.
        image_size: height and width of the view in pixels.
        interpolation: interpolation of the resize.

    Returns:
        (3, image_size, image_size) uint8.

    Example:
        >>> cut_view(torch.zeros(400, 500, 3, dtype=torch.uint8), Windows(224, 256).central(400, 500), 224).shape
        torch.Size([3, 224, 224])
    """
    top, left, height, width = window.box
    # Cut first: the filter must not reach outside the box.
    view = image[top : top + height, left : left + width].permute(2, 0, 1)
    if window.size != (height, width):
        view = F.interpolate(view[None], window.size, mode=interpolation, antialias=True)[0]
    top, left = window.cut
    view = view[:, top : top + image_size, left : left + image_size]
    if window.shift != (0, 0):
        down, right = window.shift
        view = F.pad(view, (-right, right, -down, down))
    return view.flip(2) if window.flip else view


def gpu_views(
    feed: ImageFeed, pipeline_of: PipelineOf, threads: Executor, stream: Any
) -> Generator[ViewBatch, None, None]:
    """Yield the views of each batch of a feed, made by DALI; strong augmentation is done ahead, on the CPU.

    Args:
        feed: feed of the batches.
        pipeline_of: function that builds the pipeline of views.
        threads: threads that make strong views.
        stream: torch's stream on which the views are used. If None, the pipeline runs on a CPU.

    Raises:
        DataError: an image cannot be read or decoded, and its request makes that an error.
    """
    started: deque[tuple[ViewBatch, list[Future[None]]]] = deque()
    bad: DataError | None = None
    with closing(decoded(feed, pipeline_of, stream, encoded_only=False)) as batches:
        try:
            for batch, outputs in batches:
                # What torch holds of an output keeps its memory, as long as it does.
                shown = [torch.from_dlpack(views.as_tensor()).permute(0, 3, 1, 2) for views in outputs or ()]
                started.append(_start_strong(batch, shown, threads))
                if len(started) > 1 or not started[0][1]:
                    yield _finished(*started.popleft())
        except DataError as error:
            bad = error  # after what was started before
    while started:
        yield _finished(*started.popleft())
    if bad is not None:
        raise bad


def _start_strong(batch: ReadBatch, shown: list[Tensor], threads: Executor) -> tuple[ViewBatch, list[Future[None]]]:
    """Have these threads change the views that are strong, on the CPU: a device would wait for its host at each."""
    places, tasks = list(batch.images), []
    views_of = list(shown)
    for index, numbers in enumerate((batch.request.views, batch.request.second)[: len(shown)]):
        if numbers is None or not numbers.augmentation.is_strong:
            continue
        weak = shown[index].to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream(shown[index].device).record_event() if shown[index].is_cuda else None
        views_of[index] = strong = torch.empty_like(weak)

        def make(
            rows: range,
            weak: Tensor = weak,
            strong: Tensor = strong,
            numbers: ViewParameters = numbers,
            copied: torch.cuda.Event | None = copied,
        ) -> None:
            if copied is not None:
                copied.synchronize()
            for row in rows:
                strong[row] = strong_view(weak[row], numbers, places[row])

        tasks += [threads.submit(make, rows) for rows in chunks(len(weak))]
    return ViewBatch(batch, views_of), tasks
