"""Packing an image folder: a store that is whole or is not one, whatever happens, and gives the folder's views."""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from support.folder_images import SIZE, loader
from support.generated_images import draw_image
from support.kills import killed_at_each_operation
from unikd_fast.cli import main
from unikd_fast.data import pack
from unikd_fast.data.arrow import load_arrow
from unikd_fast.data.dali import dali_problem
from unikd_fast.data.images import StoredImage, read_rgb
from unikd_fast.data.pack import PackError, pack_folder
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import ArrowImages, DataSplits, ImageFiles, hash_split
from unikd_fast.errors import DataError, FileError

CLASSES = ("läufer", "a b", "x" * 100)
SIDES = ((20, 30), (33, 17), (25, 25), (16, 60))
MODES = ("RGB", "L", "CMYK")
needs_dali = pytest.mark.skipif(dali_problem() is not None, reason="DALI does not work here")
kinds = pytest.mark.parametrize("kind", ["torchvision", pytest.param("dali", marks=needs_dali)])


def write_folder(root: Path, counts: tuple[int, int] = (24, 7)) -> Path:
    """Write JPEGs of several modes and PNGs with an orientation, in folders of awkward names."""
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for part, count in zip(("train", "val"), counts, strict=True):
        for i in range(count):
            path = root / part / CLASSES[i % 3] / "below" / f"狼 {i:03}.{'png' if i % 5 == 2 else 'JPEG'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = draw_image(generator, *SIDES[i % 4])
            image.convert("RGB" if i % 5 == 2 else MODES[i % 3]).save(path, quality=85, exif=exif)
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def stores(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder packed as its files, as pixels of a short side of 18, and as pixels of whole images."""
    root = tmp_path_factory.mktemp("stores")
    for name, raw in (("files", None), ("raw", 18), ("raw, whole", 100)):
        pack_folder(source, root / name, raw=raw, images_per_file=10)
    return {path.name: path for path in root.iterdir()}


def content(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def splits_of(splits: DataSplits) -> list[ArrowImages]:
    found = [split for split in (splits.train, splits.val) if isinstance(split, ArrowImages)]
    assert len(found) == 2
    return found


def assert_same_batches(splits: DataSplits, expected: DataSplits, **changes: object) -> None:
    one, other = (loader(each, **changes) for each in (splits, expected))  # type: ignore[arg-type]
    for found, wanted in ((one.train(2), other.train(2)), (one.evaluate("val"), other.evaluate("val"))):
        for batch, other_batch in zip(found, wanted, strict=True):
            for part, other_part in zip(batch[:3], other_batch[:3], strict=True):
                assert torch.equal(part, other_part)


@pytest.mark.parametrize("name", ["files", "raw", "raw, whole"])
def test_labels_ids_and_classes_are_the_folders(source: Path, stores: dict[str, Path], name: str) -> None:
    folder, splits = load_image_folder(source, SIZE), load_arrow(stores[name], SIZE)
    assert (splits.class_names, splits.num_classes, splits.test_is_val) == (tuple(sorted(CLASSES)), 3, True)
    assert (splits.mean, splits.std, splits.image_size) == (folder.mean, folder.std, SIZE)
    for stored, files in zip(splits_of(splits), (folder.train, folder.val), strict=True):
        assert len(stored.files) == -(-len(files) // 10)
        assert np.array_equal(stored.labels, files.labels)
        assert np.array_equal(stored.sample_ids, files.sample_ids)
        # What a teacher's cache is keyed on: files are the same data, pixels are other ones.
        assert (hash_split(stored) == hash_split(files)) == (name == "files")


def test_files_are_packed_as_they_are(source: Path, stores: dict[str, Path]) -> None:
    folder = load_image_folder(source, SIZE)
    for stored, files in zip(splits_of(load_arrow(stores["files"], SIZE)), (folder.train, folder.val), strict=True):
        assert isinstance(files, ImageFiles)
        for image, path in zip(stored.images(range(len(stored))), files.paths, strict=True):
            assert image.read() == Path(path).read_bytes()
            assert Path(path).parts[-3:] == Path(image.name.partition(", row")[0]).parts


@kinds
@pytest.mark.parametrize("name", ["files", "raw, whole"])
def test_views_are_the_folders_bit_for_bit(source: Path, stores: dict[str, Path], kind: str, name: str) -> None:
    assert_same_batches(load_arrow(stores[name], SIZE), load_image_folder(source, SIZE), kind=kind)


@pytest.mark.slow
def test_decoding_processes_read_stores(source: Path, stores: dict[str, Path]) -> None:
    assert_same_batches(load_arrow(stores["files"], SIZE), load_image_folder(source, SIZE), workers=2)


@kinds
def test_pixels_are_pils_and_give_their_views(source: Path, stores: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The short side is brought to 18 pixels unless it is smaller; the views are those of a folder of such images."""
    folder, splits, sides = load_image_folder(source, SIZE), load_arrow(stores["raw"], SIZE), set()
    for stored, files in zip(splits_of(splits), (folder.train, folder.val), strict=True):
        assert isinstance(files, ImageFiles)
        for image, path in zip(stored.images(range(len(stored))), files.paths, strict=True):
            whole = read_rgb(StoredImage(path))
            scale = min(1, 18 / min(whole.size))
            width, height = (max(min(18, min(whole.size)), int(side * scale + 1e-9)) for side in whole.size)
            expected = whole.resize((width, height), Image.Resampling.BILINEAR) if scale < 1 else whole
            assert np.array_equal(image.read(), np.asarray(expected))
            sides.add(min(expected.size))
            copy = tmp_path / Path(path).relative_to(source).with_suffix(".png")
            copy.parent.mkdir(parents=True, exist_ok=True)
            expected.save(copy)
    assert sides == {16, 17, 18}
    assert_same_batches(splits, load_image_folder(tmp_path, SIZE), kind=kind)


def test_hugging_face_reads_stores(source: Path, stores: dict[str, Path]) -> None:
    files, raw = (datasets.load_from_disk(str(stores[name])) for name in ("files", "raw"))
    assert files["train"].features["label"].names == sorted(CLASSES)
    # By itself it turns images as their EXIF orientation says.
    assert files["validation"][3]["image"].size == (16, 60)
    assert raw["validation"].with_format("numpy")[3]["image"].shape == (16, 60, 3)
    assert files["train"].split == "train"
    assert len({part[name]._fingerprint for part in (files, raw) for name in part}) == 4


@pytest.mark.long
def test_any_kill_leaves_a_store_or_what_is_continued(source: Path, tmp_path: Path, stores: dict[str, Path]) -> None:
    store, expected = tmp_path / "store", content(stores["files"])
    kills = 0
    for _ in killed_at_each_operation(
        lambda: pack_folder(source, store, images_per_file=10),
        tmp_path,
        before=lambda: shutil.rmtree(store, ignore_errors=True),
    ):
        kills += 1
        if (store / "dataset_dict.json").exists():
            assert len(load_arrow(store, SIZE).train) == 24
        elif (store / ".unikd-packing").exists():
            with pytest.raises(ValueError, match=f"{store} is a store that is not finished; run the same `unikd data"):
                load_arrow(store, SIZE)
        pack_folder(source, store, images_per_file=10)
        assert content(store) == expected
    assert kills > 20


def test_kills_in_a_row_get_to_the_same_end(source: Path, tmp_path: Path, stores: dict[str, Path]) -> None:
    store = tmp_path / "store"
    kills = [
        *killed_at_each_operation(lambda: pack_folder(source, store, raw=18, images_per_file=10, workers=1), store)
    ]
    assert len(kills) > 5
    assert content(store) == content(stores["raw"])


def test_finished_files_are_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = pack._write_rows

    def stop_at_two(path: Path, *arguments: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pack, "_write_rows", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(source, tmp_path / "store", images_per_file=10)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "train").iterdir()}
    assert len(first) == 2
    monkeypatch.setattr(pack, "_write_rows", write)
    pack_folder(source, tmp_path / "store", images_per_file=10)
    assert {path: path.stat().st_mtime_ns for path in first} == first


def test_what_was_begun_with_other_images_is_removed(
    source: Path, tmp_path: Path, stores: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    shutil.copytree(stores["raw"], store)
    (store / "dataset_dict.json").unlink()
    (store / ".unikd-packing").write_text("another")
    (store / "train" / "data-00000-of-00003.arrow").write_bytes(b"cut")
    (store / "train" / f".data-00001-of-00003.arrow.{'0' * 16}.tmp").write_bytes(b"cut")
    pack_folder(source, store, images_per_file=10)
    assert f"{store}: the unfinished pack was of other images or settings; it starts over" in caplog.messages
    assert content(store) == content(stores["files"])


def test_a_finished_store_is_left_alone(source: Path, tmp_path: Path, stores: dict[str, Path]) -> None:
    store = tmp_path / "store"
    shutil.copytree(stores["files"], store)
    times = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    pack_folder(source, store, images_per_file=10)
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == times
    with pytest.raises(ValueError, match=f"{store} is a finished store of other images or settings, .* pack into anot"):
        pack_folder(source, store, raw=18, images_per_file=10)


@pytest.mark.parametrize("lost", ["train/data-00001-of-00003.arrow", "validation/state.json", "validation"])
def test_a_finished_store_that_lost_a_file_is_refused(
    source: Path, tmp_path: Path, stores: dict[str, Path], lost: str
) -> None:
    store = Path(shutil.copytree(stores["files"], tmp_path / "store"))
    (store / lost).rename(tmp_path / "lost")
    with pytest.raises(ValueError, match=f"{store} was finished and now lacks {store / lost}.*; delete it and pack"):
        pack_folder(source, store, images_per_file=10)


def test_one_process_packs_into_a_folder(source: Path, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(PackError, match=f"another process is packing into {tmp_path}; wait for it, or pack elsewhere"):
        pack_folder(source, tmp_path)
    os.close(descriptor)
    pack_folder(source, tmp_path)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_named_and_nothing_half_made_stays(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"data-00000-of-00003\.arrow cannot be written: File too large.*; make room"):
        pack_folder(source, tmp_path / "store", images_per_file=10)
    assert [*content(tmp_path / "store")] == [".unikd-packing"]


def test_images_that_cannot_be_decoded_keep_their_ids(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = Path(shutil.copytree(source, tmp_path / "own"))
    folder = load_image_folder(own, SIZE)
    assert isinstance(folder.train, ImageFiles)
    bad = {7: b"", 12: b"text"}
    for row, kept in bad.items():
        Path(folder.train.paths[row]).write_bytes(kept)
    for raw, reason in ((None, "the file is empty"), (18, "it holds no image")):
        pack_folder(own, tmp_path / f"store {raw}", raw=raw, images_per_file=10)
        splits = load_arrow(tmp_path / f"store {raw}", SIZE)
        with pytest.raises(DataError, match=rf"cannot decode .*狼 \d+.*, row 7 of .*: {reason}"):
            read_rgb(splits_of(splits)[0].images([7])[0])
        shown = loader(splits, bad_images="skip", max_bad_share=0.5, global_batch_size=24)  # type: ignore[arg-type]
        (batch,) = shown.train(0)
        assert sorted(set(batch.sample_ids.tolist())) == [i for i in range(24) if i not in bad]
        assert {image.sample_id for image in shown.bad_samples} == set(bad)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum(f"packed without its image: cannot decode {folder.train.paths[7]}: the" in line for line in warned) == 1


def test_refuses_sources_and_targets(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(target: Path, own: Path = source, *more: str) -> str:
        assert main(["data", "pack", str(own), str(target), *more]) == 2
        return capsys.readouterr().err

    before = content(source)
    assert "holds something else, 'train' for one" in refused(source)
    assert "would be read as a class; pack elsewhere" in refused(source / "train" / "packed")
    (tmp_path / "file").touch()
    assert "file is not a folder; give a new one or one that is empty" in refused(tmp_path / "file")
    assert f"{tmp_path / 'gone'} is missing; the root must hold" in refused(tmp_path / "new", tmp_path / "gone")
    assert "workers must be at least 1, got 0" in refused(tmp_path / "new", source, "--workers", "0")
    assert "raw must be at least 1, got 0" in refused(tmp_path / "new", source, "--raw", "0")
    assert not (tmp_path / "new").exists()
    assert content(source) == before


def test_the_command_packs(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    assert main(["data", "pack", str(source), str(tmp_path / "disk"), "--raw", "18", "--workers", "3"]) == 0
    said, errors = capsys.readouterr()
    assert said.startswith(f"{source} is packed into {tmp_path / 'disk'}; train with data.name=arrow data.root=")
    assert errors == "", "no bar where stderr is not a terminal"
    own = write_folder(tmp_path / "own", (6, 3))
    gone = next(own.rglob("*004.JPEG"))
    gone.unlink()
    gone.symlink_to(gone.with_name("nowhere"))
    assert main(["data", "pack", str(own), str(tmp_path / "new")]) == 5
    assert f"size of {gone}: No such file or directory; restore the file or remove it" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    program = """
import sys
from unikd_fast.cli import main
try:
    main(["data", "pack", "--help"])
except SystemExit:
    print("heavy:", sorted({"torch", "numpy", "PIL", "pyarrow", "datasets"} & set(sys.modules)))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "--raw SIDE" in said
    assert "heavy: []" in said
