"""The loader of data in memory: same samples and pixels however the work is divided, resumed at any step."""

import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from support.loaders import build_loader
from unikd_fast.data.augmentation import Augmentation, view_parameters
from unikd_fast.data.device import DeviceLoader
from unikd_fast.data.loader import Loader
from unikd_fast.data.splits import DataSplits, TensorImages
from unikd_fast.values import Batch

SIZE = 12
CROPS = [
    Augmentation(flip_probability=0.5),
    Augmentation(crop="pad", padding=3, flip_probability=0.5),
    Augmentation(crop="resized", flip_probability=0.5),
]
crops = pytest.mark.parametrize("augmentation", CROPS, ids=lambda a: a.crop)


def split(count: int, seed: int) -> TensorImages:
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.integers(0, 256, (count, 3, SIZE, SIZE), np.uint8))
    return TensorImages(images, generator.integers(0, 5, count))


@pytest.fixture(scope="module")
def splits() -> DataSplits:
    parts = split(53, 0), split(11, 1), split(7, 2)
    return DataSplits(*parts, 5, None, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), SIZE)


def loader(splits: DataSplits, augmentation: Augmentation = CROPS[1], **changes: int | bool) -> Loader:
    arguments = {"seed": 3, "global_batch_size": 24, **changes}
    return build_loader(splits, augmentation=augmentation, device="cpu", **arguments)  # type: ignore[arg-type]


def by_id(batches: Iterable[Batch]) -> dict[int, tuple[torch.Tensor, int]]:
    """Map each id to its pixels and label; an id may come once."""
    found: dict[int, tuple[torch.Tensor, int]] = {}
    for images, labels, sample_ids, _ in batches:
        for image, label, sample_id in zip(images, labels.tolist(), sample_ids.tolist(), strict=True):
            assert sample_id not in found
            found[sample_id] = image, label
    return found


def assert_same(batches: Iterable[Batch], expected: Iterable[Batch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        for part, other_part in zip(batch[:3], other[:3], strict=True):
            assert torch.equal(part, other_part)


def denormalised(images: torch.Tensor, splits: DataSplits) -> torch.Tensor:
    """Return grey levels; fails if they are not whole, as they would be after an interpolation of normalised pixels."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (splits.mean, splits.std))
    levels = (images * std + mean) * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    return levels.round().to(torch.uint8)


@crops
def test_pixels_are_torchvisions_under_the_views_of_the_samples(splits: DataSplits, augmentation: Augmentation) -> None:
    assert isinstance(splits.train, TensorImages)
    batch = next(loader(splits, augmentation).train(epoch=4, stream=2))
    views = view_parameters(augmentation, seed=3, epoch=4, sample_ids=batch.sample_ids.numpy(), stream=2)
    levels = denormalised(batch.images, splits)
    assert views.flip.any()
    for i, sample_id in enumerate(batch.sample_ids.tolist()):
        image = TF.pad(splits.train.images[sample_id], [augmentation.padding or 0])
        image = TF.resized_crop(image, *views.crop_box(i, SIZE, SIZE), size=[SIZE, SIZE], antialias=True)
        image = TF.hflip(image) if views.flip[i] else image
        tolerance = 1 if augmentation.crop == "resized" else 0
        assert (levels[i].int() - image.int()).abs().max() <= tolerance
        assert batch.labels[i] == splits.train.labels[sample_id]


@crops
@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(2, 1), (3, 1), (4, 1), (1, 4), (2, 3), (4, 2)])
def test_a_step_has_the_same_pixels_for_any_division(
    splits: DataSplits, augmentation: Augmentation, world_size: int, accumulation_steps: int
) -> None:
    whole = list(loader(splits, augmentation).train(epoch=1))
    ranks = [
        list(
            loader(splits, augmentation, rank=rank, world_size=world_size, accumulation_steps=accumulation_steps).train(
                epoch=1
            )
        )
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        parts = [
            ranks[rank][step * accumulation_steps + micro_step]
            for micro_step in range(accumulation_steps)
            for rank in range(world_size)
        ]
        assert_same([Batch(*map(torch.cat, zip(*(part[:3] for part in parts), strict=True)))], [expected])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_id_exactly_once_per_epoch(splits: DataSplits, world_size: int) -> None:
    batches = [
        batch
        for rank in range(world_size)
        for batch in loader(splits, rank=rank, world_size=world_size, global_batch_size=12).train(epoch=0)
    ]
    assert len(by_id(batches)) == 48  # of 53; the incomplete batch is dropped


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 4), epoch=st.integers(0, 3), accumulation_steps=st.sampled_from([1, 2, 3]))
def test_resumes_at_any_step(splits: DataSplits, start: int, epoch: int, accumulation_steps: int) -> None:
    through = list(loader(splits, global_batch_size=12, accumulation_steps=accumulation_steps).train(epoch))
    resumed = loader(splits, global_batch_size=12, accumulation_steps=accumulation_steps).train(epoch, start)
    assert_same(resumed, through[start * accumulation_steps :])


def test_a_sample_looks_the_same_in_any_batch_size_and_subset(splits: DataSplits) -> None:
    whole = by_id(loader(splits, global_batch_size=53).train(epoch=2))
    positions = np.array([50, 3, 17, 8, 22, 41])
    subset = DataSplits(splits.train.select(positions), splits.val, splits.val, 5, None, splits.mean, splits.std, SIZE)
    part = by_id(loader(subset, global_batch_size=3).train(epoch=2))
    assert set(part) == set(positions.tolist())
    for sample_id, (image, label) in part.items():
        assert torch.equal(image, whole[sample_id][0])
        assert label == whole[sample_id][1]


@pytest.mark.parametrize("other", [{"epoch": 1}, {"stream": 1}], ids=str)
def test_epochs_and_streams_show_other_views(splits: DataSplits, other: dict[str, int]) -> None:
    first = by_id(loader(splits, global_batch_size=53).train(epoch=0))
    second = by_id(loader(splits, global_batch_size=53).train(**{"epoch": 0, **other}))
    assert sum(torch.equal(first[i][0], second[i][0]) for i in first) < 10


def test_streams_share_the_order(splits: DataSplits) -> None:
    for batch, other in zip(loader(splits).train(0), loader(splits).train(0, stream=1), strict=True):
        assert torch.equal(batch.sample_ids, other.sample_ids)


def test_the_views_of_another_epoch_in_the_order_of_this_one(splits: DataSplits) -> None:
    shown = list(loader(splits, global_batch_size=53).train(5, view_epoch=2))
    assert torch.equal(shown[0].sample_ids, next(loader(splits, global_batch_size=53).train(5)).sample_ids)
    expected = by_id(loader(splits, global_batch_size=53).train(2))
    for sample_id, (image, _) in by_id(shown).items():
        assert torch.equal(image, expected[sample_id][0])


def test_views_are_those_of_training(splits: DataSplits) -> None:
    """Whatever is asked for together: other sizes, other orders, several epochs."""
    requests = [(np.array([7, 3]), 2), (np.arange(53), 0), (np.array([52, 0, 7]), 2)]
    batches = list(loader(splits).views(requests))
    for (positions, epoch), batch in zip(requests, batches, strict=True):
        expected = by_id(loader(splits, global_batch_size=53).train(epoch))
        assert batch.sample_ids.tolist() == splits.train.sample_ids[positions].tolist()
        for i, sample_id in enumerate(batch.sample_ids.tolist()):
            assert torch.equal(batch.images[i], expected[sample_id][0])
            assert batch.labels[i] == expected[sample_id][1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 24])
@pytest.mark.parametrize("name", ["val", "test"])
def test_evaluation_takes_every_sample_once_in_order(splits: DataSplits, world_size: int, name: str) -> None:
    held_out = splits.val if name == "val" else splits.test
    assert isinstance(held_out, TensorImages)
    batches = [
        batch
        for rank in range(world_size)
        for batch in loader(splits, rank=rank, world_size=world_size).evaluate(name)  # type: ignore[arg-type]
    ]
    assert torch.cat([batch.sample_ids for batch in batches]).tolist() == list(range(len(held_out)))
    assert torch.cat([batch.labels for batch in batches]).tolist() == held_out.labels.tolist()
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(denormalised(images, splits), held_out.images)
    assert max(len(batch.labels) for batch in batches) <= 24 // world_size


def test_a_rank_may_have_nothing_to_evaluate(splits: DataSplits) -> None:
    counts = [len(list(loader(splits, rank=rank, world_size=24).evaluate("test"))) for rank in range(24)]
    assert 0 in counts
    assert sum(counts) == 7


def test_batches_are_ready_for_the_network(splits: DataSplits) -> None:
    for channels_last in (False, True):
        batch = next(loader(splits, channels_last=channels_last).train(0))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.images.is_contiguous(memory_format=layout)
        assert (batch.images.dtype, batch.labels.dtype, batch.sample_ids.dtype) == (
            torch.float32,
            torch.int64,
            torch.int64,
        )
    assert_same(loader(splits, channels_last=True).train(0), loader(splits).train(0))


def test_the_data_set_is_not_changed_by_use(splits: DataSplits) -> None:
    assert isinstance(splits.train, TensorImages)
    before = splits.train.images.clone()
    for batch in loader(splits).train(0):
        batch.images.zero_()
    assert torch.equal(splits.train.images, before)


@crops
def test_global_random_numbers_are_left_alone(splits: DataSplits, augmentation: Augmentation) -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    built = loader(splits, augmentation)
    list(built.train(0))
    list(built.evaluate("val"))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), numpy_state, strict=True))  # noqa: NPY002
    assert random.getstate() == python_state


@pytest.mark.parametrize("start_step", [-1, 3])
def test_refuses_a_start_outside_the_epoch_at_once(splits: DataSplits, start_step: int) -> None:
    with pytest.raises(ValueError, match=rf"start_step must be in \[0, 2\], got {start_step}"):
        loader(splits).train(0, start_step)


def test_refuses_impossible_divisions(splits: DataSplits) -> None:
    with pytest.raises(ValueError, match="does not divide into world_size 5"):
        loader(splits, world_size=5)
    with pytest.raises(ValueError, match="53 samples do not fill one global batch of 64"):
        loader(splits, global_batch_size=64)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        loader(splits, world_size=2, rank=2)


def test_refuses_images_of_another_size(splits: DataSplits) -> None:
    wrong = DataSplits(splits.train, splits.val, splits.test, 5, None, splits.mean, splits.std, 16)
    with pytest.raises(ValueError, match=r"16 pixels high and wide.* got \(12, 12\)"):
        loader(wrong)


@crops
def test_says_who_makes_the_pixels(
    splits: DataSplits, augmentation: Augmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = loader(splits, augmentation).pixels
    ours = "unikd_fast, separable antialiased bilinear, version 1"
    assert said == {"decoder": "none, uint8 tensors", "resize": ours if augmentation.crop == "resized" else "none"}
    monkeypatch.setattr("unikd_fast.data.device.RESIZE_VERSION", 2)
    assert (loader(splits, augmentation).pixels == said) == (augmentation.crop != "resized")


@crops
@pytest.mark.parametrize("second", [None, Augmentation(crop="resized", scale=(0.3, 0.9))])
def test_plans_hold_all_that_differs_between_batches(
    splits: DataSplits, augmentation: Augmentation, second: Augmentation | None
) -> None:
    """A batch made from a plan is that of `train`, to the bit."""
    own = build_loader(splits, augmentation=augmentation, second=second, seed=3, global_batch_size=24, device="cpu")
    assert isinstance(own, DeviceLoader)
    assert own.unplanned is None
    for start in (0, 1):
        plans, batches = list(own.plans(5, start)), list(own.train(5, start))
        assert len(plans) == len(batches) == 2 - start
        for plan, batch in zip(plans, batches, strict=True):
            made = own.batch_of(plan)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(made[:3], batch[:3], strict=True))
            assert (made.second is None) == (second is None)
            assert made.second is None or (batch.second is not None and torch.equal(made.second, batch.second))


def test_says_whose_views_cannot_be_planned(splits: DataSplits) -> None:
    strong = Augmentation(policy="trivial")
    for first, second, said in ((strong, None, "of the views"), (CROPS[1], strong, "of the second views")):
        own = build_loader(splits, augmentation=first, second=second, seed=3, global_batch_size=24, device="cpu")
        assert isinstance(own, DeviceLoader)
        assert own.unplanned is not None and said in own.unplanned


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@crops
def test_the_gpu_makes_the_pixels_of_the_cpu(splits: DataSplits, augmentation: Augmentation) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    on_gpu = build_loader(splits, augmentation=augmentation, seed=3, global_batch_size=24, device="cuda")
    for batch, expected in zip(on_gpu.train(0), loader(splits, augmentation).train(0), strict=True):
        assert batch.images.is_cuda
        difference = (batch.images.cpu() - expected.images).abs() * torch.tensor(splits.std).view(3, 1, 1) * 255
        assert difference.max() < (1.01 if augmentation.crop == "resized" else 0.01)
        assert torch.equal(batch.sample_ids.cpu(), expected.sample_ids)
