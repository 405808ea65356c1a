"""Loaders of one folder of images, which differ in who decodes it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from support.loaders import build_loader
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.loader import Loader
from unikd_fast.data.splits import DataSplits
from unikd_fast.values import Batch

SIZE, SHORT = 96, 110
RESIZED = Augmentation(crop="resized", flip_probability=0.5, eval_resize=SHORT)
CROPS = [
    Augmentation(flip_probability=0.5, eval_resize=SHORT),
    Augmentation(crop="pad", padding=9, flip_probability=0.5, eval_resize=SHORT),
    RESIZED,
]
crops = pytest.mark.parametrize("augmentation", CROPS, ids=lambda a: a.crop)


def make(splits: DataSplits, augmentation: Augmentation = RESIZED, **changes: Any) -> Loader:
    shared = {"kind": "dali", "seed": 3, "global_batch_size": 40, "device": "cpu", "workers": 0}
    return build_loader(splits, augmentation=augmentation, **{**shared, **changes})


def levels(images: Tensor, splits: DataSplits) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (splits.mean, splits.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        for part, other_part in zip(batch, other, strict=True):
            assert (part is None and other_part is None) or torch.equal(part, other_part)


def assert_close(batches: list[Batch], expected: list[Batch], splits: DataSplits) -> None:
    """The decoded pixels are the same. Resized, they may be rounded apart by a level, since torch's weights have 16
    bits and PIL's 22; in each of two directions, so seldom by two."""
    differences = []
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.sample_ids, other.sample_ids)
        for images, others in ((batch.images, other.images), (batch.second, other.second)):
            assert (images is None) == (others is None)
            if images is not None and others is not None:
                differences.append((levels(images, splits).int() - levels(others, splits).int()).abs().flatten())
    difference = torch.cat(differences)
    assert difference.max() <= 2
    assert (difference == 2).float().mean() <= 1e-5
    assert difference.float().mean() <= 0.02


def by_id(batches: list[Batch]) -> dict[int, Tensor]:
    return {int(i): image for batch in batches for image, i in zip(batch.images, batch.sample_ids, strict=True)}
