"""Small folders of images, and loaders of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from support.loaders import build_loader
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.loader import Loader
from unikd_fast.data.splits import DataSplits, ImageFiles, TensorImages

SIZE = 16
RESIZED = Augmentation(crop="resized", flip_probability=0.5, eval_resize=20)


def write_images(root: Path, sizes: dict[str, int], fixed_size: int | None = None) -> Path:
    generator = np.random.default_rng(0)
    for part, count in sizes.items():
        for i in range(count):
            folder = root / part / f"class_{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            height, width = (fixed_size,) * 2 if fixed_size else generator.integers(14, 60, 2)
            pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


def in_memory(files: DataSplits) -> DataSplits:
    """The same images as tensors."""

    def read(split: object) -> TensorImages:
        assert isinstance(split, ImageFiles)
        return TensorImages(torch.stack([TF.pil_to_tensor(Image.open(path)) for path in split.paths]), split.labels)

    val = read(files.val)
    return replace(files, train=read(files.train), val=val, test=val)


def loader(splits: DataSplits, augmentation: Augmentation = RESIZED, **changes: int | bool | Augmentation) -> Loader:
    kind = "device" if isinstance(splits.train, TensorImages) else "torchvision"
    arguments = {"kind": kind, "seed": 3, "global_batch_size": 8, "workers": 0, **changes}
    return build_loader(splits, augmentation=augmentation, device="cpu", **arguments)  # type: ignore[arg-type]
