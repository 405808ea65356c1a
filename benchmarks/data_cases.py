"""Data sets that the loaders are measured on, and how near their batches have to be before anything is timed."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from support.generated_images import draw_image
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.sets.in_memory import CIFAR_MEAN, CIFAR_STD
from unikd_fast.data.sets.synthetic import load_synthetic
from unikd_fast.data.splits import DataSplits, TensorImages
from unikd_fast.values import Batch

HEIGHT, WIDTH, QUALITY = 400, 500, 90
CLASSES = 8
DISTINCT = 256  # photos that are drawn; more of them are hard links
RESIZED = Augmentation(crop="resized", flip_probability=0.5)
PADDED = Augmentation(crop="pad", padding=4, flip_probability=0.5)
CIFAR_SAMPLES = 50_000


def write_photos(root: Path, images: int) -> Path:
    """Write root/train/<class>/<image> of this many JPEGs, and a root/val of two a class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 2 * CLASSES)):
        paths = [root / split / f"n{i % CLASSES:08}" / f"{i:05}.JPEG" for i in range(count)]
        for i, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            if i < DISTINCT:
                draw_image(generator, HEIGHT, WIDTH).save(path, quality=QUALITY)
            else:
                path.hardlink_to(paths[i % DISTINCT])
    return root


def mean_kilobytes(root: Path) -> float:
    """Return the mean size of the training images."""
    return round(float(np.mean([path.stat().st_size for path in (root / "train").glob("*/*")])) / 1000, 1)


def cifar_like() -> DataSplits:
    """Return made-up images in the shape of CIFAR-100, with its mean and deviation."""
    return replace(load_synthetic(CIFAR_SAMPLES, 100, 32), mean=CIFAR_MEAN, std=CIFAR_STD)


class PilImages(Dataset):
    """CIFAR-100 as the usual codebases read it: an array, one PIL image and its transforms a sample."""

    def __init__(self, splits: DataSplits) -> None:
        assert isinstance(splits.train, TensorImages)
        self.levels = splits.train.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = splits.train.labels.tolist()
        self.as_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(splits.mean, splits.std)])
        self.transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=PADDED.padding), transforms.RandomHorizontalFlip(), self.as_tensor]
        )

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.levels[index])), self.labels[index]

    def shown(self, index: int, top: int, left: int, flip: bool) -> Tensor:
        """Return the sample under this window of the padded image."""
        image = transforms.functional.pad(Image.fromarray(self.levels[index]), [PADDED.padding])
        image = transforms.functional.crop(image, top, left, 32, 32)
        return self.as_tensor(transforms.functional.hflip(image) if flip else image)


def pil_batches(images: PilImages, batch_size: int, device: str, *, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the shuffled batches of an epoch on the device, by torch's DataLoader."""
    loader = DataLoader(
        images, batch_size, shuffle=True, num_workers=workers, drop_last=True, pin_memory=device == "cuda"
    )
    for pixels, labels in loader:
        yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def levels(images: Tensor, splits: DataSplits) -> Tensor:
    """Return the grey levels that were normalised."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (splits.mean, splits.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


def assert_same(batches: Iterable[Batch], expected: Iterable[Batch], *, pixels: bool = True) -> None:
    """Check that labels and ids are equal, and, unless told not to, all pixels."""
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.sample_ids, other.sample_ids)
        assert batch.images.shape == other.images.shape
        assert not pixels or torch.equal(batch.images, other.images)


def assert_near(batches: Iterable[Batch], expected: Iterable[Batch], splits: DataSplits) -> None:
    """Check that labels and ids are equal, and pixels as near as `DaliLoader` says."""
    differences = []
    for batch, other in zip(batches, expected, strict=True):
        assert_same([batch], [other], pixels=False)
        ours, theirs = (levels(images, splits).int() for images in (batch.images, other.images))
        differences.append((ours - theirs).abs().to(torch.uint8))
    difference = torch.cat(differences)
    if difference.is_cuda:
        assert difference.float().mean(dim=(1, 2, 3)).max() <= 8  # another decoder and other borders
        return
    assert difference.max() <= 2
    assert (difference == 2).float().mean() <= 1e-5
    assert difference.float().mean() <= 0.02


def assert_every_id_once(batches: Iterable[Batch], splits: DataSplits, *, count: int) -> None:
    """Check that so many samples are there, none twice, each with its label."""
    ids, labels = (
        torch.cat(parts).cpu().numpy() for parts in zip(*((b.sample_ids, b.labels) for b in batches), strict=True)
    )
    known = dict(zip(splits.train.sample_ids.tolist(), splits.train.labels.tolist(), strict=True))
    assert len(ids) == len(np.unique(ids)) == count
    assert [known[i] for i in ids.tolist()] == labels.tolist()
