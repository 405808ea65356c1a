"""Packed stores: the samples, ids and views of the folder they were made of, and no damage that goes unnoticed."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_images import CLASSES, files_of, packed, packs_of, write_folder
from PIL import Image

from unikd_fast.data.augmentation import Augmentation, view_parameters
from unikd_fast.data.datasets import open_data
from unikd_fast.data.image_folder import load_image_folder
from unikd_fast.data.loader import Loader, LoaderKind, build_loader
from unikd_fast.data.manifest import hash_split
from unikd_fast.data.packed import PackSettings, load_packed, read_manifest, verify_store
from unikd_fast.data.packed.layout import VERSION
from unikd_fast.data.splits import INDEX_DTYPE, DataSplits, PackedImages

SIZE = 16
SETTINGS = {
    "copied": PackSettings(shard_bytes=9000),
    "jpeg": PackSettings("jpeg", size=24, quality=80, shard_bytes=9000),
    "raw": PackSettings("raw", size=24, shard_bytes=9000),
    "raw, whole": PackSettings("raw", size=100, shard_bytes=9000),
}
kinds = pytest.mark.parametrize("kind", SETTINGS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def stores(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stores")
    return {kind: packed(source, root / kind, settings) for kind, settings in SETTINGS.items()}


@pytest.fixture
def store(source: Path, tmp_path: Path) -> Path:
    return packed(source, tmp_path / "store", SETTINGS["copied"])


def loader(splits: DataSplits, workers: int = 0, kind: LoaderKind = "torchvision") -> Loader:
    augmentation = Augmentation(crop="resized", flip_probability=0.5, eval_resize=20)
    return build_loader(
        splits, augmentation=augmentation, seed=3, global_batch_size=8, device="cpu", workers=workers, kind=kind
    )


def assert_same_batches(
    splits: DataSplits,
    expected: DataSplits,
    workers: int = 0,
    *,
    kind: LoaderKind = "torchvision",
    pixels: bool = True,
) -> None:
    one, other = loader(splits, workers, kind), loader(expected, kind=kind)
    for found, wanted in ((one.train(2), other.train(2)), (one.evaluate("val"), other.evaluate("val"))):
        for batch, other_batch in zip(found, wanted, strict=True):
            assert torch.equal(batch.labels, other_batch.labels)
            assert torch.equal(batch.sample_ids, other_batch.sample_ids)
            assert batch.images.shape == other_batch.images.shape
            assert not pixels or torch.equal(batch.images, other_batch.images)


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


def test_a_store_that_moved_is_the_same(store: Path, source: Path) -> None:
    expected = hash_split(load_packed(store, SIZE).train)
    moved = load_packed(store.rename(store.parent / "moved"), SIZE)
    assert hash_split(moved.train) == expected
    assert_same_batches(moved, load_image_folder(source, SIZE))


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


@pytest.mark.parametrize("kind", ["copied", "raw"])
def test_a_flipped_byte_is_noticed_where_it_is_read_and_by_verify(source: Path, tmp_path: Path, kind: str) -> None:
    store = packed(source, tmp_path / "store", SETTINGS[kind])
    assert verify_store(store) == (60, ())
    path = store / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[2000] ^= 64
    path.write_bytes(content)
    check = verify_store(store)
    assert (check.images, len(check.faults)) == (59, 1)
    assert re.search(rf"1 of the \d+ images in {path}: cannot read {path} at byte \d+: its checksum", check.faults[0])
    damaged = load_packed(store, SIZE)  # only sizes are looked at
    with pytest.raises(ValueError, match=rf"cannot read {path} at byte \d+: its checksum is .* the file is damaged"):
        list(loader(damaged).train(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            r"is truncated: (\d+) bytes in manifest.json, (\d+) on",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes() + b"x"),
            r"is too long: (\d+) bytes in manifest.json, (\d+) on",
        ),
        (Path.unlink, "is missing"),
    ],
    ids=["truncated", "too long", "deleted"],
)
def test_a_shard_of_another_size_is_refused_by_name(store: Path, change: object, message: str) -> None:
    path = store / "val-00000.bin"
    held = int((packs_of(load_packed(store, SIZE))[1].index["shard"] == 0).sum())
    change(path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=rf"load_packed: {path} {message}.*restore the file or pack again"):
        load_packed(store, SIZE)
    check = verify_store(store)
    assert check.images == 60 - held
    assert re.match(rf"{path} {message}", *check.faults)


def test_a_shard_that_shrinks_after_opening_is_noticed(store: Path) -> None:
    splits = load_packed(store, SIZE)
    path = store / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"cannot read {path} at byte \d+: \d+ bytes are expected, \d+ are there"):
        list(loader(splits).train(0))
    path.unlink()
    with pytest.raises(ValueError, match=rf"cannot read {path} at byte \d+: No such file"):
        list(loader(splits).train(0))


@pytest.mark.parametrize("array", ["index", "labels", "ids"])
def test_a_damaged_array_is_refused_by_name(store: Path, array: str) -> None:
    path = store / f"train-{array}.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is damaged: its hash is [0-9a-f]+ in manifest.json and its content"):
        load_packed(store, SIZE)
    check = verify_store(store)
    assert (check.images, len(check.faults)) == (12, 1)
    path.unlink()
    (store / "val-00000.bin").unlink()
    with pytest.raises(ValueError, match=rf"{path} is missing \(and 1 more, see `unikd-data verify`\); restore"):
        load_packed(store, SIZE)


def test_every_changed_byte_of_a_manifest_is_noticed(store: Path) -> None:
    path = store / "manifest.json"
    content = path.read_bytes()
    expected = read_manifest(store)
    unnoticed = []
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
        try:
            if read_manifest(store) != expected:
                unnoticed.append(place)
        except ValueError as error:
            assert str(path) in str(error)
    assert unnoticed == []


def test_refuses_what_is_no_store(store: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{source} is no packed store, it has no manifest\.json; .*unikd-data pack"):
        load_packed(source, SIZE)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing; the root of data set packed must hold"):
        open_data("packed", root=source, image_size=SIZE)
    (tmp_path / "begun" / ".unikd-packing").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a packed store that is not finished; run the same `unikd-data pack`"):
        load_packed(tmp_path / "begun", SIZE)
    path = store / "manifest.json"
    manifest = json.loads(path.read_text())
    for changed, message in (
        (
            {**manifest, "version": VERSION + 1},
            rf"has format version {VERSION + 1} and this version .* reads {VERSION};",
        ),
        ({"version": VERSION}, "is not the manifest of a packed store"),
        ([], "is not the manifest of a packed store"),
        ({**manifest, "content": {}}, "is damaged: its hash is .* and its content gives"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{path} {message}"):
            load_packed(store, SIZE)
    path.write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        load_packed(store, SIZE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "webp"}, r"format must be one of .* got 'webp'"),
        ({"format": "raw"}, "'raw' needs a size of at least 1 pixels .* got 0"),
        ({"size": -1}, "'jpeg' needs a size of at least 0 pixels .* got -1"),
        ({"quality": 90}, "quality is for format 'jpeg' with a size.* got 90 with format 'jpeg' and size 0"),
        ({"format": "raw", "size": 8, "quality": 90}, "quality is for format 'jpeg'"),
        ({"size": 8, "quality": 0}, r"in \[1, 100\]; got 0"),
        ({"size": 8, "quality": 101}, r"in \[1, 100\]; got 101"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackSettings(**values)  # type: ignore[arg-type]
