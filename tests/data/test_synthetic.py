"""Made-up images: cheap, reproducible, learnable."""

import time

import numpy as np
import pytest
import torch

from unikd_fast.data.sets.synthetic import load_synthetic
from unikd_fast.data.splits import TensorImages


def tensors(num_samples: int, num_classes: int, image_size: int, *, seed: int = 0) -> tuple[TensorImages, ...]:
    splits = load_synthetic(num_samples, num_classes, image_size, seed=seed)
    parts = splits.train, splits.val, splits.test
    assert all(isinstance(part, TensorImages) for part in parts)
    return parts  # type: ignore[return-value]


def test_splits_have_their_sizes_and_all_classes() -> None:
    train, val, test = tensors(200, 10, 32)
    assert [len(part) for part in (train, val, test)] == [200, 50, 50]
    for part in (train, val, test):
        assert set(np.bincount(part.labels)) == {len(part) // 10}


def test_nearest_class_mean_learns_them() -> None:
    train, val, _ = tensors(400, 10, 24)
    labels = torch.from_numpy(train.labels)
    means = torch.stack([train.images[labels == k].float().mean(0) for k in range(10)]).flatten(1)
    nearest = torch.cdist(val.images.float().flatten(1), means).argmin(1)
    assert (nearest.numpy() == val.labels).mean() > 0.95
    shuffled = means[torch.arange(10).roll(1)]
    assert (torch.cdist(val.images.float().flatten(1), shuffled).argmin(1).numpy() == val.labels).mean() < 0.05


def test_samples_differ_within_a_class_and_across_splits() -> None:
    train, val, test = tensors(20, 2, 16)
    firsts = [train.images[0], train.images[2], val.images[0], test.images[0]]
    for i, image in enumerate(firsts):
        for other in firsts[:i]:
            assert (image != other).float().mean() > 0.9


@pytest.mark.parametrize("image_size", [5, 32, 33])
def test_samples_depend_on_the_seed_but_not_on_their_number(image_size: int) -> None:
    few, many = tensors(8, 4, image_size)[0], tensors(300, 4, image_size)[0]
    assert torch.equal(few.images, many.images[:8])
    assert not torch.equal(few.images, tensors(8, 4, image_size, seed=1)[0].images)


def test_chunks_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tensors(20, 4, 16)[0].images
    monkeypatch.setattr("unikd_fast.data.sets.synthetic._CHUNK_BYTES", 7 * 3 * 16 * 16)
    assert torch.equal(tensors(20, 4, 16)[0].images, whole)


def test_many_classes_at_full_size_are_quick() -> None:
    start = time.process_time()
    train = tensors(256, 1000, 224)[0]
    assert time.process_time() - start < 1.5
    assert train.images.shape == (256, 3, 224, 224)


def test_pixels_use_the_range_and_match_the_normalisation() -> None:
    levels = tensors(100, 10, 32)[0].images.float() / 255
    assert levels.mean().item() == pytest.approx(0.5, abs=0.05)
    assert levels.std().item() == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_refuses_empty_sets(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        load_synthetic(*sizes)


def test_refuses_a_negative_seed() -> None:
    with pytest.raises(ValueError, match="seed must be in"):
        load_synthetic(1, 1, 1, seed=-1)
