"""Data sets by name, and the digits, whose split must never move."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as load_greys

from unikd_fast.data.sets import open_data
from unikd_fast.data.settings import DataSettings
from unikd_fast.data.splits import DataSplits, ImageFiles, TensorImages


def digits(image_size: int = 8) -> tuple[DataSplits, list[TensorImages]]:
    splits = open_data(DataSettings(name="digits", image_size=image_size))
    parts = [part for part in (splits.train, splits.val, splits.test) if isinstance(part, TensorImages)]
    return splits, parts


def test_digits_are_split_once_and_for_all() -> None:
    _, parts = digits()
    assert [len(part) for part in parts] == [1000, 297, 500]
    # Labels in order identify the split; another one would let a student be tested on its teacher's training images.
    labels = np.concatenate([part.labels for part in parts]).astype("<i8")
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == "ac0eb9dc8cda3f4b"


def test_digits_are_disjoint_complete_and_stratified() -> None:
    _, parts = digits()
    greys, targets = load_greys(return_X_y=True)
    expected = sorted(
        (row.tobytes(), label) for row, label in zip(np.rint(greys * 255 / 16).astype(np.uint8), targets, strict=True)
    )
    found = sorted(
        (image.tobytes(), label)
        for part in parts
        for image, label in zip(part.images[:, 0].numpy(), part.labels, strict=True)
    )
    assert found == expected
    shares = np.bincount(targets) / len(targets)
    for part in parts:
        assert np.abs(np.bincount(part.labels) - shares * len(part)).max() <= 2


def test_digits_are_grey_enlarged_and_learnable() -> None:
    splits, (train, val, _) = digits(16)
    assert train.images.shape == (1000, 3, 16, 16)
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    assert train.images.max() > 200
    small = digits(8)[1][0].images[:, 0].float()
    enlarged = Image.fromarray(small[5].numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(enlarged) - train.images[5, 0].numpy()).max() <= 1
    levels = train.images.double() / 255
    assert splits.mean == pytest.approx([levels.mean().item()] * 3)
    assert splits.std == pytest.approx([levels.std(correction=0).item()] * 3)
    held_out = digits(8)[1][1].images[:, 0].float()
    means = torch.stack([small[torch.from_numpy(train.labels == k)].mean(0) for k in range(10)])
    nearest = torch.cdist(held_out.flatten(1), means.flatten(1)).argmin(1).numpy()
    assert (nearest == val.labels).mean() > 0.85


def test_digits_refuse_to_shrink() -> None:
    with pytest.raises(ValueError, match="at least the 8 pixels of the originals, got 7"):
        open_data(DataSettings(name="digits", image_size=7))


def test_train_samples_is_a_balanced_subset_with_its_ids() -> None:
    whole = open_data(DataSettings(name="digits", image_size=8))
    few = open_data(DataSettings(name="digits", image_size=8, train_samples=50, seed=1))
    assert isinstance(whole.train, TensorImages)
    assert isinstance(few.train, TensorImages)
    assert np.bincount(few.train.labels).tolist() == [5] * 10
    ids = few.train.sample_ids
    assert torch.equal(few.train.images, whole.train.images[torch.from_numpy(ids)])
    assert np.array_equal(few.train.labels, whole.train.labels[ids])
    assert (few.mean, few.std, len(few.test)) == (whole.mean, whole.std, len(whole.test))
    other = open_data(DataSettings(name="digits", image_size=8, train_samples=50, seed=2))
    assert not np.array_equal(ids, other.train.sample_ids)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (9, 8)).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("name", ["image_folder", "imagenet"])
def test_image_folders_open_by_both_names(folder: Path, name: str) -> None:
    splits = open_data(DataSettings(name=name, root=str(folder), image_size=8, num_classes=2, train_samples=2))
    assert isinstance(splits.train, ImageFiles)
    assert splits.train.labels.tolist() == [0, 1]
    whole = open_data(DataSettings(name=name, root=str(folder), image_size=8)).train
    assert isinstance(whole, ImageFiles)
    assert list(splits.train.paths) == [whole.paths[i] for i in splits.train.sample_ids]


def test_synthetic_takes_its_numbers() -> None:
    splits = open_data(DataSettings(name="synthetic", image_size=12, num_classes=7, synthetic_samples=28, seed=3))
    assert (splits.num_classes, len(splits.train), splits.image_size) == (7, 28, 12)
    assert open_data(DataSettings(name="synthetic", image_size=12)).num_classes == 10


def test_refuses_arguments_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match="digits has 10 classes, got num_classes 100; set it to 10"):
        open_data(DataSettings(name="digits", image_size=8, num_classes=100))
    with pytest.raises(ValueError, match=r"val_samples is for cifar100 and image_folder, imagenet .* got 5"):
        open_data(DataSettings(name="imagenet", root=str(folder), image_size=8, val_samples=5))
    with pytest.raises(ValueError, match=r"data set must be one of .* got 'mnist'"):
        open_data(DataSettings(name="mnist", image_size=8))
    with pytest.raises(FileNotFoundError, match="gone"):
        open_data(DataSettings(name="imagenet", root=str(folder / "gone"), image_size=8))
    for part in ("train", "test", "meta"):
        (folder / "cifar-100-python").mkdir(exist_ok=True)
        (folder / "cifar-100-python" / part).touch()
    with pytest.raises(ValueError, match="images of cifar100 have 32 pixels, got image_size 224"):
        open_data(DataSettings(name="cifar100", root=str(folder), image_size=224))


def test_splits_check_their_arrays() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"2 images need 2 labels, got an array of shape \(3,\)"):
        TensorImages(images, np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"uint8, got .* torch\.float32"):
        TensorImages(images.float(), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"2 images need 2 ids, got an array of shape \(1,\)"):
        ImageFiles(["a", "b"], np.zeros(2, np.int64), np.zeros(1, np.int64))


def test_ids_survive_repeated_selection() -> None:
    files = ImageFiles([str(i) for i in range(9)], np.arange(9)).select(np.array([8, 3, 5])).select(np.array([2, 0]))
    assert files.sample_ids.tolist() == [5, 8]
    assert list(files.paths) == ["5", "8"]
