"""What comes before decoding: threads read and check image files ahead, and say which part of each is wanted."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from unikd_fast.data.bad_images import BadImage, stand_ins
from unikd_fast.data.decode import DecodeRequest
from unikd_fast.data.images import StoredImage, is_plain_jpeg, open_image, read_rgb, to_rgb
from unikd_fast.data.view_windows import Box, ViewWindow, Windows, enclosing
from unikd_fast.errors import DataError

CHUNK = 16
"""Images that one thread takes in a row."""


def chunks(count: int) -> Iterator[range]:
    """Share `count` images out among threads."""
    return (range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK))


def compute_alone() -> None:
    """Keep a thread of a loader from opening a team of OpenMP's for every operation; the first call of a thread.

    OpenMP, which then counts more threads than cores, would put those of the training to sleep between operations: a
    step on 2 cores took half as long again.
    """
    torch.get_num_threads()  # torch sets the number of a thread the first time it is used there
    threadpool_limits(1, user_api="openmp")


class ReadImage(NamedTuple):
    """An image that was read, and decoded only where that is not DALI's to do."""

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
        """The part of a decoded image, (H, W, 3)."""
        top, left, height, width = self.part
        return self.content[top : top + height, left : left + width]


class ReadBatch(NamedTuple):
    """A request for N images and the M of them that are good, read."""

    request: DecodeRequest
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
        requests: taken one by one, by whom asks for batches.
        windows: of the views.
        threads: that read.
        ahead: requests that are being read at a time, the one asked for among them; at least 1.
        for_pil: images that PIL is to decode, whatever they are; `read_by_pil` adds to them.

    Example:
        >>> with ThreadPoolExecutor(2) as threads:
        ...     batch = ImageFeed(iter(requests), Windows(224, 256), threads, ahead=3, for_pil=set()).next_batch()
    """

    def __init__(
        self,
        requests: Iterator[DecodeRequest],
        windows: Windows,
        threads: Executor,
        *,
        ahead: int,
        for_pil: set[StoredImage],
    ) -> None:
        self._requests = requests
        self._for_pil = for_pil
        self._windows = windows
        self._threads = threads
        self._ahead = ahead
        self._reading: deque[tuple[DecodeRequest, list[Future[list[ReadViews | BadImage]]]]] = deque()

    def next_batch(self) -> ReadBatch | None:
        """Return the next request, read; None after the last.

        Raises:
            DataError: an image cannot be read, is none or is truncated, and the request makes that an error; the
                message names it.
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

    def read_by_pil(self, request: DecodeRequest, place: int) -> ReadViews | BadImage:
        """Return an image of a request that somebody else failed to decode, decoded by PIL, now and in future.

        Raises:
            DataError: PIL cannot, and the request makes that an error; the message names the image.
        """
        self._for_pil.add(request.images[place])
        return self._read_one(request, place)

    def is_by_pil(self, request: DecodeRequest, place: int) -> bool:
        """Return whether `read_by_pil` was called for this image."""
        return request.images[place] in self._for_pil

    def _read(self, request: DecodeRequest, places: range) -> list[ReadViews | BadImage]:
        return [self._read_one(request, place) for place in places]

    def _read_one(self, request: DecodeRequest, place: int) -> ReadViews | BadImage:
        """Read and check an image; all that is read comes through here."""
        stored = request.images[place]
        try:
            image = _decoded_by_pil(stored) if stored in self._for_pil else read_image(stored)
            self._windows.check(stored, image.height, image.width)
        except DataError as error:
            if request.on_bad == "raise":
                raise
            return BadImage(stored.name, int(request.sample_ids[place]), str(error))
        windows = self._windows_of(request, place, image)
        part = enclosing([window.box for window in windows])
        inside = tuple(window._replace(box=window.box.within(part)) for window in windows)
        return ReadViews(image.content, part, inside)

    def _windows_of(self, request: DecodeRequest, place: int, image: ReadImage) -> list[ViewWindow]:
        if request.views is None:
            return [self._windows.central(image.height, image.width)]
        shown = (request.views,) if request.second is None else (request.views, request.second)
        return [self._windows.training(views, place, image.height, image.width) for views in shown]


def read_image(stored: StoredImage) -> ReadImage:
    """Read an image and check that it is whole: who decodes a part of it only does not miss the rest.

    Usual JPEGs are left as they are. All else but stored pixels is decoded by PIL, so that every format and mode has
    its pixels.

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
