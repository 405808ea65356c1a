"""Generated images in classes that are hard to tell apart."""

import numpy as np
import pytest
import torch

from unikd_fast.data.sets.fine_grained import CLASSES_PER_FAMILY, load_fine_grained


def test_samples_depend_on_the_seed_and_not_on_their_number() -> None:
    few, many, other = (load_fine_grained(n, 10, 16, seed=s) for n, s in ((30, 3), (60, 3), (30, 4)))
    assert torch.equal(few.train.images, many.train.images[:30])
    assert not torch.equal(few.train.images, other.train.images)
    assert not torch.equal(few.val.images, few.test.images)
    assert few.train.labels.tolist() == [i % 10 for i in range(30)]
    assert (len(many.train), len(many.val), len(many.test)) == (60, 20, 20)


def test_larger_images_show_the_same() -> None:
    small, large = (load_fine_grained(20, 10, size).train.images for size in (16, 48))
    assert torch.equal(large[:, :, ::3, ::3], small) and torch.equal(large[:, :, 2::3, 2::3], small)


def test_mean_and_deviation_are_those_of_the_images() -> None:
    splits = load_fine_grained(2000, 50, 16)
    values = splits.train.images.double() / 255
    assert abs(values.mean().item() - splits.mean[0]) < 0.02
    assert abs(values.std().item() / splits.std[0] - 1) < 0.05


def test_families_are_told_apart_more_easily_than_their_classes() -> None:
    """By the distances between the means of the classes."""
    splits = load_fine_grained(4000, 20, 16)
    images = splits.train.images.double().flatten(1)
    means = torch.stack([images[torch.from_numpy(splits.train.labels == k)].mean(0) for k in range(20)])
    distances = torch.cdist(means, means)
    family = torch.arange(20) // CLASSES_PER_FAMILY
    same = (family[:, None] == family) & ~torch.eye(20, dtype=torch.bool)
    assert distances[same].mean() < 0.75 * distances[family[:, None] != family].mean()
    # A class is not the nearest mean's for all of its samples: there is something to learn.
    nearest = torch.cdist(splits.test.images.double().flatten(1), means).argmin(1).numpy()
    accuracy = float(np.mean(nearest == splits.test.labels))
    assert 0.2 < accuracy < 0.95


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 10, 16), "num_samples must be a positive multiple of 1, got 0"),
        ((10, 12, 16), "num_classes must be a positive multiple of 5, got 12"),
        ((10, 10, 24), "image_size must be a positive multiple of 16, got 24"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: tuple[int, int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_fine_grained(*arguments)
