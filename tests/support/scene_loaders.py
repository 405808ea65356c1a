"""Loaders of scenes from keywords, and what their batches are compared by."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch

from unikd_fast.data.detection.loader import DetectionLoader, build_detection_loader
from unikd_fast.data.detection.scenes import DetectionSplits
from unikd_fast.data.settings import DataSettings
from unikd_fast.values import DetectionBatch

_OF_DATA = {field.name for field in fields(DataSettings)} - {"seed"}


def scene_loader(splits: DetectionSplits, name: str = "toy_scenes", **options: Any) -> DetectionLoader:
    data = {key: options.pop(key) for key in list(options) if key in _OF_DATA}
    arguments = {"seed": 3, "global_batch_size": 8, "device": "cpu", **options}
    return build_detection_loader(splits, DataSettings(name=name, **data), **arguments)


def assert_same(batches: Iterable[DetectionBatch], expected: Iterable[DetectionBatch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        for part in ("images", "sizes", "sample_ids", "seeds"):
            assert torch.equal(getattr(batch, part), getattr(other, part)), part
        for part in ("boxes", "labels"):
            for own, others in zip(getattr(batch, part), getattr(other, part), strict=True):
                assert torch.equal(own, others), part


def by_sample(batches: Iterable[DetectionBatch]) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return the image of each sample without its padding, its boxes and their labels."""
    return {
        int(sample): (image[:, : int(size[0]), : int(size[1])], boxes, labels)
        for batch in batches
        for image, size, boxes, labels, sample, _ in zip(*batch, strict=True)
    }
