"""Ways to pack one folder, loaders of what was packed, and what these must have in common."""

import torch

from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.loader import Loader, LoaderKind, build_loader
from unikd_fast.data.packed import PackSettings
from unikd_fast.data.splits import DataSplits

SIZE = 16
SETTINGS = {
    "copied": PackSettings(shard_bytes=9000),
    "jpeg": PackSettings("jpeg", size=24, quality=80, shard_bytes=9000),
    "raw": PackSettings("raw", size=24, shard_bytes=9000),
    "raw, whole": PackSettings("raw", size=100, shard_bytes=9000),
}


def loader(splits: DataSplits, workers: int = 0, kind: LoaderKind = "torchvision") -> Loader:
    augmentation = Augmentation(crop="resized", flip_probability=0.5, eval_resize=20)
    return build_loader(
        splits, augmentation=augmentation, seed=3, global_batch_size=8, device="cpu", workers=workers, kind=kind
    )


def assert_same_batches(
    splits: DataSplits,
    expected: DataSplits,
    workers: int = 0,
    *,
    kind: LoaderKind = "torchvision",
    pixels: bool = True,
) -> None:
    one, other = loader(splits, workers, kind), loader(expected, kind=kind)
    for found, wanted in ((one.train(2), other.train(2)), (one.evaluate("val"), other.evaluate("val"))):
        for batch, other_batch in zip(found, wanted, strict=True):
            assert torch.equal(batch.labels, other_batch.labels)
            assert torch.equal(batch.sample_ids, other_batch.sample_ids)
            assert batch.images.shape == other_batch.images.shape
            assert not pixels or torch.equal(batch.images, other_batch.images)
