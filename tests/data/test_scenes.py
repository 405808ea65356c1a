"""Splits of images with boxes, and the generated ones."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from unikd_fast.data.detection.scenes import BoxedImages, DetectionSplits
from unikd_fast.data.detection.sets import open_scenes
from unikd_fast.data.detection.toy_scenes import CATEGORY_IDS, load_toy_scenes
from unikd_fast.data.sets import open_data
from unikd_fast.data.settings import DataSettings


@pytest.fixture(scope="module")
def toy() -> DetectionSplits:
    return load_toy_scenes(200)


def split_of(boxes: list[list[float]], crowd: list[bool], offsets: list[int]) -> BoxedImages:
    """Images of 20 x 10 pixels."""
    count = len(offsets) - 1
    return BoxedImages(
        images=[torch.full((3, 10, 20), i, dtype=torch.uint8) for i in range(count)],
        sizes=np.tile((10, 20), (count, 1)),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        labels=np.arange(len(boxes)) % 2,
        is_crowd=np.array(crowd, np.bool_),
        areas=np.arange(len(boxes), dtype=np.float64),
        offsets=np.array(offsets),
        ids=np.arange(count),
        image_ids=100 + np.arange(count),
    )


def test_a_selection_takes_boxes_and_ids_along(toy: DetectionSplits) -> None:
    positions = np.array([20, 3, 3, 150, 0])
    part = toy.train.select(positions)
    assert part.ids.tolist() == positions.tolist()
    assert part.image_ids.tolist() == (positions + 1).tolist()
    for i, position in enumerate(positions.tolist()):
        own, whole = part.rows(i), toy.train.rows(position)
        assert torch.equal(part.images[i], toy.train.images[position])  # type: ignore[arg-type]
        assert part.sizes[i].tolist() == toy.train.sizes[position].tolist()
        for name in ("boxes", "labels", "is_crowd", "areas"):
            assert np.array_equal(getattr(part, name)[own], getattr(toy.train, name)[whole])
    assert len(toy.train.select(np.array([], np.int64)).boxes) == 0
    again = part.select(np.array([3]))
    assert again.ids.tolist() == [150]


def test_boxes_to_train_on_have_an_area_in_the_image() -> None:
    boxes = [[0, 0, 20, 10], [5, 5, 5, 9], [8, 3, 6, 4], [20, 0, 25, 5], [-5, -5, 0, 3], [-5, -5, 1, 1], [1, 1, 2, 2]]
    split = split_of(boxes, [False] * 6 + [True], [0, 3, 3, 7])
    assert split.image_of.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert split.has_area.tolist() == [True, False, False, False, False, True, True]
    assert split.is_trainable.tolist() == [True, False, False, False, False, True, False]


def test_ground_truth_is_cocos(toy: DetectionSplits) -> None:
    truth = toy.ground_truth("val")
    assert [image["id"] for image in truth["images"]] == toy.val.image_ids.tolist()
    assert len({each["id"] for each in truth["annotations"]}) == len(toy.val.boxes)
    assert min(each["id"] for each in truth["annotations"]) == 1  # to pycocotools 0 is no match
    for row, (each, image) in enumerate(zip(truth["annotations"], toy.val.image_of.tolist(), strict=True)):
        x, y, width, height = each["bbox"]
        assert np.allclose((x, y, x + width, y + height), toy.val.boxes[row], rtol=0, atol=1e-12)
        assert each["image_id"] == toy.val.image_ids[image]
        assert each["category_id"] == CATEGORY_IDS[toy.val.labels[row]]
        assert (each["area"], each["iscrowd"]) == (toy.val.areas[row], toy.val.is_crowd[row])
    assert truth["categories"] == [
        {"id": 1, "name": "disc"},
        {"id": 3, "name": "square"},
        {"id": 7, "name": "triangle"},
        {"id": 90, "name": "cross"},
    ]


def test_toy_scenes_depend_on_seed_and_place_alone(toy: DetectionSplits) -> None:
    few, other = load_toy_scenes(20), load_toy_scenes(20, seed=1)
    for part in ("train", "val", "test"):
        whole, some = getattr(toy, part), getattr(few, part)
        expected = whole.select(np.arange(len(some)))
        assert np.array_equal(some.boxes, expected.boxes)
        assert all(map(torch.equal, some.images, expected.images))
        assert not np.array_equal(some.boxes[:5], getattr(other, part).boxes[:5])
    assert not np.array_equal(toy.val.boxes[:5], toy.train.boxes[:5])
    assert (len(few.train), len(few.val), len(few.test)) == (20, 6, 6)


def test_toy_scenes_have_what_published_sets_have(toy: DetectionSplits) -> None:
    counts = np.diff(toy.train.offsets)
    assert (counts == 0).sum() >= 5 and counts.max() >= 5
    assert 10 <= toy.train.is_crowd.sum() <= 40
    assert np.bincount(toy.train.labels).min() >= 100
    assert 0.3 < toy.train.is_portrait.mean() < 0.7
    assert len(np.unique(toy.train.sizes, axis=0)) > 100
    assert toy.train.sizes.min() >= 64 and toy.train.sizes.max() <= 120
    boxes, sizes = toy.train.boxes, toy.train.sizes[toy.train.image_of]
    assert toy.train.has_area.all()
    assert boxes.min() >= 0 and (boxes[:, 2:] <= sizes[:, ::-1]).all()


def test_toy_boxes_frame_their_shapes(toy: DetectionSplits) -> None:
    """The pixels inside a box differ from those around it, on each side."""
    plain = replace(toy, train=toy.train.select(np.flatnonzero(np.diff(toy.train.offsets) == 1)))
    differences = []
    for i, image in enumerate(plain.train.images):
        (x1, y1, x2, y2) = plain.train.boxes[plain.train.rows(i)][0].round().astype(int)
        assert isinstance(image, torch.Tensor)
        levels = image.double()
        around = levels[:, max(0, y1 - 3) : y2 + 3, max(0, x1 - 3) : x2 + 3].clone()
        inside = levels[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].mean((1, 2))
        around = (around.sum((1, 2)) - levels[:, y1:y2, x1:x2].sum((1, 2))) / (
            around[0].numel() - (y2 - y1) * (x2 - x1)
        )
        differences.append((inside - around).abs().mean())
    assert len(differences) > 10
    assert min(differences) > 15


def test_images_without_boxes_are_left_out_of_training(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "unikd_fast"):
        splits = open_scenes(DataSettings(name="toy_scenes", synthetic_samples=40))
    whole = load_toy_scenes(40)
    empty = [i for i in range(40) if not whole.train.is_trainable[whole.train.rows(i)].any()]
    assert empty
    assert splits.train.ids.tolist() == [i for i in range(40) if i not in empty]
    named = ", ".join(f"image {i + 1}" for i in empty)
    assert f"{len(empty)} of 40 training images are left out, they have no box to train on: {named}" in caplog.text
    assert len(splits.val) == len(whole.val)


def test_a_subset_is_part_of_larger_ones() -> None:
    def ids(count: int | None, seed: int = 0) -> list[int]:
        data = DataSettings(name="toy_scenes", synthetic_samples=60, train_samples=count)
        splits = open_scenes(replace(data, seed=seed) if seed else data)
        return splits.train.ids.tolist()

    assert len(ids(10)) == 10
    assert ids(10) == sorted(ids(10))
    assert set(ids(10)) < set(ids(25)) < set(ids(None))
    with pytest.raises(ValueError, match=r"train_samples is 61, and \d+ training images have boxes; lower it to \d+"):
        ids(61)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="toy_scenes has 4 classes, got num_classes 80; set it to 4"):
        open_scenes(DataSettings(name="toy_scenes", num_classes=80))
    with pytest.raises(ValueError, match="toy_scenes has a val split, got val_samples 5; set it to 0"):
        open_scenes(DataSettings(name="toy_scenes", val_samples=5))
    with pytest.raises(ValueError, match=r"digits has no boxes, and the task is detection; set data\.name to coco"):
        open_scenes(DataSettings(name="digits"))
    with pytest.raises(
        ValueError, match="images of toy_scenes have boxes and no label, and the task is classification"
    ):
        open_data(DataSettings(name="toy_scenes"))
    with pytest.raises(ValueError, match="images without labels go with image_folder and imagenet; set it to null"):
        open_scenes(DataSettings(name="toy_scenes", unlabeled_root="."))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        load_toy_scenes(0)


def test_splits_that_cannot_be_used_are_refused() -> None:
    good = split_of([[0, 0, 5, 5], [1, 1, 4, 4]], [False, False], [0, 2])
    crowd, empty = replace(good, is_crowd=np.array([True, True])), split_of([], [], [0])
    names, ids = ("a", "b"), np.array([4, 9])
    with pytest.raises(ValueError, match="no training image has a box"):
        DetectionSplits(empty, good, good, names, ids)
    with pytest.raises(ValueError, match=r"val has 1 images and no box to be found \(around crowds it has 2\)"):
        DetectionSplits(good, crowd, good, names, ids)
    with pytest.raises(ValueError, match="test has 0 images and no box"):
        DetectionSplits(good, good, empty, names, ids)
    with pytest.raises(ValueError, match="labels of train must be below the number of classes, 1, got 1"):
        DetectionSplits(good, good, good, ("a",), ids[:1])
    with pytest.raises(ValueError, match=r"offsets must have shape \(2,\), got \(3,\)"):
        replace(good, offsets=np.array([0, 1, 2]))
    assert DetectionSplits(good, good, good, names, ids).test_is_val


def crops(split: BoxedImages, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the objects (n, 3, side, side), and their classes."""
    found = []
    for row, i in enumerate(split.image_of.tolist()):
        if not split.is_crowd[row]:
            x1, y1, x2, y2 = split.boxes[row].round().astype(int)
            image = split.images[i]
            assert isinstance(image, torch.Tensor)
            part = image[:, y1:y2, x1:x2][None].double()
            found.append(torch.nn.functional.interpolate(part, (side, side), mode="area")[0])
    return torch.stack(found), torch.from_numpy(split.labels[~split.is_crowd])


def test_toy_classes_are_told_by_shape_and_not_by_colour(toy: DetectionSplits) -> None:
    """By the nearest class mean."""

    def accuracy(features: Callable[[torch.Tensor], torch.Tensor]) -> float:
        (known, labels), (shown, expected) = crops(toy.train), crops(toy.val)
        known, shown = (features(images).flatten(1) for images in (known, shown))
        means = torch.stack([known[labels == k].mean(0) for k in range(4)])
        return (torch.cdist(shown, means).argmin(1) == expected).double().mean().item()

    def shape(images: torch.Tensor) -> torch.Tensor:
        difference = (images - images[:, :, 5:7, 5:7].mean((2, 3), keepdim=True)).abs().mean(1)
        return difference / difference.amax((1, 2), keepdim=True)

    assert accuracy(shape) > 0.8
    assert accuracy(lambda images: images[:, :, 5:7, 5:7].mean((2, 3))) < 0.4  # a quarter by chance
