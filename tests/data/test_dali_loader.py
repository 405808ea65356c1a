"""The loader that decodes with DALI: the PIL loader's samples, windows and, within a level, pixels."""

import random
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("nvidia.dali")

from support.dali_loaders import CROPS, RESIZED, SHORT, SIZE, assert_close, assert_same, by_id, crops, levels, make
from unikd_fast.data import dali, dali_views
from unikd_fast.data.augmentation import Augmentation, view_parameters
from unikd_fast.data.splits import DataSplits
from unikd_fast.data.views import ViewWindow, strong_view
from unikd_fast.values import Batch, Interpolation


@crops
def test_agrees_with_the_pil_loader(splits: DataSplits, augmentation: Augmentation) -> None:
    ours, theirs = make(splits, augmentation), make(splits, augmentation, kind="torchvision", workers=2)
    assert_close(list(ours.train(2, stream=1)), list(theirs.train(2, stream=1)), splits)
    assert_close(list(ours.train(2, 5, view_epoch=1)), list(theirs.train(2, 5, view_epoch=1)), splits)


@pytest.mark.parametrize("eval_resize", [SIZE, SHORT, 301])
def test_evaluation_agrees_with_the_pil_loader(splits: DataSplits, eval_resize: int) -> None:
    ours, theirs = (
        make(splits, Augmentation(eval_resize=eval_resize), kind=kind, workers=2) for kind in ("dali", "torchvision")
    )
    batches = list(ours.evaluate("val"))
    assert [len(batch.labels) for batch in batches] == [40, 21]
    assert_close(batches, list(theirs.evaluate("val")), splits)


@pytest.mark.parametrize("squash", [False, True])
def test_bicubic_views_agree_with_the_pil_loader(splits: DataSplits, squash: bool) -> None:
    """Bicubic overshoots at edges and is clipped after each direction. PIL takes the other direction first where a tall
    image becomes wide: one pixel in 20,000 of these is more than 2 levels off. Bilinear would be off by 0.9 on average.
    """
    asked = replace(splits, interpolation="bicubic", eval_resize=SHORT, squash=squash)
    ours, theirs = (make(asked, Augmentation(crop="resized"), kind=kind) for kind in ("dali", "torchvision"))
    assert "bicubic" in ours.pixels["resize"]
    evaluation, training = ([ours.evaluate("val"), theirs.evaluate("val")], [ours.train(0), theirs.train(0)])
    for batches, others in (evaluation, [islice(iterator, 2) for iterator in training]):
        images, expected = (
            torch.cat([levels(batch.images, splits) for batch in loaded]).int() for loaded in (batches, others)
        )
        difference = (images - expected).abs().float()
        assert difference.mean() <= 0.03
        assert (difference > 2).float().mean() <= 1e-4


def test_second_views_agree_with_the_pil_loader(splits: DataSplits) -> None:
    second = CROPS[1]
    ours, theirs = (make(splits, RESIZED, second=second, kind=kind, workers=2) for kind in ("dali", "torchvision"))
    assert_close(list(ours.train(1)), list(theirs.train(1)), splits)


def test_strong_views_are_made_of_the_same_pixels(splits: DataSplits) -> None:
    strong = Augmentation(crop="resized", flip_probability=0.5, policy="trivial", erase_probability=0.5)
    batch, weak = (next(make(splits, augmentation).train(0)) for augmentation in (strong, RESIZED))
    numbers = view_parameters(strong, seed=3, epoch=0, sample_ids=batch.sample_ids.numpy())
    for i, (image, weak_image) in enumerate(zip(batch.images, weak.images, strict=True)):
        assert torch.equal(levels(image, splits), strong_view(levels(weak_image, splits), numbers, i))


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 2), (5, 2), (2, 1), (2, 7)])
def test_threads_and_prefetch_change_nothing(
    splits: DataSplits, monkeypatch: pytest.MonkeyPatch, threads: int, prefetch: int
) -> None:
    expected = [[*make(splits).train(1)], [*make(splits).evaluate("test")]]
    monkeypatch.setattr(dali, "PREFETCH", prefetch)
    other = make(splits, dali_threads=threads)
    assert_same(list(other.train(1)), expected[0])
    assert_same(list(other.evaluate("test")), expected[1])


@crops
@pytest.mark.parametrize("batch_size", [1, 7, 240])
def test_pixels_do_not_depend_on_the_batch(splits: DataSplits, augmentation: Augmentation, batch_size: int) -> None:
    few = DataSplits(
        splits.train if batch_size > 1 else splits.train.select(np.arange(0, 240, 9)),
        *(splits.val, splits.val, 3, None, splits.mean, splits.std, SIZE),
    )
    expected = by_id(list(make(splits, augmentation, global_batch_size=240).train(4)))
    shown = by_id(list(make(few, augmentation, global_batch_size=batch_size).train(4)))
    assert len(shown) == len(few.train) // batch_size * batch_size
    assert all(torch.equal(image, expected[i]) for i, image in shown.items())


@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(2, 1), (1, 4), (2, 2)])
def test_a_step_has_the_same_pixels_for_any_division(
    splits: DataSplits, world_size: int, accumulation_steps: int
) -> None:
    division = {"world_size": world_size, "accumulation_steps": accumulation_steps}
    ranks = [list(make(splits, rank=rank, **division).train(1)) for rank in range(world_size)]
    for step, expected in enumerate(make(splits).train(1)):
        parts = [
            ranks[rank][step * accumulation_steps + micro_step]
            for micro_step in range(accumulation_steps)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert torch.equal(torch.cat([part.sample_ids for part in parts]), expected.sample_ids)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_evaluation_takes_every_sample_once_in_order(splits: DataSplits, world_size: int) -> None:
    few = DataSplits(
        splits.train,
        *(splits.val.select(np.arange(5)), splits.val.select(np.arange(50)), 3),
        *(None, splits.mean, splits.std, SIZE),
    )
    for split, count in (("val", 5), ("test", 50)):
        ranks = [list(make(few, rank=rank, world_size=world_size).evaluate(split)) for rank in range(world_size)]  # type: ignore[arg-type]
        assert torch.cat([batch.sample_ids for batches in ranks for batch in batches]).tolist() == list(range(count))
        assert all(ranks) != (world_size == 8 and split == "val")  # 5 samples do not reach 8 ranks


def test_resumes_at_any_step(splits: DataSplits) -> None:
    through = list(make(splits, accumulation_steps=2).train(1))
    resuming = make(splits, accumulation_steps=2)
    for start in (1, 5, 0, 3):
        assert_same([next(resuming.train(1, start))], through[2 * start : 2 * start + 1])
    assert_same(list(resuming.train(1, 4)), through[8:])
    assert list(resuming.train(1, 6)) == []
    with pytest.raises(ValueError, match=r"start_step must be in \[0, 6\], got 7"):
        resuming.train(1, 7)


def test_iterators_do_not_disturb_each_other(splits: DataSplits) -> None:
    one = make(splits)
    first, second, evaluation = one.train(0), one.train(1), one.evaluate("val")
    batches = [[next(iterator) for iterator in (first, second, evaluation)] for _ in range(2)]
    rest = [list(first), list(second), list(evaluation)]
    expected = [list(make(splits).train(0)), list(make(splits).train(1)), list(make(splits).evaluate("val"))]
    for i in range(3):
        assert_same([batch[i] for batch in batches] + rest[i], expected[i])


def test_views_are_those_of_training_in_batches_of_any_size(splits: DataSplits) -> None:
    expected = by_id(list(make(splits).train(4, view_epoch=1)))
    positions = np.array(list(expected))
    sizes = (3, 1, 50, 2, 100)
    starts = np.cumsum((0, *sizes))
    requests = [(positions[start : start + size], 1) for start, size in zip(starts, sizes, strict=False)]
    shown = list(make(splits).views(iter(requests)))
    assert [batch.sample_ids.tolist() for batch in shown] == [rows.tolist() for rows, _ in requests]
    assert all(torch.equal(image, expected[i]) for i, image in by_id(shown).items())


def test_batches_are_the_callers_to_keep(splits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI's memory is under none of them, neither while its pipeline goes on nor after it ended."""
    monkeypatch.setattr(dali, "PREFETCH", 3)
    kept, copies = [], []
    for batch in make(splits).train(0):
        kept.append(batch)
        copies.append(Batch(*(None if part is None else part.clone() for part in batch)))
    assert_same(kept, copies)


def test_layout_is_as_asked(splits: DataSplits) -> None:
    for channels_last in (False, True):
        batch = next(make(splits, channels_last=channels_last).train(0))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.images.is_contiguous(memory_format=layout)
        assert batch.images.dtype == torch.float32
        assert torch.equal(batch.images, next(make(splits).train(0)).images)


def test_global_random_numbers_are_left_alone(splits: DataSplits) -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    list(make(splits).train(0))
    list(make(splits).evaluate("val"))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), numpy_state, strict=True))  # noqa: NPY002
    assert random.getstate() == python_state


def test_the_loaders_threads_leave_the_cores_to_the_training(
    splits: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch runs no team of OpenMP's in them, and this thread keeps its own."""
    found: list[int] = []
    whole = dali_views.cut_view

    def noting(image: Tensor, window: ViewWindow, image_size: int, interpolation: Interpolation) -> Tensor:
        found.append(torch.get_num_threads())
        return whole(image, window, image_size, interpolation)

    monkeypatch.setattr(dali_views, "cut_view", noting)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(make(splits).train(0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(found) == {1}
