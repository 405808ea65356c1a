"""Epochs over bad files: errors that name them, or skipped, and replaced in one way whatever the workers."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.folder_images import RESIZED, SIZE, write_images
from support.loaders import build_loader
from support.odd_images import broken
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.images import BadImageTally, StoredImage, check_bad_share, read_rgb, stand_ins
from unikd_fast.data.loader import Loader
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits, ImageFiles
from unikd_fast.values import Batch

# Positions in the splits of 26 and 11.
BAD = {"train": [1, 8, 9, 17, 25], "val": [0, 4, 10]}
LENIENT: dict[str, Any] = {"bad_images": "skip", "max_bad_share": 0.5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    return load_image_folder(write_images(tmp_path_factory.mktemp("images"), {"train": 26, "val": 11}), SIZE)


@pytest.fixture
def damaged(whole: DataSplits, tmp_path: Path) -> DataSplits:
    """The same folder with five bad files in train and three in val, of one kind each."""
    assert isinstance(whole.train, ImageFiles)
    root = shutil.copytree(Path(whole.train.paths[0]).parents[2], tmp_path / "damaged")
    splits = load_image_folder(root, SIZE)
    contents = broken()
    kinds = ["empty", "text", "bomb", "jpeg without 50", "png zeros for 50"]
    for part, split in (("train", splits.train), ("val", splits.val)):
        assert isinstance(split, ImageFiles)
        for kind, position in zip(kinds, BAD[part], strict=False):
            Path(split.paths[position]).write_bytes(contents[kind])
    return splits


def make(splits: DataSplits, **changes: Any) -> Loader:
    shared = {"kind": "torchvision", "augmentation": RESIZED, "seed": 3, "global_batch_size": 8, "workers": 0}
    return build_loader(splits, device="cpu", **{**shared, **changes})


def names(splits: DataSplits, part: str) -> list[str]:
    split = splits.train if part == "train" else splits.val
    assert isinstance(split, ImageFiles)
    return [split.paths[i] for i in BAD[part]]


def replaced(batch: Batch) -> Batch:
    """What the bad samples' places must hold, from a batch in which all are good; written anew, one place at a time."""
    ids, taken = batch.sample_ids.tolist(), []
    for place in range(len(ids)):
        while ids[place % len(ids)] in BAD["train"]:
            place += 1
        taken.append(place % len(ids))
    return Batch(*(None if part is None else part[taken] for part in batch))


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        for part, other_part in zip(batch, other, strict=True):
            assert (part is None and other_part is None) or torch.equal(part, other_part)


@pytest.mark.parametrize(
    ("good", "expected"),
    [("11", [0, 1]), ("101", [0, 2, 2]), ("0010", [2, 2, 2, 2]), ("10010", [0, 3, 3, 3, 0]), ("01", [1, 1])],
)
def test_the_next_good_sample_stands_in(good: str, expected: list[int]) -> None:
    assert stand_ins(np.array([digit == "1" for digit in good])).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_file(damaged: DataSplits, workers: int) -> None:
    bad = names(damaged, "train")
    with pytest.raises(ValueError, match=r"cannot decode .*; repair the file or remove it") as raised:
        list(make(damaged, workers=workers).train(0))
    assert any(name in str(raised.value) for name in bad)
    with pytest.raises(ValueError, match=f"cannot decode {names(damaged, 'val')[0]}: the file is empty"):
        list(make(damaged, workers=workers).evaluate("val"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_samples_are_replaced_within_their_batch(
    whole: DataSplits, damaged: DataSplits, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    clean, lenient = make(whole), make(damaged, workers=workers, **LENIENT)
    read_ids: list[int] = []
    for epoch in (0, 1):
        expected = list(clean.train(epoch))
        assert_same(list(lenient.train(epoch)), [replaced(batch) for batch in expected])
        ids = [i for batch in expected for i in batch.sample_ids.tolist() if i in BAD["train"]]
        assert [image.sample_id for image in lenient.bad_samples] == ids
        read_ids += ids
    assert len(read_ids) > len(set(read_ids)) > 2
    assert isinstance(damaged.train, ImageFiles)
    paths = [damaged.train.paths[i] for i in dict.fromkeys(read_ids)]
    assert [image.name for image in lenient.bad_samples] == [damaged.train.paths[i] for i in ids]
    warned = [record for record in caplog.records if record.name == "unikd_fast"]
    assert all(record.levelno == logging.WARNING for record in warned)
    # Each file once, in the order they are met, although the epochs share some.
    assert len(warned) == len(paths)
    for record, path in zip(warned, paths, strict=True):
        assert f"training: skipped a sample: cannot decode {path}: " in record.getMessage()


def test_second_views_are_replaced_with_the_first(whole: DataSplits, damaged: DataSplits) -> None:
    other = Augmentation(crop="pad", padding=2, eval_resize=20)
    clean, lenient = make(whole, second=other), make(damaged, second=other, **LENIENT)
    expected = [replaced(batch) for batch in clean.train(0)]
    assert expected[0].second is not None
    assert_same(list(lenient.train(0)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_without_bad_samples(
    whole: DataSplits, damaged: DataSplits, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    clean, lenient = make(whole), make(damaged, workers=workers, **LENIENT)
    list(lenient.train(0))
    skipped = lenient.bad_samples
    for _ in range(2):
        caplog.clear()
        for batch, expected in zip(lenient.evaluate("val"), clean.evaluate("val"), strict=True):
            good = [i for i, sample in enumerate(expected.sample_ids.tolist()) if sample not in BAD["val"]]
            assert len(good) < len(expected.labels)
            assert_same([batch], [Batch(*(part[good] for part in expected[:3]))])
    assert [record.getMessage() for record in caplog.records] == ["val: evaluated without 3 of 11 samples"]
    assert lenient.bad_samples == skipped


def test_a_batch_of_bad_samples_is_skipped_in_evaluation_only(damaged: DataSplits, tmp_path: Path) -> None:
    assert isinstance(damaged.val, ImageFiles)
    for path in damaged.val.paths[:2]:
        Path(path).write_bytes(b"")
    ids = [batch.sample_ids.tolist() for batch in make(damaged, global_batch_size=2, **LENIENT).evaluate("val")]
    assert ids == [[2, 3], [5], [6, 7], [8, 9]]
    with pytest.raises(ValueError, match=r"none of the 1 images of a batch can be decoded.*; the first: cannot decode"):
        list(make(damaged, global_batch_size=1, **LENIENT).train(0))


def test_too_many_bad_samples_are_an_error(damaged: DataSplits) -> None:
    # 26 samples make 3 batches of 8; epoch 0 leaves two samples out.
    lenient = make(damaged, **LENIENT)
    list(lenient.train(0))
    count = len(lenient.bad_samples)
    assert 3 < count <= 5
    list(make(damaged, bad_images="skip", max_bad_share=count / 24).train(0))
    first = ", ".join(image.name for image in lenient.bad_samples[:3])
    share = rf"training: {count} of 24 samples cannot be decoded, a share of {count / 24:.3g}"
    with pytest.raises(ValueError, match=rf"{share}, and data\.max_bad_share allows .*: {first}, \.\.\.; repair"):
        list(make(damaged, bad_images="skip", max_bad_share=count / 24 - 0.001).train(0))
    with pytest.raises(ValueError, match=r"val: 3 of 11 samples cannot be decoded, a share of 0\.273, .*allows 0\.25"):
        list(make(damaged, bad_images="skip", max_bad_share=0.25).evaluate("val"))
    with pytest.raises(ValueError, match=r"training: 2 of 24 samples .* allows 0\.001"):
        list(make(damaged, bad_images="skip").train(0))


def test_the_share_is_of_the_samples_of_all_processes(damaged: DataSplits) -> None:
    """A process stops as soon as its own are too many for the whole epoch; the sum is for the engine to check."""
    counts = []
    for rank in range(2):
        half = make(damaged, rank=rank, world_size=2, bad_images="skip", max_bad_share=4 / 24)
        list(half.train(0))
        counts.append(len(half.bad_samples))
        assert half.schedule.samples_per_epoch == 24
    assert min(counts) > 0
    lenient = make(damaged, **LENIENT)
    list(lenient.train(0))
    assert sum(counts) == len(lenient.bad_samples)
    limit = (max(counts) - 0.5) / 24
    with pytest.raises(ValueError, match=f"training: {max(counts)} of 24 samples"):
        list(make(damaged, rank=int(np.argmax(counts)), world_size=2, bad_images="skip", max_bad_share=limit).train(0))


def test_counts_what_was_read_of_the_latest_epoch(damaged: DataSplits) -> None:
    lenient = make(damaged, **LENIENT)
    assert lenient.bad_samples == ()
    counts = [len(lenient.bad_samples) for _ in lenient.train(0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    training = lenient.train(0)
    assert lenient.bad_samples == ()
    next(training)
    assert len(lenient.bad_samples) == counts[0]
    list(lenient.evaluate("val"))
    assert len(lenient.bad_samples) == counts[0]


def test_nothing_stands_in_for_a_view_that_was_asked_for(damaged: DataSplits) -> None:
    lenient = make(damaged, **LENIENT)
    with pytest.raises(ValueError, match=f"cannot decode {names(damaged, 'train')[0]}"):
        list(lenient.views([(np.array([0, 1, 2]), 0)]))
    (batch,) = lenient.views([(np.array([0, 2]), 0)])
    assert batch.sample_ids.tolist() == [0, 2]


def test_files_that_changed_after_they_were_listed(damaged: DataSplits, whole: DataSplits) -> None:
    removed, folder, dangling, oneself, *_ = (Path(name) for name in names(damaged, "train"))
    for path in (removed, folder, dangling, oneself):
        path.unlink()
    folder.mkdir()
    dangling.symlink_to(dangling.with_name("gone.png"))
    oneself.symlink_to(oneself)
    words = {removed: "No such file", folder: "Is a directory", dangling: "No such file", oneself: "Too many levels"}
    for path, word in words.items():
        with pytest.raises(ValueError, match=f"cannot read {path}: {word}.*restore the file or remove it"):
            read_rgb(StoredImage(str(path)))
    assert_same(list(make(damaged, **LENIENT).train(0)), [replaced(batch) for batch in make(whole).train(0)])


def test_a_tally_logs_through_what_it_is_given(caplog: pytest.LogCaptureFixture) -> None:
    tally = BadImageTally("views", samples=0, max_share=1.0, logged=set())
    tally.add([])
    assert tally.images == ()
    assert not caplog.records
    check_bad_share(5, ["a"], "training", samples=5000, max_share=0.001)
    check_bad_share(29, ["a"], "training", samples=100, max_share=0.29)  # 0.29 * 100 is less than 29
    with pytest.raises(ValueError, match=r"6 of 5000 .* share of 0\.0012, .* allows 0\.001: a, b, \.\.\.; repair"):
        check_bad_share(6, ["a", "b"], "training", samples=5000, max_share=0.001)
