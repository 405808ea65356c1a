"""Pixel work on the device against PIL and torchvision."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from unikd_fast.data.device import Normalise, pad_crop, resized_crop


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


BOXES = torch.tensor([[0, 0, 40, 50], [3, 7, 20, 11], [39, 49, 1, 1], [0, 10, 40, 8], [10, 0, 5, 50], [1, 2, 32, 32]])
FLIP = torch.tensor([False, True, False, True, True, False])


@pytest.mark.parametrize("size", [8, 32, 64])
def test_resized_crop_is_pils_within_a_level(images: torch.Tensor, size: int) -> None:
    ours = resized_crop(images, BOXES, FLIP, size)
    for i, (top, left, height, width) in enumerate(BOXES.tolist()):
        image = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
        if FLIP[i]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = ours[i].permute(1, 2, 0).numpy().astype(int) - np.asarray(image).astype(int)
        assert np.abs(difference).max() <= 1
        assert abs(difference.mean()) < 0.06  # rounding, no bias


def test_resized_crop_keeps_flat_images_flat() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 97, 83)
    boxes = torch.tensor([[1, 2, 90, 71]]).expand(256, -1)
    small = resized_crop(levels, boxes, torch.zeros(256, dtype=torch.bool), 7)
    assert torch.equal(small, levels[..., :7, :7])


def test_resized_crop_of_the_whole_image_is_the_image() -> None:
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(resized_crop(image, torch.tensor([[0, 0, 32, 32]]), torch.tensor([False]), 32), image)


def test_resized_crop_depends_on_neither_batch_nor_autocast(images: torch.Tensor) -> None:
    together = resized_crop(images, BOXES, FLIP, 24)
    for i in range(len(images)):
        assert torch.equal(resized_crop(images[i : i + 1], BOXES[i : i + 1], FLIP[i : i + 1], 24)[0], together[i])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resized_crop(images, BOXES, FLIP, 24), together)


@pytest.mark.parametrize("padding", [0, 4])
def test_pad_crop_is_torchvisions(images: torch.Tensor, padding: int) -> None:
    offsets = torch.randint(0, 2 * padding + 1, (6, 2), generator=torch.Generator().manual_seed(1))
    boxes = torch.cat((offsets, torch.tensor([[40, 50]]).expand(6, -1)), dim=1)
    ours = pad_crop(images, boxes, FLIP, padding)
    for i, (top, left) in enumerate(offsets.tolist()):
        expected = TF.crop(TF.pad(images[i], [padding]), top, left, 40, 50)
        assert torch.equal(ours[i], TF.hflip(expected) if FLIP[i] else expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalise_is_torchvisions(images: torch.Tensor, channels_last: bool) -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = Normalise(mean, std, device=torch.device("cpu"), channels_last=channels_last)(images)
    expected = TF.normalize(images.double() / 255, list(mean), list(std))
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), expected, atol=1e-6, rtol=0)
    assert ours.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_normalise_leaves_its_input_alone(images: torch.Tensor) -> None:
    before = images.clone()
    Normalise((0.5,) * 3, (0.5,) * 3, device=torch.device("cpu"))(images)
    assert torch.equal(images, before)
