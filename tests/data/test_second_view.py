"""Second views: of the same samples, with numbers of their own, in both loaders."""

from collections.abc import Callable

import pytest
import torch

from support.folder_images import SIZE, in_memory, loader, write_images
from unikd_fast.data.augmentation import SECOND_VIEWS, Augmentation
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits

WEAK = Augmentation(crop="pad", padding=2, flip_probability=0.5, eval_resize=SIZE)
STRONG = Augmentation(crop="resized", flip_probability=0.5, eval_resize=SIZE, policy="rand", erase_probability=0.5)
WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    root = write_images(tmp_path_factory.mktemp("images"), {"train": 26, "val": 6}, fixed_size=SIZE)
    return load_image_folder(root, SIZE)


kinds = pytest.mark.parametrize("kind", [lambda splits: splits, in_memory], ids=["files", "memory"])


@kinds
@pytest.mark.parametrize("workers", WORKERS)
def test_is_what_a_loader_of_its_own_would_show(
    files: DataSplits, kind: Callable[[DataSplits], DataSplits], workers: int
) -> None:
    """Under its own stream; the first view and the order are those of a loader without second views."""
    splits = kind(files)
    pairs = loader(splits, WEAK, second=STRONG, workers=workers).train(3, 1, stream=1, view_epoch=2)
    weak = loader(splits, WEAK).train(3, 1, stream=1, view_epoch=2)
    strong = loader(splits, STRONG).train(3, 1, stream=1 + SECOND_VIEWS, view_epoch=2)
    for pair, first, second in zip(pairs, weak, strong, strict=True):
        assert pair.second is not None
        assert torch.equal(pair.images, first.images)
        assert torch.equal(pair.second, second.images)
        assert torch.equal(pair.sample_ids, second.sample_ids)
        assert torch.equal(pair.labels, second.labels)


@kinds
def test_of_the_same_augmentation_shows_other_views(
    files: DataSplits, kind: Callable[[DataSplits], DataSplits]
) -> None:
    for batch in loader(kind(files), WEAK, second=WEAK).train(0):
        assert batch.second is not None
        same = sum(torch.equal(*both) for both in zip(batch.images, batch.second, strict=True))
        assert same <= 3  # of 8; 50 views of an image are equally likely


@kinds
@pytest.mark.parametrize("start", [0, 2, 3])
def test_resumes_at_any_step(files: DataSplits, kind: Callable[[DataSplits], DataSplits], start: int) -> None:
    through = list(loader(kind(files), WEAK, second=STRONG).train(1))
    resumed = list(loader(kind(files), WEAK, second=STRONG).train(1, start))
    assert len(resumed) == len(through) - start
    for batch, other in zip(resumed, through[start:], strict=True):
        assert batch.second is not None
        assert other.second is not None
        assert torch.equal(batch.second, other.second)


@kinds
def test_is_absent_unless_asked_for_and_where_nobody_trains(
    files: DataSplits, kind: Callable[[DataSplits], DataSplits]
) -> None:
    splits = kind(files)
    assert all(batch.second is None for batch in loader(splits, WEAK).train(0))
    pairs = loader(splits, WEAK, second=STRONG)
    assert all(batch.second is None for batch in pairs.evaluate("val"))
    first = next(pairs.train(0))
    (shown,) = pairs.views([(first.sample_ids.numpy(), 0)])
    assert shown.second is None
    assert torch.equal(shown.images, first.images)


def test_has_the_layout_of_the_first(files: DataSplits) -> None:
    for splits in (files, in_memory(files)):
        batch = next(loader(splits, WEAK, second=STRONG, channels_last=True).train(0))
        assert batch.second is not None
        assert batch.second.is_contiguous(memory_format=torch.channels_last)
        assert batch.second.dtype == torch.float32
