"""What is loaded from packed stores: the samples, pixels, ids and views of the folder they were made of."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.packed_images import CLASSES, files_of, packed, packs_of, write_folder
from support.packed_loaders import SETTINGS, SIZE, assert_same_batches, loader
from unikd_fast.data.augmentation import Augmentation, view_parameters
from unikd_fast.data.datasets import open_data
from unikd_fast.data.image_folder import load_image_folder
from unikd_fast.data.manifest import hash_split
from unikd_fast.data.packed import load_packed
from unikd_fast.data.splits import INDEX_DTYPE, PackedImages

kinds = pytest.mark.parametrize("kind", SETTINGS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def stores(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    return {kind: packed(source, root / kind, settings) for kind, settings in SETTINGS.items()}


def resized(path: str, size: int) -> Image.Image:
    """An image by PIL alone, its short side brought to size unless it is smaller."""
    image = Image.open(path).convert("RGB")
    scale = size / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(size, int(side * scale + 1e-9)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


@kinds
def test_labels_ids_and_classes_are_the_folders(source: Path, stores: dict[str, Path], kind: str) -> None:
    folder, splits = load_image_folder(source, SIZE), open_data("packed", root=stores[kind], image_size=SIZE)
    assert (splits.num_classes, splits.class_names) == (4, tuple(sorted(CLASSES)))
    assert (splits.mean, splits.std, splits.image_size) == (folder.mean, folder.std, SIZE)
    assert splits.test_is_val
    for pack, files in zip(packs_of(splits), files_of(folder), strict=True):
        assert np.array_equal(pack.labels, files.labels)
        assert np.array_equal(pack.sample_ids, files.sample_ids)
        assert (pack.labels.dtype, pack.index.dtype) == (np.int64, INDEX_DTYPE)
        assert len(pack.shards) > 1


def test_copied_files_are_the_files(source: Path, stores: dict[str, Path]) -> None:
    folder, splits = load_image_folder(source, SIZE), load_packed(stores["copied"], SIZE)
    for pack, files in zip(packs_of(splits), files_of(folder), strict=True):
        found = [image.read() for image in pack.images(range(len(pack)))]
        assert found == [Path(path).read_bytes() for path in files.paths]


@pytest.mark.parametrize("kind", ["copied", "raw, whole"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_packs_of_whole_images_give_the_folders_batches(
    source: Path, stores: dict[str, Path], kind: str, workers: int
) -> None:
    """Bit for bit: windows, flips, pixels, labels and ids."""
    assert_same_batches(load_packed(stores[kind], SIZE), load_image_folder(source, SIZE), workers)


def test_dali_reads_packs_as_it_reads_files(source: Path, stores: dict[str, Path]) -> None:
    pytest.importorskip("nvidia.dali")
    assert_same_batches(load_packed(stores["copied"], SIZE), load_image_folder(source, SIZE), kind="dali")
    # Other sizes, and for raw pixels no decoder: labels, ids and their order are to be the same.
    for kind in ("jpeg", "raw"):
        assert_same_batches(load_packed(stores[kind], SIZE), load_image_folder(source, SIZE), kind="dali", pixels=False)


@kinds
def test_views_are_drawn_for_the_folders_ids(source: Path, stores: dict[str, Path], kind: str) -> None:
    folder, splits = load_image_folder(source, SIZE), load_packed(stores[kind], SIZE)
    assert_same_batches(splits, folder, pixels=False)
    ids = next(loader(splits).train(2)).sample_ids.numpy()
    views, expected = (
        view_parameters(Augmentation(crop="resized"), seed=3, epoch=2, sample_ids=split.sample_ids[ids])
        for split in (splits.train, folder.train)
    )
    boxes = [views.crop_box(i, 24, 30) for i in range(len(ids))]
    assert boxes == [expected.crop_box(i, 24, 30) for i in range(len(ids))]


def test_raw_images_are_pils(source: Path, stores: dict[str, Path], tmp_path: Path) -> None:
    """And the views of them are those of a folder of such images."""
    folder, splits = load_image_folder(source, SIZE), load_packed(stores["raw"], SIZE)
    sizes = set()
    for pack, files in zip(packs_of(splits), files_of(folder), strict=True):
        for stored, path in zip(pack.images(range(len(pack))), files.paths, strict=True):
            image = resized(path, 24)
            assert stored.shape == (image.height, image.width)
            assert stored.read() == image.tobytes()
            sizes.add(min(image.size))
            copy = tmp_path / Path(path).relative_to(source).with_suffix(".png")
            copy.parent.mkdir(parents=True, exist_ok=True)
            image.save(copy)
    assert sizes == {16, 20, 24}, "smaller images keep their size"
    assert_same_batches(splits, load_image_folder(tmp_path, SIZE))


def test_jpegs_are_pils_without_the_originals_remarks(source: Path, stores: dict[str, Path]) -> None:
    folder, splits = load_image_folder(source, SIZE), load_packed(stores["jpeg"], SIZE)
    for pack, files in zip(packs_of(splits), files_of(folder), strict=True):
        for stored, path in zip(pack.images(range(len(pack))), files.paths, strict=True):
            bare = Image.fromarray(np.asarray(resized(path, 24)))
            expected = io.BytesIO()
            bare.save(expected, "JPEG", quality=80)
            assert stored.read() == expected.getvalue()
            assert stored.shape is None


def test_train_samples_takes_the_folders_subset(source: Path, stores: dict[str, Path]) -> None:
    few, expected = (
        open_data(name, root=root, image_size=SIZE, train_samples=16, num_classes=4, seed=5)
        for name, root in (("packed", stores["copied"]), ("image_folder", source))
    )
    assert len(few.train) == 16
    assert few.train.sample_ids.tolist() != list(range(16))
    assert_same_batches(few, expected)


def test_the_hash_knows_the_bytes_and_whether_they_are_checked(stores: dict[str, Path]) -> None:
    train = {kind: packs_of(load_packed(store, SIZE))[0] for kind, store in stores.items()}
    pack = train["copied"]
    index = pack.index.copy()
    index["crc"][7] ^= 1
    others = [
        PackedImages(pack.shards, index, pack.labels),
        PackedImages(pack.shards, pack.index, pack.labels, checked=False),
        pack.select(np.arange(len(pack))[::-1].copy()),
    ]
    hashes = {*map(hash_split, train.values()), *map(hash_split, others)}
    assert len(hashes) == len(train) + len(others)
    moved = pack.index.copy()
    moved["offset"] += 5
    assert hash_split(PackedImages(pack.shards, moved, pack.labels)) == hash_split(pack)  # where they lie is no matter


def test_unchecked_images_stay_so_in_a_selection(stores: dict[str, Path]) -> None:
    pack = packs_of(load_packed(stores["copied"], SIZE))[0]
    (checked,) = pack.select(np.array([3])).images([0])
    assert checked.checksum == pack.index["crc"][3]
    unchecked = PackedImages(pack.shards, pack.index, pack.labels, checked=False).select(np.array([3]))
    assert unchecked.images([0])[0] == checked._replace(checksum=None)
