"""The hash of a training split: what changes it, and what must not."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from unikd_fast.data import splits
from unikd_fast.data.splits import ImageFiles, TensorImages, hash_split
from unikd_fast.errors import DataError

NAMES = ("fox/a.jpeg", "fox/b.jpeg", "wolf/a.jpeg", "wolf/c.jpeg")


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "_HASHED_BYTES", 500)
    monkeypatch.setattr(splits, "_FILES_AT_A_TIME", 3)


def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, 3, 8, 10), np.uint8))


def tensors(pixels: torch.Tensor, labels: int = 0, ids: np.ndarray | None = None) -> TensorImages:
    return TensorImages(pixels, np.full(len(pixels), labels), ids)


def files(root: Path, names: tuple[str, ...] = NAMES) -> ImageFiles:
    """Make files of 1, 2, ... bytes."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * (i + 1))
    return ImageFiles([str(root / name) for name in names], np.arange(len(names)))


@pytest.mark.parametrize("kind", ["images", "files"])
def test_ids_and_order_count_and_labels_do_not(tmp_path: Path, kind: str) -> None:
    split = tensors(images()) if kind == "images" else files(tmp_path)
    count = len(split)
    there, back = np.arange(count), np.arange(count)[::-1].copy()
    expected = hash_split(split)
    assert re.fullmatch("[0-9a-f]{64}", expected)
    assert hash_split(split.select(there)) == expected
    split.labels[:] += 1
    assert hash_split(split) == expected
    reversed_order = split.select(back)
    others = [split.select(there[:-1]), reversed_order]
    if isinstance(split, TensorImages):
        assert isinstance(reversed_order, TensorImages)
        others += [TensorImages(split.images, split.labels, back), TensorImages(reversed_order.images, split.labels)]
    else:
        assert isinstance(reversed_order, ImageFiles)
        others += [ImageFiles(split.paths, split.labels, back), ImageFiles(reversed_order.paths, split.labels)]
    assert len({expected, *map(hash_split, others)}) == 1 + len(others)


@pytest.mark.parametrize("changed", [0, 3, 6])
def test_every_pixel_and_the_shape_count(changed: int) -> None:
    pixels = images()
    expected = hash_split(tensors(pixels))
    assert hash_split(tensors(pixels.transpose(2, 3).contiguous().view(7, 3, 8, 10))) != expected
    assert hash_split(tensors(pixels.view(7, 3, 10, 8))) != expected
    pixels[changed, 2, 7, 9] ^= 1
    assert hash_split(tensors(pixels)) != expected


def test_layout_and_chunks_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels, folder = images(), files(tmp_path)
    expected = hash_split(tensors(pixels)), hash_split(folder)
    assert hash_split(tensors(pixels.contiguous(memory_format=torch.channels_last))) == expected[0]
    monkeypatch.setattr(splits, "_HASHED_BYTES", 1)
    monkeypatch.setattr(splits, "_FILES_AT_A_TIME", 100)
    assert (hash_split(tensors(pixels)), hash_split(folder)) == expected


@pytest.mark.parametrize("names", [NAMES, NAMES[:2], NAMES[:1]], ids=["whole", "one class", "one file"])
def test_a_data_set_that_moved_keeps_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    expected = hash_split(files(tmp_path / "here", names))
    (tmp_path / "farther").mkdir()
    moved = (tmp_path / "here").rename(tmp_path / "farther" / "away")
    assert hash_split(ImageFiles([str(moved / name) for name in names], np.arange(len(names)))) == expected
    monkeypatch.chdir(moved)
    assert hash_split(ImageFiles(names, np.arange(len(names)))) == expected
    assert hash_split(ImageFiles([f"./{name}" for name in names], np.arange(len(names)))) == expected
    mixed = [str(moved / names[0]), *names[1:]]
    assert hash_split(ImageFiles(mixed, np.arange(len(names)))) == expected


def test_files_may_be_given_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = files(tmp_path, NAMES[:2])
    monkeypatch.chdir(tmp_path / "fox")
    assert hash_split(ImageFiles(["a.jpeg", "b.jpeg"], split.labels)) == hash_split(split)


@pytest.mark.parametrize("names", [NAMES, NAMES[:2], NAMES[:1]], ids=["whole", "one class", "one file"])
def test_another_name_or_size_changes_the_hash(tmp_path: Path, names: tuple[str, ...]) -> None:
    split = files(tmp_path, names)
    expected = hash_split(split)
    last = tmp_path / names[-1]
    content = last.read_bytes()
    last.write_bytes(content + b"x")
    longer = hash_split(split)
    renamed = last.rename(last.with_name("z.jpeg"))
    renamed.write_bytes(content)
    other_name = hash_split(ImageFiles([*split.paths[:-1], str(renamed)], split.labels))
    assert len({expected, longer, other_name}) == 3
    last.write_bytes(b"y" * len(content))
    assert hash_split(split) == expected  # contents are not read


def test_another_class_folder_changes_the_hash(tmp_path: Path) -> None:
    expected = hash_split(files(tmp_path / "one"))
    assert hash_split(files(tmp_path / "two", tuple(name.replace("wolf", "dog") for name in NAMES))) != expected


def test_names_cannot_run_into_each_other(tmp_path: Path) -> None:
    """Nor into sizes: names may hold quotes, line ends and bytes that are no UTF-8."""
    odd = ('a", 1]\n["b', "a\\", "a b", os.fsdecode(b"\xff"), "ab", "é")
    hashes = {hash_split(files(tmp_path / str(i), (f"fox/{name}", "wolf/x"))) for i, name in enumerate(odd)}
    assert len(hashes) == len(odd)


def test_many_files_are_hashed_in_order(tmp_path: Path) -> None:
    split = files(tmp_path, tuple(f"{i % 5}/{i}.png" for i in range(210)))
    expected = hash_split(split)
    assert all(hash_split(split) == expected for _ in range(5))
    assert hash_split(ImageFiles([*split.paths[30:], *split.paths[:30]], split.labels)) != expected  # whole chunks


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    split = files(tmp_path)
    (tmp_path / "wolf" / "a.jpeg").unlink()
    with pytest.raises(DataError, match=r"size of .*wolf/a\.jpeg: No such file .*; restore the file or remove it"):
        hash_split(split)


def test_the_hashes_of_earlier_versions_still_hold(tmp_path: Path) -> None:
    """From coreutils' sha256sum of the header, the ids and the images or lines."""
    pixels = torch.arange(12, dtype=torch.uint8).view(2, 3, 1, 2)
    assert (
        hash_split(tensors(pixels, ids=np.array([5, 258])))
        == "ba5de8ca1cfbd199c778bacbf6e3c228e2318813d4d46b2c1e0384f1464963c3"
    )
    assert (
        hash_split(files(tmp_path, ("fox/a.jpeg", "wolf/b.jpeg")))
        == "a627cc442dacfb29859dbe01fab84b963269226152d143046ae3b9e11a0bb561"
    )
