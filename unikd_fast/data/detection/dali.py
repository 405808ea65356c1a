"""Scenes decoded by NVIDIA DALI and resized by torch, both on the CPU."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from unikd_fast.data.dali import PREFETCH, Source, closed_in_time, decoding_pipeline
from unikd_fast.data.dali_views import (
    ImageFeed,
    ReadBatch,
    ReadImage,
    cut_view,
    decoded,
    made_ahead,
    part_pixels,
    raw_parts,
)
from unikd_fast.data.detection.loader import DecodedScenes, SceneRequest, check_size, padded_pixels
from unikd_fast.data.images import BadImageTally, StoredImage
from unikd_fast.data.views import ViewWindow, chunks, limit_to_one_thread, strong_view
from unikd_fast.settings import LARGEST_IMAGE

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

T = TypeVar("T")


class DaliScenes:
    """Decode requests for scenes as `DecodingWorkers` does, in threads and by DALI.

    On a CPU DALI decodes to Pillow's pixels, and resized about one in a hundred differs by one level. Each iterator has
    threads and a pipeline of its own, so a new `train` leaves older ones alone.

    Args:
        threads: number of DALI's threads; as many again read files and resize.
    """

    def __init__(self, threads: int) -> None:
        self._number_of_threads = threads
        self._for_pil: set[StoredImage] = set()

    def train(self, requests: Iterator[Any], tally: BadImageTally, batch_of: Callable[[Any], T | None]) -> Iterator[T]:
        """Decode the requests of an epoch; see `DecodingWorkers.once`."""
        return self.once(requests, tally, batch_of)

    def once(self, requests: Iterable[Any], tally: BadImageTally, batch_of: Callable[[Any], T | None]) -> Iterator[T]:
        """Decode requests; see `DecodingWorkers.once`.

        Raises:
            DataError: an image cannot be used and its request makes that an error, or there are too many.
        """
        ahead = iter(requests)
        first = next(ahead, None)
        if first is None:
            return
        with closed_in_time(self._scenes(first, ahead)) as made:
            for scenes in made:
                tally.add(scenes.bad)
                if (batch := batch_of(scenes)) is not None:
                    yield batch

    def _scenes(self, first: SceneRequest, requests: Iterator[SceneRequest]) -> Generator[DecodedScenes, None, None]:
        count = self._number_of_threads
        threads = ThreadPoolExecutor(count, thread_name_prefix="unikd-dali-scenes", initializer=limit_to_one_thread)

        def pipeline_of(source: Source) -> "Pipeline":
            return decoding_pipeline(source, batch_size=len(first.images), threads=count, prefetch=PREFETCH)

        def start(batch: ReadBatch, outputs: Any) -> tuple[DecodedScenes, list[Future[None]]]:
            return _start(batch, outputs, threads)

        try:
            feed = ImageFeed(chain((first,), requests), _windows_of, threads, ahead=PREFETCH + 1, for_pil=self._for_pil)
            yield from made_ahead(decoded(feed, pipeline_of, encoded_only=True), start)
        finally:
            threads.shutdown(cancel_futures=True)


def _windows_of(request: SceneRequest, place: int, image: ReadImage) -> list[ViewWindow]:
    stored = request.images[place]
    assert isinstance(stored, StoredImage)
    check_size(stored, (image.height, image.width), request.sizes[place])
    return [request.windows[place]]


def _start(batch: ReadBatch, outputs: Any, threads: ThreadPoolExecutor) -> tuple[DecodedScenes, list[Future[None]]]:
    """Have threads put the views of a batch's good images into padded pixels."""
    request: SceneRequest = batch.request
    places, parts = list(batch.images), raw_parts(batch, outputs)
    pixels = torch.from_numpy(padded_pixels(request)).permute(0, 3, 1, 2)

    def make(rows: range) -> None:
        for row in rows:
            place = places[row]
            (window,) = batch.images[place].windows
            view = cut_view(part_pixels(parts[row]), window, LARGEST_IMAGE)
            if request.colours is not None:
                view = strong_view(view, request.colours, place)
            pixels[place, :, : view.shape[1], : view.shape[2]] = view

    tasks = [threads.submit(make, rows) for rows in chunks(len(places))]
    return DecodedScenes(pixels, batch.taken()[1], batch.bad, request), tasks
