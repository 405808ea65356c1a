"""Files that went bad, in both loaders of files: named in an error, or skipped and counted."""

import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import EpsImagePlugin, Image

from support.generated_images import write_jpegs
from support.loaders import build_loader
from support.odd_images import bomb, encoded, two_pictures
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.dali import dali_problem
from unikd_fast.data.loader import Loader
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits, ImageFiles
from unikd_fast.errors import DataError

SIZE, BAD = 16, 4
SIDES = ((20, 30), (33, 17), (25, 25))
LENIENT: dict[str, Any] = {"bad_images": "skip", "max_bad_share": 0.2}
needs_dali = pytest.mark.skipif(dali_problem() is not None, reason="DALI does not work here")
kinds = pytest.mark.parametrize("kind", ["torchvision", pytest.param("dali", marks=needs_dali)])


@pytest.fixture
def splits(tmp_path: Path) -> DataSplits:
    """Eleven images to train on, which are one batch, and seven to evaluate on."""
    return load_image_folder(write_jpegs(tmp_path / "set", {"train": 11, "val": 7}, sides=SIDES), SIZE)


def make(splits: DataSplits, kind: str, **changes: Any) -> Loader:
    shared = {"augmentation": Augmentation(eval_resize=SIZE), "seed": 0, "device": "cpu", "workers": 0}
    return build_loader(splits, kind=kind, global_batch_size=len(splits.train), **{**shared, **changes})  # type: ignore[arg-type]


def paths(split: object) -> list[Path]:
    assert isinstance(split, ImageFiles)
    return [Path(path) for path in split.paths]


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone.jpg"))


SPOIL: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (halve, "cannot decode {}: .*; repair the file or remove it"),
    "truncated of two": (
        lambda path: path.write_bytes(two_pictures()[: two_pictures().index(b"\xff\xd9") - 50] + bytes(5000)),
        "cannot decode {}: the MPO file is truncated: its ",
    ),
    "zero-byte": (lambda path: path.write_bytes(b""), "cannot decode {}: the file is empty; repair"),
    "text": (
        lambda path: path.write_bytes(b"<html>404</html>"),
        "cannot decode {}: not a JPEG, PNG, PPM, BMP, TIFF, WEBP or GIF file; its 16",
    ),
    "bomb": (
        lambda path: path.write_bytes(bomb()),
        "cannot decode {}: its header claims more pixels than the 89478485 that",
    ),
    "removed": (Path.unlink, "cannot read {}: No such file or directory; restore the file or remove it"),
    "folder": (make_folder, "cannot read {}: Is a directory; restore"),
    "dangling": (lead_nowhere, "cannot read {}: No such file or directory; restore"),
    "forbidden": (lambda path: path.chmod(0), "cannot read {}: Permission denied; restore"),
}
spoilt = pytest.mark.parametrize("how", SPOIL)


@pytest.fixture(autouse=True)
def _nobody_reads_what_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser does, so there the system's answer is given by us."""

    def open_allowed(path: str, mode: str) -> Any:
        if Path(path).is_file() and not Path(path).stat().st_mode & 0o777:
            raise PermissionError(13, os.strerror(13), path)
        return Path(path).open(mode)

    if os.geteuid() == 0:
        monkeypatch.setattr("unikd_fast.data.images.open", open_allowed, raising=False)


@kinds
@spoilt
def test_a_bad_file_ends_the_run_and_is_named(splits: DataSplits, kind: str, how: str) -> None:
    spoil, message = SPOIL[how]
    loader = make(splits, kind)
    for split, batches in ((splits.train, lambda: loader.train(0)), (splits.val, lambda: loader.evaluate("val"))):
        path = paths(split)[BAD]
        spoil(path)
        with pytest.raises(DataError, match=message.format(re.escape(str(path)))):
            list(batches())


@kinds
@spoilt
def test_a_bad_file_is_skipped_counted_and_told(
    splits: DataSplits, kind: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In training a good sample stands in for it, in evaluation it is left out."""
    spoil, _ = SPOIL[how]
    (whole,) = make(splits, kind).evaluate("val")
    path, path_of_val = paths(splits.train)[BAD], paths(splits.val)[BAD]
    spoil(path)
    spoil(path_of_val)
    loader = make(splits, kind, **LENIENT)
    (batch,) = loader.train(0)
    assert len(batch.labels) == 11
    assert set(batch.sample_ids.tolist()) == {*range(11)} - {BAD}
    assert [(image.name, image.sample_id) for image in loader.bad_samples] == [(str(path), BAD)]
    (batch,) = loader.evaluate("val")
    assert batch.sample_ids.tolist() == [i for i in range(7) if i != BAD]
    assert torch.equal(batch.images, whole.images[batch.sample_ids])
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 3
    for start, bad, text in zip(("training", "val"), (path, path_of_val), said, strict=False):
        assert text.startswith(f"{start}: skipped a sample: cannot ")
        assert str(bad) in text
    assert said[2] == "val: evaluated without 1 of 7 samples"


@kinds
def test_no_image_starts_ghostscript(
    splits: DataSplits, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EPS under the name of a JPEG; Pillow alone would have it drawn by `gs`."""
    program, trace = tmp_path / "programs" / "gs", tmp_path / "trace"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $0 $* >> {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked for once
    path = paths(splits.train)[BAD]
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=f"{path}: not a JPEG, PNG, PPM, BMP, TIFF, WEBP or GIF file; its 78 bytes"):
        list(make(splits, kind).train(0))
    assert not trace.exists()
    with suppress(OSError):
        Image.open(path).load()
    assert trace.exists()


@kinds
def test_more_bad_files_than_allowed_end_the_run(splits: DataSplits, kind: str) -> None:
    """Two of eleven are within a fifth, three are not."""
    for count, path in enumerate(paths(splits.train)[:3], 1):
        path.write_bytes(b"")
        loader = make(splits, kind, **LENIENT)
        if count < 3:
            list(loader.train(0))
            assert len(loader.bad_samples) == count
    with pytest.raises(DataError, match=r"training: 3 of 11 samples .* share of 0\.273, .* data\.max_bad_share allows"):
        list(loader.train(0))


@kinds
@pytest.mark.parametrize(
    "name",
    ["наука 科学.jpg", "n" * 251 + ".jpg", os.fsdecode(b"latin1-\xe9.jpg"), "new\nline.jpg"],
    ids=["scripts", "long", "no UTF-8", "line end"],  # a test's own name must be UTF-8
)
def test_names_may_be_anything(splits: DataSplits, kind: str, name: str) -> None:
    path = paths(splits.train)[BAD].with_name(name)
    path.write_bytes(encoded("JPEG"))
    named = load_image_folder(path.parents[2], SIZE)
    position = paths(named.train).index(path)
    (batch,) = make(named, kind).train(0)
    assert sorted(batch.sample_ids.tolist()) == list(range(12))
    path.write_bytes(b"")
    lenient = make(named, kind, **LENIENT)
    list(lenient.train(0))
    shown = str(path).encode("utf-8", "backslashreplace").decode()  # so that any stream can show it
    assert [(image.name, image.sample_id) for image in lenient.bad_samples] == [(shown, position)]


@kinds
def test_linked_folders_and_files_are_read(splits: DataSplits, kind: str, tmp_path: Path) -> None:
    """A class, a split and an image that lie elsewhere, under other names."""
    (expected,), (of_val,) = make(splits, kind).train(0), make(splits, kind).evaluate("val")
    root = tmp_path / "set"
    (root / "train" / "class_1").rename(tmp_path / "elsewhere")
    (root / "train" / "class_1").symlink_to(tmp_path / "elsewhere")
    (root / "val").rename(tmp_path / "held out")
    (root / "val").symlink_to("../held out")
    image = paths(splits.train)[0]
    image.rename(tmp_path / "image without an extension")
    image.symlink_to(tmp_path / "image without an extension")
    linked = load_image_folder(root, SIZE)
    assert paths(linked.train) == paths(splits.train)
    (batch,) = make(linked, kind).train(0)
    assert torch.equal(batch.images, expected.images)
    (batch,) = make(linked, kind).evaluate("val")
    assert torch.equal(batch.images, of_val.images)
