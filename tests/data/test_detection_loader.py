"""The loader of images with boxes: a pure function of (seed, epoch, step), whose boxes follow the pixels."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.scene_loaders import assert_same, by_sample, scene_loader
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.detection.scenes import BoxedImages, DetectionSplits
from unikd_fast.data.detection.sets import open_scenes
from unikd_fast.data.detection.toy_scenes import load_toy_scenes
from unikd_fast.data.detection.views import DetectionSettings, resized
from unikd_fast.data.mixing import Mixing
from unikd_fast.data.settings import DataSettings
from unikd_fast.values import DetectionBatch


@pytest.fixture(scope="module")
def splits() -> DetectionSplits:
    return open_scenes(DataSettings(name="toy_scenes", synthetic_samples=60))


JITTERED = {
    "detection": DetectionSettings(scale_jitter=(0.5, 2.0)),
    "augmentation": Augmentation(jitter=(0.4, 0.4, 0.4, 0.1)),
}
kinds = pytest.mark.parametrize("options", [{}, JITTERED], ids=["usual", "jittered"])


def levels(images: Tensor, splits: DetectionSplits) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (splits.mean, splits.std))
    return (images * std + mean) * 255


@kinds
def test_batches_are_a_function_of_epoch_and_step(splits: DetectionSplits, options: dict) -> None:
    first, second = scene_loader(splits, **options), scene_loader(splits, **options)
    list(second.train(4))
    assert_same(second.train(1), first.train(1))
    through = list(first.train(1))
    for start in (1, 3, first.steps_per_epoch):
        assert_same(second.train(1, start), through[start:])
    one, two = by_sample(through), by_sample(first.train(2))
    assert (
        sum(one[i][0].shape != two[i][0].shape or not torch.equal(one[i][0], two[i][0]) for i in one if i in two) > 20
    )


@kinds
@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(2, 1), (1, 4), (2, 2)])
def test_a_step_is_the_same_for_any_division(
    splits: DetectionSplits, options: dict, world_size: int, accumulation_steps: int
) -> None:
    """Up to the padding, which is that of the images of a micro-batch."""
    division = {"world_size": world_size, "accumulation_steps": accumulation_steps}
    ranks = [list(scene_loader(splits, rank=rank, **division, **options).train(1)) for rank in range(world_size)]
    whole = list(scene_loader(splits, **options).train(1))
    assert len(ranks[0]) == len(whole) * accumulation_steps
    for step, expected in enumerate(whole):
        parts = [
            ranks[rank][step * accumulation_steps + micro_step]
            for micro_step in range(accumulation_steps)
            for rank in range(world_size)
        ]
        assert torch.cat([part.sample_ids for part in parts]).tolist() == expected.sample_ids.tolist()
        own, others = by_sample(parts), by_sample([expected])
        for sample, values in own.items():
            assert all(map(torch.equal, values, others[sample]))


def test_a_view_does_not_depend_on_the_batch_or_the_subset(splits: DetectionSplits) -> None:
    subset = replace(splits, train=splits.train.select(np.array([20, 3, 17, 8, 22])))
    whole = by_sample(scene_loader(splits, global_batch_size=len(splits.train)).train(2))
    part = by_sample(scene_loader(subset, global_batch_size=5).train(2))
    assert len(part) == 5
    for sample, values in part.items():
        assert all(map(torch.equal, values, whole[sample]))


def test_seed_and_stream_give_other_views(splits: DetectionSplits) -> None:
    """And a stream gives them of the same samples."""
    base, seeded = (list(scene_loader(splits, seed=seed).train(0)) for seed in (3, 4))
    streamed = list(scene_loader(splits).train(0, stream=1))
    assert [b.sample_ids.tolist() for b in base] == [b.sample_ids.tolist() for b in streamed]
    assert [b.sample_ids.tolist() for b in base] != [b.sample_ids.tolist() for b in seeded]
    one, two = by_sample(base), by_sample(streamed)
    assert sum(one[i][0].shape != two[i][0].shape for i in one) > 20  # of 56, two thirds of which draw another size
    flips = (scene_loader(splits, augmentation=Augmentation(flip_probability=p)).train(0, stream=1) for p in (0.0, 1.0))
    for plain, flipped in zip(*flips, strict=True):
        assert torch.equal(plain.sizes, flipped.sizes)


def test_batches_are_of_one_shape_padded_and_zero_beyond(splits: DetectionSplits) -> None:
    mixed = 0
    for batch in scene_loader(splits).train(0):
        height, width = batch.images.shape[2:]
        assert height % 32 == width % 32 == 0
        assert (batch.sizes.amax(0) > torch.tensor([height - 32, width - 32])).all()
        portrait = batch.sizes[:, 0] > batch.sizes[:, 1]
        mixed += bool(portrait.any()) and not bool(portrait.all())
        for image, (high, wide) in zip(batch.images, batch.sizes.tolist(), strict=True):
            assert not image[:, high:].any() and not image[:, :, wide:].any()
            assert image[:, high - 1].any() and image[:, :, wide - 1].any()
    assert mixed <= 1


def test_short_side_flip_and_crowds_are_as_asked(splits: DetectionSplits) -> None:
    batches = [batch for epoch in range(6) for batch in scene_loader(splits).train(epoch)]
    shorts = torch.cat([batch.sizes.amin(1) for batch in batches])
    drawn, counts = shorts.unique(return_counts=True)
    assert drawn.tolist() == [64, 72, 80]
    assert counts.min() > 0.2 * counts.sum()  # a third each, of more than 300
    for sample, (_, boxes, labels) in by_sample(batches).items():
        (position,) = np.flatnonzero(splits.train.ids == sample)
        rows = splits.train.rows(position)
        kept = ~splits.train.is_crowd[rows]
        assert labels.tolist() == splits.train.labels[rows][kept].tolist()
        assert boxes.dtype == torch.float32 and labels.dtype == torch.int64
    flips = [
        torch.equal(flipped[0], plain[0].flip(2))
        for flipped, plain in zip(
            by_sample(scene_loader(splits, augmentation=Augmentation(flip_probability=1.0)).train(0)).values(),
            by_sample(scene_loader(splits, augmentation=Augmentation(flip_probability=0.0)).train(0)).values(),
            strict=True,
        )
    ]
    assert all(flips)


def bright_rectangles(sizes: Sequence[tuple[int, int]]) -> DetectionSplits:
    """One white rectangle on black in each image."""
    generator = np.random.default_rng(0)
    images, boxes = [], []
    for height, width in sizes:
        x1, y1 = generator.integers(0, width - 30), generator.integers(0, height - 30)
        x2, y2 = x1 + generator.integers(20, width - x1 + 1), y1 + generator.integers(20, height - y1 + 1)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[:, y1:y2, x1:x2] = 255
        images.append(image)
        boxes.append((x1, y1, x2, y2))
    count = len(images)
    split = BoxedImages(
        images=images,
        sizes=np.array(sizes),
        boxes=np.array(boxes, np.float64),
        labels=np.zeros(count, np.int64),
        is_crowd=np.zeros(count, np.bool_),
        areas=np.ones(count),
        offsets=np.arange(count + 1),
        ids=np.arange(count),
        image_ids=np.arange(count),
    )
    return DetectionSplits(split, split, split, ("rectangle",), np.array([1]))


def framed(image: Tensor, splits: DetectionSplits) -> Tensor:
    """Return the frame of what is brighter than half, where pixels are partly covered by their share."""
    shown = levels(image, splits).mean(0) / 255
    rows, columns = shown.amax(1), shown.amax(0)
    found = []
    for line in (columns, rows):
        bright = (line > 0.5).nonzero().flatten()
        found.append((bright.min().item(), bright.max().item() + 1))
    (x1, x2), (y1, y2) = found
    return torch.tensor([x1, y1, x2, y2], dtype=torch.float64)


SIZES = [(70, 101), (97, 64), (80, 80), (64, 128), (200, 41), (55, 73), (119, 90), (60, 95)]


@pytest.mark.parametrize("jitter", [(1.0, 1.0), (0.4, 0.8), (1.3, 2.5)], ids=["whole", "smaller", "parts"])
def test_boxes_follow_the_pixels(jitter: tuple[float, float]) -> None:
    splits = bright_rectangles(SIZES)
    loader = scene_loader(splits, detection=DetectionSettings(scale_jitter=jitter))
    seen, empty = 0, 0
    for batch in [batch for epoch in range(5) for batch in loader.train(epoch)] + list(loader.evaluate("val")):
        for image, boxes, (height, width) in zip(batch.images, batch.boxes, batch.sizes.tolist(), strict=True):
            inside = image[:, :height, :width]
            if not len(boxes):
                assert levels(inside, splits).max() < 128
                empty += 1
                continue
            x1, y1, x2, y2 = boxes[0].tolist()
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            if min(x2 - x1, y2 - y1) > 2:
                assert (framed(inside, splits) - boxes[0]).abs().max() <= 1
                seen += 1
    assert seen >= 30
    assert empty == 0 or jitter[0] > 1


def test_evaluation_is_one_image_a_batch_in_order(splits: DetectionSplits) -> None:
    alone = list(scene_loader(splits).evaluate("val"))
    assert [batch.sample_ids.tolist() for batch in alone] == [[i] for i in range(len(splits.val))]
    for batch, (height, width) in zip(alone, splits.val.sizes.tolist(), strict=True):
        assert batch.sizes.tolist() == [list(resized(height, width, 80, 128))]
        assert batch.images.shape[2:] == tuple(-(-side // 32) * 32 for side in batch.sizes[0].tolist())
    for world_size in (2, 5):
        ranks = [scene_loader(splits, global_batch_size=10, rank=r, world_size=world_size) for r in range(world_size)]
        assert_same([batch for rank in ranks for batch in rank.evaluate("val")], alone)


def test_evaluated_boxes_are_scaled_by_the_real_ratio(splits: DetectionSplits) -> None:
    for i, batch in enumerate(scene_loader(splits).evaluate("test")):
        rows = splits.test.rows(i)
        boxes = splits.test.boxes[rows][~splits.test.is_crowd[rows]]
        height, width = splits.test.sizes[i]
        high, wide = batch.sizes[0].tolist()
        scale = np.array((wide / width, high / height) * 2)
        assert np.allclose(batch.boxes[0], boxes * scale, rtol=1e-6)


def test_a_newer_epoch_ends_the_older_and_evaluation_does_not(splits: DetectionSplits) -> None:
    loader = scene_loader(splits)
    training = loader.train(0)
    batches = [next(training)]
    evaluated = list(loader.evaluate("val"))
    assert_same([*batches, *training], scene_loader(splits).train(0))
    assert len(evaluated) == len(splits.val)
    older, newer = loader.train(0), loader.train(1)
    next(newer)
    with pytest.raises(RuntimeError, match="ended when a newer call of train"):
        next(older)


def test_global_random_numbers_are_left_alone(splits: DetectionSplits) -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    loader = scene_loader(splits, **JITTERED)
    list(loader.train(0))
    list(loader.evaluate("val"))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), numpy_state, strict=True))  # noqa: NPY002
    assert random.getstate() == python_state


def test_colours_change_and_boxes_do_not(splits: DetectionSplits) -> None:
    plain = by_sample(scene_loader(splits).train(0))
    jittered = by_sample(scene_loader(splits, augmentation=Augmentation(jitter=(0.4, 0.4, 0.4, 0.1))).train(0))
    assert plain.keys() == jittered.keys()
    changed = 0
    for sample, (image, boxes, _) in plain.items():
        assert torch.equal(boxes, jittered[sample][1])
        assert image.shape == jittered[sample][0].shape
        changed += not torch.equal(image, jittered[sample][0])
    assert changed == len(plain)


def test_views_are_those_of_the_settings(splits: DetectionSplits) -> None:
    detection = DetectionSettings(short_sides=(48,), long_side=56, eval_short_side=40)
    loader = scene_loader(splits, detection=detection)
    sizes = torch.cat([batch.sizes for batch in loader.train(0)])
    assert sizes.amax() == 56 and sizes.amin(1).amax() == 48
    assert (sizes.amin(1) == 48).logical_or(sizes.amax(1) == 56).all()
    assert max(batch.sizes.amin().item() for batch in loader.evaluate("val")) == 40
    usual = DetectionSettings().for_data("coco")
    assert (usual.short_sides, usual.long_side) == ((640, 672, 704, 736, 768, 800), 1333)
    assert usual.eval_short_side == 800
    assert DetectionSettings(short_sides=(500, 300)).for_data("voc").eval_short_side == 500


def test_what_does_not_move_boxes_is_refused(splits: DetectionSplits) -> None:
    refused: dict[str, dict[str, Any]] = {
        "augmentation.crop": {"augmentation": Augmentation(crop="pad")},
        "augmentation.policy": {"augmentation": Augmentation(policy="trivial")},
        "augmentation.eval_resize": {"augmentation": Augmentation(eval_resize=64)},
        "mixing": {"mixing": Mixing(mixup_alpha=0.2)},
        "second_view": {"second_view": Augmentation()},
    }
    for key, options in refused.items():
        with pytest.raises(ValueError, match=rf"data\.{key} cannot be used with toy_scenes, whose images have boxes"):
            scene_loader(splits, **options)
    with pytest.raises(ValueError, match="56 samples do not fill one global batch of 64"):
        scene_loader(splits, global_batch_size=64)
    with pytest.raises(ValueError, match="short_sides is empty"):
        DetectionSettings(short_sides=())
    with pytest.raises(ValueError, match=r"scale_jitter must be an ascending range.*got \(2.0, 1.0\)"):
        DetectionSettings(scale_jitter=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"start_step must be in \[0, 7\], got 8"):
        scene_loader(splits).train(0, 8)


def test_layout_is_as_asked(splits: DetectionSplits) -> None:
    for channels_last in (False, True):
        batch = next(scene_loader(splits, channels_last=channels_last).train(0))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.images.is_contiguous(memory_format=layout)
        assert isinstance(batch, DetectionBatch) and batch.images.dtype == torch.float32


def test_the_smallest_set_fills_a_batch() -> None:
    """Also where the shapes of its images would not fill one each."""
    few = load_toy_scenes(8)
    train = few.train.select(np.flatnonzero(np.bincount(few.train.image_of[few.train.is_trainable], minlength=8)))
    assert 0 < train.is_portrait.sum() < len(train)
    (batch,) = scene_loader(replace(few, train=train), global_batch_size=len(train)).train(0)
    assert len(batch.images) == len(train)
