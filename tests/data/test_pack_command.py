"""`unikd-data`: what it says, what it returns, and what it refuses."""

import re
from pathlib import Path

import numpy as np
import pytest

from support.packed_images import (
    ARGUMENTS,
    CLASSES,
    LONG,
    SETTINGS,
    content,
    interrupt,
    packed,
    packs_of,
    write_folder,
)
from unikd_fast.data.image_folder import load_image_folder
from unikd_fast.data.pack_command import main
from unikd_fast.data.packed import PackSettings, load_packed, read_manifest
from unikd_fast.data.packed.shard import ShardJob, pack_shard


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """A folder in which three files are no images, one of them in val."""
    root = write_folder(tmp_path / "spoiled", (24, 8))
    (root / "train" / CLASSES[0] / "狼 000.JPEG").write_bytes(b"")
    path = root / "train" / CLASSES[1] / LONG
    path.write_bytes(path.read_bytes()[:500])
    (root / "val" / CLASSES[2] / "狼 002.png").write_bytes(b"text")
    return root


def test_pack_info_and_verify(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "new" / "store"
    assert main(["pack", str(source), str(store), *ARGUMENTS, "--quality", "70", "--workers", "0"]) == 0
    packed_text, errors = capsys.readouterr()
    assert errors == "", "no bar where stderr is no terminal"
    assert main(["info", str(store)]) == 0
    assert capsys.readouterr().out == packed_text
    first, train, val = packed_text.splitlines()
    assert first == f"{store}: 4 classes, JPEG of quality 70, short side at most 24 pixels"
    shards = sorted(store.glob("train-*.bin"))
    assert len(shards) > 3
    assert train == f"  train: 48 images, {sum(path.stat().st_size for path in shards)} bytes in {len(shards)} files"
    assert val.startswith("  val: 12 images, ")
    assert {path.name for path in store.iterdir()} == {
        "manifest.json",
        *(f"{split}-{array}.npy" for split in ("train", "val") for array in ("index", "labels", "ids")),
        *(path.name for path in store.glob("*.bin")),
    }
    assert main(["verify", str(store)]) == 0
    assert capsys.readouterr() == (f"{store}: 60 images are as they were packed, 0 faults\n", "")


def test_verify_names_faults_and_fails(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = packed(source, tmp_path / "store", PackSettings(shard_bytes=1))  # a file for each image
    for i in range(30):
        (store / f"train-{i:05}.bin").unlink()
    assert main(["verify", str(store)]) == 1
    out, errors = capsys.readouterr()
    assert out == f"{store}: 30 images are as they were packed, 30 faults\n"
    assert errors.splitlines()[0] == f"{store}/train-00000.bin is missing"
    assert errors.splitlines()[20:] == ["... and 10 faults more"]
    assert main(["verify", str(source)]) == 2
    assert main(["info", str(source)]) == 2
    assert capsys.readouterr().err.startswith(f"unikd-data: error: {source} is no packed store")


def test_a_finished_store_is_left_alone_and_another_is_refused(source: Path, tmp_path: Path) -> None:
    store = packed(source, tmp_path / "store", SETTINGS)
    times = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    packed(source, store, SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == times
    with pytest.raises(ValueError, match=r"holds another pack, finished: settings\.size: 24 there, 25 now; pack into"):
        packed(source, store, PackSettings("jpeg", size=25, shard_bytes=6000))
    assert not (store / ".unikd-packing").exists()


def test_a_bad_image_is_named_and_what_is_packed_is_kept(
    spoiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pack", str(spoiled), str(tmp_path / "store"), *ARGUMENTS, "--workers", "0"]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("unikd-data: error: ")
    assert f"cannot decode {spoiled}/train/{CLASSES[0]}/狼 000.JPEG: the file is empty" in message
    assert "--bad skip" in message
    assert main([*arguments, "--bad", "skip"]) == 0
    out, errors = capsys.readouterr()
    assert f"left out: train/{CLASSES[1]}/{LONG}: " in errors
    assert "  train: 22 images" in out
    assert re.search(r"  val: 7 images, .*, 1 of 8 left out", out)


def test_skipped_images_are_listed_and_the_others_keep_their_ids(
    spoiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = packed(spoiled, tmp_path / "store", SETTINGS, skip_bad=True)
    manifest = read_manifest(store)
    train, val = manifest.splits["train"], manifest.splits["val"]
    assert (train.count, train.source_count, val.count, val.source_count) == (22, 24, 7, 8)
    assert {name for name, _ in train.skipped} == {f"{CLASSES[0]}/狼 000.JPEG", f"{CLASSES[1]}/{LONG}"}
    assert all(reason and "0x" not in reason and str(spoiled) not in reason for _, reason in train.skipped)
    listed = load_image_folder(spoiled, 16)
    for pack, files in zip(packs_of(load_packed(store, 16)), (listed.train, listed.val), strict=True):
        left_out = [i for i, path in enumerate(files.paths) if Path(path).stat().st_size in (0, 4, 500)]  # type: ignore[union-attr]
        assert pack.sample_ids.tolist() == [i for i in range(len(files)) if i not in left_out]
        assert np.array_equal(pack.labels, files.labels[pack.sample_ids])
    interrupt(monkeypatch, spoiled, tmp_path / "resumed", 20, skip_bad=True)
    assert content(packed(spoiled, tmp_path / "resumed", SETTINGS, skip_bad=True)) == content(store)


def test_a_file_that_cannot_be_read_is_never_skipped(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".unikd-packing").mkdir()
    job = ShardJob("train", 0, 0, (load_image_folder(source, 16).train.paths[0], str(tmp_path / "gone.jpg")))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"cannot read .*gone\.jpg: No such file"):
        pack_shard(job, tmp_path, SETTINGS, skip_bad=True, tick=lambda: None)
    assert [path.name for path in tmp_path.rglob("*")] == [".unikd-packing"], "nothing half-made stays"


def test_a_split_without_a_good_image_is_refused(spoiled: Path, tmp_path: Path) -> None:
    for path in (spoiled / "val").rglob("*"):
        if path.is_file():
            path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"none of the 8 images of val can be decoded, the first is .*狼 \d+"):
        packed(spoiled, tmp_path / "store", SETTINGS, skip_bad=True)
    for path in (spoiled / "train").rglob("*"):
        if path.is_file():
            path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"(?s)cannot decode .* not a JPEG, PNG"):
        packed(spoiled, tmp_path / "other", SETTINGS, skip_bad=True)


def test_refuses_sources_and_targets(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(target: Path, own: Path = source, *more: str) -> str:
        assert main(["pack", str(own), str(target), *more]) == 2
        return capsys.readouterr().err

    before = content(source)
    assert "holds something else, 'train' for one" in refused(source)
    assert "would be read as a class; pack elsewhere" in refused(source / "train" / "packed")
    (tmp_path / "file").touch()
    assert "file is no folder; give a new one or one that is empty" in refused(tmp_path / "file")
    assert f"{tmp_path / 'gone'} is missing; the root must hold" in refused(tmp_path / "new", tmp_path / "gone")
    assert "workers must be at least 0, got -1" in refused(tmp_path / "new", source, "--workers", "-1")
    assert "quality is for format 'jpeg' with a size" in refused(tmp_path / "new", source, "--quality", "80")
    own = write_folder(tmp_path / "own", (8, 8))
    (own / "train" / "leer ∅").mkdir()
    (own / "val" / "leer ∅").mkdir()
    assert f"1 of 5 class folders in {own / 'val'} hold no images: leer ∅;" in refused(tmp_path / "new", own)
    assert not (tmp_path / "new").exists()
    assert content(source) == before
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    packed(source, tmp_path / "disk", SETTINGS)
