"""Training images without labels: after the others, each with an id of its own, and the same from every loader."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.folder_images import RESIZED, SIZE, write_images
from support.loaders import build_loader
from unikd_fast.data.dali import dali_problem
from unikd_fast.data.loader import Loader
from unikd_fast.data.mixing import Mixing
from unikd_fast.data.pack import pack_folder
from unikd_fast.data.roots import check_root, check_unlabeled_root
from unikd_fast.data.sets import open_data
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.settings import DataSettings
from unikd_fast.data.splits import DataSplits, ImageFiles, hash_split
from unikd_fast.values import NO_LABEL

LABELLED, WITHOUT = 9, 14
LOADERS = ["torchvision", pytest.param("dali", marks=pytest.mark.skipif(bool(dali_problem()), reason="no DALI"))]


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listed(splits: DataSplits, root: Path) -> list[str]:
    assert isinstance(splits.train, ImageFiles)
    return [str(Path(path).relative_to(root)) for path in splits.train.paths]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in train/<class>, val/<class> and unlabeled/<any folder>."""
    return write_images(tmp_path_factory.mktemp("set"), {"train": LABELLED, "val": 5, "unlabeled": WITHOUT})


def opened(root: Path, **changes: Any) -> DataSplits:
    given = {"unlabeled_root": str(root / "unlabeled"), **changes}
    return open_data(DataSettings(name="image_folder", root=str(root), image_size=SIZE, **given))


def loader(splits: DataSplits, **changes: Any) -> Loader:
    shared = {"kind": "torchvision", "augmentation": RESIZED, "seed": 3, "global_batch_size": 6, "workers": 0}
    return build_loader(splits, device="cpu", **{**shared, **changes})


def test_they_come_after_the_others_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/1.png", "train/a/2.png", "val/a/3.png", "val/b/4.png")
    touch(tmp_path, "more/z.jpg", "more/2024/deep/y.png", "more/2024/x.png", "more/notes.txt")
    splits = load_image_folder(tmp_path, 8, unlabelled=tmp_path / "more")
    files = ["train/a/2.png", "train/b/1.png", "more/z.jpg", "more/2024/x.png", "more/2024/deep/y.png"]
    assert listed(splits, tmp_path) == files
    assert splits.train.labels.tolist() == [0, 1, NO_LABEL, NO_LABEL, NO_LABEL]
    assert splits.train.sample_ids.tolist() == [0, 1, 2, 3, 4]
    assert (splits.unlabelled, splits.num_classes, splits.val.labels.tolist()) == (3, 2, [0, 1])


def test_a_train_with_images_and_no_folders_has_no_labels(tmp_path: Path) -> None:
    touch(tmp_path, "train/2.png", "train/1.jpg", "train/.cache/0.png", "val/a/3.png", "val/b/4.png")
    splits = load_image_folder(tmp_path, 8)
    assert listed(splits, tmp_path) == ["train/1.jpg", "train/2.png"]
    assert (splits.unlabelled, splits.class_names, splits.num_classes) == (2, ("a", "b"), 2)
    with pytest.raises(ValueError, match="train has no class folders, and a store needs a label"):
        pack_folder(tmp_path, tmp_path / "store")


@pytest.mark.parametrize("where", ["train", "elsewhere"])
def test_no_train_is_needed_beside_them(tmp_path: Path, where: str) -> None:
    """The folder may be train itself; its sub-folders are then not classes."""
    touch(tmp_path, f"{where}/monday/1.png", f"{where}/tuesday/2.png", "val/a/3.png", "val/b/4.png")
    splits = opened(tmp_path, unlabeled_root=str(tmp_path / where))
    assert listed(splits, tmp_path) == [f"{where}/monday/1.png", f"{where}/tuesday/2.png"]
    assert (splits.unlabelled, splits.class_names) == (2, ("a", "b"))
    if where == "train":
        with pytest.raises(
            ValueError, match=r"folders of images without labels: set data.unlabeled_root to .*/train\)"
        ):
            load_image_folder(tmp_path, 8)


def test_held_out_images_keep_their_ids(tmp_path: Path) -> None:
    """A folder among class folders is not a class, and its ids follow those of all labelled images."""
    names = [f"{name}/{i}.png" for name in ("a", "b") for i in range(5)]
    touch(tmp_path, *names, "unlabeled/c/x.png", "unlabeled/y.png")
    splits = load_image_folder(tmp_path, 8, val_samples=4, unlabelled=tmp_path / "unlabeled")
    alone = load_image_folder(touch(tmp_path / "alone", *names), 8, val_samples=4)
    assert splits.class_names == ("a", "b")
    assert splits.val.sample_ids.tolist() == alone.val.sample_ids.tolist()
    assert splits.train.sample_ids.tolist() == [*alone.train.sample_ids.tolist(), 10, 11]


def test_a_subset_is_of_those_with_a_label(root: Path) -> None:
    whole, some = opened(root), opened(root, train_samples=6)
    assert np.bincount(some.train.labels[:6]).tolist() == [2, 2, 2]
    assert some.train.sample_ids[6:].tolist() == list(range(LABELLED, LABELLED + WITHOUT))
    assert (len(whole.train), len(some.train), some.unlabelled) == (23, 20, WITHOUT)
    alone = open_data(DataSettings(name="image_folder", root=str(root), image_size=SIZE, train_samples=6))
    assert some.train.sample_ids[:6].tolist() == alone.train.sample_ids.tolist()


def test_they_are_part_of_the_hash_wherever_they_lie(tmp_path: Path) -> None:
    names = ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    hashes = []
    for place in ("one", "two"):
        touch(tmp_path / place, *names)
        touch(tmp_path / place / ("far/off" if place == "two" else "."), "more/5.png")
        more = tmp_path / place / ("far/off/more" if place == "two" else "more")
        hashes.append(hash_split(load_image_folder(tmp_path / place, 8, unlabelled=more).train))
    assert hashes[0] == hashes[1]
    without = hash_split(load_image_folder(tmp_path / "one", 8).train)
    touch(tmp_path / "one", "more/6.png")
    further = hash_split(load_image_folder(tmp_path / "one", 8, unlabelled=tmp_path / "one" / "more").train)
    assert len({without, hashes[0], further}) == 3


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("val", r"those in .*/val are partly the same; put them into a folder beside it \(data.unlabeled_root\)"),
        (".", "those in .*/val are partly the same"),
        ("val/a", "those in .*/val are partly the same"),
        ("train/a", "those in .*/train are partly the same"),
        ("empty", r"/empty holds no images; put images .* or set data.unlabeled_root to null"),
        ("absent", r"data.unlabeled_root = .*/absent is missing; give a folder of images, or null"),
        ("val/a/3.png", "3.png is not a folder"),
    ],
)
def test_folders_that_cannot_be_it_are_refused(tmp_path: Path, place: str, said: str) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        opened(tmp_path, unlabeled_root=str(tmp_path / place))


def test_other_data_sets_and_unset_variables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data.name = 'digits': images without labels go with image_folder"):
        open_data(DataSettings(name="digits", image_size=8, unlabeled_root=str(tmp_path)))
    monkeypatch.delenv("MORE", raising=False)
    with pytest.raises(ValueError, match=r"data.unlabeled_root is '\$\{MORE\}/x' and MORE is not set; .*export MORE="):
        check_unlabeled_root("imagenet", "${MORE}/x")
    monkeypatch.setenv("MORE", str(tmp_path))
    assert check_unlabeled_root("imagenet", "${MORE}") == tmp_path
    (tmp_path / "val").mkdir()
    assert check_root("imagenet", str(tmp_path), needs_train=False) == tmp_path


def test_a_subset_of_no_labels_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "val").symlink_to(root / "val")
    with pytest.raises(ValueError, match=r"no training image has one; got 4, set it to null"):
        opened(tmp_path, unlabeled_root=str(root / "unlabeled"), train_samples=4)


@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_shows_each_image_once(root: Path, kind: str) -> None:
    """Labelled or not, whoever decodes and however many processes share an epoch, under the views of its id."""
    splits = opened(root)
    labels = dict(zip(splits.train.sample_ids.tolist(), splits.train.labels.tolist(), strict=True))
    shown = {}
    for rank in range(2):
        for batch in loader(splits, kind=kind, global_batch_size=22, rank=rank, world_size=2).train(1):
            assert batch.labels.dtype == torch.int64
            shown |= dict(
                zip(batch.sample_ids.tolist(), zip(batch.labels.tolist(), batch.images, strict=True), strict=True)
            )
    assert len(shown) == 22 and all(labels[i] == label for i, (label, _) in shown.items())
    (whole,) = loader(splits, kind=kind, global_batch_size=23).train(1)
    assert sorted(whole.labels.tolist()) == sorted(labels.values())
    for i, image in zip(whole.sample_ids.tolist(), whole.images, strict=True):
        assert i not in shown or torch.equal(image, shown[i][1])


def test_without_any_label_only_images_are_mixed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "val").symlink_to(root / "val")
    splits = opened(tmp_path, unlabeled_root=str(root / "unlabeled"))
    plain, mixed = (
        list(loader(splits, mixing=Mixing(mixup_alpha=alpha)).train(0))  # type: ignore[arg-type]
        for alpha in (0.0, 1.0)
    )
    assert all((batch.labels == NO_LABEL).all() for batch in (*plain, *mixed))
    assert not any(torch.equal(one.images, other.images) for one, other in zip(plain, mixed, strict=True))
