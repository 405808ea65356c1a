"""The format of packed stores: a folder that may move, settings that go together, and no damage that goes unnoticed."""

import json
import re
from pathlib import Path

import pytest

from support.packed_images import packed, packs_of, write_folder
from support.packed_loaders import SETTINGS, SIZE, assert_same_batches, loader
from unikd_fast.data.datasets import open_data
from unikd_fast.data.image_folder import load_image_folder
from unikd_fast.data.manifest import hash_split
from unikd_fast.data.packed import PackSettings, load_packed, read_manifest, verify_store
from unikd_fast.data.packed.layout import VERSION


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture
def store(source: Path, tmp_path: Path) -> Path:
    return packed(source, tmp_path / "store", SETTINGS["copied"])


def test_a_store_that_moved_is_the_same(store: Path, source: Path) -> None:
    expected = hash_split(load_packed(store, SIZE).train)
    moved = load_packed(store.rename(store.parent / "moved"), SIZE)
    assert hash_split(moved.train) == expected
    assert_same_batches(moved, load_image_folder(source, SIZE))


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
