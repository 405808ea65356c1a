"""A frozen detector that is asked about regions, in the precision of its own, and its fidelity to itself in fp32."""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor, nn

from unikd_fast.config import Config
from unikd_fast.data.detection.loader import DetectionLoader
from unikd_fast.engine.checked_teacher import checked_teacher
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.memory import oom_hint
from unikd_fast.models.detector import Detector, Maps, Regions, Sizes, sizes_of
from unikd_fast.teacher import Fidelity, compare_features, exact_convolutions, fold_batch_norm, resolve_precision
from unikd_fast.teacher.online import PRECISIONS
from unikd_fast.values import DetectionBatch, Features

_logger = logging.getLogger("unikd_fast")


class DetectorTeacher(nn.Module):
    """A frozen detector that is asked about regions.

    In half precision its convolutions and linear layers run under autocast, from weights in fp32; what `Detector` keeps
    in fp32 stays so: anchors, boxes, logits and RoIAlign.

    Args:
        network: the teacher, on its device; changed in place.
        precision: see `OnlineTeacher`.
        fold: whether to fold BatchNorms into the preceding convolutions, frozen ones as well, see `fold_batch_norm`.

    Attributes:
        precision: precision the network runs in, with "auto" resolved.
        folded: number of BatchNorms folded.
        record: what the run folder says about the teacher.

    Raises:
        ValueError: the precision is unknown.
    """

    compile_mode: str | None = None

    def __init__(self, network: Detector, *, precision: str = "fp32", fold: bool = False) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._device = next(network.parameters()).device
        self.precision = resolve_precision(precision, self._device)
        self._is_unsettled = precision == "auto" and self.precision == "fp16"
        backbone = network.plain.backbone
        self.folded = fold_batch_norm(backbone) if fold else 0
        if fold or self.precision != "fp32":  # otherwise it runs as it was given
            backbone.to(memory_format=torch.channels_last)
        self.record: dict[str, Any] = {}

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, sizes: Sizes) -> list[dict[str, Tensor]]:
        """Return the detections of each image, see `Detector`."""
        with self._autocast():
            detections: list[dict[str, Tensor]] = self.network(images, sizes)
        return detections

    @torch.no_grad()
    def maps(self, images: Tensor) -> Maps:
        """Return the maps of the pyramid by name, finest first, in the teacher's precision."""
        with self._autocast():
            return self.network.maps(images)

    @torch.no_grad()
    def regions(self, maps: Maps, batch: DetectionBatch) -> Regions:
        """Return regions that the teacher itself proposes, chosen as in training."""
        with self._autocast():
            return self.network.sampled(maps, batch)

    @torch.no_grad()
    def at(self, maps: Maps, regions: Regions, sizes: Sizes) -> Features:
        """Return the teacher's logits (R, K + 1) and levels at these regions."""
        with self._autocast():
            return self.network.at(maps, regions, sizes)

    def sampled(self, batch: DetectionBatch) -> tuple[Features, Tensor]:
        """Return levels and logits at regions that the teacher itself proposes, chosen as in training, and labels."""
        maps = self.maps(batch.images)
        regions = self.regions(maps, batch)
        return self.at(maps, regions, sizes_of(batch)), regions.labels

    def is_finite(self, batches: Iterable[DetectionBatch]) -> bool:
        """Return whether logits and levels of these batches are finite, at regions that the teacher itself proposes."""
        found = (self.sampled(batch)[0] for batch in batches)
        return all(bool(each.isfinite().all()) for features in found for each in (features.logits, *features.levels))

    def settle(self, finite: bool) -> None:
        """Settle "auto": if fp16 outputs were not finite, run in bf16; see `OnlineTeacher.settle`."""
        if self._is_unsettled and not finite:
            _logger.warning(
                "DetectorTeacher: outputs in fp16 are not finite on real images; the teacher runs in bf16 instead"
            )
            self.precision = "bf16"
        self._is_unsettled = False

    def _autocast(self) -> torch.autocast:
        """Return the context of the teacher's precision; that of the student must not apply."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)


@oom_hint("teacher")
def start_detector(config: Config, network: Detector, loader: DetectionLoader, processes: Processes) -> DetectorTeacher:
    """Make the teacher that ``config.teacher`` describes and compare it with the network, see `checked_teacher`.

    They are compared at regions of training images that the network itself proposes in fp32.

    Args:
        config: configuration of a run with a teacher.
        network: the detector in fp32; changed in place.
        loader: this process's loader.
        processes: processes of the run.

    Raises:
        ValueError: the teacher does not match the network it was made from.
    """
    assert config.teacher is not None

    def batches(count: int) -> list[DetectionBatch]:
        return [*islice(loader.train(0), count)]

    make = partial(DetectorTeacher, fold=config.teacher.fold_batch_norm)
    teacher = checked_teacher(config, network, batches, processes, make=make, measure=_measure, compared="regions")
    teacher.record["compared"] = "regions"
    return teacher


def _measure(teacher: DetectorTeacher, reference: nn.Module, batches: list[DetectionBatch]) -> Fidelity:
    assert isinstance(reference, Detector)
    exact = DetectorTeacher(reference)

    def pairs() -> Iterator[tuple[Features, Features]]:
        for batch in batches:
            sizes = sizes_of(batch)
            with exact_convolutions(batch.images.device):
                maps = exact.maps(batch.images)
                regions = exact.regions(maps, batch)
                expected = exact.at(maps, regions, sizes)
            yield teacher.at(teacher.maps(batch.images), regions, sizes), expected

    return compare_features(pairs(), teacher.precision)
