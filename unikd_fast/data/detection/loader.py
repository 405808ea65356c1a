"""The loader of images with boxes: DALI or Pillow decodes and resizes, the device normalises."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unikd_fast.data.augmentation import ViewParameters
from unikd_fast.data.detection.scenes import BoxedImages, DetectionSplits
from unikd_fast.data.detection.views import SceneViews, SceneWindows, padded_size, shown_boxes
from unikd_fast.data.device import Normalise, to_device
from unikd_fast.data.files import OnBad
from unikd_fast.data.images import (
    FORMATS,
    BadImage,
    BadImageTally,
    StoredImage,
    naming_bad_file,
    open_image,
    stand_ins,
    to_rgb,
)
from unikd_fast.data.loader import fitting_kind
from unikd_fast.data.sampler import Schedule
from unikd_fast.data.settings import DataSettings, LoaderKind
from unikd_fast.data.views import ViewWindow, strong_view
from unikd_fast.data.workers import DecodingWorkers
from unikd_fast.errors import DataError
from unikd_fast.values import DetectionBatch

if TYPE_CHECKING:
    from unikd_fast.data.detection.dali import DaliScenes

_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class SceneRequest:
    """One micro-batch of N images to decode."""

    images: tuple[StoredImage | Tensor, ...]
    sizes: NDArray[np.int64]  # (N, 2) height and width that the annotations say
    windows: tuple[ViewWindow, ...]
    boxes: tuple[NDArray[np.float32], ...]  # N x (n, 4) in the views
    labels: tuple[NDArray[np.int64], ...]  # N x (n,)
    sample_ids: NDArray[np.int64]  # (N,)
    seeds: NDArray[np.int64]  # (N,) of the random choices of a step
    colours: ViewParameters | None  # None: as they are
    on_bad: OnBad


class DecodedScenes(NamedTuple):
    """What became of a request."""

    images: Tensor  # (N, 3, H, W) uint8, channels_last; 0 beyond each image
    taken: NDArray[np.int64]  # (M,) places of the request that make up the batch
    bad: Sequence[BadImage]
    request: SceneRequest


class SceneDecoder:
    """Decode requests; indexed by them, as a torch DataLoader wants its data set."""

    def __getitem__(self, request: SceneRequest) -> DecodedScenes:
        """Decode a batch; the request says whether a bad image is an error, is left out, or is replaced.

        Raises:
            DataError: an image, or every image of a batch, cannot be used; the message names it.
        """
        pixels = padded_pixels(request)
        bad: dict[int, BadImage] = {}
        for i, window in enumerate(request.windows):
            try:
                image = read_scene(request.images[i], request.sizes[i])
            except DataError as error:
                if request.on_bad == "raise":
                    raise
                bad[i] = BadImage(_name(request.images[i]), int(request.sample_ids[i]), str(error))
                continue
            high, wide = window.size
            view = torch.from_numpy(pixels[i, :high, :wide])
            view.copy_(torch.from_numpy(np.array(_cut(image, window))))
            if request.colours is not None:
                view.copy_(strong_view(view.permute(2, 0, 1), request.colours, i).permute(1, 2, 0))
        good = np.array([i not in bad for i in range(len(pixels))])
        if request.on_bad == "replace" and not good.any():
            raise DataError(
                f"none of the {len(good)} images of a batch can be decoded, so none can stand in for the others; the "
                f"first: {bad[0].reason}"
            )
        taken = stand_ins(good) if request.on_bad == "replace" else np.flatnonzero(good)
        return DecodedScenes(torch.from_numpy(pixels).permute(0, 3, 1, 2), taken, list(bad.values()), request)


def padded_pixels(request: SceneRequest) -> NDArray[np.uint8]:
    """Return zeros (N, H, W, 3) that hold the views of a request."""
    return np.zeros((len(request.images), *padded_size([window.size for window in request.windows]), 3), np.uint8)


def read_scene(stored: StoredImage | Tensor, size: NDArray[np.int64]) -> Image.Image:
    """Return the image of a scene, decoded.

    Args:
        stored: where it lies, or (3, H, W) uint8.
        size: (2,) height and width in pixels that its annotations say.

    Raises:
        DataError: it cannot be decoded, or has another size.
    """
    if isinstance(stored, Tensor):
        return Image.fromarray(stored.permute(1, 2, 0).numpy())
    content = stored.read()
    assert isinstance(content, bytes)  # of a file
    image = open_image(content, stored)
    check_size(stored, (image.height, image.width), size)
    return to_rgb(image, stored)


def check_size(stored: StoredImage, found: tuple[int, int], size: NDArray[np.int64]) -> None:
    """Check the height and width of an image against those that its annotations say: boxes would be beside their
    objects.

    Raises:
        DataError: they differ; the message names the image.
    """
    if found == tuple(size.tolist()):
        return
    with naming_bad_file(stored), Image.open(stored.path, formats=FORMATS) as image:
        turned = image.getexif().get(_EXIF_ORIENTATION, 1)
    raise DataError(
        f"{stored.name} has {found[1]} x {found[0]} pixels, its annotations say {size[1]} x {size[0]}; "
        + (
            f"its EXIF orientation, {turned}, is not applied: store it upright"
            if turned != 1
            else "correct the annotations, or restore the image that they were made for"
        )
    )


def _name(stored: StoredImage | Tensor) -> str:
    return stored.name if isinstance(stored, StoredImage) else "an image in memory"


def _cut(image: Image.Image, window: ViewWindow) -> Image.Image:
    top, left, height, width = window.box
    if (height, width) != (image.height, image.width):
        # Cut first: given as `box`, PIL would let the filter reach outside the window.
        image = image.crop((left, top, left + width, top + height))
    if window.size != (height, width):
        image = image.resize(window.size[::-1], Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if window.flip else image


class DetectionLoader:
    """Serve images with boxes to one rank, as a function of (epoch, step); made by `build_detection_loader`.

    Args:
        splits: data set.
        data: settings of how it is read and augmented.
        schedule: part of this rank.
        decoding: who decodes the requests.
        seed: seed of the views.
        device: device of the batches.
        channels_last: whether images have that memory layout.
    """

    def __init__(
        self,
        splits: DetectionSplits,
        data: DataSettings,
        schedule: Schedule,
        decoding: "DecodingWorkers | DaliScenes",
        *,
        seed: int,
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        self.schedule = schedule
        self._train = splits.train
        self._held_out = {"val": splits.val, "test": splits.test}
        self._windows = SceneWindows(data.detection.for_data(data.name), data.first_augmentation)
        self._is_strong = data.first_augmentation.is_strong
        self._seed = seed
        self._device = device
        self._normalise = Normalise(splits.mean, splits.std, device=device, channels_last=channels_last)
        self._skip_bad, self._max_bad_share = data.bad_images == "skip", data.max_bad_share
        self._logged: set[str] = set()
        self._trained = self._new_tally("training", 0)
        self._decoding = decoding

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of optimiser steps per epoch, the same on every rank; the incomplete last batch is
        dropped."""
        return self.schedule.steps_per_epoch

    @property
    def bad_samples(self) -> tuple[BadImage, ...]:
        """Return the samples of the latest `train`, as far as it was read, whose files cannot be used and were
        skipped."""
        return self._trained.images

    def train(self, epoch: int, start_step: int = 0, *, stream: int = 0) -> Iterator[DetectionBatch]:
        """Yield this rank's micro-batches, `accumulation_steps` for each optimiser step from `start_step` on.

        `train(e, s)` gives what `train(e)` gives after s steps, bit for bit. Images of a batch are all upright or none
        is, but for one batch an epoch. Crowds have no boxes in it. Another stream gives the same samples under other
        views.

        Raises:
            ValueError: the epoch has no such step.
            DataError: an image cannot be used.
            LoaderError: a worker died.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"DetectionLoader.train: start_step must be in [0, {self.steps_per_epoch}], got {start_step}"
            )
        on_bad: OnBad = "replace" if self._skip_bad else "raise"

        def request(positions: NDArray[np.int64]) -> SceneRequest:
            ids = self._train.ids[positions]
            views = self._windows.views(seed=self._seed, epoch=epoch, sample_ids=ids, stream=stream)
            return self._request(self._train, positions, views, on_bad)

        self._trained = self._new_tally("training", self.schedule.samples_per_epoch)
        requests = map(request, self.schedule.order(epoch, start_step))
        return self._decoding.train(requests, self._trained, self._batch)

    def evaluate(self, split: Literal["val", "test"]) -> Iterator[DetectionBatch]:
        """Yield this rank's share of a split, in order, one image a batch: over all ranks each image once.

        One, because the padding of a batch changes what a detector finds in it. The boxes are those in the resized
        image that are not around a crowd. A rank may get fewer images than another, or none.

        Raises:
            DataError: an image cannot be used.
            LoaderError: a worker died.
        """
        held_out = self._held_out[split]
        on_bad: OnBad = "leave_out" if self._skip_bad else "raise"
        requests = [
            self._request(held_out, np.array([i]), None, on_bad)
            for part in self.schedule.evaluation(len(held_out))
            for i in range(part.start, part.stop)
        ]
        tally = self._new_tally(split, len(held_out))
        if requests:
            yield from self._decoding.once(requests, tally, self._batch)
        tally.log_missing()

    def _request(
        self, split: BoxedImages, positions: NDArray[np.int64], views: SceneViews | None, on_bad: OnBad
    ) -> SceneRequest:
        sizes = split.sizes[positions]
        windows = tuple(
            self._windows.central(*size) if views is None else self._windows.training(views, i, *size)
            for i, size in enumerate(sizes.tolist())
        )
        shown = []
        for position, window in zip(positions.tolist(), windows, strict=True):
            rows = split.rows(position)
            objects = ~split.is_crowd[rows]
            shown.append(shown_boxes(split.boxes[rows][objects], split.labels[rows][objects], window))
        return SceneRequest(
            images=tuple(split.images[i] for i in positions.tolist()),
            sizes=sizes,
            windows=windows,
            boxes=tuple(boxes for boxes, _ in shown),
            labels=tuple(labels for _, labels in shown),
            sample_ids=split.ids[positions],
            seeds=np.zeros(len(positions), np.int64) if views is None else views.seeds,
            colours=views.usual if views is not None and self._is_strong else None,
            on_bad=on_bad,
        )

    def _batch(self, decoded: DecodedScenes) -> DetectionBatch | None:
        """Return a batch on the device, or None if all its images are left out."""
        request, taken = decoded.request, decoded.taken
        if not len(taken):
            return None
        sizes = np.array([request.windows[i].size for i in taken])
        images = decoded.images if np.array_equal(taken, np.arange(len(decoded.images))) else decoded.images[taken]
        images = self._normalise(to_device(images, self._device))
        for image, (height, width) in zip(images, sizes.tolist(), strict=True):
            image[:, height:] = 0
            image[:, :height, width:] = 0
        counts = [len(request.labels[i]) for i in taken]
        boxes, labels, on_device, ids = (
            to_device(torch.from_numpy(part), self._device)
            for part in (
                np.concatenate([request.boxes[i] for i in taken]),
                np.concatenate([request.labels[i] for i in taken]),
                sizes,
                request.sample_ids[taken],
            )
        )
        seeds = torch.from_numpy(request.seeds[taken])
        return DetectionBatch(images, on_device, boxes.split(counts), labels.split(counts), ids, seeds)

    def _new_tally(self, purpose: str, samples: int) -> BadImageTally:
        return BadImageTally(purpose, samples=samples, max_share=self._max_bad_share, logged=self._logged)


def build_detection_loader(
    splits: DetectionSplits,
    data: DataSettings,
    *,
    seed: int,
    global_batch_size: int,
    accumulation_steps: int = 1,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str,
    channels_last: bool = False,
) -> DetectionLoader:
    """Return a loader for a data set of images with boxes; arguments as for `build_loader`.

    Raises:
        ValueError: a setting does not fit images with boxes, the batch does not divide evenly or is larger than the
            train split.

    Example:
        >>> data = DataSettings(name="toy_scenes")
        >>> loader = build_detection_loader(open_scenes(data), data, seed=0, global_batch_size=8, device="cpu")
        >>> next(loader.train(epoch=0)).images.shape[:2]
        torch.Size([8, 3])
    """
    augmentation = data.first_augmentation
    unfit = {
        "augmentation.crop": augmentation.crop != "none",
        "augmentation.policy": augmentation.policy != "none",
        "augmentation.eval_resize": augmentation.eval_resize is not None,
        "second_view": data.second_view is not None,
        "mixing": data.mixing.is_on,
    }
    if keys := [f"data.{key}" for key, is_set in unfit.items() if is_set]:
        raise ValueError(
            f"build_detection_loader: {', '.join(keys)} cannot be used with {data.name}, whose images have boxes; "
            "remove it (data.detection says how they are resized, and cuts parts out)"
        )
    schedule = Schedule(
        splits.train.ids,
        augmentation,
        seed=seed,
        global_batch_size=global_batch_size,
        accumulation_steps=accumulation_steps,
        rank=rank,
        world_size=world_size,
        groups=splits.train.is_portrait,
    )
    device = torch.device(device)
    return DetectionLoader(
        splits, data, schedule, _decoding(splits, data, device), seed=seed, device=device, channels_last=channels_last
    )


def _decoding(splits: DetectionSplits, data: DataSettings, device: torch.device) -> "DecodingWorkers | DaliScenes":
    in_memory = isinstance(splits.train.images[0], Tensor)
    fitting: tuple[LoaderKind, ...] = ("torchvision",) if in_memory else ("dali", "torchvision")
    if fitting_kind(data.loader, fitting, data.name) == "dali":
        from unikd_fast.data.detection.dali import DaliScenes  # an optional dependency

        return DaliScenes(data.dali_threads)
    return DecodingWorkers(SceneDecoder(), 0 if in_memory else data.workers, pin_memory=device.type == "cuda")
