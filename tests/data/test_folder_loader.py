"""The loader of image files: torchvision's pixels, any number of workers."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from support.folder_images import RESIZED, SIZE, loader, write_images
from unikd_fast.data.augmentation import Augmentation, view_parameters
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits, ImageFiles, TensorImages
from unikd_fast.values import Batch

CROPS = [
    Augmentation(flip_probability=0.5, eval_resize=20),
    Augmentation(crop="pad", padding=3, flip_probability=0.5, eval_resize=20),
    RESIZED,
]
crops = pytest.mark.parametrize("augmentation", CROPS, ids=lambda a: a.crop)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    return load_image_folder(write_images(tmp_path_factory.mktemp("images"), {"train": 26, "val": 11}), SIZE)


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        for part, other_part in zip(batch[:3], other[:3], strict=True):
            assert torch.equal(part, other_part)


def levels(images: Tensor, splits: DataSplits) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (splits.mean, splits.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


@crops
def test_training_pixels_are_torchvisions(splits: DataSplits, augmentation: Augmentation) -> None:
    assert isinstance(splits.train, ImageFiles)
    batch = next(loader(splits, augmentation).train(epoch=2, stream=1))
    views = view_parameters(augmentation, seed=3, epoch=2, sample_ids=batch.sample_ids.numpy(), stream=1)
    for i, sample_id in enumerate(batch.sample_ids.tolist()):
        image = Image.open(splits.train.paths[sample_id])
        if augmentation.crop != "resized":
            image = TF.pad(TF.center_crop(TF.resize(image, [20]), [SIZE]), [augmentation.padding or 0])
        height, width = (SIZE, SIZE) if augmentation.crop == "pad" else (image.height, image.width)
        image = TF.resized_crop(image, *views.crop_box(i, height, width), size=[SIZE, SIZE])
        image = TF.hflip(image) if views.flip[i] else image
        assert torch.equal(levels(batch.images[i], splits), TF.pil_to_tensor(image))
        assert batch.labels[i] == splits.train.labels[sample_id]


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_those_of_training(splits: DataSplits, workers: int) -> None:
    """Also while training goes on: they have workers of their own."""
    training = loader(splits, RESIZED, workers=workers).train(4, view_epoch=1)
    first = next(training)
    positions = np.array([int(np.flatnonzero(splits.train.sample_ids == i)[0]) for i in first.sample_ids.tolist()])
    (shown,) = loader(splits, RESIZED, workers=workers).views([(positions, 1)])
    assert_same([shown], [first])
    (other,) = loader(splits, RESIZED, workers=workers).views([(positions, 4)])
    assert not torch.equal(other.images, first.images)
    assert torch.equal(other.sample_ids, first.sample_ids)
    next(training)


@pytest.mark.parametrize("eval_resize", [16, 20, 33])
def test_evaluation_pixels_are_torchvisions(splits: DataSplits, eval_resize: int) -> None:
    assert isinstance(splits.val, ImageFiles)
    batches = list(loader(splits, Augmentation(eval_resize=eval_resize)).evaluate("val"))
    images = torch.cat([batch.images for batch in batches])
    for image, path in zip(images, splits.val.paths, strict=True):
        expected = TF.center_crop(TF.resize(Image.open(path), [eval_resize]), [SIZE])
        assert torch.equal(levels(image, splits), TF.pil_to_tensor(expected))


@pytest.mark.parametrize(("squash", "resize"), [(False, [20]), (True, [20, 20])])
def test_bicubic_and_squashed_pixels_are_torchvisions(splits: DataSplits, squash: bool, resize: list[int]) -> None:
    """As the published configuration of a network may ask for."""
    bicubic = TF.InterpolationMode.BICUBIC
    asked = replace(splits, interpolation="bicubic", eval_resize=20, squash=squash)
    assert isinstance(splits.val, ImageFiles) and isinstance(splits.train, ImageFiles)
    shown = loader(asked, Augmentation(crop="resized"))
    assert shown.pixels["resize"] == f"pillow {PIL.__version__.partition('.')[0]}, bicubic, antialiased"
    images = torch.cat([batch.images for batch in shown.evaluate("val")])
    for image, path in zip(images, splits.val.paths, strict=True):
        expected = TF.center_crop(TF.resize(Image.open(path), resize, bicubic), [SIZE])
        assert torch.equal(levels(image, splits), TF.pil_to_tensor(expected))
    batch = next(shown.train(0))
    views = view_parameters(Augmentation(crop="resized"), seed=3, epoch=0, sample_ids=batch.sample_ids.numpy())
    for i, sample_id in enumerate(batch.sample_ids.tolist()):
        image = Image.open(splits.train.paths[sample_id])
        window = views.crop_box(i, image.height, image.width)
        expected = TF.resized_crop(image, *window, size=[SIZE, SIZE], interpolation=bicubic)
        assert torch.equal(levels(batch.images[i], splits), TF.pil_to_tensor(expected))


def test_a_resize_that_is_set_wins_over_the_data_sets(splits: DataSplits) -> None:
    asked = replace(splits, eval_resize=18, squash=True)
    set_to_20, own, theirs = (
        next(loader(data, augmentation).evaluate("val")).images
        for data, augmentation in (
            (asked, Augmentation(eval_resize=20)),
            (splits, Augmentation(eval_resize=20)),
            (asked, Augmentation()),
        )
    )
    assert torch.equal(set_to_20, own)
    assert not torch.equal(theirs, own)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_evaluation_takes_every_sample_once_in_order(splits: DataSplits, world_size: int) -> None:
    batches = [
        batch
        for rank in range(world_size)
        for batch in loader(splits, rank=rank, world_size=world_size).evaluate("val")
    ]
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(11))
    assert torch.cat([batch.labels for batch in batches]).tolist() == splits.val.labels.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(splits: DataSplits, workers: int) -> None:
    alone, helped = loader(splits), loader(splits, workers=workers)
    for epoch in (0, 1):  # the second epoch reuses the workers
        assert_same(list(helped.train(epoch)), list(alone.train(epoch)))
    assert_same(list(helped.evaluate("test")), list(alone.evaluate("test")))


@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(2, 1), (1, 4), (2, 2)])
def test_a_step_has_the_same_pixels_for_any_division(
    splits: DataSplits, world_size: int, accumulation_steps: int
) -> None:
    division = {"world_size": world_size, "accumulation_steps": accumulation_steps}
    ranks = [list(loader(splits, rank=rank, **division).train(1)) for rank in range(world_size)]
    for step, expected in enumerate(loader(splits).train(1)):
        parts = [
            ranks[rank][step * accumulation_steps + micro_step]
            for micro_step in range(accumulation_steps)
            for rank in range(world_size)
        ]
        assert_same([Batch(*map(torch.cat, zip(*(part[:3] for part in parts), strict=True)))], [expected])


def test_a_subset_keeps_ids_and_views(splits: DataSplits) -> None:
    def by_id(data: DataSplits, batch_size: int) -> dict[int, tuple[Tensor, Tensor]]:
        batches = loader(data, global_batch_size=batch_size).train(2)
        return {int(i): (image, label) for batch in batches for image, label, i in zip(*batch[:3], strict=True)}

    positions = np.array([20, 3, 17, 8, 22])
    subset = DataSplits(splits.train.select(positions), splits.val, splits.val, 3, None, splits.mean, splits.std, SIZE)
    whole, part = by_id(splits, 26), by_id(subset, 5)
    assert set(part) == set(positions.tolist())
    for i, (image, label) in part.items():
        assert torch.equal(image, whole[i][0])
        assert label == whole[i][1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_at_any_step_even_with_an_epoch_left_half_way(splits: DataSplits, workers: int) -> None:
    through = list(loader(splits, accumulation_steps=2).train(1))
    resuming = loader(splits, accumulation_steps=2, workers=workers)
    for start in (1, 3, 0, 2):
        resumed = resuming.train(1, start)
        if start < 3:
            assert_same([next(resumed)], through[2 * start : 2 * start + 1])  # the rest stays in the workers' queues
    assert_same(list(resuming.train(1, 1)), through[2:])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluates_in_the_middle_of_an_epoch(splits: DataSplits, workers: int) -> None:
    both = loader(splits, workers=workers)
    training = both.train(0)
    batches = [next(training)]
    evaluated = list(both.evaluate("val"))
    assert_same([*batches, *training], list(loader(splits).train(0)))
    assert_same(evaluated, list(loader(splits).evaluate("val")))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_numbers_are_left_alone(splits: DataSplits, workers: int) -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    built = loader(splits, workers=workers)
    for epoch in range(2):
        list(built.train(epoch))
    list(built.evaluate("val"))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), numpy_state, strict=True))  # noqa: NPY002
    assert random.getstate() == python_state


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    root = write_images(tmp_path, {"train": 3, "val": 3})
    path = root / "train" / "class_0" / ("000.png" if mode != "CMYK" else "000.jpg")
    (root / "train" / "class_0" / "000.png").unlink()
    Image.new("RGB", (30, 30), (255, 255, 255)).convert(mode).save(path)
    folder = load_image_folder(root, SIZE)
    images = {
        int(i): image for b in loader(folder, global_batch_size=3).train(0) for image, _, i in zip(*b[:3], strict=True)
    }
    assert levels(images[0], folder).min() >= 250


@crops
def test_agrees_with_the_device_loader_at_the_final_size(tmp_path: Path, augmentation: Augmentation) -> None:
    files = load_image_folder(write_images(tmp_path, {"train": 9, "val": 6}, fixed_size=SIZE), SIZE)

    def in_memory(split: object) -> TensorImages:
        assert isinstance(split, ImageFiles)
        images = torch.stack([TF.pil_to_tensor(Image.open(path)) for path in split.paths])
        return TensorImages(images, split.labels)

    val = in_memory(files.val)
    tensors = DataSplits(in_memory(files.train), val, val, 3, None, files.mean, files.std, SIZE)
    same_size = replace(augmentation, flip_probability=0.5, eval_resize=SIZE)
    loaders = [loader(data, same_size, global_batch_size=3) for data in (files, tensors)]
    batches, expected = (list(one.train(1)) for one in loaders)
    if augmentation.crop == "resized":
        for batch, other in zip(batches, expected, strict=True):
            assert torch.equal(batch.sample_ids, other.sample_ids)
            difference = levels(batch.images, files).int() - levels(other.images, files).int()
            assert difference.abs().max() <= 1
    else:
        assert_same(batches, expected)
    assert_same(*(list(one.evaluate("val")) for one in loaders))


def test_layout_is_as_asked(splits: DataSplits) -> None:
    for channels_last in (False, True):
        batch = next(loader(splits, channels_last=channels_last).train(0))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.images.is_contiguous(memory_format=layout)
        assert batch.images.dtype == torch.float32


@crops
@pytest.mark.parametrize(
    ("versions", "library"),
    [({"libjpeg_turbo": "3.1.0", "jpg": "6.2"}, "libjpeg-turbo 3.1.0"), ({"jpg": "9.5"}, "libjpeg 9.5")],
    ids=["turbo", "plain"],
)
def test_says_who_makes_the_pixels(
    splits: DataSplits,
    augmentation: Augmentation,
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    library: str,
) -> None:
    monkeypatch.setattr("PIL.features.version", versions.get)
    monkeypatch.setattr("PIL.__version__", "12.3.4")
    said = loader(splits, augmentation).pixels
    assert said == {"decoder": f"pillow, {library}", "resize": "pillow 12, bilinear, antialiased"}
